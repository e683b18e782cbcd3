"""Everything that the report says about a detector beyond the COCO figures, read off the matches alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from detection.metrics.bootstrap import average_precision
from detection.metrics.counts import Counts, count, count_figures, plain, share
from detection.metrics.curves import Curves, Operating, best_thresholds, curves, operating
from detection.metrics.matching import Matches
from detection.metrics.tide import Kinds, confusion_matrix, delta_ap50, kinds_of
from schematics.resampling import Interval, interval, resample

FEWEST_SHEETS = 5  # that a class must be on to get an interval of its own


@dataclass(frozen=True)
class Analysis:
    """Classes are in the order of `matches.category_ids`; for the letters see `metrics.matching`."""

    matches: Matches
    thresholds: np.ndarray  # float64 [K]
    thresholds_given: bool  # False where they were chosen on the very sheets they are judged on
    # "AP", "AP50" and "AP75" at matches.limit, "F1" of all classes pooled, and those of `count_figures`.
    intervals: dict[str, Interval]
    class_ap50: list[Interval]  # [K]
    resamples: int
    seed: int
    curves: Curves
    operating: Operating
    kinds: Kinds  # of detections above their thresholds
    delta_ap50: dict[str, float]  # by kind of error
    confusion: np.ndarray  # int64 [K + 1, K + 1]
    counts: Counts

    @property
    def sheet_f1(self) -> np.ndarray:
        """float64 [I]: F1 of each sheet at the thresholds; NaN for a sheet without boxes or detections."""
        right, made, boxes = _sheet_totals(self.matches, self.matches.above(self.thresholds))
        return np.divide(2.0 * right, made + boxes, out=np.full(len(boxes), np.nan), where=made + boxes > 0)

    def summary(self) -> str:
        """The intervals and the counts, in two lines."""
        counts, at = self.counts, self.intervals
        figures = ", ".join(f"{name} {at[name]}" for name in ("AP", "AP50", "AP75", "F1"))
        pairs, sheets = int(counts.pairs.sum()), len(counts.truth)
        right = int(counts.exact.sum()), int((counts.error == 0).all(1).sum())
        return (
            f"95 % of {self.resamples} resamples of the {sheets} sheets: {figures}\n"
            f"at the thresholds {counts.found.sum()} symbols are counted, {counts.truth.sum()} are labelled; "
            f"{right[0]} of {pairs} classes on a sheet counted right {at['exact_pairs']}, "
            f"{right[1]} of {sheets} sheets {at['exact_sheets']}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything but the curves and single boxes, ready for JSON; None stands for NaN."""
        ids = self.matches.category_ids.tolist()
        classes = [
            {
                "id": number,
                "name": self.matches.names[k],
                "boxes": self.operating.boxes[k],
                "threshold": self.thresholds[k],
                "AP50": asdict(self.class_ap50[k]),
                "precision": self.operating.precision[k],
                "recall": self.operating.recall[k],
                "F1": self.operating.f1[k],
            }
            for k, number in enumerate(ids)
        ]
        return plain(
            {
                "max_detections": self.matches.limit,
                "thresholds_given": self.thresholds_given,
                "resamples": self.resamples,
                "seed": self.seed,
                "intervals": {name: asdict(value) for name, value in self.intervals.items()},
                "errors": {"delta_ap50": self.delta_ap50, "counts": self.kinds.counts()},
                "classes": classes,
                "confusion": self.confusion.tolist(),
            }
        )


def analyse(
    matches: Matches,
    *,
    thresholds: Mapping[int, float] | None = None,
    resamples: int = 500,
    seed: int = 0,
) -> Analysis:
    """Analyse the matches of `metrics.coco.measure`.

    thresholds: by category id, the score from which a detection counts. A class that is not named gets the
    one with the highest F1 on these sheets. resamples, seed: of the bootstrap behind the intervals.
    """
    given = thresholds or {}
    chosen = np.array(
        [given.get(number, best) for number, best in fit_thresholds(matches).items()], np.float64
    )
    kept = matches.above(chosen)
    weights = resample(len(matches.image_ids), resamples, seed)
    draws, exact = average_precision(matches, weights), average_precision(matches)
    right, made, boxes = _sheet_totals(matches, kept)
    counts = count(matches, kept)
    return Analysis(
        matches=matches,
        thresholds=chosen,
        thresholds_given=bool(given),
        intervals={
            **{name: interval(draws[name], exact[name][0]) for name in ("AP", "AP50", "AP75")},
            "F1": share(2 * right, made + boxes, weights),
            **count_figures(counts, weights),
        },
        class_ap50=_class_intervals(matches, draws["AP50_class"], exact["AP50_class"][0]),
        resamples=resamples,
        seed=seed,
        curves=curves(matches),
        operating=operating(matches, kept),
        kinds=kinds_of(matches, kept),
        delta_ap50=delta_ap50(matches),
        confusion=confusion_matrix(matches, kept),
        counts=counts,
    )


def fit_thresholds(matches: Matches) -> dict[int, float]:
    """By category id, the score from which a detection should count: that of the highest F1 on these sheets.

    Fit them on valid, keep them with the detector, judge them on test. See `curves.best_thresholds`.
    """
    return dict(zip(matches.category_ids.tolist(), best_thresholds(matches).tolist(), strict=True))


def _class_intervals(matches: Matches, draws: np.ndarray, values: np.ndarray) -> list[Interval]:
    """AP50 of each class, from its draws [B, K]; the bounds of a class on too few sheets are NaN."""
    sheets = (matches.positives > 0).sum(0)
    draws = np.where(sheets < FEWEST_SHEETS, np.nan, draws)
    return [interval(draws[:, k], value) for k, value in enumerate(values.tolist())]


def _sheet_totals(matches: Matches, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right detections, all detections and boxes of each sheet, int64 [I] each."""
    sheet, sheets = matches.found.sheet, len(matches.image_ids)
    return (
        np.bincount(sheet[matches.right(kept)], minlength=sheets),
        np.bincount(sheet[matches.counted(kept)], minlength=sheets),
        matches.positives.sum(1),
    )
