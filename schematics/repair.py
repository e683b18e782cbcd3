"""Find what is usable in the rows of a COCO file.

Each function counts in a tally what it repairs or leaves out. docs/data-format.md lists all of it.
"""

import itertools
import os
import posixpath
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import cv2
import numpy as np

from schematics.sheets import SUFFIXES, DataError, Sheet, looks_truncated, read_sheet, sheet_header, walk
from schematics.windows import ink_mask

# A thinner box is a slip of the mouse, and torchvision stops a whole run at a box without area.
MIN_SIDE = 0.1  # px
# Standard errors by which boxes must hold more ink where a repair puts them than elsewhere. On 148 sheets of
# two data sets, each padded, cropped and turned so that the repair is wrong, the most was 2.2.
CLEAR = 3.0
LEAST_BOXES = 5

Tally = Counter[tuple[str, str, str]]  # (kind, where, action) -> count
Box = tuple[float, float, float, float]  # x, y, width, height


@dataclass(frozen=True)
class SheetFile:
    """A listed image whose file is there; width and height are those of the file, in px."""

    id: int
    name: str
    file: Sheet
    width: int
    height: int
    scale: tuple[float, float]  # what boxes must be multiplied by along x and y, if labelled at another size


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
            number, name = _whole(row.get("id")), row.get("name")
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
    parents = {str(row.get("supercategory")) for row in rows if _whole(row.get("id")) != 0}
    found = {names[0] for names in listed.values() if names.get(0) in parents}
    if not found:
        return found
    boxed = {
        listed[split].get(number)
        for split, document in documents.items()
        for row in document["annotations"]
        if (number := _whole(row.get("category_id"))) is not None
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


def usable_images(
    folders: Sequence[Path], top: Path, document: dict[str, Any], file_name: str, tally: Tally
) -> dict[int, SheetFile | None]:
    """Every listed image id -> its sheet, or None if the sheet can't be used.

    Reads headers only, but for sheets whose size was changed. A name that is listed under several ids is one
    sheet, under the first of them. folders: where to look for the files. top: files outside it are tallied.
    """
    rows: dict[str, dict] = {}  # by name
    ids: dict[str, int] = {}
    names: dict[int, str] = {}
    for row in document["images"]:
        image_id, name = _whole(row.get("id")), _path(row.get("file_name"))
        if image_id is None or not name:
            tally["image without a whole-number id or a file name", file_name, "dropped"] += 1
            continue
        if names.setdefault(image_id, name) != name:
            clash = f"image id {image_id} stands for both {printable(names[image_id])} and {printable(name)}"
            tally[f"{clash}; give each image one id", file_name, "fatal"] += 1
            continue
        if name not in rows:
            rows[name], ids[name] = row, image_id
            continue
        sizes = [[_number(r.get(side)) or 0 for side in ("width", "height")] for r in (rows[name], row)]
        if sizes[0] != sizes[1] and all(map(all, sizes)):
            (a, b), (c, d) = sizes
            clash = f"image listed with two sizes, {a:g} x {b:g} and {c:g} x {d:g} px"
            tally[f"{clash}; give each file its own name", printable(name), "fatal"] += 1
        elif image_id == ids[name]:
            tally["image listed twice", printable(name), "repaired"] += 1
        else:
            tally["image listed under two ids: boxes joined", printable(name), "repaired"] += 1
    annotations = defaultdict(list)
    for row in document["annotations"]:
        if (image_id := _whole(row.get("image_id"))) in names:
            annotations[names[image_id]].append(row)
    found = find_files(list(rows), folders, tally)
    sheets: dict[str, SheetFile | None] = dict.fromkeys(rows)
    homes = {os.path.realpath(folder) + os.sep for folder in (top, *folders)}  # a folder itself may be a link
    for name, file in found.items():
        if not os.path.realpath(file.path).startswith(tuple(homes)):
            tally[f"image outside {top.name}/: read all the same", printable(name), "kept"] += 1
        sheets[name] = _sheet_file(ids[name], name, file, rows[name], annotations[name], tally)
    return {image_id: sheets[name] for image_id, name in names.items()}


def _path(value: Any) -> str:
    """The path that a file name is, with slashes, or "" where it is none."""
    if not isinstance(value, str) or not value:
        return ""
    return posixpath.normpath(value.replace("\\", "/"))  # the file may have been written on Windows


def find_files(names: Sequence[str], folders: Sequence[Path], tally: Tally) -> dict[str, Sheet]:
    """Name -> its file; what isn't found, or not without doubt, is tallied and left out.

    A name that is not there as it stands is looked for in another normal form, in another case, with
    percent-encoding and without its first folders, and taken where just one file fits that no other name has.
    """
    found: dict[str, Sheet] = {}
    for name in names:
        path, page = _page(name)
        for folder, (part, number) in itertools.product(folders, ((name, None), (path, page))):
            # An absolute path is that of another machine.
            if not name.startswith("/") and os.path.isfile(folder / part):
                found[name] = Sheet(folder / part, number)
                break
    missing = [name for name in names if name not in found]
    if missing:
        fits = _by_form(folders, {sheet.path for sheet in found.values()})
        for name in missing:
            path, page = _page(name)
            parts = [part for part in _form(path).split("/") if part not in ("", "..")]
            ends = ("/".join(parts[start:]) for start in range(len(parts)))
            files = next((fits[end] for end in ends if end in fits), set())
            if len(files) == 1:
                found[name] = Sheet(files.copy().pop(), page)
            else:
                several = f", and {len(files)} files fit" if files else ""
                tally[f"image named but missing{several}", printable(name), "dropped"] += 1
    claimed = {name: (os.path.abspath(sheet.path), sheet.page or 1) for name, sheet in found.items()}
    claims, guessed = Counter(claimed.values()), set(missing)
    for name, claim in claimed.items():
        if claims[claim] > 1:
            tally["image has no file but one that fits another image too", printable(name), "dropped"] += 1
            del found[name]
        elif name in guessed:
            place = os.path.relpath(claim[0], folders[0])
            same = unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", place)
            kind = "image found in another Unicode form of its name" if same else f"image found as {place}"
            tally[printable(kind), printable(name), "repaired"] += 1
    return found


def _by_form(folders: Sequence[Path], taken: Set[Path]) -> dict[str, set[Path]]:
    """The drawings in the folders that are not taken, by the form of their path there."""
    fits = defaultdict(set)
    for folder in folders:
        for path in walk(folder):
            if path.suffix.lower() in SUFFIXES and path not in taken:
                fits[_form(path.relative_to(folder).as_posix())].add(path)
    return fits


def _page(name: str) -> tuple[str, int | None]:
    """Path and page of a name such as "plan.pdf#page=2", which is how `Sheet.name` writes one."""
    found = re.fullmatch(r"(.+\.(?:pdf|tiff?))#page=([1-9]\d{0,5})", name, re.IGNORECASE)
    return (found[1], int(found[2])) if found else (name, None)


def _form(path: str) -> str:
    """What two spellings of one path have in common."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", unquote(path)).casefold())


def _sheet_file(
    image_id: int, name: str, file: Sheet, row: dict, annotations: Sequence[dict], tally: Tally
) -> SheetFile | None:
    where, said = printable(name), printable(row["file_name"])
    try:
        width, height, turn = sheet_header(file)
        if looks_truncated(file.path):
            raise DataError(f"{file.name}: truncated")
    except (DataError, OSError):
        tally["image truncated or unreadable", where, "dropped"] += 1
        return None
    listed = tuple(_number(row.get(side)) or 0.0 for side in ("width", "height"))
    sheet = SheetFile(image_id, said, file, width, height, (1.0, 1.0))
    if min(listed) <= 0:
        tally["image size missing: read from the file", where, "repaired"] += 1
    if min(listed) <= 0 or listed == (width, height):
        # Of the other turns the size tells, since they swap the sides.
        if turn in (2, 3, 4) or (turn != 1 and (width == height or min(listed) <= 0)):
            tally["image carries an EXIF turn: look at its boxes", where, "kept"] += 1
        return sheet
    labelled = f"image labelled at {listed[0]:g} x {listed[1]:g} px, the file has {width} x {height}"
    boxes = np.array([box for a in annotations if (box := _box(a)[0])], float).reshape(-1, 4)
    if listed == (height, width):
        if _swapped(file, boxes, sheet):
            tally[f"{labelled}: sides swapped", where, "repaired"] += 1
            return sheet
        kind = f"{labelled}: turned (by EXIF?) or its sides swapped, its boxes don't tell; label it again"
        tally[kind, where, "dropped"] += 1
        return None
    scale = (width / listed[0], height / listed[1])
    # A sheet that was scaled keeps its shape but for the rounding of its sides to whole pixels.
    if abs(scale[0] / scale[1] - 1) <= 1 / min(width, height, *listed):
        tally[f"{labelled}: boxes scaled", where, "repaired"] += 1
    elif _on_ink(file, boxes * [*scale, *scale], [boxes]):
        tally[f"{labelled}: boxes scaled along each axis, where they hold ink", where, "repaired"] += 1
    else:
        kind = f"{labelled}: of another shape, and its boxes don't tell how; label it again"
        tally[kind, where, "dropped"] += 1
        return None
    return replace(sheet, scale=scale)


def _swapped(file: Sheet, boxes: np.ndarray, sheet: SheetFile) -> bool:
    """Whether boxes [N, 4] show that the sides of a sheet are swapped in the json, and not the sheet turned.

    They do where one is centred beyond the sides as listed and all are within those of the file, or by ink.
    """
    x, y, width, height = boxes.T
    right, bottom = sheet.width + 1, sheet.height + 1  # of the file, with a pixel for rounding
    inside = (boxes >= -1).all() and (x + width <= right).all() and (y + height <= bottom).all()
    beyond = (x + width / 2 > bottom) | (y + height / 2 > right)
    if inside and beyond.any():
        return True
    clockwise = np.stack([sheet.width - y - height, x, height, width], axis=1)
    counter = np.stack([y, sheet.height - x - width, height, width], axis=1)
    return _on_ink(file, boxes, [clockwise, counter])


def _on_ink(file: Sheet, boxes: np.ndarray, others: Sequence[np.ndarray]) -> bool:
    """Whether ink shows that `boxes` [N, 4], x y width height in px, are on the symbols. True if N is 0.

    They must hold clearly more ink than each of `others`, which are in doubt, than their mirror images, and
    than when they are moved by half their own sides. On a few boxes nothing is clear.
    """
    if not len(boxes):
        return True
    try:
        ink = ink_mask(read_sheet(file))
    except DataError:
        return False
    x, y, width, height = boxes.T
    across, down = ink.shape[1] - x - width, ink.shape[0] - y - height
    corners = [(across, y), (x, down), (across, down)]
    corners += [(x + width / 2, y), (x - width / 2, y), (x, y + height / 2), (x, y - height / 2)]
    moved = [np.stack([left, top, width, height], axis=1) for left, top in corners]
    total = cv2.integral(ink.astype(np.uint8))
    held = _ink_in(total, boxes)
    for other in (*others, *moved):
        more = held - _ink_in(total, other)
        error = more.std(ddof=1) / np.sqrt(len(more)) if len(more) >= LEAST_BOXES else np.inf
        if not more.mean() > CLEAR * error:
            return False
    return True


def _ink_in(total: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Root of the share of ink [N] in boxes [N, 4], x y width height in px. total: integral of the ink."""
    corners = np.hstack([np.floor(boxes[:, :2]), np.ceil(boxes[:, :2] + boxes[:, 2:])]).clip(-1e9, 1e9)
    area = np.maximum((corners[:, 2:] - corners[:, :2]).prod(axis=1), 1)
    height, width = total.shape
    x0, y0, x1, y1 = np.clip(corners, 0, [width - 1, height - 1] * 2).astype(int).T
    ink = total[y1, x1] - total[y0, x1] - total[y1, x0] + total[y0, x0]
    return np.sqrt(np.maximum(ink, 0) / area)


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
        image_id, category_id = _whole(row.get("image_id")), _whole(row.get("category_id"))
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
        drawn, repair = _box(row)
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
        area = _number(row.get("area"))
        if area is None or area <= 0:
            tally["area missing: taken from the box", file_name, "repaired"] += 1
        keep_area = area is not None and area > 0 and bbox == labelled
        area = area * sheet.scale[0] * sheet.scale[1] if keep_area and area else bbox[2] * bbox[3]
        if "iscrowd" not in row:
            tally["iscrowd missing: set to 0", file_name, "repaired"] += 1
        yield Row(_whole(row.get("id")), sheet, label, bbox, area, row.get("iscrowd") in (1, "1"))


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


def printable(text: str) -> str:
    r"""A name that can be written in one line: "\n" and the halves of surrogate pairs are escaped."""
    return re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda bad: repr(bad[0])[1:-1], text)


def _whole(value: Any) -> int | None:
    """The whole number of up to 64 bits that an id is, also from "7" and 7.0, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = int(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < 1 << 63 and (isinstance(value, str) or number == value) else None


def _number(value: Any) -> float | None:
    """The finite number that a value is, or None; a string is no number even if it looks like one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return None
    return float(value)


def _box(row: Mapping[str, Any]) -> tuple[Box | None, str]:
    """x, y, width, height in px as labelled, or None if the row has no box; and how the box was repaired."""
    numbers, box = _numbers(row.get("bbox")), None
    if len(numbers) == 4:
        x, y, width, height = numbers
        box = x, y, width, height
        if width > 0 and height > 0:
            return box, ""
        if width and height:
            turned = min(x, x + width), min(y, y + height), abs(width), abs(height)
            return turned, "box drawn backwards: turned about"
    polygons = row.get("segmentation")
    outlines = [_numbers(polygon) for polygon in polygons] if isinstance(polygons, list) else []
    if outlines and all(len(outline) >= 6 and len(outline) % 2 == 0 for outline in outlines):
        left, top, right, bottom = (
            side(side(outline[axis::2]) for outline in outlines) for side in (min, max) for axis in (0, 1)
        )
        return (left, top, right - left, bottom - top), "box missing: taken from its outline"
    return box, ""


def _numbers(values: Any) -> list[float]:
    """The finite numbers that a list consists of, or [] if it is something else."""
    numbers = [_number(value) for value in values] if isinstance(values, list) else []
    return [] if None in numbers else [number for number in numbers if number is not None]


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
