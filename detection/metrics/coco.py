"""COCO detection figures: pycocotools as the reference, its known traps closed.

pycocotools stays the engine, so on a clean set the 12 figures are its own to the last bit. hotcoco (the extra
"fast") is another, faster and equal to the bit after the same repairs. What is repaired
before either sees the data: annotation ids (it never matches id 0 and confuses doubled ids), missing `area`,
`iscrowd` and `info`, empty predictions, the order of tied scores. What is added: the figures at a limit of
detections that fits the data (a sheet may hold 250 symbols of one class; COCO counts 100), size bins that fit
the data, figures per class, and the false positives of classes without ground truth, which COCO lets go free.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from schematics.sheets import DataError

Engine = Literal["pycocotools", "hotcoco"]

NAMES = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip
# COCO's area ranges in square pixels: all, small, medium, large.
AREAS = [[0.0, 1e10], [0.0, 32.0**2], [32.0**2, 96.0**2], [96.0**2, 1e10]]


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

    @property
    def ap(self) -> float:
        return self.coco[0]

    @property
    def ap50(self) -> float:
        return self.coco[1]

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


def evaluate(
    ground_truth: Mapping[str, Any],
    detections: Iterable[Mapping[str, Any]],
    max_detections: int | None = None,
    engine: Engine = "pycocotools",
) -> Figures:
    """Figures of `detections` against `ground_truth`.

    ground_truth: a COCO object dict (images, annotations, categories); it is not changed.
    detections: COCO results: image_id, category_id, bbox [x, y, w, h] in pixels, score.
    max_detections: a limit per class and sheet, 100 or more, beside COCO's 100; None fits it to the data.
    Raises DataError for an image or class the ground truth does not know, for a number that isn't finite, and
    for an engine that isn't installed.
    """
    truth = repair(ground_truth)
    found = prepare(truth, detections)
    limit = max(100, max_detections or fit_max_detections(truth["annotations"]))
    edges = fit_size_bins(truth["annotations"])
    # A further limit above 100 and further area ranges leave the standard figures alone: matching goes down
    # the scores, and each range is matched by itself.
    limits = sorted({1, 10, 100, limit})
    bins = [[low**2, float(np.nextafter(high**2, 0))] for low, high in itertools.pairwise(edges)]
    evaluator = match_boxes(truth, found, limits, AREAS + bins, engine)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.accumulate()
    arrays, class_ids = evaluator.eval, evaluator.params.catIds
    everything, last = slice(None), len(limits) - 1
    fitted = _mean_figures(arrays, everything, 0, last)
    boxes_of = Counter(a["category_id"] for a in truth["annotations"] if not a["iscrowd"])
    found_of = Counter(d["category_id"] for d in found)
    rows = []
    by_id = {c["id"]: c["name"] for c in truth["categories"]}
    for k, category_id in enumerate(class_ids):
        figures = _mean_figures(arrays, slice(k, k + 1), 0, last)
        rows.append(
            ClassFigures(
                category_id=int(category_id),
                name=by_id[category_id],
                boxes=boxes_of[category_id],
                detections=found_of[category_id],
                ap=figures["AP"],
                ap50=figures["AP50"],
                ap75=figures["AP75"],
            )
        )
    return Figures(
        coco=_coco_figures(arrays),
        max_detections=limit,
        fitted=fitted,
        sizes=_size_figures(arrays, truth["annotations"], edges, last),
        classes=rows,
        false_positives_without_truth=_stray(rows, evaluator),
        images=len(truth["images"]),
        boxes=sum(boxes_of.values()),
        detections=len(found),
    )


def _stray(rows: Sequence[ClassFigures], evaluator: Any) -> dict[str, int]:
    """Detections of classes without boxes to find; what lies in a crowd is not counted."""
    in_crowd: Counter[int] = Counter()
    for sheet in filter(None, evaluator.evalImgs):
        if list(sheet["aRng"]) == AREAS[0]:
            in_crowd[int(sheet["category_id"])] += int(np.sum(np.asarray(sheet["dtIgnore"])[0]))
    stray: Counter[str] = Counter()
    shared = Counter(row.name for row in rows)
    for row in rows:
        if not row.boxes:
            name = row.name if shared[row.name] == 1 else f"{row.name} ({row.category_id})"
            stray[name] = row.detections - in_crowd[row.category_id]
    return {name: count for name, count in stray.items() if count}


def fit_max_detections(annotations: Sequence[Mapping[str, Any]]) -> int:
    """Twice the most boxes of one class on one sheet, rounded up to hundreds; at least COCO's 100."""
    return max(100, 100 * math.ceil(2 * fullest(annotations) / 100))


def fullest(rows: Iterable[Mapping[str, Any]]) -> int:
    """The most annotations or detections of one class on one sheet."""
    return max(Counter((row["image_id"], row["category_id"]) for row in rows).values(), default=0)


def fit_size_bins(annotations: Sequence[Mapping[str, Any]]) -> list[float]:
    """Edges in pixels of up to three bins of sqrt(area) that hold a third of the boxes each.

    COCO's edges are 32 and 96 px: with symbols of 20 to 60 px its AP_large is -1. Returned edges are whole
    pixels, ascending, the first at or below the smallest box and the last above the largest.
    """
    sides = np.sqrt([a["area"] for a in annotations if not a["iscrowd"]])
    if not sides.size:
        return []
    inner = np.round(np.quantile(sides, [1 / 3, 2 / 3]))
    return sorted({float(np.floor(sides.min())), *inner.tolist(), float(np.floor(sides.max()) + 1)})


def repair(ground_truth: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with what pycocotools relies on: ids 1..N, area, iscrowd, info."""
    annotations = []
    for number, annotation in enumerate(ground_truth["annotations"], start=1):
        _, _, width, height = annotation["bbox"]
        annotations.append(
            {
                "id": number,
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "bbox": [float(value) for value in annotation["bbox"]],
                "area": annotation.get("area") or float(width) * float(height),
                "iscrowd": int(annotation.get("iscrowd") or 0),
            }
        )
    return {
        "info": {},
        "images": [dict(image) for image in ground_truth["images"]],
        "categories": [dict(category) for category in ground_truth["categories"]],
        "annotations": annotations,
    }


def prepare(truth: Mapping[str, Any], detections: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Detections checked, in an order that does not depend on how they came, with ids 1..N and area."""
    images = {image["id"] for image in truth["images"]}
    classes = {category["id"] for category in truth["categories"]}
    rows = []
    for row in detections:
        if row["image_id"] not in images:
            raise DataError(f"predictions: image_id {row['image_id']} is not in the ground truth; "
                            "evaluate against the split that was predicted")  # fmt: skip
        if row["category_id"] not in classes:
            raise DataError(f"predictions: category_id {row['category_id']} is not in the ground truth; "
                            "write the data set's own category ids")  # fmt: skip
        box = [float(value) for value in row["bbox"]]
        score = float(row["score"])
        if not all(map(math.isfinite, [*box, score])):
            raise DataError(f"predictions: image_id {row['image_id']} has a box or score that is not finite")
        rows.append((-score, row["image_id"], row["category_id"], box))
    return [
        {"id": n, "image_id": image, "category_id": category, "bbox": box, "score": -negated,
         "area": box[2] * box[3], "iscrowd": 0}
        for n, (negated, image, category, box) in enumerate(sorted(rows), start=1)
    ]  # fmt: skip


def match_boxes(
    truth: Mapping[str, Any],
    found: list[dict[str, Any]],
    limits: list[int],
    areas: list[list[float]],
    engine: Engine = "pycocotools",
) -> Any:
    """The engine's COCOeval after `evaluate`, of what `repair` and `prepare` made.

    limits: detections of a class on a sheet, ascending. areas: ranges in square pixels.
    Raises DataError for an engine that isn't installed.
    """
    kinds = coco_classes(engine)
    with contextlib.redirect_stdout(io.StringIO()):
        gt, dt = kinds[0](), kinds[0]()
        gt.dataset = truth
        dt.dataset = {**truth, "annotations": found}
        gt.createIndex()
        dt.createIndex()
        evaluator = kinds[1](gt, dt, "bbox")
        evaluator.params.maxDets = limits
        evaluator.params.areaRng = areas
        evaluator.params.areaRngLbl = [str(n) for n in range(len(areas))]
        evaluator.evaluate()
    return evaluator


def coco_classes(engine: Engine) -> tuple[Any, Any]:
    """COCO and COCOeval of an engine. Raises DataError that names the cure where it isn't installed."""
    homes = {"pycocotools": ("pycocotools.coco", "pycocotools.cocoeval"), "hotcoco": ("hotcoco", "hotcoco")}
    try:
        coco, evaluation = (importlib.import_module(name) for name in homes[engine])
    except ImportError:
        raise DataError(f"{engine} is not installed: pip install 'linework[fast]'") from None
    return coco.COCO, evaluation.COCOeval


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
    sides = np.sqrt([a["area"] for a in annotations if not a["iscrowd"]])
    rows = []
    for n, (low, high) in enumerate(itertools.pairwise(edges)):
        figures = _mean_figures(arrays, slice(None), len(AREAS) + n, limit)
        boxes = int(((sides >= low) & (sides < high)).sum())
        rows.append(SizeFigures(low, high, boxes, figures["AP"], figures["AP50"], figures["AR"]))
    return rows
