"""The loss of VICReg (Bardes, Ponce, LeCun 2022, arXiv 2105.04906)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cluster.tensor_cores import tensor_cores

BLOCK = 1024  # columns or rows of z of which a centred copy exists at one time
ROWS = 512  # of the symmetric product that are computed at a time, from the diagonal on


def hinge(variance: Tensor, eps: float = 1e-4) -> Tensor:
    """Pushes the std of every dimension to 1 or above, equation (1): variance [D] -> []."""
    return F.relu(1 - torch.sqrt(variance + eps)).mean()


def moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """The variance of every dimension, and the covariance term, equations (3) and (4): z [N, D] -> [D], [].

    The term is the sum of the squared off-diagonal covariances over D. With fewer samples than dimensions the
    Gram matrix replaces the covariance matrix: ||Z'Z||_F = ||ZZ'||_F, so the D x D product (8192 x 8192 by
    default) is never computed, and the work falls from N D^2 to N^2 D. On a GPU the products are in TF32,
    which changes the term by less than 1e-4 of it.
    """
    return _Moments.apply(z)


def vicreg_loss(
    z1: Tensor, z2: Tensor, sim_coeff: float = 25.0, std_coeff: float = 25.0, cov_coeff: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """lambda * invariance + mu * variance + nu * covariance, equation (6), weights of section 4.2.

    As in Algorithm 1 and the authors' runs, the invariance is a mean over N and D (equation 5 sums over D),
    the variance is averaged over the two views and the covariance is summed over them.
    The loss needs the global batch: gather the rows of all ranks first.

    Args:
        z1, z2: embeddings, each [N, D], any float type; N >= 2.
        sim_coeff, std_coeff, cov_coeff: lambda, mu and nu.

    Returns:
        The scalar loss in float32, and its three unweighted terms for the journal.

    Raises:
        ValueError: the shapes differ or are not [N, D], or N < 2, which leaves no variance.
    """
    if z1.shape != z2.shape or z1.ndim != 2 or len(z1) < 2:
        raise ValueError(f"VICReg needs two [N, D] tensors with N >= 2, not {[*z1.shape]} and {[*z2.shape]}")
    with torch.autocast(z1.device.type, enabled=False):  # squares of half-precision sums overflow
        z1, z2 = z1.float(), z2.float()
        invariance = F.mse_loss(z1, z2)
        (variance1, cov1), (variance2, cov2) = moments(z1), moments(z2)
        std = (hinge(variance1) + hinge(variance2)) / 2
        cov = cov1 + cov2
        loss = sim_coeff * invariance + std_coeff * std + cov_coeff * cov
    return loss, {"invariance": invariance.detach(), "variance": std.detach(), "covariance": cov.detach()}


def dense_vicreg(
    a: Tensor,
    b: Tensor,
    seen: Tensor,
    sim_coeff: float = 25.0,
    std_coeff: float = 25.0,
    cov_coeff: float = 1.0,
) -> Tensor:
    """VICReg of matched local vectors, the location-based loss of VICRegL (arXiv 2210.01571, section 3.2).

    VICRegL takes variance and covariance over the batch, for each place of a map by itself. Here they are
    over all places that are seen, whose number varies from window to window. The loss needs the global batch:
    gather the rows of all ranks first.

    Args:
        a, b: local embeddings, each [N, K, D], any float type; row k of window i is the same place in both.
        seen: bool [N, K], the places that both views show; the others count for nothing.
        sim_coeff, std_coeff, cov_coeff: as in `vicreg_loss`.

    Returns:
        The scalar loss in float32; 0 if fewer than two places are seen, which leaves no variance.
    """
    a, b = a[seen].float(), b[seen].float()  # [M, D]
    if len(a) < 2:
        return 0 * (a.sum() + b.sum())
    return vicreg_loss(a, b, sim_coeff, std_coeff, cov_coeff)[0]


class _Moments(torch.autograd.Function):
    """`moments`, block by block of the longer side of z, so that no second copy of z is made.

    The product P is ZZ' or Z'Z of the centred Z, whichever is smaller. The gradient of ||P||^2 is 4 PZ or
    4 ZP: one product where autograd would compute two, as it does not know that P is symmetric.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        n, d = z.shape
        mean, diagonal = z.mean(dim=0), torch.zeros_like(z[0])
        product = z.new_zeros(min(n, d), min(n, d))
        for block in _blocks(max(n, d), BLOCK):
            centred = _centred(z, mean, block)
            if n < d:
                diagonal[block] = centred.square().sum(dim=0)
            _add_square(product, centred if n < d else centred.T)
        for rows in _blocks(len(product), ROWS):
            product[rows.stop :, rows] = product[rows, rows.stop :].T
        if n >= d:
            diagonal.copy_(product.diagonal())  # [D], the variances times N - 1
        ctx.save_for_backward(z, mean, diagonal, product)
        off = product.square().sum() - diagonal.square().sum()
        return diagonal / (n - 1), off / ((n - 1) ** 2 * d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        z, mean, diagonal, product = ctx.saved_tensors
        n, d = z.shape
        scale = 4 * grads[1] / ((n - 1) ** 2 * d)
        own = 2 * grads[0] / (n - 1) - scale * diagonal  # what a centred value itself contributes
        grad = torch.empty_like(z)
        with torch.autocast(z.device.type, enabled=False), tensor_cores(z.device):
            product = product * scale
            for block in _blocks(max(n, d), BLOCK):
                centred = _centred(z, mean, block)
                if n < d:
                    grad[:, block] = torch.addcmul(product @ centred, centred, own[block])
                else:
                    grad[block] = torch.addcmul(centred @ product, centred, own)
        return grad


def _blocks(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]


def _centred(z: Tensor, mean: Tensor, block: slice) -> Tensor:
    """Columns of z less their mean, or rows of it: [N, block] if N < D, else [block, D]."""
    return z[:, block] - mean[block] if len(z) < z.shape[1] else z[block] - mean


def _add_square(product: Tensor, a: Tensor) -> None:
    """Add a a' to the product [A, A], on and above its diagonal at least: a [A, B]."""
    for rows in _blocks(len(a), ROWS):
        with tensor_cores(a.device):
            product[rows, rows.start :].addmm_(a[rows], a[rows.start :].T)
