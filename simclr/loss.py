"""NT-Xent, the loss of SimCLR (Chen et al. 2020, arXiv 2002.05709)."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cluster.tensor_cores import tensor_cores

# Rows and columns of the similarities that exist at one time: 1 MB, which a core's cache holds. A GPU wants
# few large products instead (268 MB).
TILE = {"cpu": 512}
TILE_ELSEWHERE = 8192


def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.1) -> tuple[Tensor, dict[str, Tensor]]:
    """Normalised temperature-scaled cross entropy, equation (1) of the paper, mean over all 2N anchors.

    Row i of `z1` and row i of `z2` are two views of one window; the other 2N - 2 rows of the batch are its
    negatives. The loss needs the global batch: gather the rows of all ranks first. The [2N, 2N] similarities
    are computed tile by tile, and once more in the backward pass, so memory grows with N alone. On a GPU the
    products are in TF32, which changes the loss by less than 1e-4 of it.

    Args:
        z1, z2: projections, each [N, D], any float type; N >= 2.
        temperature: tau of the paper, in units of cosine similarity.

    Returns:
        The scalar loss in float32, and no terms for the journal. If all rows are equal, the loss is
        log(2N - 1).

    Raises:
        ValueError: the shapes differ or are not [N, D], or N < 2, which leaves no negative.
    """
    if z1.shape != z2.shape or z1.ndim != 2 or len(z1) < 2:
        raise ValueError(f"NT-Xent needs two [N, D] tensors with N >= 2, not {[*z1.shape]} and {[*z2.shape]}")
    with torch.autocast(z1.device.type, enabled=False):
        z = F.normalize(torch.cat([z1, z2]).float(), dim=1)  # [2N, D]
        return _CrossEntropy.apply(z, temperature), {}


def dense_nt_xent(a: Tensor, b: Tensor, seen: Tensor, temperature: float = 0.1) -> Tensor:
    """The loss of local vectors, equation (2) of DenseCL (arXiv 2011.09157), mean over views and places.

    Row k of window i of `a` and of `b` is the same place in its two views. As in DenseCL the negatives of a
    place are the other windows, each by the mean of its vectors in the other view. Other places of the same
    window are none: symbols repeat on a drawing, and blank paper is blank everywhere. The loss needs the
    global batch: gather the rows of all ranks first. Memory grows with N^2 K.

    Args:
        a, b: local projections, each [N, K, D], any float type.
        seen: bool [N, K], the places that both views show; the others count for nothing.
        temperature: tau, in units of cosine similarity.

    Returns:
        The scalar loss in float32; 0 if no place is seen. If all vectors are equal and each window has a
        place that is seen, it is log(N).
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b = F.normalize(a.float(), dim=2), F.normalize(b.float(), dim=2)
        positive = (a * b).sum(dim=2) / temperature  # [N, K]
        itself = torch.eye(len(a), dtype=torch.bool, device=a.device)
        no_negative = (itself | ~seen.any(dim=1))[:, None]  # [N, 1, N]
        lse = []
        for anchors, others in ((a, b), (b, a)):
            windows = F.normalize((others * seen[..., None]).sum(dim=1), dim=1)  # [N, D]
            negatives = (anchors @ windows.T / temperature).masked_fill(no_negative, float("-inf"))
            lse.append(torch.cat([positive[..., None], negatives], dim=2).logsumexp(dim=2))  # [N, K]
        loss = (lse[0] + lse[1]) / 2 - positive
        return (loss * seen).sum() / seen.sum().clamp(min=1)


class _CrossEntropy(torch.autograd.Function):
    """The mean over anchors i of logsumexp_j(s_ij) - s_ip, for rows of length 1: z [2N, D] -> [].

    s_ij is the similarity by the temperature, j any row but i, p the other view of i. The similarities are
    symmetric, so each tile above the diagonal serves its rows and its columns. Their gradient is
    (exp(s_ij - lse_i) + exp(s_ij - lse_j)) z_j, summed over j, less 2 z_p.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, temperature: float) -> Tensor:
        scaled, n = z / temperature, len(z) // 2
        # In float64 these few sums cost nothing, and a loss near 0 keeps its digits.
        lse = torch.full_like(z[:, 0], float("-inf"), dtype=torch.float64)  # of the columns seen so far
        positives = lse.new_zeros(())
        for rows, columns, tile in _tiles(scaled, z):
            positives += tile.diagonal(rows.start + n - columns.start).sum(dtype=torch.float64)
            work = torch.empty_like(tile)
            for dim, anchors in ((1, rows), (0, columns)):
                top = tile.amax(dim, keepdim=True)
                total = torch.sub(tile, top, out=work).exp_().sum(dim, dtype=torch.float64)
                lse[anchors] = torch.logaddexp(lse[anchors], total.log_() + top.squeeze(dim))
                if rows == columns:
                    break
        ctx.save_for_backward(z, lse.to(z.dtype))
        ctx.temperature = temperature
        return (lse.mean() - positives / n).to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        z, lse = ctx.saved_tensors
        with torch.autocast(z.device.type, enabled=False):
            grad = -2 * z.roll(len(z) // 2, 0)
            for rows, columns, tile in _tiles(z / ctx.temperature, z):
                weight = torch.sub(tile, lse[rows, None]).exp_()
                weight += tile.sub_(lse[columns]).exp_()
                with tensor_cores(z.device):
                    grad[rows].addmm_(weight, z[columns])
                    if rows != columns:
                        grad[columns].addmm_(weight.T, z[rows])
            return grad.mul_(grads[0] / (len(z) * ctx.temperature)), None


def _tiles(scaled: Tensor, z: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, columns and values of each tile of scaled @ z.T on and above the diagonal, which is -inf.

    An anchor is not its own negative. A tile may be overwritten; it is valid until the next one.
    """
    side = TILE.get(z.device.type, TILE_ELSEWHERE)
    starts = range(0, len(z), side)
    for top in starts:
        rows = slice(top, min(top + side, len(z)))
        for left in starts[top // side :]:
            columns = slice(left, min(left + side, len(z)))
            with tensor_cores(z.device):
                tile = scaled[rows] @ z[columns].T
            if rows == columns:
                tile.fill_diagonal_(float("-inf"))
            yield rows, columns, tile
