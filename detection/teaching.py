"""The teacher of a run: it labels unlabelled windows, keeps its thresholds, and is measured and judged.

Published: Unbiased Teacher (arXiv 2102.09480), Soft Teacher (2106.09018), Consistent-Teacher (2209.01589).
What was taken from which is said in docs/detection.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from cluster import distributed
from cluster.config import setting
from cluster.facts import check_facts
from detection.data import KEEP
from detection.model import Detector
from detection.teacher import (
    BINS,
    FORGET,
    STABLE,
    Candidates,
    Pseudo,
    agreement,
    candidates,
    count_scores,
    jittered,
    spread,
    taught,
    thresholds,
)

# Of a class: pseudo-labels, those on sheets with labels, the right ones of these, and true boxes there.
TALLIED = ("given", "measured", "right", "true")


@dataclass(frozen=True)
class TeacherFacts:
    """What a checkpoint says of a teacher beside its tensors."""

    burn_in: int = setting(least=1, most=2**63 - 1)
    windows: int = setting(least=0, most=2**63 - 1)
    burnt: float = setting(least=-2, most=1)


class Teaching:
    """Teaches a student what the teacher sees, and remembers the distribution of its scores.

    teacher: the averaged detector, in eval mode. weight: of the losses on its labels. burn_in: steps before
    it begins. Its state is the same on every rank, and a function of the global batches.
    """

    def __init__(self, teacher: Detector, weight: float, burn_in: int) -> None:
        self.teacher, self.weight, self.burn_in = teacher, weight, burn_in
        classes = len(teacher.spec.categories)
        self.scores = torch.zeros(classes, BINS, dtype=torch.float64)  # decayed counts
        self.tally = torch.zeros(classes, len(TALLIED), dtype=torch.int64)  # since the last validation
        self.windows = 0  # likewise
        self.burnt = -2.0  # validation AP at the end of the burn-in

    def losses(
        self,
        student: nn.Module,
        images: Tensor,
        targets: list[dict[str, Tensor]],
        seeds: Sequence[int],
        pool: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        """The student's losses by name, on labelled windows and on those of the pool by the teacher's labels.

        pool: a batch of `UnlabelledWindows`. Call it on every rank.
        """
        found, told = self.label(pool["weak"], pool["jitter"], pool["matrix"])
        self._remember(found, pool["truth"])
        both = torch.cat([images, pool["strong"]])
        losses = student(both, targets, [*seeds, *pool["seed"]], told)
        return {
            name: self.weight * loss if name.startswith("teacher_") else loss for name, loss in losses.items()
        }

    @torch.no_grad()
    def label(self, windows: Tensor, jitter: Tensor, matrix: Tensor) -> tuple[list[Candidates], list[Pseudo]]:
        """The teacher's candidates on each of B windows, and what a student is told of them.

        windows: uint8 [B, 3, S, S]. jitter: [B, J, 4], see `jittered`. matrix: [B, 2, 3], from a window's
        pixels to those that the student sees.
        """
        least = self.thresholds.to(windows.device)
        found, stable = find(self.teacher, windows, jitter, least)
        return found, [
            taught(each, least, exact, change, windows.shape[-1], KEEP)
            for each, exact, change in zip(found, stable, matrix, strict=True)
        ]

    @property
    def thresholds(self) -> Tensor:
        """For each class the score from which a box is believed, float32 [K]."""
        return thresholds(self.scores).float()

    def _remember(self, found: Sequence[Candidates], truth: Sequence[dict[str, Tensor] | None]) -> None:
        """Count the scores of a batch, and the boxes that are believed and right, over all ranks."""
        classes, least = len(self.scores), self.thresholds
        scores = torch.zeros(classes, BINS, dtype=torch.int64)
        tally = torch.zeros_like(self.tally)
        for each, true in zip(found, truth, strict=True):
            each = Candidates(each.boxes.cpu(), each.scores.cpu(), each.soft.cpu())
            scores += count_scores(each)
            sure = each.scores >= least[each.labels]
            boxes, labels = each.boxes[sure], each.labels[sure]
            tally[:, 0] += torch.bincount(labels, minlength=classes)
            if true is not None:
                true_labels = true["labels"].cpu()
                right = agreement(boxes, labels, true["boxes"].cpu(), true_labels)
                for column, of in enumerate((labels, labels[right], true_labels), start=1):
                    tally[:, column] += torch.bincount(of, minlength=classes)
        counts = torch.cat([scores, tally], 1)[None]
        gathered = distributed.all_gather(counts.to(self.teacher.device)).cpu()
        counts = gathered.sum(0)
        self.scores = FORGET * self.scores + counts[:, :BINS]
        self.tally += counts[:, BINS:]
        self.windows += len(found) * len(gathered)

    def figures(self) -> dict[str, float]:
        """Since the last validation: pseudo-labels a window; precision and recall where these are known."""
        given, measured, right, true = self.tally.sum(0).tolist()
        told = {"pseudo_labels": given / max(1, self.windows)}
        if true:
            told |= {"pseudo_precision": right / max(1, measured), "pseudo_recall": right / true}
        return told

    def figures_by_class(self) -> dict[str, float]:
        """The same for each class that occurred, and each class's threshold."""
        told = {}
        for (_, name), row, least in zip(
            self.teacher.spec.categories, self.tally.tolist(), self.thresholds.tolist(), strict=True
        ):
            given, measured, right, true = row
            told[f"pseudo_threshold/{name}"] = least
            told[f"pseudo_labels/{name}"] = given / max(1, self.windows)
            if measured:
                told[f"pseudo_precision/{name}"] = right / measured
            if true:
                told[f"pseudo_recall/{name}"] = right / true
        return told

    def begin_tally(self) -> None:
        """Count from here on, as after each validation."""
        self.tally, self.windows = torch.zeros_like(self.tally), 0

    def verdict(self, best: Mapping[str, float]) -> str:
        """One line: whether the run came out better than its burn-in. best: AP and step of model.pt."""
        if self.burnt < -1:
            return f"the run ended within its burn-in of {self.burn_in} steps: nothing was taught"
        told = f"valid AP {self.burnt:.3f} at the end of the burn-in (step {self.burn_in}), "
        if best["step"] > self.burn_in:
            return f"{told}{best['AP']:.3f} with the teacher's labels (step {best['step']:.0f}), in model.pt"
        return (
            f"{told}never more with the teacher's labels: model.pt is the detector of step {best['step']:.0f}"
        )

    def state(self) -> dict[str, Any]:
        facts = {name: getattr(self, name) for name in ("burn_in", "windows", "burnt")}
        return {"scores": self.scores, "tally": self.tally, **facts}

    def restore(self, state: Mapping[str, Any], source: str, cure: str) -> None:
        """Take the state of a checkpoint; raises UserError for facts that no finetuning writes."""
        facts = check_facts(TeacherFacts, state, source, cure)
        vars(self).update(facts, scores=state["scores"], tally=state["tally"])


def find(
    teacher: Detector, windows: Tensor, jitter: Tensor, least: Tensor
) -> tuple[list[Candidates], list[Tensor]]:
    """The candidates on each of B windows, and for each bool [N], whether the teacher is sure of its box.

    Only boxes with a score of `least` [K] of their class are asked for again, see `spread`.
    """
    batch, _ = teacher.transform(windows)
    maps = teacher.backbone(batch.tensors)
    proposals, _ = teacher.rpn(batch, maps)
    spec = teacher.spec
    found = [
        candidates(*of, teacher.roi_heads.nms_thresh, spec.detections)
        for of in zip(*_refined(teacher, batch, maps, proposals), strict=True)
    ]
    asked = [each.scores >= least[each.labels] for each in found]
    copies = [
        jittered(each.boxes[sure], offsets).flatten(0, 1)
        for each, sure, offsets in zip(found, asked, jitter, strict=True)
    ]
    stable = [sure.clone() for sure in asked]
    if any(map(len, copies)):
        again = _refined(teacher, batch, maps, copies)[1]
        for exact, sure, boxes in zip(stable, asked, again, strict=True):
            exact[sure] = spread(boxes.view(jitter.shape[1], -1, 4)) <= STABLE
    return found, stable


def _refined(
    teacher: Detector, batch: ImageList, maps: dict[str, Tensor], regions: list[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What the head makes of regions [P, 4] of each window: logits [P, 1 + K], and boxes [P, 4] inside it."""
    heads, counts = teacher.roi_heads, [len(of) for of in regions]
    logits, offsets = heads.box_predictor(
        heads.box_head(heads.box_roi_pool(maps, regions, batch.image_sizes))
    )
    boxes = heads.box_coder.decode(offsets[:, :4], regions)[:, 0].clamp(0, batch.image_sizes[0][0])
    return logits.split(counts), boxes.split(counts)
