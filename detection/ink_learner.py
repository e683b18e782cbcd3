"""What is pretrained on ink: a detector without its last layers, by the boxes around the ink of a pool.

The features of a box, through backbone, pyramid, RoIAlign and box head, agree between views and scales
(SoCo, arXiv 2106.02637; AlignDet, arXiv 2307.11077, section 3.3), and the RPN learns to propose the boxes
(ADePT, arXiv 2211.09022).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cluster.distributed import all_gather
from cluster.journal import Journal
from cluster.training import GuardedStep
from detection.contrast import box_contrast
from detection.model import Detector

EMBEDDING = 128  # numbers of a box's embedding


class InkLearner(nn.Module):
    """A detector and the projector of its box features. The box predictor takes no part and is frozen."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector
        detector.roi_heads.box_predictor.requires_grad_(False)
        width = detector.roi_heads.box_predictor.cls_score.in_features
        self.projector = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, EMBEDDING)
        )

    def forward(
        self, large: Tensor, small: Tensor, boxes: Tensor, truth: list[Tensor], seeds: list[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Embeddings [B K, 3, EMBEDDING] of the boxes, and the two losses of the RPN by name.

        The arguments are those of `Views` for B windows.
        """
        windows, count = boxes.shape[0], boxes.shape[2]
        pairs = large.flatten(0, 1)  # [2 B, C, S, S], the views of a window beside each other
        images, features = self._features(pairs)
        z = self._embed(images, features, list(boxes[:, :2].flatten(0, 1))).view(windows, 2, count, -1)
        small_images, small_features = self._features(small)
        z_small = self._embed(small_images, small_features, list(boxes[:, 2])).view(windows, 1, count, -1)
        self.detector.rpn.fg_bg_sampler.seeds = seeds
        _, losses = self.detector.rpn(images, features, [{"boxes": b} for b in truth])
        return torch.cat([z, z_small], 1).transpose(1, 2).flatten(0, 1), losses

    def _features(self, images: Tensor) -> tuple[Any, dict[str, Tensor]]:
        batch, _ = self.detector.transform(images)
        return batch, self.detector.backbone(batch.tensors)

    def _embed(self, images: Any, features: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        heads = self.detector.roi_heads
        pooled = heads.box_roi_pool(features, boxes, images.image_sizes)
        return self.projector(heads.box_head(pooled))


def train(
    learner: nn.Module,
    guarded: GuardedStep,
    batches: Iterable[tuple[int, Any]],
    journal: Journal,
    boundary: Callable[[int], object],
    temperature: float,
    weights: tuple[float, float],
) -> None:
    """Take one optimizer step for each (step, batch of `collate`).

    temperature: see `box_contrast`, whose loss is over the boxes of all ranks. weights: of that loss and of
    the RPN's. boundary: called after each step with the number of steps done.
    """
    for step, (large, small, boxes, known, truth, seeds) in batches:
        with guarded.forward():
            z, losses = learner(large, small, boxes, truth, seeds)
        known = all_gather(known.flatten().float()) > 0
        z = all_gather(z.float())
        losses = {"contrast": box_contrast(z, known, temperature), **losses}
        loss = weights[0] * losses["contrast"]
        loss = loss + weights[1] * (losses["loss_objectness"] + losses["loss_rpn_box_reg"])
        norm = guarded.take(step, loss)
        if journal.main and journal.due(step):
            terms = {name: value.detach() for name, value in losses.items()}
            figures = {"accuracy": agreement(z.detach(), known)}
            journal.log(step, loss=loss.detach(), **terms, **figures, lr=guarded.lr(step), grad_norm=norm)
        boundary(step + 1)


def agreement(z: Tensor, known: Tensor) -> Tensor:
    """The share of boxes whose first view is nearest to the second view of the same box, [].

    z: [M, 3, D]. known: bool [M].
    """
    z = nn.functional.normalize(z[known], dim=2)
    nearest = (z[:, 0] @ z[:, 1].T).argmax(1) if len(z) else torch.empty(0, dtype=torch.int64)
    return (nearest == torch.arange(len(z), device=nearest.device)).float().mean()
