"""What kind each error is and what it costs, by TIDE (Bolya et al. 2020, arXiv 2008.08115); confusions.

The kind of a wrong detection is the first of these that holds for its overlap with truth, in the order of the
authors' program:

  localisation  IoU 0.1 to 0.5 with its own class
  class         IoU 0.5 or more with another class
  duplicate     IoU 0.5 or more with its own class, whose box a better detection has found
  background    IoU under 0.1 with everything
  both          the rest: badly placed on another class

A box that no detection found is missed, unless a detection with an error of class or localisation lies on it.
Then the box carries the name of that error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from detection.metrics.matching import Matches, Pairs

KINDS = ("found", "class", "localisation", "both", "duplicate", "background", "missed")
FOUND, CLASS, LOCALISATION, BOTH, DUPLICATE, BACKGROUND, MISSED = range(7)
LEFT_OUT = -1  # a detection below its threshold or in a crowd, or a crowd

RIGHT_IOU = 0.5
BACKGROUND_IOU = 0.1


@dataclass(frozen=True)
class Kinds:
    """The kind of each detection and of each box: an index into KINDS, or LEFT_OUT."""

    found: np.ndarray  # int64 [D]
    truth: np.ndarray  # int64 [G]
    cause: np.ndarray  # int64 [D], the box that a detection has found or overlaps best, -1 for none

    def counts(self) -> dict[str, int]:
        """How often each kind of error occurs; "found" counts the right detections."""
        of_found = np.bincount(self.found[self.found >= 0], minlength=len(KINDS))
        table = dict(zip(KINDS, of_found.tolist(), strict=True))
        return {**table, "missed": int((self.truth == MISSED).sum())}


def kinds_of(matches: Matches, kept: np.ndarray | None = None) -> Kinds:
    """Sort detections and truth into kinds, at IoU 0.5.

    kept: bool [D], see `Matches.above`; None keeps all. What is not kept counts as not made, so of each class
    the best scores must be kept: without them, the other detections would have been matched differently.
    """
    truth, taken = matches.truth, matches.match[0]
    kept = np.ones(len(matches.found.score), bool) if kept is None else kept
    right, wrong = matches.right(kept), matches.wrong(kept)
    pairs = matches.pairs.where(wrong[matches.pairs.found] & ~truth.crowd[matches.pairs.truth])
    of_one_class = matches.found.label[pairs.found] == truth.label[pairs.truth]
    best_own, own = _closest(pairs.where(of_one_class), len(wrong))
    best_other, other = _closest(pairs.where(~of_one_class), len(wrong))
    best, closest = _closest(pairs, len(wrong))
    conditions = [
        right,
        ~wrong,
        (best_own >= BACKGROUND_IOU) & (best_own < RIGHT_IOU),
        best_other >= RIGHT_IOU,
        best_own >= RIGHT_IOU,
        best < BACKGROUND_IOU,
    ]
    of_found = np.select(conditions, [FOUND, LEFT_OUT, LOCALISATION, CLASS, DUPLICATE, BACKGROUND], BOTH)
    cause = np.select(conditions, [taken, -1, own, other, own, -1], closest)

    of_truth = np.where(truth.crowd, LEFT_OUT, MISSED)
    for kind in (LOCALISATION, CLASS):
        of_truth[cause[of_found == kind]] = kind
    of_truth[taken[right]] = FOUND
    return Kinds(of_found, of_truth, cause)


def _closest(pairs: Pairs, detections: int) -> tuple[np.ndarray, np.ndarray]:
    """IoU float64 [D] and index int64 [D] of the box that each detection overlaps best; 0 and -1 for none."""
    iou, box = np.zeros(detections), np.full(detections, -1)
    if len(pairs.found):
        starts = np.flatnonzero(np.append(True, pairs.found[1:] != pairs.found[:-1]))
        iou[pairs.found[starts]] = np.maximum.reduceat(pairs.iou, starts)
        best = pairs.where(pairs.iou == iou[pairs.found])
        box[best.found[::-1]] = best.truth[::-1]  # the first of each detection is written last
    return iou, box


def delta_ap50(matches: Matches) -> dict[str, float]:
    """What AP50 would gain if all errors of one kind were mended and nothing else (paper, section 2.3).

    Errors of class and of localisation are mended by making the best such detection of a box that nothing has
    found a right one, and dropping the rest. Errors of the kinds both, duplicate and background are dropped.
    Missed boxes are no longer asked for. As in AP, all detections up to the limit count, not only those above
    a threshold. The kinds come in the order of KINDS; AP50 is NaN, and so is each gain, where there are no
    boxes.
    """
    kinds = kinds_of(matches, matches.found.rank < matches.limit)
    score, label = matches.found.score, matches.found.label
    right, counted = kinds.found == FOUND, kinds.found != LEFT_OUT
    boxes = matches.positives.sum(0)
    before = _ap50(score[counted], label[counted], right[counted], boxes, matches.recalls)
    gains = {}
    for kind in (CLASS, LOCALISATION, BOTH, DUPLICATE, BACKGROUND):
        wrong = kinds.found == kind
        mended = np.empty(0, np.int64)
        if kind in (CLASS, LOCALISATION):
            mended = _best_of_each(np.flatnonzero(wrong), kinds, score)
        now_right, now_counted, now_label = right.copy(), counted & ~wrong, label.copy()
        now_right[mended] = now_counted[mended] = True
        now_label[mended] = matches.truth.label[kinds.cause[mended]]
        arrays = (score[now_counted], now_label[now_counted], now_right[now_counted])
        gains[KINDS[kind]] = _ap50(*arrays, boxes, matches.recalls) - before
    unseen = np.bincount(matches.truth.label[kinds.truth == MISSED], minlength=len(boxes))
    asked = (score[counted], label[counted], right[counted], boxes - unseen, matches.recalls)
    all_missed = unseen.any() and not (boxes - unseen).any()  # then nothing is left to ask for
    gains[KINDS[MISSED]] = (1.0 if all_missed else _ap50(*asked)) - before
    return {kind: gains[kind] for kind in KINDS[1:]}


def _best_of_each(rows: np.ndarray, kinds: Kinds, score: np.ndarray) -> np.ndarray:
    """Of the detections `rows` the one with the highest score for each box that nothing has found."""
    rows = rows[kinds.truth[kinds.cause[rows]] != FOUND]
    rows = rows[np.argsort(-score[rows], kind="stable")]
    return rows[np.unique(kinds.cause[rows], return_index=True)[1]]


def _ap50(
    score: np.ndarray, label: np.ndarray, right: np.ndarray, boxes: np.ndarray, recalls: np.ndarray
) -> float:
    """Mean over the classes with boxes of the precision at 101 recalls, as COCO takes it; NaN without boxes.

    score, label, right: [D] of the detections. boxes: int64 [K].
    """
    figures = []
    for k in np.flatnonzero(boxes).tolist():
        rows = np.flatnonzero(label == k)
        true = right[rows[np.argsort(-score[rows], kind="stable")]].cumsum()
        precision = np.append(true / np.arange(1, len(true) + 1), 0.0)
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        figures.append(envelope[np.searchsorted(true / boxes[k], recalls)].mean())
    return float(np.mean(figures)) if figures else np.nan


def confusion_matrix(matches: Matches, kept: np.ndarray) -> np.ndarray:
    """int64 [K + 1, K + 1]: rows are true classes, columns predicted ones, the last of each is background.

    kept: bool [D], see `Matches.above`. Detections that found a box of their class at IoU 0.5 are the
    diagonal. What is left on both sides is paired whatever the class, closest first, down to IoU 0.5. The
    rest pairs with background.
    """
    truth, found = matches.truth, matches.found
    background = len(matches.category_ids)
    matrix = np.zeros((background + 1, background + 1), np.int64)
    taken, right = matches.match[0], matches.right(kept)
    np.add.at(matrix, (truth.label[taken[right]], found.label[right]), 1)
    free = ~truth.crowd
    free[taken[right]] = False
    stray = matches.wrong(kept)
    pairs = matches.pairs
    left = stray[pairs.found] & free[pairs.truth] & (pairs.iou >= RIGHT_IOU)
    pairs = pairs.where(left)
    pairs = pairs.where(np.argsort(-pairs.iou, kind="stable"))
    for d, g in zip(pairs.found.tolist(), pairs.truth.tolist(), strict=True):
        if stray[d] and free[g]:
            matrix[truth.label[g], found.label[d]] += 1
            stray[d] = free[g] = False
    np.add.at(matrix, (np.full(stray.sum(), background), found.label[stray]), 1)
    np.add.at(matrix, (truth.label[free], np.full(free.sum(), background)), 1)
    return matrix


def confusions(matrix: np.ndarray, most: int = 10) -> list[tuple[int, int, int]]:
    """(true class, predicted class, times) of the mistakings that happened most, `most` of them."""
    classes = matrix[:-1, :-1].copy()
    np.fill_diagonal(classes, 0)
    order = np.argsort(-classes, axis=None, kind="stable")[:most]
    pairs = [(*divmod(int(place), len(classes)), int(classes.flat[place])) for place in order]
    return [pair for pair in pairs if pair[2]]
