"""How far a figure would move with other sheets of the same kind: the bootstrap over sheets.

Boxes of one sheet are not independent of each other, so whole sheets are drawn, with replacement (Efron 1979;
percentile intervals). Detections are matched once. A drawn set of sheets only weights them, and AP is
accumulated again from the weights, so that 500 sets of 440 sheets with 31 classes take seconds.
In shapes B is the number of resamples; for the other letters see `metrics.matching`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from detection.metrics.matching import Matches

CELLS = 4_000_000  # resamples times detections that are held in memory at a time


@dataclass(frozen=True)
class Interval:
    """A figure and the bounds that 95 % of the resamples lie in; NaN where there is nothing to measure."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def resample(sheets: int, count: int, seed: int = 0) -> np.ndarray:
    """int64 [count, sheets]: how often each sheet is in each of `count` drawn sets of as many sheets.

    The same (sheets, count, seed) gives the same sets. Two detectors on one split are thus compared on the
    same draws, and interval(first - second, ...) is the interval of their difference.
    """
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, sheets, (count, sheets)) + sheets * np.arange(count)[:, None]
    return np.bincount(drawn.ravel(), minlength=count * sheets).reshape(count, sheets)


def every_sheet_once(matches: Matches) -> np.ndarray:
    """int64 [1, I]: the weights that leave the sheets as they are."""
    return np.ones((1, len(matches.image_ids)), np.int64)


def interval(draws: np.ndarray, value: float) -> Interval:
    """The percentile interval of draws [B] of a figure; draws that are NaN are left out."""
    draws = draws[~np.isnan(draws)]
    low, high = np.quantile(draws, [0.025, 0.975]).tolist() if draws.size else (np.nan, np.nan)
    return Interval(float(value), low, high)


def ratio(numerator: np.ndarray, denominator: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float64 [B]: one quantity [I] over another [I], each summed by weights [B, I]; NaN for 0/0."""
    below = weights @ denominator
    return np.divide(weights @ numerator, below, out=np.full(len(weights), np.nan), where=below != 0)


def average_precision(
    matches: Matches, weights: np.ndarray | None = None, limit: int | None = None
) -> dict[str, np.ndarray]:
    """AP, AP50 and AP75 of each weighting of the sheets, float64 [B], and "AP50_class" by class, [B, K].

    weights: int64 [B, I]; None takes every sheet once. limit: as `precision_at_recall` takes it. A figure is
    NaN where a set of sheets has no truth for it.
    """
    if weights is None:
        weights = every_sheet_once(matches)
    at_half, at_three_quarters = (int(np.argmin(abs(matches.ious - iou))) for iou in (0.5, 0.75))
    figures: dict[str, list] = {"AP": [], "AP50": [], "AP75": [], "AP50_class": []}
    for first in range(0, len(weights), 64):
        for precision in precision_at_recall(matches, weights[first : first + 64], limit):
            figures["AP"].append(_mean(precision))
            figures["AP50"].append(_mean(precision[at_half]))
            figures["AP75"].append(_mean(precision[at_three_quarters]))
            by_class = precision[at_half].mean(0)
            figures["AP50_class"].append(np.where(by_class > -1, by_class, np.nan))
    return {name: np.array(values) for name, values in figures.items()}


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
    positives = weights @ matches.positives  # [B, K]
    for label in range(len(matches.category_ids)):
        rows = np.arange(len(matches.found.score))[matches.of_class(label)]
        rows = rows[matches.found.rank[rows] < (limit or matches.limit)]
        held = max(1, CELLS // max(1, len(rows)))
        for first in range(0, len(weights), held):
            part = slice(first, first + held)
            precision[part, :, :, label] = _of_class(matches, rows, weights[part], positives[part, label])
    return precision


def _of_class(matches: Matches, rows: np.ndarray, weights: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """float64 [B, T, R]: precision of the detections `rows` of one class, which come by falling score.

    Precision only rises where a detection is right, so those places alone give its envelope.
    """
    precision = np.zeros((len(weights), len(matches.ious), len(matches.recalls)))
    times = weights[:, matches.found.sheet[rows]]  # [B, D]
    so_far = times.cumsum(1)
    wanted = _least_right(positives, matches.recalls)
    for t in range(len(matches.ious)):
        ignored = matches.ignored[t, rows]
        counted = (times * ~ignored).cumsum(1) if ignored.any() else so_far
        right = np.flatnonzero((matches.match[t, rows] >= 0) & ~ignored)
        if not len(right):
            continue
        true = times[:, right].cumsum(1)  # [B, P]
        false = counted[:, right] - true
        envelope = true / (false + true + np.spacing(1))
        envelope = np.maximum.accumulate(envelope[:, ::-1], axis=1)[:, ::-1]
        place = _first_reaching(true, wanted)
        reached = place < len(right)
        precision[:, t] = np.where(reached, np.take_along_axis(envelope, place - ~reached, 1), 0.0)
    precision[positives == 0] = -1.0
    return precision


def _least_right(positives: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """int64 [B, R]: the fewest right detections whose share of `positives` [B] reaches each recall."""
    table = {n: np.searchsorted(np.arange(n + 1) / max(n, 1), recalls) for n in set(positives.tolist())}
    return np.array([table[n] for n in positives.tolist()])


def _first_reaching(ascending: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """int64 [B, R]: the first place in each row of ascending [B, P] to reach wanted [B, R]; P for none."""
    step = int(max(ascending[:, -1].max(), wanted.max())) + 1
    lift = step * np.arange(len(ascending))[:, None]  # so that the rows, laid end to end, stay ascending
    flat = np.searchsorted((ascending + lift).ravel(), (wanted + lift).ravel()).reshape(wanted.shape)
    return flat - ascending.shape[1] * np.arange(len(ascending))[:, None]
