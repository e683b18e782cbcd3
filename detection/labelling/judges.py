"""Who judges which sheet: never a detector that was trained on it, if there is another."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.errors import UserError
from detection.classes import match_classes
from detection.detections import Detections
from detection.labelling.doubts import Judged, Labels
from schematics.coco import LabelledSheet, Split, find_split, read_split
from schematics.progress import progress
from schematics.sheets import DataError, Sheet, read_sheet
from schematics.splits import alike, take_share
from schematics.windows import ink_and_bare


def trained_on(checkpoint: Path) -> list[Sheet]:
    """The sheets that a detector was finetuned on, by the config.json beside it.

    Raises UserError where that is not known any more.
    """
    path = checkpoint.parent / "config.json"
    try:
        config = json.loads(path.read_text())
        folder, share, seed = Path(config["data_dir"]), config.get("train_share", 1.0), config.get("seed", 0)
        split, _ = take_share(read_split(find_split(folder, "train")), share, seed)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, DataError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"--checkpoint {checkpoint}: on which sheets it was trained is not known ({why}); give --seen to "
            "judge with it all the same"
        ) from None
    return [sheet.file for sheet in split.sheets]


def seen_by(sheets: Sequence[Sheet], trained: Sequence[Sequence[Sheet]]) -> np.ndarray:
    """bool [len(trained), len(sheets)]: whether each training had each sheet, or one that looks like it.

    What looks alike stays on one side of a split, see `schematics.splits.alike`: a file of other bytes, such
    as Roboflow's copy, may show the same drawing. Raises DataError for a sheet that can't be decoded.
    """
    files = list(dict.fromkeys([*sheets, *(sheet for each in trained for sheet in each)]))
    group = dict(zip(files, alike(files), strict=True))
    known = [{group[sheet] for sheet in each} for each in trained]
    return np.array([[group[sheet] in each for sheet in sheets] for each in known], bool)


@dataclass(frozen=True)
class Desk:
    """The sheets of a data set on which labels are judged, and the numbers that name the classes.

    Class k is names[k - 1].
    """

    sheets: list[tuple[Split, LabelledSheet]]
    names: list[str]

    @property
    def files(self) -> list[Sheet]:
        return [sheet.file for _, sheet in self.sheets]


def lay_out(splits: Sequence[Split]) -> Desk:
    """All sheets of the splits, which have the same classes. Raises UserError if they don't."""
    names = [category.name for category in splits[0].categories]
    for split in splits[1:]:
        if [category.name for category in split.categories] != names:
            raise UserError(
                f"{split.folder}: its classes are not those of {splits[0].folder}; judge one alone"
            )
    return Desk([(split, sheet) for split in splits for sheet in split.sheets], names)


def judge(
    desk: Desk,
    judges: np.ndarray,
    categories: Sequence[Sequence[tuple[int, str]]],
    detect: Callable[[int, np.ndarray], Detections],
) -> tuple[list[Judged], dict[str, int]]:
    """What the judges say of each sheet that has one, and the boxes that can't be judged by their class.

    judges: int64 [N], by sheet the number of its detector, or -1. categories: the classes of each detector,
    (id, name) of its labels 1..K. detect: from the number of a detector and an image to what it finds there.
    Raises DataError for a sheet that can't be read.
    """
    chosen = np.flatnonzero(judges >= 0).tolist()
    maps = {}  # of a detector and a split
    judged, unknown = list[Judged](), dict[str, int]()
    for n, place in enumerate(progress(chosen, "judging")):
        split, sheet = desk.sheets[place]
        number = int(judges[place])
        key = (number, split.folder, split.name)
        if key not in maps:
            maps[key] = class_map(categories[number], split)
        known = maps[key][1]
        image = read_sheet(sheet.file)
        other = desk.sheets[chosen[n - len(chosen) // 2]][1]  # far away, as neighbours may be alike
        judged.append(see(sheet, other, image, detect(number, image), maps[key]))
        for label in sheet.labels[~known[sheet.labels] & ~sheet.crowd].tolist():
            unknown[desk.names[label - 1]] = unknown.get(desk.names[label - 1], 0) + 1
    return judged, unknown


def see(
    sheet: LabelledSheet,
    other: LabelledSheet,
    image: np.ndarray,
    found: Detections,
    classes: tuple[np.ndarray, np.ndarray],
) -> Judged:
    """A sheet with its detections, as the detector labels them, for `find_doubts`.

    other: another sheet, which shows something else. classes: see `class_map`.
    """
    to_split, known = classes
    labels = to_split[found.labels]
    found = Detections(found.boxes[labels > 0], found.scores[labels > 0], labels[labels > 0])
    given = _labels(sheet.boxes, sheet.labels, sheet.crowd, known, image)
    height, width = image.shape[:2]
    fits = (other.boxes <= [width, height, width, height]).all(1) & (other is not sheet)
    elsewhere = _labels(other.boxes[fits], other.labels[fits], other.crowd[fits], known, image)
    return Judged(given, found, elsewhere)


def class_map(categories: Sequence[tuple[int, str]], split: Split) -> tuple[np.ndarray, np.ndarray]:
    """int64 [1 + classes], the split's label of each of the detector, or 0; bool [1 + K], those with one."""
    matched = match_classes(categories, split)
    label_of = {category.id: label for label, category in enumerate(split.categories, start=1)}
    own = np.array([0, *(label_of[category.id] for category in matched.split.categories)])
    to_split = own[matched.labels]
    known = np.zeros(1 + len(split.categories), bool)
    known[to_split[1:]] = True
    known[0] = False
    return to_split, known


def _labels(
    boxes: np.ndarray, labels: np.ndarray, crowd: np.ndarray, known: np.ndarray, image: np.ndarray
) -> Labels:
    return Labels(boxes, np.where(known[labels] & ~crowd, labels, 0), ink_and_bare(image, boxes)[1])
