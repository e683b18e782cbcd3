"""COCO: splits from which others are to be drawn, read and repaired as every command reads them."""

import json
import mmap
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from schematics.coco import Category, annotation_file, find_splits, inspect_split, to_coco, write_split
from schematics.formats.source import Box, Labelled, Tree, extent, split_named
from schematics.rows import Tally
from schematics.sheets import DataError, Sheet

IMAGES = "."  # where the sheets lie in what `write` makes: beside the json, as Roboflow wants them


def is_there(tree: Tree) -> bool:
    """Whether a json file has COCO's keys."""
    for path in (path for path in tree.files if path.suffix.lower() == ".json" and path.stat().st_size):
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data.find(b'"annotations"') >= 0 and data.find(b'"images"') >= 0:
                return True
    return False


def read(tree: Tree, tally: Tally) -> tuple[dict[int, str], list[Labelled]]:
    """Classes by id and the sheets, with all columns of their rows.

    Raises DataError if a split has a fatal finding.
    """
    ids: dict[str, int] = {}
    sheets = []
    for place in find_splits(tree.root):
        split = inspect_split(place)
        for finding in split.findings:
            if finding.action == "fatal":
                raise DataError(f"{place / finding.where if place.is_dir() else place}: {finding.kind}")
            tally[finding.kind, f"{place.name}/{finding.where}", finding.action] += finding.count
        for category in split.categories:
            free = category.id not in ids.values()
            ids.setdefault(category.name, category.id if free else max(ids.values()) + 1)
        images, annotations = _columns(place)
        boxes: dict[int, list[Box]] = defaultdict(list)
        document = to_coco(split)
        names = {category["id"]: category["name"] for category in document["categories"]}
        for row in document["annotations"]:
            name = names[row["category_id"]]
            raw = annotations.get((str(row["image_id"]), name, *row["bbox"]))
            if raw is None:  # the box was changed, and an outline would no longer fit it
                tally["changed box: its columns but area and iscrowd", place.name, "dropped"] += 1
            columns = {**(raw or {}), "area": row["area"], "iscrowd": row["iscrowd"]}
            x, y, width, height = row["bbox"]
            boxes[row["image_id"]].append(Box(name, x, y, width, height, columns))
        words = place.stem.split("_")  # such as those of instances_train2017
        own = next((found for word in words if (found := split_named(word))), "train")
        for sheet in split.sheets:
            # detection.predict names a page of a document so.
            page = re.search(r"#page=(\d+)$", sheet.file_name)
            path = Path(re.sub(r"#page=\d+$", "", str(sheet.path)))
            image = Sheet(path, int(page[1]) if page else None)
            size = (sheet.width, sheet.height)
            columns = images.get(str(sheet.image_id), {})
            sheets.append(Labelled(image, own, size, boxes[sheet.image_id], columns))
    return {number: name for name, number in ids.items()}, sheets


def _columns(place: Path) -> tuple[dict[str, dict], dict[tuple, dict]]:
    """The file's rows of images, by id, and of annotations, by image, class and box."""
    file = annotation_file(place) if place.is_dir() else place
    document = json.loads(file.read_bytes()) if file else {}
    # Half of a surrogate pair, which JSON may hold, can't be written.
    document = json.loads(json.dumps(document, ensure_ascii=False).encode("utf-8", errors="replace"))
    images = {str(row.get("id")): row for row in document.get("images", ())}
    names = {str(row.get("id")): str(row.get("name")).strip() for row in document.get("categories", ())}
    annotations = {
        (str(row.get("image_id")), names.get(str(row.get("category_id"))), *box): row
        for row in document.get("annotations", ())
        if (box := _box(row))
    }
    return images, annotations


def _box(row: dict) -> list[float] | None:
    """The box of a row as it stands there, or the extent of its outline."""
    try:
        if row.get("bbox"):
            return [float(side) for side in row["bbox"]]
        points = [value for polygon in row["segmentation"] for value in polygon]
        x0, y0, x1, y1 = extent(zip(points[::2], points[1::2], strict=True))
        return [float(side) for side in (x0, y0, x1 - x0, y1 - y0)]
    except (TypeError, ValueError, KeyError, OverflowError):
        return None


def write(folder: Path, sheets: Sequence[Labelled], names: Mapping[int, str], model: str) -> None:
    """Write `folder`/_annotations.coco.json, with all columns of the boxes. The sheets lie beside it."""
    images, annotations = [], []
    for number, sheet in enumerate(sheets, start=1):
        width, height = sheet.size
        images.append({"id": number, "file_name": sheet.sheet.path.name, "width": width, "height": height})
        for box in sheet.boxes:
            bbox = [box.x, box.y, box.width, box.height]
            category = next(number for number, name in names.items() if name == box.name)
            row = {"image_id": number, "category_id": category, "bbox": bbox}
            # Datumaro, by which CVAT imports COCO, refuses rows without a segmentation.
            annotations.append({**box.columns, "segmentation": [], **row})
    write_split(folder, images, [Category(number, name) for number, name in names.items()], annotations)
