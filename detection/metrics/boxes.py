"""Ground truth and detections as arrays, in an order that does not depend on how they came.

What traps COCO's programs is mended here: annotation ids play no part (those programs never match 0, and
confuse doubled ones), `area`, `iscrowd` and `info` may be missing, there may be no detections, and detections
of one score are ordered by sheet and box.

Letters in shapes: I sheets, K classes, G true boxes, D detections.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, repeat
from operator import itemgetter
from typing import Any

import numpy as np

from schematics.sheets import DataError


@dataclass(frozen=True)
class Truth:
    """Annotated boxes, in the order of the ground truth."""

    sheet: np.ndarray  # int64 [G], index into image_ids
    label: np.ndarray  # int64 [G], index 0..K-1 into category_ids
    xywh: np.ndarray  # float64 [G, 4], sheet pixels, as in COCO files; turning them into corners would round
    area: np.ndarray  # float64 [G], square pixels, as annotated; of the box where that is missing
    crowd: np.ndarray  # bool [G]


@dataclass(frozen=True)
class Found:
    """Detections by class, and within a class by falling score, ties broken as pycocotools breaks them."""

    sheet: np.ndarray  # int64 [D], index into image_ids
    label: np.ndarray  # int64 [D], index 0..K-1 into category_ids, ascending
    xywh: np.ndarray  # float64 [D, 4], sheet pixels
    score: np.ndarray  # float64 [D]
    rank: np.ndarray  # int64 [D], place among the detections of its class on its sheet, from 0

    @property
    def area(self) -> np.ndarray:
        """float64 [D], square pixels"""
        return self.xywh[:, 2] * self.xywh[:, 3]


def read_ids(ground_truth: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Image ids int64 [I] and category ids int64 [K] of a COCO object, ascending, and the classes' names."""
    names = {category["id"]: str(category["name"]) for category in ground_truth["categories"]}
    images = np.array(sorted({image["id"] for image in ground_truth["images"]}), np.int64)
    return images, np.array(sorted(names), np.int64), tuple(names[number] for number in sorted(names))


def read_truth(ground_truth: Mapping[str, Any], image_ids: np.ndarray, category_ids: np.ndarray) -> Truth:
    """The annotations of a COCO object. Raises DataError for one of an image or class that is not listed."""
    rows = ground_truth["annotations"]
    sheet, label = (
        _index(rows, key, ids) for key, ids in (("image_id", image_ids), ("category_id", category_ids))
    )
    for key, index in (("image_id", sheet), ("category_id", label)):
        for n in np.flatnonzero(index < 0)[:1].tolist():
            raise DataError(f"ground truth: an annotation has {key} {rows[n][key]}, which is not listed")
    xywh = _xywh(rows)
    sizes = (xywh[:, 2] * xywh[:, 3]).tolist()
    area = [row.get("area") or size for row, size in zip(rows, sizes, strict=True)]
    crowd = [bool(row.get("iscrowd")) for row in rows]
    return Truth(sheet, label, xywh, np.array(area, np.float64), np.array(crowd, bool))


def read_found(
    detections: Iterable[Mapping[str, Any]], image_ids: np.ndarray, category_ids: np.ndarray
) -> Found:
    """COCO results in the order of `Found`.

    Raises DataError for an image or class that is not listed and for a number that is not finite.
    """
    rows = detections if isinstance(detections, list) else list(detections)
    sheet, label = _index(rows, "image_id", image_ids), _index(rows, "category_id", category_ids)
    xywh = _xywh(rows)
    score = np.fromiter(map(itemgetter("score"), rows), np.float64, len(rows))
    finite = np.isfinite(xywh).all(1) & np.isfinite(score)
    for n in np.flatnonzero((sheet < 0) | (label < 0) | ~finite)[:1].tolist():
        image, category = rows[n]["image_id"], rows[n]["category_id"]
        if sheet[n] < 0:
            cure = "evaluate against the split that was predicted"
            raise DataError(f"predictions: image_id {image} is not in the ground truth; {cure}")
        if label[n] < 0:
            cure = "write the data set's own category ids"
            raise DataError(f"predictions: category_id {category} is not in the ground truth; {cure}")
        raise DataError(f"predictions: image_id {image} has a box or score that is not finite")
    order = _by_class_and_score(sheet, label, score, xywh)
    sheet, label = sheet[order], label[order]
    return Found(sheet, label, xywh[order], score[order], _rank(sheet * len(category_ids) + label))


def fullest(sheet: np.ndarray, label: np.ndarray) -> int:
    """The most boxes of one class on one sheet."""
    if not len(sheet):
        return 0
    return int(np.bincount(sheet * (int(label.max()) + 1) + label).max())


def _index(rows: list[Mapping[str, Any]], key: str, ids: np.ndarray) -> np.ndarray:
    """int64 [N]: the place of each row's id among `ids`, or -1."""
    place = {number: n for n, number in enumerate(ids.tolist())}
    return np.fromiter(map(place.get, map(itemgetter(key), rows), repeat(-1)), np.int64, len(rows))


def _xywh(rows: list[Mapping[str, Any]]) -> np.ndarray:
    """float64 [N, 4]: boxes of annotations or results. Raises DataError for one that is not four numbers."""
    boxes = list(map(itemgetter("bbox"), rows))
    if set(map(len, boxes)) - {4}:
        image = next(row["image_id"] for row in rows if len(row["bbox"]) != 4)
        raise DataError(f"image_id {image} has a box that is not four numbers: x, y, width, height")
    return np.fromiter(chain.from_iterable(boxes), np.float64, 4 * len(rows)).reshape(-1, 4)


def _by_class_and_score(
    sheet: np.ndarray, label: np.ndarray, score: np.ndarray, xywh: np.ndarray
) -> np.ndarray:
    """int64 [D]: the rows by class, falling score, sheet and box."""
    order = np.lexsort((-score, label))
    tied = (score[order][1:] == score[order][:-1]) & (label[order][1:] == label[order][:-1])
    # Few scores tie as a rule, so the six further keys are worth sorting by only where some do.
    places = np.flatnonzero(np.append(tied, False) | np.append(False, tied))
    rows = order[places]
    keys = (*xywh[rows].T[::-1], sheet[rows], -score[rows], label[rows])
    order[places] = rows[np.lexsort(keys)]
    return order


def _rank(group: np.ndarray) -> np.ndarray:
    """int64 [D]: how many rows of the same group, int64 [D], stand before each row."""
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    first = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])) if len(group) else order
    size = np.diff(np.append(first, len(group)))
    rank = np.empty(len(group), np.int64)
    rank[order] = np.arange(len(group)) - np.repeat(first, size)
    return rank
