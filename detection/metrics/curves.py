"""Precision, recall and F1 by class at IoU 0.5, and the score from which a detection should count."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from detection.metrics.accumulate import accumulate
from detection.metrics.matching import Matches

NO_EVIDENCE = 0.5  # the threshold of every class where no detection of any class is right


@dataclass(frozen=True)
class Curves:
    """What a chart draws; NaN for classes without truth."""

    recalls: np.ndarray  # float64 [R]
    precision: np.ndarray  # float64 [K, R], the best at this recall or beyond; its mean is the class's AP50
    thresholds: np.ndarray  # float64 [S]: 0, 0.01, ..., 1
    f1: np.ndarray  # float64 [K, S]


@dataclass(frozen=True)
class Operating:
    """What comes out at the thresholds, by class [K]; a ratio is NaN for 0/0."""

    right: np.ndarray  # int64
    found: np.ndarray  # int64
    boxes: np.ndarray  # int64

    @property
    def precision(self) -> np.ndarray:
        return _divide(self.right, self.found)

    @property
    def recall(self) -> np.ndarray:
        return _divide(self.right, self.boxes)

    @property
    def f1(self) -> np.ndarray:
        return _divide(2 * self.right, self.found + self.boxes)


def curves(matches: Matches) -> Curves:
    """Precision over recall and F1 over the score threshold, at IoU 0.5."""
    precision = accumulate(matches)[0][0].T
    thresholds = np.arange(101) / 100
    boxes = matches.positives.sum(0)
    f1 = np.full((len(boxes), len(thresholds)), np.nan)
    for label in np.flatnonzero(boxes).tolist():
        score, right = _falling(matches, label)
        counted = np.searchsorted(-score, -thresholds, side="right")
        f1[label] = 2 * np.append(0, right.cumsum())[counted] / (counted + boxes[label])
    return Curves(matches.recalls, np.where(precision < 0, np.nan, precision), thresholds, f1)


def best_thresholds(matches: Matches, sheets: np.ndarray | None = None) -> np.ndarray:
    """float64 [K]: for each class the score from which its F1 at IoU 0.5 is highest.

    sheets: bool [I], those to judge by; None for all.

    The threshold lies half way to the next lower score, and of equal F1 the highest threshold is taken. A
    class of which nothing was found, or that has no boxes, gets the threshold that is best for all classes
    pooled.
    """
    boxes = matches.positives[slice(None) if sheets is None else sheets].sum(0)
    everything = [_falling(matches, label, sheets) for label in range(len(boxes))]
    score = np.concatenate([score for score, _ in everything])
    falling = np.argsort(-score, kind="stable")
    pooled = _best(score[falling], np.concatenate([right for _, right in everything])[falling], boxes.sum())
    default = NO_EVIDENCE if pooled is None else pooled
    each = [_best(*rows, number) for rows, number in zip(everything, boxes, strict=True)]
    return np.array([default if threshold is None else threshold for threshold in each])


def operating(matches: Matches, kept: np.ndarray) -> Operating:
    """What the detections bool kept [D], see `Matches.above`, come to in each class."""
    label, classes = matches.found.label, len(matches.category_ids)
    return Operating(
        right=np.bincount(label[matches.right(kept)], minlength=classes),
        found=np.bincount(label[matches.counted(kept)], minlength=classes),
        boxes=matches.positives.sum(0),
    )


def _falling(matches: Matches, label: int, sheets: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the detections of one class, falling, and whether each is right at IoU 0.5."""
    rows = matches.of_class(label)
    counted = ~matches.ignored[0, rows]
    if sheets is not None:
        counted &= sheets[matches.found.sheet[rows]]
    return matches.found.score[rows][counted], matches.match[0, rows][counted] >= 0


def _best(score: np.ndarray, right: np.ndarray, boxes: int) -> float | None:
    """The threshold of the highest F1, for falling scores and whether each is right; None where none is."""
    if not right.any():
        return None
    f1 = 2 * right.cumsum() / (np.arange(1, len(score) + 1) + boxes)
    f1[:-1][score[:-1] == score[1:]] = -1.0  # no threshold lies between equal scores
    last = int(f1.argmax())
    if last + 1 == len(score):
        return float(score[last])
    middle = (score[last] + score[last + 1]) / 2
    return float(middle if middle > score[last + 1] else score[last])


def _divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(len(below), np.nan), where=below != 0)
