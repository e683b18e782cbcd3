"""How far a figure would move with other sheets of the same kind: the bootstrap over sheets.

Boxes of one sheet are not independent of each other, so whole sheets are drawn, with replacement (Efron 1979;
percentile intervals). Detections are matched once. A drawn set of sheets only weights them, and AP is
accumulated again from the weights, so that 500 sets of 440 sheets with 31 classes take seconds.
In shapes B is the number of resamples; for the other letters see `metrics.matching`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from detection.metrics.accumulate import accumulate, least_right
from detection.metrics.matching import Matches

CELLS = 4_000_000  # numbers of a table over resamples that are held in memory at a time
# Numpy is slow at sums and maxima that run down a table, as each row needs the one before. So such a table is
# cut into blocks of this many rows, and all blocks are gone through at once: [BLOCK, blocks, B].
BLOCK = 32


def average_precision(
    matches: Matches, weights: np.ndarray | None = None, limit: int | None = None
) -> dict[str, np.ndarray]:
    """AP, AP50 and AP75 of each weighting of the sheets, float64 [B], and "AP50_class" by class, [B, K].

    weights: int64 [B, I]; None takes every sheet once. limit: as `precision_at_recall` takes it. A figure is
    NaN where a set of sheets has no truth for it.
    """
    at_half, at_three_quarters = (int(np.argmin(abs(matches.ious - iou))) for iou in (0.5, 0.75))
    figures: dict[str, list] = {"AP": [], "AP50": [], "AP75": [], "AP50_class": []}
    for precision in _each_precision(matches, weights, limit):
        figures["AP"].append(_mean(precision))
        figures["AP50"].append(_mean(precision[at_half]))
        figures["AP75"].append(_mean(precision[at_three_quarters]))
        by_class = precision[at_half].mean(0)
        figures["AP50_class"].append(np.where(by_class > -1, by_class, np.nan))
    return {name: np.array(values) for name, values in figures.items()}


def _each_precision(matches: Matches, weights: np.ndarray | None, limit: int | None) -> Iterator[np.ndarray]:
    """Precision [T, R, K] of each weighting of the sheets in turn."""
    if weights is None:
        yield accumulate(matches, limit)[0]
        return
    held = max(1, CELLS // (len(matches.ious) * len(matches.recalls) * max(1, len(matches.category_ids))))
    for first in range(0, len(weights), held):
        yield from precision_at_recall(matches, weights[first : first + held], limit)


def _mean(precision: np.ndarray) -> float:
    present = precision[precision > -1]
    return float(np.mean(present)) if present.size else np.nan


def precision_at_recall(matches: Matches, weights: np.ndarray, limit: int | None = None) -> np.ndarray:
    """float64 [B, T, R, K]: pycocotools' eval["precision"] when sheet i is there weights[b, i] times.

    limit: the detections of a class on a sheet that count; None for matches.limit. Precision is -1 for a
    class without truth in the set. As long as no two scores of a class tie, this equals pycocotools on the
    set of sheets written out to the last bit.
    """
    shape = (len(weights), len(matches.ious), len(matches.recalls), len(matches.category_ids))
    precision = np.full(shape, -1.0)
    found, kept = matches.found, matches.found.rank < (limit or matches.limit)
    positives = _weighted(matches.positives, weights)  # [B, K]
    made = np.zeros_like(matches.positives)
    np.add.at(made, (found.sheet[kept], found.label[kept]), 1)
    most = _weighted(made, weights).max(0)
    # By sheet, with one more that is never there.
    times = np.vstack([weights.T, np.zeros((1, len(weights)), np.int64)])
    for label in range(len(matches.category_ids)):
        rows = np.arange(len(kept))[matches.of_class(label)]
        rows = rows[kept[rows]]
        held = max(1, CELLS // (4 * max(1, len(rows))))
        small = np.uint16 if most[label] < 2**16 else np.int32
        for first in range(0, len(weights), held):
            part = slice(first, first + held)
            block = np.ascontiguousarray(times[:, part], small)
            precision[part, :, :, label] = _of_class(matches, rows, block, positives[part, label])
    return precision


def _weighted(table: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """int64 [B, K]: a table [I, K] of numbers, summed over the sheets by weights [B, I].

    In float64, which is exact up to 2**53 and has a fast product.
    """
    return (weights.astype(np.float64) @ table.astype(np.float64)).astype(np.int64)


def _of_class(matches: Matches, rows: np.ndarray, times: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """float64 [B, T, R]: precision of the detections `rows` of one class, which come by falling score.

    times: integer [I + 1, B], of each sheet and of one that is never there. Precision rises where a detection
    is right, so the last of each run of right ones gives its envelope, whatever the weights.
    """
    precision = np.zeros((len(positives), len(matches.ious), len(matches.recalls)))
    wanted = np.maximum(least_right(positives, matches.recalls), 1)
    sheet, nowhere = matches.found.sheet[rows], len(times) - 1
    counted, ignored = RunningSum(times, sheet), np.zeros(len(rows), bool)
    for t in range(len(matches.ious)):
        if not np.array_equal(matches.ignored[t, rows], ignored):
            ignored = matches.ignored[t, rows]
            counted = RunningSum(times, np.where(ignored, nowhere, sheet))
        right = np.flatnonzero((matches.match[t, rows] >= 0) & ~ignored)
        if len(right):
            turn = np.flatnonzero(np.diff(right) > 1)
            first, last = right[np.append(0, turn + 1)], right[np.append(turn, len(right) - 1)]
            best = _at_recalls(counted, first, last, wanted)
            precision[:, t, : best.shape[1]] = best
    precision[positives == 0] = -1.0
    return precision


class RunningSum:
    """How many detections there are up to each, when sheet i is there times[i, b] times."""

    def __init__(self, times: np.ndarray, sheet: np.ndarray) -> None:
        """times: integer [I + 1, B], the last of which are 0. sheet: int64 [D], that of each detection."""
        place = _in_blocks(sheet, len(times) - 1)
        self.blocks, resamples = place.shape[1], times.shape[1]
        self.sums = np.zeros((place.size + 1, resamples), times.dtype)  # the last is the sum of none
        table = self.sums[:-1].reshape(*place.shape, resamples)
        np.take(times, place, axis=0, out=table, mode="clip")
        _sum_down(table)

    def up_to(self, rows: np.ndarray) -> np.ndarray:
        """integer [..., B]: the sums up to the detections int64 [...], these included; -1 stands for none."""
        place = np.where(rows < 0, len(self.sums) - 1, rows % BLOCK * self.blocks + rows // BLOCK)
        return self.sums.take(place, axis=0)


def _in_blocks(rows: np.ndarray, fill: int) -> np.ndarray:
    """int64 [BLOCK, blocks] of int64 [N], a column a block; the last is filled up."""
    blocks = -(-len(rows) // BLOCK)
    return np.append(rows, np.full(blocks * BLOCK - len(rows), fill)).reshape(blocks, BLOCK).T


def _sum_down(table: np.ndarray) -> None:
    """Make integer [BLOCK, blocks, B] the sums from the top on, in place."""
    for n in range(1, BLOCK):
        table[n] += table[n - 1]
    table += table[-1].cumsum(0, dtype=table.dtype) - table[-1]


def _at_recalls(counted: RunningSum, first: np.ndarray, last: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """float64 [B, <= R]: the best precision at each recall or beyond, 0 for a recall that is never reached.

    first, last: int64, of each run of right detections. wanted: int64 [B, R], how many must be right.
    Recalls that are reached in no resample are left out.
    """
    made = counted.up_to(_in_blocks(last, last[-1]))  # [BLOCK, blocks, B]
    right = made - counted.up_to(_in_blocks(first, last[-1] + 1) - 1)
    _sum_down(right)
    with np.errstate(invalid="ignore"):
        precision = right / made
    early = made.min(2) <= 1  # only there does pycocotools' spacing show
    precision[early] = right[early] / (made[early] + np.spacing(1))
    for n in range(BLOCK - 2, -1, -1):
        np.maximum(precision[n], precision[n + 1], out=precision[n])
    beyond = np.zeros((right.shape[1] + 1, right.shape[2]))  # from each block on
    beyond[:-1] = np.maximum.accumulate(precision[0, ::-1])[::-1]

    reached = wanted <= right[-1, -1][:, None]
    reached = reached[:, : reached.sum(1).max()]
    wanted = wanted[:, : reached.shape[1]]
    # The block in which a recall is reached, then the row in it, by halving.
    block = _first_reaching(right[-1].T, wanted) - ~reached
    place = block * len(wanted) + np.arange(len(wanted))[:, None]
    later, rows = beyond.ravel().take(place + len(wanted)), right[0].size
    for step in (16, 8, 4, 2, 1):
        place += (right.ravel().take(place + (step - 1) * rows) < wanted) * (step * rows)
    return np.where(reached, np.maximum(precision.ravel().take(place), later), 0.0)


def _first_reaching(ascending: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """int64 [B, R]: the first place in each row of ascending [B, P] to reach wanted [B, R]; P for none."""
    step = int(max(ascending[:, -1].max(), wanted.max())) + 1
    lift = step * np.arange(len(ascending))[:, None]  # so that the rows, laid end to end, stay ascending
    flat = np.searchsorted((ascending + lift).ravel(), (wanted + lift).ravel()).reshape(wanted.shape)
    return flat - ascending.shape[1] * np.arange(len(ascending))[:, None]
