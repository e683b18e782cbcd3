"""Find what is usable in the rows of a COCO file: classes and boxes. For its images see sheet_files.

Each function counts in a tally what it repairs or leaves out. docs/data-format.md lists all of it.
"""

import itertools
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from schematics.rows import Box, Tally, drawn_box, finite, printable, whole_number
from schematics.sheet_files import SheetFile

# A thinner box is a slip of the mouse, and torchvision stops a whole run at a box without area.
MIN_SIDE = 0.1  # px


@dataclass
class Row:
    """One usable box."""

    id: int | None
    sheet: SheetFile
    label: int
    bbox: Box  # inside the sheet
    area: float
    crowd: bool


def match_classes(
    documents: Mapping[str, dict[str, Any]], own: str, file_name: str, tally: Tally
) -> tuple[list[tuple[int, str]], dict[int, int]]:
    """(id, name) of the classes of all splits, in the order of their labels, and the label of each own id.

    Classes are matched by name, and an id is that of the split `own`, whose file alone is tallied. The order
    is that of the ids in the first document that lists the class, so it is the same for every `own`.
    """
    listed = _listed(documents, own, file_name, tally)
    first: dict[str, tuple[int, int]] = {}  # name -> its id in the first split that lists it, number of that
    for place, names in enumerate(listed.values()):
        for number, name in sorted(names.items()):
            first.setdefault(name, (number, place))
    order = sorted(first, key=lambda name: first[name])
    ids_of = defaultdict(list)
    for number, name in sorted(listed[own].items()):
        ids_of[name].append(number)
    taken = set(listed[own])
    classes = []
    for name in order:
        number, place = first[name]
        ids = ids_of[name]
        if len(ids) > 1:
            said = ", ".join(map(str, ids))
            tally[f"class name {name!r} stands under ids {said}: one class", file_name, "repaired"] += 1
        if not ids:
            tally[f"class {name!r} is listed only in another split", file_name, "kept"] += 1
            ids = [number if number not in taken else next(n for n in itertools.count(1) if n not in taken)]
            taken.update(ids)
        elif ids[0] != number:
            split = list(listed)[place]
            kind = f"class {name!r} has id {ids[0]} here and {number} in {split}: matched by name"
            tally[kind, file_name, "repaired"] += 1
        classes.append((ids[0], name))
    by_case = defaultdict(list)
    for name in order:
        by_case[name.casefold()].append(repr(name))
    for alike in by_case.values():
        if len(alike) > 1:
            kind = f"classes {' and '.join(alike)} differ in case only: kept apart"
            tally[kind, file_name, "kept"] += 1
    label_of = {name: label for label, name in enumerate(order, start=1)}
    return classes, {number: label_of[name] for number, name in listed[own].items()}


def _listed(
    documents: Mapping[str, dict[str, Any]], own: str, file_name: str, tally: Tally
) -> dict[str, dict[int, str]]:
    """By split, the names of its classes by id, without Roboflow's placeholder."""
    listed: dict[str, dict[int, str]] = {split: {} for split in documents}
    for split, document in documents.items():
        for row in document["categories"]:
            number, name = whole_number(row.get("id")), row.get("name")
            name = "" if name is None or isinstance(name, list | dict) else str(name).strip()
            name = unicodedata.normalize("NFC", printable(name))
            if number is None or not name:
                if split == own:
                    tally["class without a whole-number id or a name", file_name, "dropped"] += 1
            elif (known := listed[split].setdefault(number, name)) != name:
                clash = f"category id {number} is both {known!r} and {name!r} in {split}"
                tally[f"{clash}; give each class one id", file_name, "fatal"] += 1
    for name in _placeholders(documents, listed):
        if name in listed[own].values():
            tally[f"placeholder category 0 {name!r}", file_name, "dropped"] += 1
        for split, names in listed.items():
            listed[split] = {number: other for number, other in names.items() if other != name}
    for clash in _doubtful_ids(listed):
        tally[f"{clash}; give each class one id", file_name, "fatal"] += 1
    return listed


def _placeholders(
    documents: Mapping[str, dict[str, Any]], listed: Mapping[str, Mapping[int, str]]
) -> set[str]:
    """The names of Roboflow's placeholder: category 0, which has the project's name and no boxes.

    It is the supercategory of the others.
    """
    rows = [row for document in documents.values() for row in document["categories"]]
    parents = {str(row.get("supercategory")) for row in rows if whole_number(row.get("id")) != 0}
    found = {names[0] for names in listed.values() if names.get(0) in parents}
    if not found:
        return found
    boxed = {
        listed[split].get(number)
        for split, document in documents.items()
        for row in document["annotations"]
        if (number := whole_number(row.get("category_id"))) is not None
    }
    return found - boxed


def _doubtful_ids(listed: Mapping[str, Mapping[int, str]]) -> Iterator[str]:
    """Yield a line for each id that has two names in two splits, unless some split knows both as two classes.

    It may be one class that was renamed, or two: nothing in the files tells.
    """
    together = [set(names.values()) for names in listed.values()]
    names_of: dict[int, dict[str, str]] = defaultdict(dict)
    for split, names in listed.items():
        for number, name in names.items():
            names_of[number].setdefault(name, split)
    for number, splits in sorted(names_of.items()):
        for (name, split), (other, beside) in itertools.combinations(splits.items(), 2):
            if not any({name, other} <= names for names in together):
                yield f"category id {number} is {name!r} in {split} but {other!r} in {beside}"


def clean_rows(
    rows: Iterable[dict],
    files: Mapping[int, SheetFile | None],
    labels: Mapping[int, int],
    file_name: str,
    tally: Tally,
) -> Iterator[Row]:
    """Yield the usable boxes, clipped to their sheets, under the ids that the file gives.

    labels: by category id.
    """
    seen = set()
    for row in rows:
        image_id, category_id = whole_number(row.get("image_id")), whole_number(row.get("category_id"))
        if image_id is None or image_id not in files:
            tally["box of an image that is not listed", file_name, "dropped"] += 1
            continue
        sheet = files[image_id]
        if sheet is None:
            tally["box of a dropped image", file_name, "dropped"] += 1
            continue
        if category_id is None or category_id not in labels:
            tally["box of a class that is not listed", sheet.name, "dropped"] += 1
            continue
        drawn, repair = drawn_box(row)
        if drawn is None:
            tally["box is not four finite numbers", sheet.name, "dropped"] += 1
            continue
        across, down = sheet.scale
        labelled = drawn[0] * across, drawn[1] * down, drawn[2] * across, drawn[3] * down
        bbox = _clipped(labelled, sheet, tally)
        if bbox is None:
            continue
        label = labels[category_id]
        if (sheet.id, label, bbox) in seen:
            tally["box listed twice", sheet.name, "dropped"] += 1
            continue
        seen.add((sheet.id, label, bbox))
        if repair:
            tally[repair, sheet.name, "repaired"] += 1
        area = finite(row.get("area"))
        if area is None or area <= 0:
            tally["area missing: taken from the box", file_name, "repaired"] += 1
        keep_area = area is not None and area > 0 and bbox == labelled
        area = area * sheet.scale[0] * sheet.scale[1] if keep_area and area else bbox[2] * bbox[3]
        if "iscrowd" not in row:
            tally["iscrowd missing: set to 0", file_name, "repaired"] += 1
        yield Row(whole_number(row.get("id")), sheet, label, bbox, area, row.get("iscrowd") in (1, "1"))


def renumber(rows: Sequence[Row], file_name: str, tally: Tally) -> None:
    """Number all annotations anew from 1, unless each has an id of its own that is 1 or more.

    pycocotools takes id 0 for "no match", and of several rows with one id it loses all but one.
    """
    ids = [row.id for row in rows]
    bad = sum(number is None or number < 1 for number in ids)
    twice = len(ids) - len(set(ids))
    if bad:
        tally["annotation id missing or below 1: all numbered anew", file_name, "repaired"] += bad
    if twice:
        tally["annotation id used twice: all numbered anew", file_name, "repaired"] += twice
    if bad or twice:
        for number, row in enumerate(rows, start=1):
            row.id = number


def _clipped(bbox: Box, sheet: SheetFile, tally: Tally) -> Box | None:
    """The part of a box that is on its sheet, or None if nothing usable is."""
    x, y, width, height = bbox
    if min(width, height) < MIN_SIDE:
        tally["box without area", sheet.name, "dropped"] += 1
        return None
    if x >= 0 and y >= 0 and x + width <= sheet.width and y + height <= sheet.height:
        return bbox
    left, top = max(x, 0.0), max(y, 0.0)
    width, height = min(x + width, sheet.width) - left, min(y + height, sheet.height) - top
    if min(width, height) < MIN_SIDE:
        tally["box wholly outside the sheet", sheet.name, "dropped"] += 1
        return None
    tally["box partly outside the sheet: clipped", sheet.name, "repaired"] += 1
    return left, top, width, height
