"""Ranges that hold the true count of a class on a sheet with a promised probability, from labelled sheets.

Split conformal prediction (Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World, 2005; Lei et
al. 2018, arXiv 1604.04173; Angelopoulos and Bates, arXiv 2107.07511). On each labelled sheet the error of a
count is divided by its spread, what the scores themselves say of their doubt: each detection of the class,
also below its threshold, is there or not with its score as the probability, so that the count's variance is
that of a Poisson binomial, the sum of s (1 - s). A range reaches as many spreads to either side of the count
as hold a share `level` of the labelled sheets and of one more. That is right whether scores are calibrated or
not; scores that are make ranges narrow.

What is assumed: the sheets to be counted and the labelled ones are exchangeable, as draws in any order from
one pile of sheets are. Nothing is promised for another customer's, scanner's or year's sheets.

A class has a range of its own for the sheets on which it was found and for those on which it was not
("Mondrian" classes of Vovk et al.): else the many sheets without a class would pay for wrong counts on the
few that have it. Where fewer than OWN labelled sheets are behind that, such classes are pooled, in the
weights of Lee, Barber and Willett (arXiv 2306.06342, HCP), as the classes on one sheet are not independent:
the promise is then for one of these classes picked at random, not for each.

Letters in shapes: I sheets, K classes, D detections. The last of K + 1 columns is the sheet's total.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from detection.metrics.curves import best_thresholds
from detection.metrics.matching import Matches

LEVEL = 0.9  # the probability that is promised
FOLDS = 10  # parts of the labelled sheets for `cross_tally`
OWN = 19  # sheets from which on 90 % can do without the sheet that is furthest off


@dataclass(frozen=True)
class Tally:
    """Counts of detections above their thresholds, and their spreads in symbols, [I, K + 1] each."""

    found: np.ndarray  # int64
    spread: np.ndarray  # float64, 1 or more

    def on(self, sheets: np.ndarray) -> Tally:
        """That of some of the sheets, int64 [J]."""
        return Tally(self.found[sheets], self.spread[sheets])


def tally(
    sheet: np.ndarray, label: np.ndarray, score: np.ndarray, thresholds: np.ndarray, sheets: int
) -> Tally:
    """Count the detections with sheet int [D], label int [D] from 0 on and score float [D].

    thresholds: float64 [K], the score from which a detection of a class counts. sheets: I.
    """
    found = np.zeros((sheets, len(thresholds)), np.int64)
    variance = np.zeros(found.shape)
    counts = score >= thresholds[label]
    np.add.at(found, (sheet[counts], label[counts]), 1)
    np.add.at(variance, (sheet, label), score * (1 - score))
    # The 1 stands for symbols of which there is no detection at all.
    return Tally(with_total(found), np.sqrt(1 + with_total(variance)))


def tally_matches(matches: Matches, thresholds: np.ndarray) -> Tally:
    """The tally of all sheets, without detections that lie in a crowd."""
    counted = matches.counted(np.ones(len(matches.found.score), bool))
    found = matches.found
    sheet, label, score = (part[counted] for part in (found.sheet, found.label, found.score))
    return tally(sheet, label, score, thresholds, len(matches.image_ids))


def cross_tally(matches: Matches, sheets: np.ndarray) -> Tally:
    """The tally of the sheets int64 [J], each counted at thresholds that were fitted on other ones of them.

    At thresholds that were fitted on the very sheets, their counts are better than those of new sheets will
    be, and ranges would be too narrow. So each of FOLDS parts is counted at the best thresholds of the others
    (cross-conformal prediction, Vovk, arXiv 1208.0806; CV+ of Barber et al., arXiv 1905.02928).
    """
    part = np.arange(len(sheets)) % FOLDS
    found = np.zeros((len(sheets), len(matches.category_ids) + 1), np.int64)
    spread = np.ones(found.shape)
    for fold in np.unique(part).tolist():
        others = np.isin(np.arange(len(matches.image_ids)), sheets[part != fold])
        counted = tally_matches(matches, best_thresholds(matches, others)).on(sheets[part == fold])
        found[part == fold], spread[part == fold] = counted.found, counted.spread
    return Tally(found, spread)


def fewest(level: float) -> int:
    """The labelled sheets without which nothing can be promised at this level: 9 for 90 %."""
    return math.ceil(round(1 / (1 - level), 6)) - 1


def why_none(sheets: int, level: float = LEVEL) -> str:
    """Why so many labelled sheets can promise nothing, in words; "" where they can."""
    if sheets >= (least := fewest(level)):
        return ""
    labelled = f"{sheets} labelled sheet{'s' * (sheets != 1)}"
    return f"{labelled} can't promise {100 * level:g} % for a count: that takes {least}"


def reach(errors: np.ndarray, sheet: np.ndarray, level: float = LEVEL) -> float:
    """How far a range must reach to hold the truth of a new sheet with probability `level`.

    errors: float [P], in spreads, of pairs of a class and a sheet. sheet: int [P]. Each of n sheets has the
    weight 1 / (n + 1), shared by its pairs (arXiv 2306.06342, HCP); with one pair a sheet this is the
    ceil((n + 1) level)-th error (arXiv 2107.07511, section 1). inf where n is below `fewest`.
    """
    sheets, place, pairs = np.unique(sheet, return_inverse=True, return_counts=True)
    order = np.argsort(errors, kind="stable")
    weights = np.cumsum(1 / pairs[place[order]]) / (len(sheets) + 1)
    enough = np.flatnonzero(weights >= level - 1e-9)
    return float(errors[order[enough[0]]]) if len(enough) else np.inf


@dataclass(frozen=True)
class Basis:
    """What the ranges of a class rest on."""

    reach: float = 0.0  # spreads to either side of the count; of no meaning with too few sheets
    sheets: int = 0  # labelled ones behind it
    pooled: bool = False  # whether rare classes share it


@dataclass(frozen=True)
class Ranges:
    """Fitted ranges, by class in the order of `names`. It is a part of model.pt and of ranges.json."""

    names: tuple[str, ...]
    thresholds: tuple[float, ...]  # at which was counted: ranges of other counts would be others
    scale: float  # at which sheets were seen
    boxes: tuple[int, ...]  # of the class on the labelled sheets
    sheets: int  # labelled ones
    found: tuple[Basis, ...]  # where the class was found
    unfound: tuple[Basis, ...]  # where it was not
    total: Basis  # of all classes together
    level: float = LEVEL

    def bounds(self, counted: Tally) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest count of each range, float64 [I, K + 1]; NaN where nothing is promised."""
        there, not_there = (
            np.array([basis.reach if self.holds(basis) else np.nan for basis in (*part, self.total)])
            for part in (self.found, self.unfound)
        )
        half = counted.spread * np.where(counted.found > 0, there, not_there)
        low, high = np.ceil(counted.found - half - 1e-9), np.floor(counted.found + half + 1e-9)
        return np.maximum(low, 0), high

    def holds(self, basis: Basis) -> bool:
        """Whether there are sheets enough behind it to promise anything."""
        return basis.sheets >= fewest(self.level)

    def of(self, names: tuple[str, ...]) -> Ranges:
        """The same for other classes or another order of them, by name.

        A class that is not among the fitted ones, or whose name two of them have, gets no range, and the
        total has one only where the classes are the same.
        """
        if names == self.names:
            return self
        place = {name: k for k, name in enumerate(self.names) if self.names.count(name) == 1}
        places = [place.get(name) if names.count(name) == 1 else None for name in names]
        return Ranges(
            names=names,
            thresholds=tuple(1.0 if k is None else self.thresholds[k] for k in places),
            scale=self.scale,
            boxes=tuple(0 if k is None else self.boxes[k] for k in places),
            sheets=self.sheets,
            found=tuple(Basis() if k is None else self.found[k] for k in places),
            unfound=tuple(Basis() if k is None else self.unfound[k] for k in places),
            total=self.total if sorted(names) == sorted(place) else Basis(),
            level=self.level,
        )

    def flaw(self) -> str:
        """What is wrong with ranges that come from a file, in words; "" for those that a fit gives."""
        columns = (self.thresholds, self.boxes, self.found, self.unfound)
        if any(len(column) != len(self.names) for column in columns):
            return "ranges are not one for each class"
        bases = (*self.found, *self.unfound, self.total)
        if any(basis.reach < 0 or basis.sheets < 0 for basis in bases) or not 0 < self.level < 1:
            return "ranges have a number below 0, or a level that is no probability"
        return ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def widest_first(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """int64 [I]: the sheets in the order to look at them, from bounds [I, K + 1].

    By the sum of the widths over the classes, as errors of two classes can make up for each other in the
    total. Of equal width, the first comes first.
    """
    return np.argsort(-np.nansum((high - low)[:, :-1], 1), kind="stable")


def fit_ranges_of(
    matches: Matches,
    thresholds: Mapping[int, float],
    names: Mapping[int, str],
    scale: float,
    fitted_here: bool,
) -> Ranges:
    """Fit ranges on the sheets of the matches. thresholds, names: by category id; scale: as in `Ranges`.

    fitted_here: whether the thresholds were fitted on these very sheets, see `cross_tally`.
    """
    ids = matches.category_ids.tolist()
    least = np.array([thresholds[number] for number in ids], np.float64)
    called = tuple(names[number] for number in ids)
    every = np.arange(len(matches.image_ids))
    counted = cross_tally(matches, every) if fitted_here else tally_matches(matches, least)
    return fit_ranges(called, counted, matches.positives, least, scale)


def fit_ranges(
    names: tuple[str, ...],
    counted: Tally,
    truth: np.ndarray,
    thresholds: np.ndarray,
    scale: float = 1.0,
    level: float = LEVEL,
) -> Ranges:
    """Fit ranges on labelled sheets, whose true counts are int64 [I, K]. No two are views of one drawing.

    thresholds: float64 [K], at which other sheets will be counted. scale: at which the sheets were seen.
    """
    sheets, classes = truth.shape
    errors = abs(counted.found - with_total(truth)) / counted.spread
    was_found = counted.found[:, :classes] > 0
    seen = truth.sum(0) > 0
    found, unfound = (_bases(errors[:, :classes], rows, seen, level) for rows in (was_found, ~was_found))
    return Ranges(
        names=names,
        thresholds=tuple(thresholds.tolist()),
        scale=scale,
        boxes=tuple(truth.sum(0).tolist()),
        sheets=sheets,
        found=found,
        unfound=unfound,
        total=_basis(errors[:, classes:], np.ones((sheets, 1), bool), level),
        level=level,
    )


def _bases(errors: np.ndarray, rows: np.ndarray, seen: np.ndarray, level: float) -> tuple[Basis, ...]:
    """Of each class, from its errors [I, K] on the sheets bool rows [I, K]; unseen classes get none."""
    own = rows.sum(0) >= OWN
    pooled = _basis(errors, rows & seen & ~own, level, pooled=True)
    alone = [_basis(errors[:, [k]], rows[:, [k]], level) for k in range(len(own))]
    return tuple((alone[k] if own[k] else pooled) if seen[k] else Basis() for k in range(len(own)))


def _basis(errors: np.ndarray, rows: np.ndarray, level: float, pooled: bool = False) -> Basis:
    furthest = reach(errors[rows], np.nonzero(rows)[0], level)
    return Basis(furthest if np.isfinite(furthest) else 0.0, int(rows.any(1).sum()), pooled)


def with_total(table: np.ndarray) -> np.ndarray:
    """[I, K + 1] of [I, K]"""
    return np.hstack([table, table.sum(1, keepdims=True)])
