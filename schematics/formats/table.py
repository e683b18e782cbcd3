"""Tables: csv files with a row for each box.

Read are Roboflow's export ("Tensorflow Object Detection") and others with such column names, and what
keras-retinanet reads, which has no line of names: path,x1,y1,x2,y2,class, or path,,,,, without boxes.
"""

import csv
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from schematics.formats.source import (
    IMAGE_SUFFIXES,
    Box,
    Labelled,
    Tree,
    assign,
    box_between,
    class_name,
    number,
    read_text,
    split_named,
)
from schematics.rows import Tally
from schematics.sheets import DataError, Sheet

COLUMNS = ("filename", "class", "xmin", "ymin", "xmax", "ymax")
UNNAMED = ("filename", "xmin", "ymin", "xmax", "ymax", "class")  # the order of a table without names
VIA = ("region_shape_attributes", "spatial_coordinates")  # columns of VGG's Image Annotator, 1 and 2, and 3
CURE = f"name the columns in a first line, such as {','.join(UNNAMED)}"


def is_there(tree: Tree) -> bool:
    return any(_is_table(path) for path in tree.files)


def read(tree: Tree, tally: Tally) -> tuple[dict[int, str], list[Labelled]]:
    """Classes by id, numbered in the order of their names, and the sheets.

    A row without a class and numbers is a sheet without boxes. Raises DataError if a sheet has two sizes or
    is in the tables of two splits, and if a table's columns or the unit of its numbers are in doubt.
    """
    boxes: dict[Path, list[Box]] = defaultdict(list)
    sizes: dict[Path, tuple[int, int]] = {}
    listed: dict[Path, str] = {}
    for path in (path for path in tree.files if _is_table(path)):
        where = tree.name(path)
        folder = where.rpartition("/")[0]
        split = next(filter(None, map(split_named, path.stem.split("_"))), None)  # train.csv, test_labels.csv
        largest = 0.0  # coordinate
        for row in _rows(path):
            image = tree.find(f"{folder}/{row['filename']}" if folder else row["filename"])
            if image is None:
                tally["row of an image that is not there", where, "dropped"] += 1
                continue
            if split and listed.setdefault(image, split) != split:
                both = f"{listed[image]} and {split}"
                raise DataError(f"{path}: {image.name} is in the tables of {both}; keep it in one")
            members = boxes[image]
            sides = [row.get("width", ""), row.get("height", "")]
            if all(side.isdecimal() and len(side) < 10 for side in sides):
                size = (int(sides[0]), int(sides[1]))
                if all(size) and sizes.setdefault(image, size) != size:
                    raise DataError(f"{path}: {row['filename']} has two sizes, {sizes[image]} and {size}")
            if any(row[column] for column in COLUMNS[1:]):
                try:
                    corners = [number(row[column]) for column in COLUMNS[2:]]
                    largest = max(largest, *map(abs, corners))
                    members.append(box_between(class_name(row["class"]), corners, where, tally))
                except ValueError:
                    tally["row without a class and four numbers", where, "dropped"] += 1
        if 0 < largest <= 1:
            raise DataError(f"{path}: no coordinate is above 1: shares of a sheet's sides? Give pixels")
    splits = assign(tree, boxes, listed, tally)
    sheets = []
    for image, split in splits.items():
        if found := tree.usable_size(image, tally):
            sheets.append(Labelled(Sheet(image), split, sizes.get(image, found), boxes[image]))
    for image in set(tree.images) - set(boxes):
        tally["image that no row names", tree.name(image), "dropped"] += 1
    names = sorted({box.name for sheet in sheets for box in sheet.boxes})
    return dict(enumerate(names, start=1)), sheets


def _is_table(path: Path) -> bool:
    """Whether a file is a table of boxes, also one that `_rows` refuses."""
    if path.suffix.lower() != ".csv":
        return False
    with open(path, "rb") as file:
        # UTF-16 has zeros and a mark of its own, which UTF-8 can't be.
        head = file.read(4000).replace(b"\0", b"").decode("utf-8-sig", errors="replace").lstrip("\ufffd")
    first = _fields(head)
    is_box = any(field.lower().endswith(IMAGE_SUFFIXES) for field in first) and (
        sum(map(_is_number, first)) >= 4 or (len(first) == len(UNNAMED) and not any(first[1:]))
    )
    return is_box or _has_names(first) or any(name in head for name in VIA)


def _fields(text: str) -> list[str]:
    """The fields of the first line of a table."""
    head = text.partition("\n")[0]
    try:
        return [field.strip() for field in next(csv.reader([head], delimiter=_delimiter(head)), [])]
    except csv.Error:
        return []


def _delimiter(head: str) -> str:
    return ";" if ";" in head else ","


def _has_names(first: Sequence[str]) -> bool:
    return set(COLUMNS) <= {field.lower() for field in first}


def _is_number(text: str) -> bool:
    try:
        number(text)
    except ValueError:
        return False
    return True


def _rows(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows, each with all of COLUMNS. Raises DataError for a broken table and one in doubt."""
    text = read_text(path)
    if any(name in text[:4000] for name in VIA):
        cure = "export its annotations in COCO format in place of csv"
        raise DataError(f"{path}: is VGG Image Annotator's csv, which is not read; {cure}")
    first = _fields(text)
    named = _has_names(first)
    names = [field.lower() for field in first] if named else UNNAMED
    if not named:
        _refuse_doubtful(path, first, 1)
    head, _, rest = text.partition("\n")
    lines = (rest if named else text).splitlines(keepends=True)
    table = csv.reader(lines, delimiter=_delimiter(head), strict=True)
    settled = named or any(first[1:])  # else the first sheets are without boxes and show no order
    try:
        for values in table:
            row = {**dict.fromkeys(COLUMNS, ""), **dict(zip(names, map(str.strip, values), strict=False))}
            if any(values[len(names) :]):  # a comma in a name, say, that has shifted the rest
                row["xmin"] = "?"
            if not named:
                if not settled and len(values) == len(UNNAMED) and all(values):
                    _refuse_doubtful(path, [value.strip() for value in values], table.line_num)
                    settled = True
                _refuse_backwards(path, row)
            if any(values):
                yield row
    except csv.Error as error:
        raise DataError(f"{path}: no table that can be read ({error}); export it again") from None


def _refuse_doubtful(path: Path, first: Sequence[str], line: int) -> None:
    """Raise DataError unless a line without names can only be path,x1,y1,x2,y2,class or path,,,,,.

    first: the fields of that line, the first of the table or the first with a box. Where the class is a
    number, it might as well come first.
    """
    is_path = len(first) == len(UNNAMED) and first[0].lower().endswith(IMAGE_SUFFIXES)
    is_box = is_path and all(map(_is_number, first[1:5])) and first[5] and not _is_number(first[5])
    if not (is_box or (is_path and not any(first[1:]))):
        raise DataError(f"{path}: line {line} is neither column names nor path,x1,y1,x2,y2,class; {CURE}")


def _refuse_backwards(path: Path, row: dict[str, str]) -> None:
    """Raise DataError for a box that may be x,y,width,height: nothing in the file tells."""
    try:
        x0, y0, x1, y1 = (number(row[side]) for side in COLUMNS[2:])
    except ValueError:
        return
    if x1 < x0 or y1 < y0:
        kind = f"{row['filename'][:200]} has x2 below x1 or y2 below y1: widths and heights?"
        raise DataError(f"{path}: {' '.join(kind.split())} {CURE[0].upper()}{CURE[1:]}")
