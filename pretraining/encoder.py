"""The network that is pretrained: a timm backbone and the projector the loss is computed behind."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from cluster.weights import Normalise


def build_projector(widths: list[int], last_norm: bool) -> nn.Sequential:
    """A perceptron over `widths` (input first), BatchNorm and ReLU after each layer but the last.

    The last layer has no bias; `last_norm` puts a BatchNorm behind it (SimCLR's projector; VICReg's expander
    has none). Widths [2048, 8192, 8192, 8192] are VICReg's (arXiv 2105.04906, 4.2), [2048, 2048, 128]
    SimCLR's.
    """
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(widths[:-1]):
        layers += [nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out), nn.ReLU(inplace=True)]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=False))
    if last_norm:
        layers.append(nn.BatchNorm1d(widths[-1]))
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """Backbone and projector over both views in one forward, so that DDP sees one forward a step.

    Args:
        normalise: from pixels to what the backbone takes, by the mean and std of the pool.
        joint: True puts both views through as one batch of 2N, as SimCLR does; False makes two passes, so
            that BatchNorm's statistics belong to one view, as VICReg does.
    """

    def __init__(self, normalise: Normalise, backbone: nn.Module, projector: nn.Module, joint: bool):
        super().__init__()
        self.normalise = normalise
        self.backbone = backbone
        self.projector = projector
        self.joint = joint

    def forward(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor]:
        """view1, view2 uint8 [n, 3, S, S] -> z1, z2 [n, D]."""
        if self.joint:
            z1, z2 = self.embed(torch.cat([view1, view2])).chunk(2)
            return z1, z2
        return self.embed(view1), self.embed(view2)

    def embed(self, views: Tensor) -> Tensor:
        """uint8 [n, 3, S, S] -> [n, D]."""
        return self.projector(self.backbone(self.normalise(views)))
