"""Detections matched to truth once, as COCO does it; every figure, curve and count is read off that one run.

pycocotools is the reference engine. hotcoco (the extra "fast") is faster and equal to the last bit on the
same input. `repair` and `prepare` mend what would trap either of them before it sees the data: annotation ids
(0 is never matched, and doubled ids are confused), a missing `area`, `iscrowd` or `info`, predictions that
are empty, and the order of tied scores.

Letters in shapes: I sheets, K classes, G true boxes, D detections, T IoU thresholds (0.5, 0.55, ..., 0.95),
R recalls.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from schematics.sheets import DataError

Engine = Literal["pycocotools", "hotcoco"]

# COCO's area ranges in square pixels: all, small, medium, large.
AREAS = [[0.0, 1e10], [0.0, 32.0**2], [32.0**2, 96.0**2], [96.0**2, 1e10]]


@dataclass(frozen=True)
class Truth:
    """Annotated boxes, in the order of the ground truth."""

    sheet: np.ndarray  # int64 [G], index into image_ids
    label: np.ndarray  # int64 [G], index 0..K-1 into category_ids
    xywh: np.ndarray  # float64 [G, 4], sheet pixels, as in COCO files; turning them into corners would round
    crowd: np.ndarray  # bool [G]


@dataclass(frozen=True)
class Found:
    """Detections by class, and within a class by falling score, ties broken as pycocotools breaks them."""

    sheet: np.ndarray  # int64 [D], index into image_ids
    label: np.ndarray  # int64 [D], index 0..K-1 into category_ids, ascending
    xywh: np.ndarray  # float64 [D, 4], sheet pixels
    score: np.ndarray  # float64 [D]
    rank: np.ndarray  # int64 [D], place among the detections of its class on its sheet, from 0


@dataclass(frozen=True)
class Matches:
    """Which detection found which box, at each IoU threshold."""

    image_ids: np.ndarray  # int64 [I], ascending
    category_ids: np.ndarray  # int64 [K], ascending
    names: tuple[str, ...]  # [K]
    limit: int  # AP takes this many detections of a class on a sheet, by rank; all else takes every detection
    ious: np.ndarray  # float64 [T]
    recalls: np.ndarray  # float64 [R], where precision is read: 0, 0.01, ..., 1
    truth: Truth
    found: Found
    match: np.ndarray  # int64 [T, D], the truth that a detection has found, or -1
    ignored: np.ndarray  # bool [T, D], neither right nor wrong, as the detection lies in a crowd

    @property
    def positives(self) -> np.ndarray:
        """int64 [I, K]: boxes to find, without crowds."""
        table = np.zeros((len(self.image_ids), len(self.category_ids)), np.int64)
        plain = ~self.truth.crowd
        np.add.at(table, (self.truth.sheet[plain], self.truth.label[plain]), 1)
        return table

    def of_class(self, label: int) -> slice:
        """The detections of one class."""
        first, last = np.searchsorted(self.found.label, [label, label + 1])
        return slice(int(first), int(last))

    def above(self, thresholds: np.ndarray) -> np.ndarray:
        """bool [D]: detections whose score reaches the threshold of their class, float64 [K]."""
        return self.found.score >= thresholds[self.found.label]

    def counted(self, kept: np.ndarray) -> np.ndarray:
        """bool [D]: those of the detections bool kept [D] that count, as they do not lie in a crowd."""
        return kept & ~self.ignored[0]

    def right(self, kept: np.ndarray) -> np.ndarray:
        """bool [D]: those of the detections bool kept [D] that count and have found a box, at IoU 0.5."""
        return self.counted(kept) & (self.match[0] >= 0)

    def wrong(self, kept: np.ndarray) -> np.ndarray:
        """bool [D]: those of the detections bool kept [D] that count and have found no box, at IoU 0.5."""
        return self.counted(kept) & (self.match[0] < 0)


@dataclass(frozen=True)
class EngineRun:
    """One run of an engine, for `read_matches` and `metrics.coco.read_figures` to read."""

    # The engine's COCOeval after `evaluate`. Together they hold the area ranges in order, AREAS[0] first.
    evaluators: list[Any]
    truth: Mapping[str, Any]  # as `repair` made it
    found: list[dict[str, Any]]  # as `prepare` made them
    limit: int  # see `Matches`


def match(
    ground_truth: Mapping[str, Any],
    detections: Iterable[Mapping[str, Any]],
    max_detections: int | None = None,
    engine: Engine = "pycocotools",
) -> Matches:
    """Match alone, without the figures: down the scores, each detection takes the best free box of its class.

    Takes and raises what `metrics.coco.measure` does, and gives its second half in a fraction of the time.
    """
    truth = repair(ground_truth)
    found = prepare(truth, detections)
    return read_matches(run_engine(truth, found, AREAS[:1], max_detections, engine))


def run_engine(
    truth: Mapping[str, Any],
    found: list[dict[str, Any]],
    areas: list[list[float]],
    max_detections: int | None = None,
    engine: Engine = "pycocotools",
) -> EngineRun:
    """Let an engine match `found`, as `prepare` makes them, to `truth`, as `repair` makes it.

    areas: ranges in square pixels, the first of them AREAS[0]. max_detections: as `metrics.coco.measure`
    takes it. The engine's limits are COCO's 1, 10 and 100, this one, and as many as the fullest sheet has.
    Neither further limits nor further ranges change the figures at the others, for matching goes down the
    scores, and each range is matched by itself. Raises DataError for an engine that is not installed.
    """
    limit = max(100, max_detections or fit_max_detections(truth["annotations"]))
    limits = sorted({1, 10, 100, limit, max(limit, fullest(found))})
    # hotcoco takes far longer to hand out its matches than to make them, and hands out those of all ranges at
    # once. So the range that is read has an evaluator to itself there. No range is matched twice.
    parts = [areas] if engine == "pycocotools" else [areas[:1], areas[1:]]
    coco, evaluation = coco_classes(engine)
    evaluators = []
    with contextlib.redirect_stdout(io.StringIO()):
        gt, dt = coco(), coco()
        gt.dataset = truth
        dt.dataset = {**truth, "annotations": found}
        gt.createIndex()
        dt.createIndex()
        for part in filter(None, parts):
            evaluator = evaluation(gt, dt, "bbox")
            evaluator.params.maxDets = limits
            evaluator.params.areaRng = part
            evaluator.params.areaRngLbl = [str(n) for n in range(len(part))]
            evaluator.evaluate()
            evaluators.append(evaluator)
    return EngineRun(evaluators, truth, found, limit)


def coco_classes(engine: Engine) -> tuple[Any, Any]:
    """COCO and COCOeval of an engine. Raises DataError that names the cure where it is not installed."""
    homes = {"pycocotools": ("pycocotools.coco", "pycocotools.cocoeval"), "hotcoco": ("hotcoco", "hotcoco")}
    try:
        coco, evaluation = (importlib.import_module(name) for name in homes[engine])
    except ImportError:
        raise DataError(f"{engine} is not installed: pip install 'linework[fast]'") from None
    return coco.COCO, evaluation.COCOeval


def repair(ground_truth: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a COCO object with what the engines rely on: ids 1..N, area, iscrowd and info."""
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
    """COCO results with ids 1..N and areas, in an order that does not depend on how they came.

    Raises DataError for an image or class that `truth` does not know and for a number that is not finite.
    """
    images = {image["id"] for image in truth["images"]}
    classes = {category["id"] for category in truth["categories"]}
    rows = []
    for row in detections:
        image, category = row["image_id"], row["category_id"]
        if image not in images:
            cure = "evaluate against the split that was predicted"
            raise DataError(f"predictions: image_id {image} is not in the ground truth; {cure}")
        if category not in classes:
            cure = "write the data set's own category ids"
            raise DataError(f"predictions: category_id {category} is not in the ground truth; {cure}")
        box = [float(value) for value in row["bbox"]]
        score = float(row["score"])
        if not all(map(math.isfinite, [*box, score])):
            raise DataError(f"predictions: image_id {image} has a box or score that is not finite")
        rows.append((-score, image, category, box))
    return [
        {
            "id": number,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "score": -negated,
            "area": box[2] * box[3],
            "iscrowd": 0,
        }
        for number, (negated, image, category, box) in enumerate(sorted(rows), start=1)
    ]


def fit_max_detections(annotations: Sequence[Mapping[str, Any]]) -> int:
    """Twice the most boxes of one class on one sheet, rounded up to hundreds; at least COCO's 100."""
    return max(100, 100 * math.ceil(2 * fullest(annotations) / 100))


def fullest(rows: Iterable[Mapping[str, Any]]) -> int:
    """The most annotations or detections of one class on one sheet."""
    return max(Counter((row["image_id"], row["category_id"]) for row in rows).values(), default=0)


def read_matches(run: EngineRun) -> Matches:
    """The matches of a run, those over boxes of all areas."""
    params = run.evaluators[0].params
    image_ids, category_ids = (np.array(ids, np.int64) for ids in (params.imgIds, params.catIds))
    ious = np.array(params.iouThrs)
    rows, rank, match, ignored = _by_class(run, category_ids, len(ious))
    annotations = run.truth["annotations"]
    names = {category["id"]: category["name"] for category in run.truth["categories"]}
    return Matches(
        image_ids=image_ids,
        category_ids=category_ids,
        names=tuple(str(names[number]) for number in category_ids.tolist()),
        limit=run.limit,
        ious=ious,
        recalls=np.array(params.recThrs),
        truth=Truth(
            *_places(annotations, image_ids, category_ids),
            crowd=np.array([row["iscrowd"] for row in annotations], bool),
        ),
        found=Found(
            *_places([run.found[row] for row in rows], image_ids, category_ids),
            score=np.array([run.found[row]["score"] for row in rows], np.float64),
            rank=rank,
        ),
        match=match,
        ignored=ignored,
    )


def _by_class(
    run: EngineRun, category_ids: np.ndarray, ious: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The rows of `run.found` in the order of `Found`, int64 [D], and the rank, match and ignored of each."""
    of_class: dict[int, list] = {}  # one engine goes through the classes first, the other through the sheets
    for result in filter(None, run.evaluators[0].evalImgs):
        if list(result["aRng"]) == AREAS[0]:
            of_class.setdefault(int(result["category_id"]), []).append(result)
    scores = np.array([row["score"] for row in run.found], np.float64)
    order, rank = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    match, ignored = [np.empty((ious, 0), np.int64)], [np.empty((ious, 0), bool)]
    for results in (of_class[number] for number in category_ids.tolist() if number in of_class):
        ids, matched, in_crowd = (
            np.hstack([np.array(result[name]) for result in results])
            for name in ("dtIds", "dtMatches", "dtIgnore")
        )
        rows = ids.astype(np.int64) - 1  # `repair` and `prepare` gave row n the id n + 1
        falling = np.argsort(-scores[rows], kind="stable")  # sheets stay in order where scores tie
        order.append(rows[falling])
        rank.append(np.concatenate([np.arange(len(result["dtIds"])) for result in results])[falling])
        match.append(matched[:, falling].astype(np.int64) - 1)
        ignored.append(in_crowd[:, falling].astype(bool))
    return np.concatenate(order), np.concatenate(rank), np.hstack(match), np.hstack(ignored)


def _places(
    rows: list[dict[str, Any]], image_ids: np.ndarray, category_ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sheet [N], label [N] and xywh [N, 4] of annotations or results."""
    return (
        np.searchsorted(image_ids, np.array([row["image_id"] for row in rows], np.int64)),
        np.searchsorted(category_ids, np.array([row["category_id"] for row in rows], np.int64)),
        np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4),
    )
