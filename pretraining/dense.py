"""The dense term of pretraining: local features of two views that show the same place agree.

It is that of DenseCL (arXiv 2011.09157), PixPro (2011.10043) and VICRegL (2210.01571), but the correspondence
is known exactly: both views come from one window by known crops, turns and mirrors.

Shapes: n is a rank's share of the global batch N, C the channels of a feature map of h x h cells, K = G x G
the places that are looked at in a view, D the width of a local vector.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cluster.errors import UserError

MOST = 7  # places a side, the 49 of DenseCL's and VICRegL's maps; a finer map is read at that many
WIDTHS = (256, 128)  # of the projector's layers

Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]
DenseLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


class DenseHead(nn.Module):
    """Reads a feature map of each view at the same places of the sheet, and projects what is there.

    stage: which of the maps that the backbone's `forward_intermediates` gives. cells: its cells a side.
    projector: of one place, so a stack of 1 x 1 convolutions.
    """

    def __init__(self, stage: int, cells: int, projector: nn.Module) -> None:
        super().__init__()
        self.stage, self.cells, self.projector = stage, cells, projector
        self.side = min(cells, MOST)  # of the places

    def forward(self, map1: Tensor, map2: Tensor, across: Tensor) -> tuple[Tensor, Tensor]:
        """map1, map2 [n, C, h, h], across [n, 2, 3] -> local vectors a, b [n, K, D].

        a[i, k] and b[i, k] are of the same place of the sheet, as far as view 2 shows it: see `shown`.
        """
        points = grid(self.side, across)
        a, b = read(map1, points[None]), read(map2, carried(points, across))
        # As rows of one batch, BatchNorm's statistics are those of both views.
        both = self.projector(torch.cat([a, b]).flatten(0, 1))
        return both.view(2, *a.shape[:2], -1).unbind()


def grid(side: int, like: Tensor) -> Tensor:
    """The middles (u, v) of side x side equal parts of a view, row by row: [K, 2] from -1 to 1."""
    line = (2 * torch.arange(side, dtype=torch.float32, device=like.device) + 1) / side - 1
    return torch.cartesian_prod(line, line).flip(1)


def carried(points: Tensor, across: Tensor) -> Tensor:
    """Where view 2 shows the points [K, 2] of view 1, by `schematics.places.across` [n, 2, 3]: [n, K, 2]."""
    with torch.autocast(points.device.type, enabled=False):
        return points @ across[:, :, :2].mT + across[:, None, :, 2]


def shown(across: Tensor, side: int) -> Tensor:
    """Bool [n, K]: whether view 2 shows a place of view 1."""
    return (carried(grid(side, across), across).abs() <= 1).all(dim=2)


def read(maps: Tensor, points: Tensor) -> Tensor:
    """Maps [n, C, h, h] at points [n or 1, K, 2], linear between the middles of cells: float32 [n, K, C].

    It is a product with a matrix of weights, since torch's `grid_sample` has no deterministic backward pass
    on a GPU. Beyond the outermost middles a map is what it is there.
    """
    with torch.autocast(maps.device.type, enabled=False):
        side = maps.shape[-1]
        cells = ((points + 1) * (side / 2) - 0.5).clamp(0, side - 1)
        apart = cells[..., None] - torch.arange(side, dtype=cells.dtype, device=cells.device)
        x, y = (1 - apart.abs()).clamp(min=0).unbind(dim=2)  # [n or 1, K, h] each
        weights = (y[..., :, None] * x[..., None, :]).flatten(2)  # [n or 1, K, h * h]
        return weights @ maps.float().flatten(2).mT


def with_dense(loss: Loss, dense: DenseLoss, weight: float) -> Loss:
    """The loss of z1, z2 [N, D] plus `weight` times the dense one of a, b [N, K, D'] and across [N, 2, 3].

    dense: takes a, b and, as bool [N, K], which of their vectors are of a place that both views show.
    """

    def both(
        z1: Tensor, z2: Tensor, a: Tensor, b: Tensor, across: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        value, terms = loss(z1, z2)
        seen = shown(across, math.isqrt(a.shape[1]))
        term = dense(a, b, seen)
        return value + weight * term, {**terms, "dense": term.detach(), "dense_seen": seen.float().mean()}

    return both


@torch.no_grad()
def choose_map(backbone: Any, arch: str, size: int, stride: int) -> tuple[int, int, int]:
    """Number, channels and side of the deepest feature map whose cells are at most `stride` px apart.

    size: of a view in px. Raises UserError if the backbone gives no maps, none so fine, or one of a cell.
    """
    if not hasattr(backbone, "forward_intermediates"):
        raise UserError(
            f"--dense-weight: timm's {arch} hands out no feature maps; take a ResNet, or leave it out"
        )
    backbone.eval()
    maps = backbone.forward_intermediates(torch.zeros(1, 3, size, size), intermediates_only=True)
    backbone.train()
    fine = [k for k, found in enumerate(maps) if size / found.shape[-1] <= stride]
    if not fine or maps[fine[-1]].shape[-1] < 2:
        told = f"--dense-stride {stride}: no map of {arch} has 2 x 2 such cells or more in views of {size} px"
        raise UserError(f"{told}; give another, or a larger --image-size")
    return fine[-1], maps[fine[-1]].shape[1], maps[fine[-1]].shape[-1]


def describe_dense(head: DenseHead, weight: float) -> str:
    """The dense term as a line for the log."""
    told = f"on map {head.stage} of the backbone, {head.cells} x {head.cells} cells"
    return f"dense term: weight {weight:g}, at {head.side} x {head.side} places of a view, {told}"
