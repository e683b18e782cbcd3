"""NT-Xent, the loss of SimCLR (Chen et al. 2020, arXiv 2002.05709)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.1) -> tuple[Tensor, dict[str, Tensor]]:
    """Normalised temperature-scaled cross entropy, equation (1) of the paper, mean over all 2N anchors.

    Row i of `z1` and row i of `z2` are two views of one window; the other 2N - 2 rows of the batch are its
    negatives. The loss needs the global batch: gather the rows of all ranks first.

    Args:
        z1, z2: projections, each [N, D], any float type; N >= 2.
        temperature: tau of the paper, in units of cosine similarity.

    Returns:
        The scalar loss in float32, and for the journal `accuracy`: the share of anchors whose most similar
        row is the other view of the same window. If all rows are equal, the loss is log(2N - 1).

    Raises:
        ValueError: the shapes differ or are not [N, D], or N < 2, which leaves no negative.
    """
    if z1.shape != z2.shape or z1.ndim != 2 or len(z1) < 2:
        raise ValueError(f"NT-Xent needs two [N, D] tensors with N >= 2, not {[*z1.shape]} and {[*z2.shape]}")
    with torch.autocast(z1.device.type, enabled=False):
        z = F.normalize(torch.cat([z1, z2]).float(), dim=1)  # [2N, D]
        similarity = z @ z.T / temperature  # [2N, 2N]
        similarity.fill_diagonal_(float("-inf"))  # an anchor is not its own negative
        n = len(z1)
        positive = torch.arange(2 * n, device=z.device).roll(n)  # i <-> i + N
        loss = F.cross_entropy(similarity, positive)
        accuracy = (similarity.detach().argmax(dim=1) == positive).float().mean()
    return loss, {"accuracy": accuracy}
