"""Which labels are doubtful, by what a detector that was not trained on their sheets says. No torch.

A doubt is of one of five kinds, and its evidence a number from 0 to 1 (up to 2 for a label on bare paper). s
is a detection's score; a detection of its class that no other label fits better is a label's own:

    missing   s of a detection that lies on no label, whatever its class
    class     s of a detection of another class that fits the label, times 1 - s of its own
    doubled   IoU of two labels, times 1 - s of the own detection of the one that is less sure
    placed    s (1 - IoU) of the own detection that overlaps the label best by s IoU
    spurious  1 - s of the best detection on the label, and 1 more where its box holds no ink

Evidence of different kinds, classes and detectors can't be compared, so a score is made of it. If five good
labels in a thousand (RATE) had a fault of this kind, E of them would have evidence this strong or stronger:
that is counted on these very sheets, by giving each label the fault. O cases here do have it. Then E / O is
the share of such cases that faults account for, an estimate of the probability that the case is one (1 - E /
O is the false discovery rate of Efron's two groups, Statistical Science 2008, by tails). There can't be many
more faults than cases, so E is lowered for all evidence alike until E <= O + 1 wherever a tenth of such
faults or more would be. Then

    S = E / (max(E, O) + 1)  over all classes
    score = (E_k + m S) / (max(E_k, O_k) + m)  for the class k of the label, or of what is missing; m = HELD

which never falls as evidence rises. Of doubled labels the evidence is the score: there is hardly a symbol on
another one, and a detector can't see two. The cases are those of ObjectLab (arXiv 2309.00832: overlooked,
swapped, badly located); that the judge is held out, and each class measured by itself, comes from confident
learning (arXiv 1911.00068). A score is a probability only as far as RATE suits the data.

Letters in shapes: N labels of a sheet, D detections, C cases, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from detection.detections import Detections
from schematics.boxes import box_iou, paired_iou, share_within

KINDS = ("missing", "class", "doubled", "placed", "spurious")
MISSING, CLASS, DOUBLED, PLACED, SPURIOUS = range(5)

RATE = 0.005  # faults of a kind that are expected, for each label
HELD = 20.0  # cases by which the share in a class is held to that in all
RIGHT = 0.5  # IoU from which a detection fits a label
NEAR = 0.1  # IoU from which it may be one that is badly placed
ON = 0.3  # IoU from which a detection lies on a label of another class
DOUBLE = 0.6  # IoU from which two labels may be of one symbol
MOVE = 0.4  # of its sides, by which a label is moved to see what that looks like


@dataclass(frozen=True)
class Labels:
    """Labelled boxes on a sheet.

    A label is 1..K, or 0 where the detector can't judge it (a crowd, a class that it doesn't know): it only
    keeps detections on it from being missing labels.
    """

    boxes: np.ndarray  # float64 [N, 4], xyxy in sheet pixels
    labels: np.ndarray  # int64 [N]
    bare: np.ndarray  # bool [N], the boxes that hold no ink


@dataclass(frozen=True)
class Judged:
    """A sheet as it is labelled, and what a detector says of it.

    found: with scores as low as the detector gives them. elsewhere: labels that are not of this sheet but of
    another, and what ink is here in their boxes: places like those of labels without a reason.
    """

    given: Labels
    found: Detections
    elsewhere: Labels


@dataclass(frozen=True)
class Doubt:
    """A label that is probably wrong, or one that is probably missing."""

    sheet: int  # index into the sheets that were judged
    kind: int  # index into KINDS
    label: int  # index of the sheet's label; -1 for a missing one
    score: float
    given: int  # class of the label, 1..K; 0 for a missing one
    suggested: int  # class that it should have; 0 where it should go
    box: tuple[float, ...] | None  # where it should be, xyxy; None where it should stay or go
    twin: int = -1  # of a doubled label: the label that should stay


@dataclass(frozen=True)
class Cases:
    """What may be a fault on one sheet, and what faults would look like there, kind by kind."""

    doubts: list[Doubt]  # with their evidence in place of a score
    like_faults: list[tuple[np.ndarray, np.ndarray]]  # for each kind: evidence, and the class it goes by


def find_doubts(sheets: Sequence[Judged], rate: float = RATE) -> list[Doubt]:
    """All doubts about the labels of the sheets, the highest score first; see the head of this module.

    A label has at most one doubt, that of its highest score. rate: faults of each kind expected for a label.
    Of equal scores the doubt with the stronger evidence is first, then that of the earlier sheet and label.
    """
    cases = [look(number, sheet) for number, sheet in enumerate(sheets)]
    labels = sum(int((sheet.given.labels > 0).sum()) for sheet in sheets)
    scored: list[tuple[Doubt, float]] = []
    for kind in range(len(KINDS)):
        doubts = [doubt for case in cases for doubt in case.doubts if doubt.kind == kind]
        like = [case.like_faults[kind] for case in cases]
        evidence = np.concatenate([np.empty(0), *(e for e, _ in like)])
        classes = np.concatenate([np.empty(0, int), *(c for _, c in like)])
        seen = np.array([doubt.score for doubt in doubts], np.float64)
        of = np.array([doubt.given or doubt.suggested for doubt in doubts], np.int64)
        weight = rate * labels / max(1, len(evidence))
        scores = seen if kind == DOUBLED else shares(seen, of, evidence, classes, weight)
        for doubt, score in zip(doubts, scores.tolist(), strict=True):
            scored.append((replace(doubt, score=score), doubt.score))
    scored.sort(key=lambda pair: (-pair[0].score, -pair[1], pair[0].sheet, pair[0].label))
    first: dict[tuple[int, int], Doubt] = {}
    for n, (doubt, _) in enumerate(scored):
        first.setdefault((doubt.sheet, doubt.label if doubt.label >= 0 else -1 - n), doubt)
    return list(first.values())


def shares(
    seen: np.ndarray, of: np.ndarray, like: np.ndarray, like_of: np.ndarray, weight: float
) -> np.ndarray:
    """The score of each case, float64 [C]: the share of faults among those of its evidence or more.

    seen: float64 [C], evidence; of: int64 [C], the class of each. like, like_of: the same of labels that were
    given the fault, each of which counts `weight`. See the head of this module for the formula.
    """
    # No more faults than cases, but for one, at any evidence that a tenth of the faults have.
    like_sorted, seen_sorted = np.sort(like), np.sort(seen)
    common = like_sorted[: int(0.9 * len(like)) + 1]
    many = weight * (len(like) - np.searchsorted(like_sorted, common, "left"))
    cases = len(seen) - np.searchsorted(seen_sorted, common, "left")
    weight *= min(1.0, ((cases + 1) / np.maximum(many, 1e-9)).min(initial=1.0))

    def tails(seen: np.ndarray, like: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        expected = weight * (len(like) - np.searchsorted(np.sort(like), seen, "left"))
        return expected, len(seen) - np.searchsorted(np.sort(seen), seen, "left")

    expected, number = tails(seen, like)
    pooled = expected / (np.maximum(expected, number) + 1)
    scores = np.empty(len(seen))
    for k in np.unique(of).tolist():
        rows = np.flatnonzero(of == k)
        expected, number = tails(seen[rows], like[like_of == k])
        share = (expected + HELD * pooled[rows]) / (np.maximum(expected, number) + HELD)
        order = np.argsort(seen[rows], kind="stable")
        scores[rows[order]] = np.maximum.accumulate(share[order])
    return scores


def look(number: int, sheet: Judged) -> Cases:
    """The cases of sheet `number`, with their evidence, and the evidence that faults would give there."""
    boxes, labels, found = sheet.given.boxes, sheet.given.labels, sheet.found
    iou = box_iou(boxes, found.boxes)  # [N, D]
    same = labels[:, None] == found.labels[None]
    owner = _owners(np.where(same, iou, 0.0))  # [D], the label that each detection fits best, or -1
    rows = np.arange(len(boxes))[:, None]
    free = owner[None] < 0
    own = _best(np.where((owner[None] == rows) & (iou >= RIGHT), found.scores, 0.0))
    other = np.where(free & ~same & (iou >= RIGHT), found.scores, 0.0)  # [N, D]
    held = np.where(free | (owner[None] == rows), iou, 0.0)  # without what fits another label of its class
    parts = (
        _missing(number, sheet, iou, same, owner),
        _wrong_class(number, labels, own, other, found),
        _doubled(number, boxes, labels, own),
        _placed(number, labels, found, np.where(same, held, 0.0)),
        _spurious(number, sheet.given, found, held),
    )
    known = labels > 0
    top = np.maximum(own, _best(other))
    like = [
        (top[known], labels[known]),
        (own[known], labels[known]),
        (np.empty(0), np.empty(0, np.int64)),
        _like_moved(boxes, labels, found, np.where(owner[None] == rows, iou, 0.0)),
        _like_spurious(sheet.elsewhere, found),
    ]
    return Cases([doubt for part in parts for doubt in part], like)


def _missing(number: int, sheet: Judged, iou: np.ndarray, same: np.ndarray, owner: np.ndarray) -> list[Doubt]:
    """Of detections on each other the best stands for all."""
    found = sheet.found
    inside = share_within(sheet.given.boxes, found.boxes) >= 0.7  # a part of a symbol that is labelled
    near = (iou >= ON) | (same & ((iou >= NEAR) | inside))
    # A label that can't be judged may be of any class.
    near |= (sheet.given.labels == 0)[:, None] & ((iou >= NEAR) | inside)
    left = np.flatnonzero((owner < 0) & ~near.any(0))
    left = left[np.argsort(-found.scores[left], kind="stable")]
    doubts = []
    while len(left):
        d, left = left[0], left[1:]
        box, label = tuple(found.boxes[d].tolist()), int(found.labels[d])
        doubts.append(Doubt(number, MISSING, -1, float(found.scores[d]), 0, label, box))
        left = left[box_iou(found.boxes[d : d + 1], found.boxes[left])[0] < ON]
    return doubts


def _wrong_class(
    number: int, labels: np.ndarray, own: np.ndarray, other: np.ndarray, found: Detections
) -> list[Doubt]:
    best = _best(other)
    doubts = []
    for n in np.flatnonzero((labels > 0) & (best > own)).tolist():
        suggested = int(found.labels[other[n].argmax()])
        doubts.append(Doubt(number, CLASS, n, float(best[n] * (1 - own[n])), int(labels[n]), suggested, None))
    return doubts


def _doubled(number: int, boxes: np.ndarray, labels: np.ndarray, own: np.ndarray) -> list[Doubt]:
    iou = np.triu(box_iou(boxes, boxes), 1)
    doubts = []
    for first, second in np.argwhere(iou >= DOUBLE).tolist():
        goes, stays = (first, second) if own[first] < own[second] else (second, first)
        if labels[goes] and labels[stays]:
            evidence = float(iou[first, second] * (1 - own[goes]))
            doubts.append(Doubt(number, DOUBLED, goes, evidence, int(labels[goes]), 0, None, stays))
    return doubts


def _placed(number: int, labels: np.ndarray, found: Detections, iou: np.ndarray) -> list[Doubt]:
    """iou: [N, D], 0 where a detection is not of the label's class or fits another label."""
    doubts = []
    near = np.where(iou >= NEAR, iou, 0.0)
    for n in np.flatnonzero((labels > 0) & near.any(1)).tolist():
        d = (near[n] * found.scores).argmax()
        evidence = float(found.scores[d] * (1 - iou[n, d]))
        box = tuple(found.boxes[d].tolist())
        doubts.append(Doubt(number, PLACED, n, evidence, int(labels[n]), int(labels[n]), box))
    return doubts


def _like_moved(
    boxes: np.ndarray, labels: np.ndarray, found: Detections, iou: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Evidence of labels that are moved in eight directions. iou: [N, D], 0 but for a label's own."""
    known = np.flatnonzero(labels > 0)
    sides = boxes[known, 2:] - boxes[known, :2]
    weighed = iou[known] * found.scores
    score, best = _best(weighed), weighed.argmax(1) if len(found) else np.zeros(len(known), int)
    evidence = []
    for dx, dy in ((x, y) for x in (-1, 0, 1) for y in (-1, 0, 1) if x or y):
        moved = boxes[known] + np.tile(MOVE * sides * [dx, dy], 2)
        left = paired_iou(moved, found.boxes[best]) if len(found) else np.zeros(len(known))
        scores = found.scores[best] if len(found) else np.zeros(len(known))
        evidence.append(np.where((score > 0) & (left >= NEAR), scores * (1 - left), 0.0))
    return np.concatenate(evidence), np.tile(labels[known], 8)


def _spurious(number: int, given: Labels, found: Detections, iou: np.ndarray) -> list[Doubt]:
    evidence = _emptiness(given, found, iou)
    return [
        Doubt(number, SPURIOUS, n, float(evidence[n]), int(given.labels[n]), 0, None)
        for n in np.flatnonzero(given.labels > 0).tolist()
    ]


def _like_spurious(elsewhere: Labels, found: Detections) -> tuple[np.ndarray, np.ndarray]:
    """Evidence of labels where there is no reason for one."""
    known = elsewhere.labels > 0
    evidence = _emptiness(elsewhere, found, box_iou(elsewhere.boxes, found.boxes))
    return evidence[known], elsewhere.labels[known]


def _emptiness(given: Labels, found: Detections, iou: np.ndarray) -> np.ndarray:
    """float64 [N]. iou: [N, D]."""
    return 1 - _best(np.where(iou >= NEAR, found.scores, 0.0)) + given.bare


def _owners(iou: np.ndarray) -> np.ndarray:
    """int64 [D]: the row whose IoU with each column is highest and at least RIGHT, or -1."""
    if not len(iou):
        return np.full(iou.shape[1], -1)
    best = iou.argmax(0)
    return np.where(iou.max(0) >= RIGHT, best, -1)


def _best(scores: np.ndarray) -> np.ndarray:
    """The largest of each row, 0 where it is empty."""
    return scores.max(1, initial=0.0)
