"""Detections matched to truth once, as COCO does; curves, intervals, errors and counts are read off it.

Letters: I sheets, K classes, G true boxes, D detections, T IoU thresholds (0.5, 0.55, ..., 0.95).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from detection.metrics.coco import AREAS, Engine, fit_max_detections, fullest, match_boxes, prepare, repair


@dataclass(frozen=True)
class Truth:
    """Annotated boxes, in the order of the ground truth."""

    sheet: np.ndarray  # int64 [G], index into image_ids
    label: np.ndarray  # int64 [G], index 0..K-1 into category_ids
    xywh: np.ndarray  # float64 [G, 4], sheet pixels, as in COCO files: corners would round
    crowd: np.ndarray  # bool [G]


@dataclass(frozen=True)
class Found:
    """Detections by class, and within a class by falling score, ties as pycocotools breaks them."""

    sheet: np.ndarray  # int64 [D], index into image_ids
    label: np.ndarray  # int64 [D], index 0..K-1 into category_ids, ascending
    xywh: np.ndarray  # float64 [D, 4], sheet pixels
    score: np.ndarray  # float64 [D]
    rank: np.ndarray  # int64 [D], place among the detections of its class on its sheet, from 0


@dataclass(frozen=True)
class Matches:
    image_ids: np.ndarray  # int64 [I], ascending
    category_ids: np.ndarray  # int64 [K], ascending
    names: tuple[str, ...]  # [K]
    limit: int  # detections of a class on a sheet that AP takes, by rank; the rest counts elsewhere
    ious: np.ndarray  # float64 [T]
    recalls: np.ndarray  # float64 [R], where precision is read: 0, 0.01, ..., 1
    truth: Truth
    found: Found
    match: np.ndarray  # int64 [T, D], the truth a detection has found, or -1
    ignored: np.ndarray  # bool [T, D], neither right nor wrong: it lies in a crowd

    @property
    def positives(self) -> np.ndarray:
        """int64 [I, K]: boxes to find, crowds left out."""
        table = np.zeros((len(self.image_ids), len(self.category_ids)), np.int64)
        plain = ~self.truth.crowd
        np.add.at(table, (self.truth.sheet[plain], self.truth.label[plain]), 1)
        return table

    def of_class(self, label: int) -> slice:
        """The detections of one class."""
        first, last = np.searchsorted(self.found.label, [label, label + 1])
        return slice(int(first), int(last))

    def above(self, thresholds: np.ndarray) -> np.ndarray:
        """bool [D]: detections whose score reaches their class's threshold [K]."""
        return self.found.score >= thresholds[self.found.label]


def match(
    ground_truth: Mapping[str, Any],
    detections: Iterable[Mapping[str, Any]],
    limit: int | None = None,
    engine: Engine = "pycocotools",
) -> Matches:
    """Match as COCO does: down the scores, each detection takes the best free truth of its class.

    ground_truth, detections, limit, engine: as `metrics.coco.evaluate` takes them; limit None fits it to the
    data. Raises DataError as that does.
    """
    truth = repair(ground_truth)
    found = prepare(truth, detections)
    limit = max(100, limit or fit_max_detections(truth["annotations"]))
    # Matching goes down the scores: what comes after the limit leaves the matches before it alone.
    evaluator = match_boxes(truth, found, [max(limit, fullest(found))], AREAS[:1], engine)
    return _gather(evaluator, truth, found, limit)


def _gather(evaluator: Any, truth: Mapping[str, Any], found: list[dict[str, Any]], limit: int) -> Matches:
    image_ids, category_ids = (
        np.array(ids, np.int64) for ids in (evaluator.params.imgIds, evaluator.params.catIds)
    )
    ious, recalls = np.array(evaluator.params.iouThrs), np.array(evaluator.params.recThrs)
    # Row n of either list has id n + 1.
    order, rank = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    match, ignored = [np.empty((len(ious), 0), np.int64)], [np.empty((len(ious), 0), bool)]
    scores = np.array([row["score"] for row in found], np.float64)
    of_class: dict[int, list] = {}  # one engine goes through the classes first, the other through the sheets
    for result in filter(None, evaluator.evalImgs):
        of_class.setdefault(int(result["category_id"]), []).append(result)
    for results in (of_class[number] for number in category_ids.tolist() if number in of_class):
        ids, matched, in_crowd = (
            np.hstack([np.array(result[name]) for result in results])
            for name in ("dtIds", "dtMatches", "dtIgnore")
        )
        rows = ids.astype(np.int64) - 1
        falling = np.argsort(-scores[rows], kind="stable")  # sheets in order where scores tie
        order.append(rows[falling])
        rank.append(np.concatenate([np.arange(len(result["dtIds"])) for result in results])[falling])
        match.append(matched[:, falling].astype(np.int64) - 1)
        ignored.append(in_crowd[:, falling].astype(bool))
    rows = np.concatenate(order)
    by_id = {category["id"]: category["name"] for category in truth["categories"]}
    return Matches(
        image_ids=image_ids,
        category_ids=category_ids,
        names=tuple(str(by_id[number]) for number in category_ids.tolist()),
        limit=limit,
        ious=ious,
        recalls=recalls,
        truth=Truth(
            *_places(truth["annotations"], image_ids, category_ids),
            crowd=np.array([row["iscrowd"] for row in truth["annotations"]], bool),
        ),
        found=Found(
            *_places([found[row] for row in rows], image_ids, category_ids),
            score=scores[rows],
            rank=np.concatenate(rank),
        ),
        match=np.hstack(match),
        ignored=np.hstack(ignored),
    )


def _places(
    rows: list[dict[str, Any]], image_ids: np.ndarray, category_ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sheet [N], label [N] and xywh [N, 4] of annotations or results."""
    return (
        np.searchsorted(image_ids, np.array([row["image_id"] for row in rows], np.int64)),
        np.searchsorted(category_ids, np.array([row["category_id"] for row in rows], np.int64)),
        np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4),
    )
