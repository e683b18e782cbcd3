"""labelme: a json file for each image, with shapes of which each has a label."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from schematics.formats.source import (
    LARGEST,
    Box,
    Labelled,
    Tree,
    assign,
    box_between,
    class_name,
    extent,
    read_text,
)
from schematics.rows import Tally
from schematics.sheets import DataError, Sheet

# Shapes whose points surround something. Points and lines have no box.
AREAS = {"polygon", "rectangle", "rotation", "oriented_rectangle", "quadrilateral", "mask"}


def is_there(tree: Tree) -> bool:
    return any(_document(path) for path in tree.files if path.suffix.lower() == ".json")


def read(tree: Tree, tally: Tally) -> tuple[dict[int, str], list[Labelled]]:
    """Classes by id, numbered in the order of their names, and the sheets. Raises DataError for bad json."""
    files: dict[Path, tuple[tuple[int, int] | None, list[Box]]] = {}
    names: dict[Path, str] = {}
    for path in tree.files:
        if path.suffix.lower() == ".json" and (document := _document(path)):
            boxes = _boxes(document["shapes"], tree.name(path), tally)
            width, height = document.get("imageWidth"), document.get("imageHeight")
            size = None
            if isinstance(width, int) and isinstance(height, int) and min(width, height) > 0:
                size = (width, height)
            files[path] = size, boxes  # and not the picture that it may hold
            name = document.get("imagePath")
            names[path] = name if isinstance(name, str) else ""
    pairs = tree.pair(names, tally)
    splits = assign(tree, pairs.values(), {}, tally)
    sheets = []
    for path, image in pairs.items():
        if size := tree.usable_size(image, tally):
            labelled, boxes = files[path]
            sheets.append(Labelled(Sheet(image), splits[image], labelled or size, boxes))
    # Of a json file above the limit only this is known, that its image has no labels.
    for image in set(tree.images) - set(pairs.values()):
        tally["image without a label file", tree.name(image), "dropped"] += 1
    classes = sorted({box.name for sheet in sheets for box in sheet.boxes})
    return dict(enumerate(classes, start=1)), sheets


def _document(path: Path) -> dict[str, Any] | None:
    """The contents of a json file that labelme wrote, None for another. Raises DataError if it is broken."""
    if path.stat().st_size > LARGEST:
        return None
    text = read_text(path)
    if '"shapes"' not in text:
        return None
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); save it again") from None
    return document if isinstance(document, dict) and isinstance(document.get("shapes"), list) else None


def _boxes(shapes: list, where: str, tally: Tally) -> list[Box]:
    """The extents of the shapes. Shapes of one label and group are one object, as labelme itself has it."""
    groups = defaultdict(list)
    for place, shape in enumerate(shapes):
        kind = "not an object"
        try:
            if not isinstance(shape, dict):
                raise ValueError
            kind = str(shape.get("shape_type") or "polygon")[:40]
            name = class_name(shape.get("label"))
            corners = _extent(kind, [(_finite(x), _finite(y)) for x, y in shape["points"]])
        except (ValueError, TypeError, KeyError):
            tally[f"shape without a label and an area ({kind!r})", where, "dropped"] += 1
            continue
        group = shape.get("group_id")
        groups[name, f"group {group}" if group is not None else place].append(corners)
    boxes = []
    for (name, _), members in groups.items():
        if len(members) > 1:
            tally["shapes of one label and group: one box", where, "repaired"] += len(members)
        corners = extent([point for x0, y0, x1, y1 in members for point in ((x0, y0), (x1, y1))])
        boxes.append(box_between(name, corners, where, tally))
    return boxes


def _extent(kind: str, points: list[tuple[float, float]]) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 of a shape. Raises ValueError if it surrounds nothing."""
    if kind == "circle":
        (x, y), edge = points
        radius = math.dist((x, y), edge)
        return x - radius, y - radius, x + radius, y + radius
    if kind not in AREAS or len(points) < 2:
        raise ValueError
    return extent(points)


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise ValueError
    return float(value)
