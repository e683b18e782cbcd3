"""The loss of VICReg (Bardes, Ponce, LeCun 2022, arXiv 2105.04906)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def variance(z: Tensor, eps: float = 1e-4) -> Tensor:
    """Hinge loss that pushes the std of every dimension to 1 or above, equation (1): z [N, D] -> []."""
    return F.relu(1 - torch.sqrt(z.var(dim=0) + eps)).mean()


def covariance(z: Tensor) -> Tensor:
    """Sum of the squared off-diagonal covariances over D, equations (3) and (4): z [N, D] -> [].

    With fewer samples than dimensions the Gram matrix replaces the covariance matrix: ||Z'Z||_F = ||ZZ'||_F,
    so the D x D product (8192 x 8192 by default) is never computed, and the work falls from N D^2 to N^2 D.
    """
    n, d = z.shape
    z = z - z.mean(dim=0)
    product = z @ z.T if n < d else z.T @ z
    diagonal = z.square().sum(dim=0)  # [D], the variances times N - 1
    return (product.square().sum() - diagonal.square().sum()) / ((n - 1) ** 2 * d)


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
        std = (variance(z1) + variance(z2)) / 2
        cov = covariance(z1) + covariance(z2)
        loss = sim_coeff * invariance + std_coeff * std + cov_coeff * cov
    return loss, {"invariance": invariance.detach(), "variance": std.detach(), "covariance": cov.detach()}
