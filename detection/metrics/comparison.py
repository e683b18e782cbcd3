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
    drawn = [
        drawn_figures(matches, given, resamples, seed)
        for matches, given in zip((first, second), thresholds or (None, None), strict=True)
    ]
    return differences(*drawn)


def drawn_figures(
    matches: Matches, thresholds: Mapping[int, float] | None = None, resamples: int = 1000, seed: int = 0
) -> dict[str, np.ndarray]:
    """Each figure of the sheets as they are and then of each resample of them, float64 [1 + resamples].

    Two detectors on the same sheets are drawn alike, so that the means of several runs can be compared too.
    """
    sheets = len(matches.image_ids)
    weights = np.vstack([np.ones((1, sheets), np.int64), resample(sheets, resamples, seed)])
    drawn = average_precision(matches, weights)
    del drawn["AP50_class"]
    return drawn | (_at_thresholds(matches, thresholds, weights) if thresholds else {})


def drawn_interval(drawn: np.ndarray) -> Interval:
    """The interval of a figure of `drawn_figures`."""
    return interval(drawn[1:], drawn[0])


def differences(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> dict[str, Difference]:
    """By how much the figures of the second differ from those of the first, both of `drawn_figures`."""
    return {
        name: Difference(float(one[0]), float(second[name][0]), drawn_interval(second[name] - one))
        for name, one in first.items()
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
