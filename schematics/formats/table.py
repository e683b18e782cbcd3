"""Tables: csv files with a row for each box, as Roboflow exports them ("Tensorflow Object Detection")."""

import csv
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from schematics.formats.source import Box, Labelled, Tree, assign, box_between, class_name, number, read_text
from schematics.repair import Tally
from schematics.sheets import DataError, Sheet

COLUMNS = ("filename", "class", "xmin", "ymin", "xmax", "ymax")


def is_there(tree: Tree) -> bool:
    return any(_is_table(path) for path in tree.files)


def read(tree: Tree, tally: Tally) -> tuple[dict[int, str], list[Labelled]]:
    """Classes by id, numbered in the order of their names, and the sheets.

    A row without a class and numbers is a sheet without boxes. Raises DataError if a sheet has two sizes.
    """
    boxes: dict[Path, list[Box]] = defaultdict(list)
    sizes: dict[Path, tuple[int, int]] = {}
    for path in (path for path in tree.files if _is_table(path)):
        where = tree.name(path)
        folder = where.rpartition("/")[0]
        for row in _rows(path):
            image = tree.find(f"{folder}/{row['filename']}" if folder else row["filename"])
            if image is None:
                tally["row of an image that is not there", where, "dropped"] += 1
                continue
            members = boxes[image]
            sides = [row.get("width", ""), row.get("height", "")]
            if all(side.isdecimal() and len(side) < 10 for side in sides):
                size = (int(sides[0]), int(sides[1]))
                if all(size) and sizes.setdefault(image, size) != size:
                    raise DataError(f"{path}: {row['filename']} has two sizes, {sizes[image]} and {size}")
            if any(row[column] for column in COLUMNS[1:]):
                try:
                    corners = [number(row[column]) for column in COLUMNS[2:]]
                    members.append(box_between(class_name(row["class"]), corners, where, tally))
                except ValueError:
                    tally["row without a class and four numbers", where, "dropped"] += 1
    splits = assign(tree, boxes, {}, tally)
    sheets = []
    for image, members in boxes.items():
        if found := tree.usable_size(image, tally):
            sheets.append(Labelled(Sheet(image), splits[image], sizes.get(image, found), members))
    for image in set(tree.images) - set(boxes):
        tally["image that no row names", tree.name(image), "dropped"] += 1
    names = sorted({box.name for sheet in sheets for box in sheet.boxes})
    return dict(enumerate(names, start=1)), sheets


def _is_table(path: Path) -> bool:
    if path.suffix.lower() != ".csv":
        return False
    with open(path, "rb") as file:
        head = file.readline(4000).decode("utf-8-sig", errors="replace")
    return set(COLUMNS) <= set(_columns(head))


def _columns(head: str) -> list[str]:
    return [column.strip().strip('"').lower() for column in head.replace(";", ",").split(",")]


def _rows(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows, each with all of COLUMNS. Raises DataError for a broken table."""
    text = read_text(path)
    head, _, rest = text.partition("\n")
    lines = rest.splitlines(keepends=True)
    try:
        for values in csv.reader(lines, delimiter=";" if ";" in head else ",", strict=True):
            row = dict(zip(_columns(head), map(str.strip, values), strict=False))
            if any(values):
                yield {**dict.fromkeys(COLUMNS, ""), **row}
    except csv.Error as error:
        raise DataError(f"{path}: no table that can be read ({error}); export it again") from None
