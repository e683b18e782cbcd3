"""Match the classes of a labelled split to those of a detector, by name: each data set has its own ids."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from detection.detections import Detections
from schematics.coco import Split


@dataclass(frozen=True)
class Matched:
    """What of a split a detector can be judged by."""

    split: Split  # with the classes that the detector knows, and their boxes
    labels: np.ndarray  # int64 [1 + K], by label of the detector: the label in the split, 0 where it has none
    unknown: dict[str, int]  # the classes that the detector does not know, and how many boxes they have

    def relabel(self, found: Detections) -> Detections:
        """The detections of classes that the split lists, under its labels."""
        labels = self.labels[found.labels]
        kept = labels > 0
        return Detections(found.boxes[kept], found.scores[kept], labels[kept])


def match_classes(known: Sequence[tuple[int, str]], split: Split) -> Matched:
    """Match the detector's classes, (id, name) of its labels 1..K, to those of a split.

    A name that stands under several ids is one class, unless detector and split have it under the same ids.
    """
    listed = [(category.id, category.name) for category in split.categories]
    ids, theirs = _ids_by_name(known), _ids_by_name(listed)

    def key(number: int, name: str) -> tuple[str, int]:
        name = _normal(name)
        return name, number if ids[name] == theirs[name] else 0

    of_detector, of_split = ([key(*pair) for pair in pairs] for pairs in (known, listed))
    judged = [k for k in dict.fromkeys(of_split) if k in of_detector]
    label_of = {k: label for label, k in enumerate(judged, start=1)}
    new, labels = (np.array([0, *(label_of.get(k, 0) for k in keys)]) for keys in (of_split, of_detector))
    boxes, unknown = boxes_by_class(split), Counter[str]()
    for label, (number, name) in enumerate(listed, start=1):
        if not new[label]:
            unknown[name] += boxes[number]
    sheets = []
    for sheet in split.sheets:
        kept = new[sheet.labels] > 0
        part = {name: getattr(sheet, name)[kept] for name in ("boxes", "crowd", "area", "annotation_ids")}
        xywh = None if sheet.xywh is None else sheet.xywh[kept]
        sheets.append(replace(sheet, labels=new[sheet.labels[kept]], xywh=xywh, **part))
    categories = [split.categories[of_split.index(k)] for k in judged]
    return Matched(replace(split, categories=categories, sheets=sheets), labels, dict(unknown))


def boxes_by_class(split: Split) -> dict[int, int]:
    """By category id, the number of boxes."""
    labels = Counter(label for sheet in split.sheets for label in sheet.labels.tolist())
    return {category.id: labels[label] for label, category in enumerate(split.categories, start=1)}


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip())


def _ids_by_name(classes: Iterable[tuple[int, str]]) -> defaultdict[str, set[int]]:
    found = defaultdict(set)
    for number, name in classes:
        found[_normal(name)].add(number)
    return found
