"""Do ranges of counts hold what they promise? Measured on labelled sheets that they were not fitted on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from detection.metrics.counts import plain, share
from detection.metrics.ranges import Ranges, Tally, with_total
from schematics.resampling import Interval, resample

FOUND, UNFOUND, TOTAL = "found", "not found", "total"
KINDS = {
    FOUND: "classes found on a sheet",
    UNFOUND: "classes not found on a sheet",
    TOTAL: "sheets, all classes together",
}


@dataclass(frozen=True)
class Kind:
    """What came of the ranges of one kind, see KINDS."""

    holds: Interval  # share of the ranges that hold the true count
    width: float  # mean number of symbols from the lowest to the highest count
    ranges: int
    without: int  # pairs of a sheet and a class for which nothing is promised, in no other figure


@dataclass(frozen=True)
class Coverage:
    """Ranges beside the truth, [I, K + 1] with the total last; for the letters see `metrics.ranges`."""

    ranges: Ranges
    low: np.ndarray  # float64, NaN where nothing is promised
    high: np.ndarray  # float64
    found: np.ndarray  # int64
    truth: np.ndarray  # int64

    @cached_property
    def promised(self) -> np.ndarray:
        """bool [I, K + 1]"""
        return ~np.isnan(self.low)

    @cached_property
    def holds(self) -> np.ndarray:
        """bool [I, K + 1]: the ranges that hold the true count"""
        return (self.low <= self.truth) & (self.truth <= self.high)

    @cached_property
    def width(self) -> np.ndarray:
        """float64 [I, K + 1], in symbols; 0 where nothing is promised"""
        return np.where(self.promised, self.high - self.low, 0.0)

    def pairs(self, kind: str) -> np.ndarray:
        """bool [I, K + 1]: the pairs of a sheet and a class, or its total, that are of this kind"""
        pairs = np.zeros(self.found.shape, bool)
        if kind == TOTAL:
            pairs[:, -1] = True
        else:
            pairs[:, :-1] = (self.found[:, :-1] > 0) == (kind == FOUND)
        return pairs

    def figures(self, resamples: int = 500, seed: int = 0) -> dict[str, Kind]:
        """By kind, with intervals of the bootstrap over sheets."""
        weights = resample(len(self.low), resamples, seed)
        return {kind: self._figures(self.pairs(kind), weights) for kind in KINDS}

    def summary(self) -> str:
        """What the ranges held on these sheets, in a line."""
        said = [
            f"{row.holds} of {row.ranges} {KINDS[kind]} (mean width {row.width:.1f})"
            for kind, row in self.figures().items()
            if row.ranges
        ]
        held = ", ".join(said) or "nothing, as no class here has one"
        return f"{100 * self.ranges.level:g} % ranges of the counts held the true one for {held}"

    def to_dict(self) -> dict[str, Any]:
        """The figures by kind, and by class where it was found; None stands for NaN. Ready for JSON."""
        kinds = {kind: asdict(row) for kind, row in self.figures().items()}
        made = self.promised & self.pairs(FOUND)
        classes = [
            {
                "name": name,
                "ranges": int(made[:, k].sum()),
                "hold": int((self.holds & made)[:, k].sum()),
                "width": float(self.width[:, k].sum(where=made[:, k]) / max(1, made[:, k].sum())),
                "labelled_sheets": self.ranges.found[k].sheets,
                "pooled": self.ranges.found[k].pooled,
            }
            for k, name in enumerate(self.ranges.names)
        ]
        return plain({"level": self.ranges.level, "sheets": self.ranges.sheets, **kinds, "classes": classes})

    def _figures(self, pairs: np.ndarray, weights: np.ndarray) -> Kind:
        made = self.promised & pairs
        number = int(made.sum())
        return Kind(
            holds=share((self.holds & made).sum(1), made.sum(1), weights),
            width=float(self.width[made].mean()) if number else np.nan,
            ranges=number,
            without=int((pairs & ~self.promised).sum()),
        )


def cover(ranges: Ranges, counted: Tally, truth: np.ndarray) -> Coverage:
    """Ranges of these counts beside the true numbers, int64 [I, K]."""
    low, high = ranges.bounds(counted)
    return Coverage(ranges, low, high, counted.found, with_total(truth))
