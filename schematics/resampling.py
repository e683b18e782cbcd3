"""Draw sheets again, with replacement, to see how far a figure would move with other sheets of the same kind.

What lies on one sheet is alike, so whole sheets are drawn (Efron 1979; percentile intervals). A drawn set of
sheets only weights them: B is the number of sets, I that of sheets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A figure and the bounds that 95 % of the resamples lie in; NaN where there is nothing to measure."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def signed(self) -> str:
        """As a difference is written."""
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def resample(sheets: int, count: int, seed: int = 0) -> np.ndarray:
    """int64 [count, sheets]: how often each sheet is in each of `count` drawn sets of as many sheets.

    The same (sheets, count, seed) gives the same sets. Two networks on one split are thus compared on the
    same draws, and interval(first - second, ...) is the interval of their difference.
    """
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, sheets, (count, sheets)) + sheets * np.arange(count)[:, None]
    return np.bincount(drawn.ravel(), minlength=count * sheets).reshape(count, sheets)


def interval(draws: np.ndarray, value: float) -> Interval:
    """The percentile interval of draws [B] of a figure; draws that are NaN are left out."""
    draws = draws[~np.isnan(draws)]
    low, high = np.quantile(draws, [0.025, 0.975]).tolist() if draws.size else (np.nan, np.nan)
    return Interval(float(value), low, high)


def ratio(numerator: np.ndarray, denominator: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float64 [B]: one quantity [I] over another [I], each summed by weights [B, I]; NaN for 0/0."""
    below = weights @ denominator
    return np.divide(weights @ numerator, below, out=np.full(len(weights), np.nan), where=below != 0)
