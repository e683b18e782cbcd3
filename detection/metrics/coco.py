"""COCO's detection figures, and what they leave out.

On a clean set the 12 figures are pycocotools' own to the last bit. Added are: the figures at a limit of
detections that fits the data (a sheet may hold 250 symbols of one class, and COCO counts 100), size bins that
fit the data, figures of each class, and the false positives of classes without ground truth, which COCO lets
go free. `metrics.boxes` holds the repairs that come before the matching, `metrics.matching` does it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from detection.metrics.accumulate import accumulate
from detection.metrics.boxes import Truth
from detection.metrics.engines import Engine, check_engine, run_engine
from detection.metrics.matching import AREAS, Matches, match, match_in_ranges

NAMES = (
    "AP",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR_1",
    "AR_10",
    "AR_100",
    "AR_small",
    "AR_medium",
    "AR_large",
)


@dataclass(frozen=True)
class ClassFigures:
    """Figures of one class at `Figures.max_detections`; -1 where the class has no ground truth."""

    category_id: int
    name: str
    boxes: int
    detections: int
    ap: float
    ap50: float
    ap75: float


@dataclass(frozen=True)
class SizeFigures:
    """Figures of the boxes whose side sqrt(area) lies in [low, high) pixels, at `Figures.max_detections`."""

    low: float
    high: float
    boxes: int
    ap: float
    ap50: float
    ar: float


@dataclass(frozen=True)
class Figures:
    """coco: the 12 figures in pycocotools' order, -1 for nothing to measure; fitted: at `max_detections`."""

    coco: tuple[float, ...]
    max_detections: int
    fitted: dict[str, float]
    sizes: list[SizeFigures]
    classes: list[ClassFigures]
    false_positives_without_truth: dict[str, int]  # by class, "name (id)" where classes share a name
    images: int
    boxes: int
    detections: int

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; the 12 figures by name."""
        return {**asdict(self), "coco": dict(zip(NAMES, self.coco, strict=True))}

    def table(self) -> str:
        """The 12 lines as pycocotools prints them."""
        rows = [
            (name, "0.50" if name == "AP50" else "0.75" if name == "AP75" else "0.50:0.95") for name in NAMES
        ]
        lines = []
        for (name, iou), value in zip(rows, self.coco, strict=True):
            title = "Average Precision  (AP)" if name.startswith("AP") else "Average Recall     (AR)"
            suffix = name.partition("_")[2]
            area = suffix if suffix in ("small", "medium", "large") else "all"
            limit = int(suffix) if suffix.isdigit() else 100
            lines.append(f" {title} @[ IoU={iou:<9} | area={area:>6s} | maxDets={limit:>3d} ] = {value:0.3f}")
        return "\n".join(lines)

    def details(self) -> str:
        """What the 12 lines leave out: the fitted limit, the fitted sizes, strays, each class."""
        fitted = ", ".join(f"{name} {value:.3f}" for name, value in self.fitted.items())
        lines = [f"at most {self.max_detections} detections of a class on a sheet: {fitted}"]
        for size in self.sizes:
            lines.append(
                f"boxes of {size.low:.0f} to {size.high:.0f} px: {size.boxes} boxes, "
                f"AP {size.ap:.3f}, AP50 {size.ap50:.3f}, AR {size.ar:.3f}"
            )
        stray = self.false_positives_without_truth
        if stray:
            named = ", ".join(f"{name} {count}" for name, count in stray.items())
            lines.append(f"detections at every score of classes without ground truth, not in any AP: {named}")
        lines.append(f"{'class':<32} {'boxes':>6} {'found':>6} {'AP':>6} {'AP50':>6} {'AP75':>6}")
        for row in self.classes:
            lines.append(
                f"{row.name[:32]:<32} {row.boxes:>6} {row.detections:>6} "
                f"{row.ap:>6.3f} {row.ap50:>6.3f} {row.ap75:>6.3f}"
            )
        return "\n".join(lines)


def measure(
    ground_truth: Mapping[str, Any],
    detections: Iterable[Mapping[str, Any]],
    max_detections: int | None = None,
    engine: Engine = "linework",
) -> tuple[Figures, Matches]:
    """Figures of `detections` against `ground_truth`, and the matches for all else.

    ground_truth: a COCO object (images, annotations, categories); it is not changed.
    detections: COCO results, each with image_id, category_id, bbox [x, y, w, h] in pixels and score.
    max_detections: a limit per class and sheet, 100 or more, beside COCO's 100; None fits it to the data.
    engine: what computes the figures, see `metrics.engines`; they are the same to the last bit.
    Raises DataError for an image or class that the ground truth does not know, for a number that is not
    finite, and for an engine that is not installed.
    """
    check_engine(engine)
    matches = match(ground_truth, detections, max_detections)
    return read_figures(matches, engine), matches


def evaluate(
    ground_truth: Mapping[str, Any],
    detections: Iterable[Mapping[str, Any]],
    max_detections: int | None = None,
    engine: Engine = "linework",
) -> Figures:
    """The figures of `measure` alone."""
    return measure(ground_truth, detections, max_detections, engine)[0]


def read_figures(matches: Matches, engine: Engine = "linework") -> Figures:
    """All figures of these matches; another engine than ours gets their boxes and matches them itself."""
    truth = matches.truth
    edges = fit_size_bins(truth)
    bins = [(low**2, float(np.nextafter(high**2, 0))) for low, high in itertools.pairwise(edges)]
    cells = _cells(matches, AREAS + bins, engine)
    whole = cells[0, matches.limit]
    classes = len(matches.category_ids)
    boxes = matches.positives.sum(0).tolist()
    found = np.bincount(matches.found.label, minlength=classes).tolist()
    rows = []
    for k, category_id in enumerate(matches.category_ids.tolist()):
        figures = mean_figures(whole, slice(k, k + 1))
        rows.append(
            ClassFigures(
                category_id=category_id,
                name=matches.names[k],
                boxes=boxes[k],
                detections=found[k],
                ap=figures["AP"],
                ap50=figures["AP50"],
                ap75=figures["AP75"],
            )
        )
    of_size = [mean_figures(cells[n, matches.limit]) for n in range(len(AREAS), len(AREAS + bins))]
    return Figures(
        coco=_coco_figures(cells),
        max_detections=matches.limit,
        fitted=mean_figures(whole),
        sizes=_size_figures(of_size, truth, edges),
        classes=rows,
        false_positives_without_truth=_stray(rows, matches),
        images=len(matches.image_ids),
        boxes=sum(boxes),
        detections=sum(found),
    )


# Precision [T, R, K] and recall [T, K], see `metrics.accumulate`.
Cell = tuple[np.ndarray, np.ndarray]


def _cells(matches: Matches, areas: list[tuple[float, float]], engine: Engine) -> dict[tuple[int, int], Cell]:
    """By the index of an area range and the limit of detections, what the figures are read from."""
    limits = sorted({1, 10, 100, matches.limit})
    if engine != "linework":
        precision, recall = run_engine(engine, matches, areas, limits)
        return {
            (n, limit): (precision[..., n, m], recall[..., n, m])
            for n in range(len(areas))
            for m, limit in enumerate(limits)
        }
    cells = {}
    ranges = match_in_ranges(matches, areas)
    for n, area in enumerate(areas):
        matched = next(ranges)
        for limit in limits if n == 0 else {100, matches.limit}:
            cells[n, limit] = accumulate(matches, limit, area, matched)
        del matched  # so that no two are held at a time
    return cells


def fit_size_bins(truth: Truth) -> list[float]:
    """Edges in pixels of up to three bins of sqrt(area) that hold a third of the boxes each.

    COCO's edges are 32 and 96 px, so that symbols of 20 to 60 px have an AP_large of -1. The edges are whole
    pixels, ascending, the first at or below the smallest box and the last above the largest.
    """
    sides = _sides(truth)
    if not sides.size:
        return []
    inner = np.round(np.quantile(sides, [1 / 3, 2 / 3]))
    return sorted({float(np.floor(sides.min())), *inner.tolist(), float(np.floor(sides.max()) + 1)})


def _sides(truth: Truth) -> np.ndarray:
    """float64 [N]: sqrt(area) in pixels of the boxes to find."""
    return np.sqrt(truth.area[~truth.crowd])


def _stray(rows: Sequence[ClassFigures], matches: Matches) -> dict[str, int]:
    """The number of detections of each class without boxes, less those in a crowd."""
    outside = np.bincount(matches.found.label[~matches.ignored[0]], minlength=len(rows)).tolist()
    bearers = Counter(row.name for row in rows)
    return {
        row.name if bearers[row.name] == 1 else f"{row.name} ({row.category_id})": number
        for row, number in zip(rows, outside, strict=True)
        if number and not row.boxes
    }


def _coco_figures(cells: Mapping[tuple[int, int], Cell]) -> tuple[float, ...]:
    """COCO's 12 as pycocotools' `summarize` takes them from its arrays."""
    of_area = [mean_figures(cells[area, 100]) for area in range(len(AREAS))]
    at_limit = [mean_figures(cells[0, limit]) for limit in (1, 10, 100)]
    return (
        *(of_area[0][name] for name in ("AP", "AP50", "AP75")),
        *(figures["AP"] for figures in of_area[1:]),
        *(figures["AR"] for figures in at_limit),
        *(figures["AR"] for figures in of_area[1:]),
    )


def mean_figures(cell: Cell, classes: slice = slice(None)) -> dict[str, float]:
    """AP, AP50, AP75 and AR of some classes; -1 where there is nothing to measure."""
    precision, recall = cell[0][:, :, classes], cell[1][:, classes]
    values = {"AP": precision, "AP50": precision[0], "AP75": precision[5], "AR": recall}
    return {name: float(np.mean(v[v > -1])) if (v > -1).any() else -1.0 for name, v in values.items()}


def _size_figures(
    of_size: Sequence[Mapping[str, float]], truth: Truth, edges: Sequence[float]
) -> list[SizeFigures]:
    sides = _sides(truth)
    rows = []
    for (low, high), figures in zip(itertools.pairwise(edges), of_size, strict=True):
        boxes = int(((sides >= low) & (sides < high)).sum())
        rows.append(SizeFigures(low, high, boxes, figures["AP"], figures["AP50"], figures["AR"]))
    return rows
