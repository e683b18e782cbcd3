"""The bill of materials: how many symbols of each class were counted on a sheet, and how many it has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from detection.metrics.matching import Matches
from schematics.resampling import Interval, interval, ratio


@dataclass(frozen=True)
class Counts:
    """Numbers by sheet and class, int64 [I, K]; crowds and what lies in them are left out.

    A (sheet, class) pair counts where the class is on the sheet or was thought to be. The many pairs that are
    0 on both sides would make any detector look right.
    """

    truth: np.ndarray
    found: np.ndarray

    @cached_property
    def pairs(self) -> np.ndarray:
        """bool [I, K], the pairs that count"""
        return (self.truth > 0) | (self.found > 0)

    @cached_property
    def exact(self) -> np.ndarray:
        """bool [I, K], those of the pairs with the right number"""
        return self.pairs & (self.truth == self.found)

    @cached_property
    def error(self) -> np.ndarray:
        """int64 [I, K], by how many symbols the count is too high or too low"""
        return abs(self.found - self.truth)


def count(matches: Matches, kept: np.ndarray) -> Counts:
    """Counts of the detections bool kept [D], see `Matches.above`, beside the truth."""
    truth, counted = matches.positives, matches.counted(kept)
    found = np.zeros_like(truth)
    np.add.at(found, (matches.found.sheet[counted], matches.found.label[counted]), 1)
    return Counts(truth, found)


def count_figures(counts: Counts, weights: np.ndarray) -> dict[str, Interval]:
    """What the counts are worth, with intervals from the weights int64 [B, I] of `resample`:

    exact_pairs: share of the (sheet, class) pairs with the right number
    exact_sheets: share of the sheets with the right number of every class
    count_error: mean absolute error of a pair, in symbols
    total_error: sum of the absolute errors over the number of boxes
    """
    pairs = counts.pairs.sum(1)
    sheets = np.ones(len(pairs))
    quantities = {
        "exact_pairs": (counts.exact.sum(1), pairs),
        "exact_sheets": ((counts.error == 0).all(1), sheets),
        "count_error": (counts.error.sum(1), pairs),
        "total_error": (counts.error.sum(1), counts.truth.sum(1)),
    }
    return {name: share(above, below, weights) for name, (above, below) in quantities.items()}


def share(numerator: np.ndarray, denominator: np.ndarray, weights: np.ndarray) -> Interval:
    """The ratio of two quantities [I], each summed over the sheets, with its interval from weights [B, I]."""
    once = np.ones((1, len(numerator)), np.int64)
    draws = ratio(numerator.astype(float), denominator.astype(float), weights)
    return interval(draws, float(ratio(numerator, denominator, once)[0]))


def plain(value: Any) -> Any:
    """The same with numpy's numbers as Python's and NaN as None, all the way down."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and np.isnan(value) else value
