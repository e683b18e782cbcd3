"""The loss that makes the features of one box agree between views: what the box head is pretrained with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def box_contrast(z: Tensor, known: Tensor, temperature: float) -> Tensor:
    """The mean over boxes and views of -log p(the same box in another view | all other boxes and views), [].

    z: float32 [M, V, D], embeddings of M boxes in V views. known: bool [M]; where it is False there is no
    box, and the embedding counts for nothing. temperature: of the cosine similarities. It is the loss of
    arXiv 2004.11362, equation 2, in which the views of a box are a class of their own: with two views
    NT-Xent. Without two known boxes it is 0.
    """
    boxes, views, _ = z.shape
    flat = functional.normalize(z.float(), dim=2).reshape(boxes * views, -1)
    similar = flat @ flat.T / temperature  # [M V, M V]
    there = known.repeat_interleave(views)
    itself = torch.eye(boxes * views, dtype=torch.bool, device=z.device)
    similar = similar.masked_fill(itself | ~there, -torch.inf)
    box = torch.arange(boxes, device=z.device).repeat_interleave(views)
    same = (box[:, None] == box[None]) & ~itself & there[:, None] & there[None]
    if int(known.sum()) < 2:
        return 0 * flat.sum()
    # Rows of unknown boxes have finite entries too, since two boxes are known; none of them is among `same`.
    log_p = similar - torch.logsumexp(similar, 1, keepdim=True)
    return -log_p[same].mean()
