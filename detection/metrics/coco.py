"""COCO's detection figures, and what they leave out.

On a clean set the 12 figures are pycocotools' own to the last bit. Added are: the figures at a limit of
detections that fits the data (a sheet may hold 250 symbols of one class, and COCO counts 100), size bins that
fit the data, figures of each class, and the false positives of classes without ground truth, which COCO lets
go free. `metrics.matching` holds the engine and the repairs that come before it.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from detection.metrics.matching import (
    AREAS,
    Engine,
    EngineRun,
    Matches,
    prepare,
    read_matches,
    repair,
    run_engine,
)

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
    engine: Engine = "pycocotools",
) -> tuple[Figures, Matches]:
    """Figures of `detections` against `ground_truth`, and the matches for all else, by one run of the engine.

    ground_truth: a COCO object (images, annotations, categories); it is not changed.
    detections: COCO results, each with image_id, category_id, bbox [x, y, w, h] in pixels and score.
    max_detections: a limit per class and sheet, 100 or more, beside COCO's 100; None fits it to the data.
    Raises DataError for an image or class that the ground truth does not know, for a number that is not
    finite, and for an engine that is not installed.
    """
    truth = repair(ground_truth)
    found = prepare(truth, detections)
    edges = fit_size_bins(truth["annotations"])
    bins = [[low**2, float(np.nextafter(high**2, 0))] for low, high in itertools.pairwise(edges)]
    run = run_engine(truth, found, AREAS + bins, max_detections, engine)
    matches = read_matches(run)
    return read_figures(run, matches, edges), matches


def evaluate(
    ground_truth: Mapping[str, Any],
    detections: Iterable[Mapping[str, Any]],
    max_detections: int | None = None,
    engine: Engine = "pycocotools",
) -> Figures:
    """The figures of `measure` alone."""
    return measure(ground_truth, detections, max_detections, engine)[0]


def read_figures(run: EngineRun, matches: Matches, edges: list[float]) -> Figures:
    """The figures of a run over AREAS and the size bins between `edges`; `matches` are those of the run."""
    with contextlib.redirect_stdout(io.StringIO()):
        for evaluator in run.evaluators:
            evaluator.accumulate()
    arrays = {
        name: np.concatenate([evaluator.eval[name] for evaluator in run.evaluators], axis=-2)
        for name in ("precision", "recall")
    }
    limit = list(run.evaluators[0].params.maxDets).index(run.limit)
    annotations = run.truth["annotations"]
    boxes_of = Counter(a["category_id"] for a in annotations if not a["iscrowd"])
    found_of = Counter(d["category_id"] for d in run.found)
    rows = []
    for k, category_id in enumerate(matches.category_ids.tolist()):
        figures = _mean_figures(arrays, slice(k, k + 1), 0, limit)
        rows.append(
            ClassFigures(
                category_id=category_id,
                name=matches.names[k],
                boxes=boxes_of[category_id],
                detections=found_of[category_id],
                ap=figures["AP"],
                ap50=figures["AP50"],
                ap75=figures["AP75"],
            )
        )
    return Figures(
        coco=_coco_figures(arrays),
        max_detections=run.limit,
        fitted=_mean_figures(arrays, slice(None), 0, limit),
        sizes=_size_figures(arrays, annotations, edges, limit),
        classes=rows,
        false_positives_without_truth=_stray(rows, matches),
        images=len(run.truth["images"]),
        boxes=sum(boxes_of.values()),
        detections=len(run.found),
    )


def fit_size_bins(annotations: Sequence[Mapping[str, Any]]) -> list[float]:
    """Edges in pixels of up to three bins of sqrt(area) that hold a third of the boxes each.

    COCO's edges are 32 and 96 px, so that symbols of 20 to 60 px have an AP_large of -1. The edges are whole
    pixels, ascending, the first at or below the smallest box and the last above the largest.
    """
    sides = _sides(annotations)
    if not sides.size:
        return []
    inner = np.round(np.quantile(sides, [1 / 3, 2 / 3]))
    return sorted({float(np.floor(sides.min())), *inner.tolist(), float(np.floor(sides.max()) + 1)})


def _sides(annotations: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """float64 [N]: sqrt(area) in pixels of the boxes to find."""
    return np.sqrt([a["area"] for a in annotations if not a["iscrowd"]])


def _stray(rows: Sequence[ClassFigures], matches: Matches) -> dict[str, int]:
    """The number of detections of each class without boxes, less those that count and lie in a crowd."""
    in_crowd = matches.ignored[0] & (matches.found.rank < matches.limit)
    outside = np.bincount(matches.found.label[~in_crowd], minlength=len(rows)).tolist()
    bearers = Counter(row.name for row in rows)
    return {
        row.name if bearers[row.name] == 1 else f"{row.name} ({row.category_id})": number
        for row, number in zip(rows, outside, strict=True)
        if number and not row.boxes
    }


def _coco_figures(arrays: Mapping[str, Any]) -> tuple[float, ...]:
    """COCO's 12 as pycocotools' `summarize` takes them from its arrays; the limits begin with 1, 10, 100."""
    everything = slice(None)
    of_area = [_mean_figures(arrays, everything, area, 2) for area in range(len(AREAS))]
    at_limit = [_mean_figures(arrays, everything, 0, limit) for limit in (0, 1, 2)]
    return (
        *(of_area[0][name] for name in ("AP", "AP50", "AP75")),
        *(figures["AP"] for figures in of_area[1:]),
        *(figures["AR"] for figures in at_limit),
        *(figures["AR"] for figures in of_area[1:]),
    )


def _mean_figures(arrays: Mapping[str, Any], classes: slice, area: int, limit: int) -> dict[str, float]:
    """AP, AP50, AP75 and AR of some classes, one area range and one limit, each by its index."""
    precision = arrays["precision"][:, :, classes, area, limit]  # [IoU, recall, class]
    recall = arrays["recall"][:, classes, area, limit]  # [IoU, class]
    values = {"AP": precision, "AP50": precision[0], "AP75": precision[5], "AR": recall}
    return {name: float(np.mean(v[v > -1])) if (v > -1).any() else -1.0 for name, v in values.items()}


def _size_figures(
    arrays: Mapping[str, Any], annotations: Sequence[Mapping[str, Any]], edges: list[float], limit: int
) -> list[SizeFigures]:
    sides = _sides(annotations)
    rows = []
    for n, (low, high) in enumerate(itertools.pairwise(edges)):
        figures = _mean_figures(arrays, slice(None), len(AREAS) + n, limit)
        boxes = int(((sides >= low) & (sides < high)).sum())
        rows.append(SizeFigures(low, high, boxes, figures["AP"], figures["AP50"], figures["AR"]))
    return rows
