"""Detections matched to truth once, as COCO does it; every figure, curve and count is read off that one run.

The rule is pycocotools': down the scores, each detection takes the free box of its class that it overlaps
best, at each IoU threshold by itself. It is followed for all sheets at once, as proposals: each detection
asks for its best box, a box keeps the best detection that has asked, and one that is turned away asks for its
next. As all boxes prefer detections in the same order, by score, the outcome is that of one by one (Gale and
Shapley 1962). `metrics.engines` has other programs to compare with.

Letters in shapes: I sheets, K classes, G true boxes, D detections, P pairs of a detection and a box, T IoU
thresholds (0.5, 0.55, ..., 0.95), R recalls.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from pycocotools import mask

from detection.metrics.boxes import Found, Truth, fullest, read_found, read_ids, read_truth

# COCO's area ranges in square pixels: all, small, medium, large. Both ends belong to a range.
AREAS = [(0.0, 1e10), (0.0, 32.0**2), (32.0**2, 96.0**2), (96.0**2, 1e10)]
IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)

LEAST_IOU = 0.1  # of the pairs that are kept: `metrics.tide` asks for no less
CELLS = 4_000_000  # overlaps that are computed at a time


@dataclass(frozen=True)
class Pairs:
    """Detections and boxes of one sheet that overlap by LEAST_IOU or more, by detection, then by box."""

    found: np.ndarray  # int64 [P], the detection
    truth: np.ndarray  # int64 [P], the box
    iou: np.ndarray  # float64 [P]; where the box is a crowd, the share of the detection that lies in it

    def where(self, wanted: np.ndarray) -> Pairs:
        """Those of the pairs that bool or int64 [P] `wanted` picks."""
        return Pairs(self.found[wanted], self.truth[wanted], self.iou[wanted])


@dataclass(frozen=True)
class Matches:
    """Which detection found which box, at each IoU threshold, over boxes of all areas."""

    image_ids: np.ndarray  # int64 [I], ascending
    category_ids: np.ndarray  # int64 [K], ascending
    names: tuple[str, ...]  # [K]
    limit: int  # AP takes this many detections of a class on a sheet, by rank; all else takes every detection
    ious: np.ndarray  # float64 [T]
    recalls: np.ndarray  # float64 [R], where precision is read: 0, 0.01, ..., 1
    truth: Truth
    found: Found
    pairs: Pairs
    match: np.ndarray  # int32 [T, D], the truth that a detection has found, or -1
    ignored: np.ndarray  # bool [T, D], neither right nor wrong, as the detection lies in a crowd

    @cached_property
    def positives(self) -> np.ndarray:
        """int64 [I, K]: boxes to find, without crowds."""
        shape = len(self.image_ids), len(self.category_ids)
        place = (self.truth.sheet * shape[1] + self.truth.label)[~self.truth.crowd]
        return np.bincount(place, minlength=shape[0] * shape[1]).reshape(shape)

    def of_class(self, label: int) -> slice:
        """The detections of one class."""
        first, last = np.searchsorted(self.found.label, [label, label + 1])
        return slice(int(first), int(last))

    def above(self, thresholds: np.ndarray) -> np.ndarray:
        """bool [D]: detections whose score reaches the threshold of their class, float64 [K]."""
        return self.found.score >= thresholds[self.found.label]

    def counted(self, kept: np.ndarray) -> np.ndarray:
        """bool [D]: those of the detections bool kept [D] that count, as they do not lie in a crowd."""
        return kept & ~self.ignored[0]

    def right(self, kept: np.ndarray) -> np.ndarray:
        """bool [D]: those of the detections bool kept [D] that count and have found a box, at IoU 0.5."""
        return self.counted(kept) & (self.match[0] >= 0)

    def wrong(self, kept: np.ndarray) -> np.ndarray:
        """bool [D]: those of the detections bool kept [D] that count and have found no box, at IoU 0.5."""
        return self.counted(kept) & (self.match[0] < 0)


def match(
    ground_truth: Mapping[str, Any],
    detections: Iterable[Mapping[str, Any]],
    max_detections: int | None = None,
) -> Matches:
    """Match alone, without the figures. Takes and raises what `metrics.coco.measure` does."""
    image_ids, category_ids, names = read_ids(ground_truth)
    truth = read_truth(ground_truth, image_ids, category_ids)
    found = read_found(detections, image_ids, category_ids)
    pairs = overlaps(truth, found)
    regular = ~truth.crowd & in_range(truth.area, AREAS[0])
    matched = np.full((len(IOUS), len(found.score)), -1, np.int32)
    _serve(_of_one_class(pairs, truth, found), regular, truth.crowd, matched)
    outside = ~in_range(found.area, AREAS[0])
    return Matches(
        image_ids=image_ids,
        category_ids=category_ids,
        names=names,
        limit=max(100, max_detections or fit_max_detections(truth)),
        ious=IOUS,
        recalls=RECALLS,
        truth=truth,
        found=found,
        pairs=pairs,
        match=matched,
        # The last of the table is what -1, nothing found, reads.
        ignored=np.append(~regular, False)[matched] | ((matched < 0) & outside),
    )


def match_in_ranges(matches: Matches, areas: Iterable[tuple[float, float]]) -> Iterator[np.ndarray]:
    """For each range of areas, in square pixels, what is matched there, int32 [T, D].

    A detection takes a box outside the range, or a crowd, only if it can have none inside. So it is only the
    groups, of a class on a sheet, in which that changes the order that some detection asks in that are
    matched again.
    """
    truth, found = matches.truth, matches.found
    pairs = _of_one_class(matches.pairs, truth, found)
    pairs = pairs.where(_preference(pairs, ~truth.crowd & in_range(truth.area, AREAS[0])))
    group = found.sheet * len(matches.category_ids) + found.label
    for area in areas:
        regular = ~truth.crowd & in_range(truth.area, area)
        matched = matches.match
        if (other := _out_of_order(pairs, regular)).any():
            again = np.isin(group, group[pairs.found[1:][other]])
            matched = matched.copy()
            matched[:, again] = -1
            _serve(pairs.where(again[pairs.found]), regular, truth.crowd, matched)
        yield matched


def in_range(area: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """bool [N]: the areas from the lower limit to the upper, both included."""
    return (area >= limits[0]) & (area <= limits[1])


def fit_max_detections(truth: Truth) -> int:
    """Twice the most boxes of one class on one sheet, rounded up to hundreds; at least COCO's 100."""
    return max(100, 100 * math.ceil(2 * fullest(truth.sheet, truth.label) / 100))


def overlaps(truth: Truth, found: Found) -> Pairs:
    """The pairs of detections and boxes of one sheet, whatever their classes, see `Pairs`."""
    parts = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
    boxes, made = (_rows_by_sheet(sheet) for sheet in (truth.sheet, found.sheet))
    for sheet in boxes.keys() & made.keys():
        there, rows = boxes[sheet], made[sheet]
        step = max(1, CELLS // len(there))
        for part in (rows[n : n + step] for n in range(0, len(rows), step)):
            iou = mask.iou(found.xywh[part], truth.xywh[there], truth.crowd[there])
            d, g = np.nonzero(~(iou < LEAST_IOU))  # pycocotools takes a NaN for an overlap
            parts.append((part[d], there[g], iou[d, g]))
    pairs = Pairs(*map(np.concatenate, zip(*parts, strict=True)))
    return pairs.where(np.argsort(pairs.found, kind="stable"))


def _rows_by_sheet(sheet: np.ndarray) -> dict[int, np.ndarray]:
    """By sheet, the rows int64 that are on it, ascending."""
    order = np.argsort(sheet, kind="stable")
    values, starts = np.unique(sheet[order], return_index=True)
    return dict(zip(values.tolist(), np.split(order, starts[1:]), strict=False))


def _of_one_class(pairs: Pairs, truth: Truth, found: Found) -> Pairs:
    """The pairs that can be matched: of one class, and with the least of the IoU thresholds or more."""
    return pairs.where((found.label[pairs.found] == truth.label[pairs.truth]) & ~(pairs.iou < IOUS[0]))


def _preference(pairs: Pairs, regular: np.ndarray) -> np.ndarray:
    """int64 [P]: pairs by detection and in the order in which each asks: as pycocotools has it, regular boxes
    before others, then those with the larger IoU, then the later one."""
    places = np.arange(len(pairs.found))
    several = pairs.found[1:] == pairs.found[:-1]
    rows = np.flatnonzero(np.append(several, False) | np.append(False, several))
    some = pairs.where(rows)
    places[rows] = rows[np.lexsort((-some.truth, -some.iou, ~regular[some.truth], some.found))]
    return places


def _out_of_order(pairs: Pairs, regular: np.ndarray) -> np.ndarray:
    """bool [P - 1]: pairs after the first that `_preference` would move before the one that they follow."""
    regular, truth, iou = regular[pairs.truth], pairs.truth, pairs.iou
    closer = (iou[1:] > iou[:-1]) | ((iou[1:] == iou[:-1]) & (truth[1:] > truth[:-1]))
    before = (regular[1:] > regular[:-1]) | ((regular[1:] == regular[:-1]) & closer)
    return (pairs.found[1:] == pairs.found[:-1]) & before


def _serve(pairs: Pairs, regular: np.ndarray, crowd: np.ndarray, matched: np.ndarray) -> None:
    """Write into `matched`, int32 [T, D], the box that each detection of the pairs finds at each threshold.

    pairs: those of `_of_one_class`. regular: bool [G], boxes to find, which detections prefer to others.
    """
    pairs = pairs.where(_preference(pairs, regular))
    for t, iou in enumerate(IOUS):
        close = pairs.where(~(pairs.iou < min(iou, 1 - 1e-10)))
        taken = _propose(close.found, close.truth, crowd)
        matched[t, close.found[taken]] = close.truth[taken]


def _propose(found: np.ndarray, truth: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """int64: the pairs that are matched; each detection, int64 [P], asks for its boxes, int64 [P], in turn.

    Of one class on a sheet, the detections come by falling score. A crowd, bool [G], takes all who ask.
    """
    nobody = len(found)
    holder = np.full(len(crowd), nobody)  # the pair that a box is in
    in_crowd = [np.empty(0, np.int64)]
    asking = np.flatnonzero(np.append(True, found[1:] != found[:-1])) if nobody else in_crowd[0]
    while len(asking):
        welcome = crowd[truth[asking]]
        in_crowd.append(asking[welcome])
        asking = asking[~welcome]
        box = truth[asking]
        before = holder[box]
        np.minimum.at(holder, box, asking)  # the lower pair has the better detection
        kept = holder[box] == asking
        displaced = before[kept & (before < nobody)]
        asking = np.concatenate([asking[~kept], displaced]) + 1
        asking = asking[asking < nobody]
        asking = asking[found[asking] == found[asking - 1]]
    return np.concatenate([holder[holder < nobody], *in_crowd])
