"""Two detectors on the same sheets: by how much each figure differs, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from detection.metrics.bootstrap import average_precision
from detection.metrics.counts import count
from detection.metrics.matching import Matches
from schematics.resampling import Interval, interval, ratio, resample


@dataclass(frozen=True)
class Difference:
    """A figure of the first detector, of the second, and second - first with its 95 % interval."""

    first: float
    second: float
    gain: Interval


def compare(
    first: Matches,
    second: Matches,
    thresholds: tuple[Mapping[int, float], Mapping[int, float]] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Difference]:
    """AP, AP50 and AP75 of two detectors, each resample of the sheets being the same for both.

    first, second: matches with one ground truth. thresholds: of each, by category id; with them also "F1",
    "Counts right" and "Sheets right", as the report has them. Raises ValueError for other sheets or classes.
    """
    for one, other in ((first.image_ids, second.image_ids), (first.category_ids, second.category_ids)):
        if not np.array_equal(one, other):
            raise ValueError("the two were not matched with the same ground truth")
    weights = np.vstack(
        [np.ones((1, len(first.image_ids)), np.int64), resample(len(first.image_ids), resamples, seed)]
    )
    draws = [average_precision(matches, weights) for matches in (first, second)]
    for table in draws:
        del table["AP50_class"]
    if thresholds:
        for table, matches, given in zip(draws, (first, second), thresholds, strict=True):
            table |= _at_thresholds(matches, given, weights)
    return {
        name: Difference(float(one[0]), float(other[0]), interval(other[1:] - one[1:], other[0] - one[0]))
        for name, one, other in ((name, draws[0][name], draws[1][name]) for name in draws[0])
    }


def _at_thresholds(
    matches: Matches, thresholds: Mapping[int, float], weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Figures above the thresholds by weights int64 [B, I] of the sheets, float64 [B] each."""
    kept = matches.above(np.array([thresholds[number] for number in matches.category_ids.tolist()]))
    counts = count(matches, kept)
    right = np.bincount(matches.found.sheet[matches.right(kept)], minlength=len(matches.image_ids))
    return {
        "F1": ratio(2 * right, counts.found.sum(1) + counts.truth.sum(1), weights),
        "Counts right": ratio(counts.exact.sum(1), counts.pairs.sum(1), weights),
        "Sheets right": ratio((counts.error == 0).all(1), np.ones(len(right)), weights),
    }
