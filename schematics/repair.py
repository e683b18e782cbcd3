"""Find what is usable in the rows of a COCO file.

Each function counts in a tally what it repairs or leaves out. docs/data-format.md lists all of it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schematics.sheets import DataError, looks_truncated, sheet_size

# A thinner box is a slip of the mouse, and torchvision stops a whole run at a box without area.
MIN_SIDE = 0.1  # px

Tally = Counter[tuple[str, str, str]]  # (kind, where, action) -> count


@dataclass(frozen=True)
class SheetFile:
    """A listed image whose file is there; width and height are those of the file, in px."""

    id: int
    name: str
    path: Path
    width: int
    height: int
    scale: tuple[float, float]  # what boxes must be multiplied by along x and y, if labelled at another size


@dataclass
class Row:
    """One usable box."""

    id: int | None
    sheet: SheetFile
    category_id: int
    bbox: tuple[float, float, float, float]  # x, y, width, height, inside the sheet
    area: float
    crowd: bool


def class_names(documents: Mapping[str, dict[str, Any]], file_name: str, tally: Tally) -> dict[int, str]:
    """Category id -> name, sorted by id, over the documents of all splits; only the first one is tallied.

    Roboflow's placeholder is left out: category 0, which has the project's name and no boxes, and which is
    the supercategory of the others.
    """
    own = next(iter(documents))
    names: dict[int, str] = {}
    listed_in: dict[int, str] = {}
    for split, document in documents.items():
        for row in document["categories"]:
            number, name = _whole(row.get("id")), str(row.get("name") or "").strip()
            if number is None or not name:
                if split == own:
                    tally["class without a whole-number id or a name", file_name, "dropped"] += 1
            elif names.setdefault(number, name) != name:
                clash = f"{names[number]!r} in {listed_in[number]} but {name!r} in {split}"
                tally[f"category id {number} is {clash}; give each class one id", file_name, "fatal"] += 1
            elif listed_in.setdefault(number, split) != own:
                tally[f"class {name!r} is listed only in another split", file_name, "kept"] = 1
    rows = [row for document in documents.values() for row in document["categories"]]
    parents = {str(row.get("supercategory")) for row in rows if _whole(row.get("id")) != 0}
    boxes = (box for document in documents.values() for box in document["annotations"])
    if names.get(0) in parents and not any(_whole(box.get("category_id")) == 0 for box in boxes):
        tally[f"placeholder category 0 {names.pop(0)!r}", file_name, "dropped"] += 1
    for name, count in Counter(names.values()).items():
        if count > 1:
            ids = ", ".join(str(number) for number in sorted(names) if names[number] == name)
            tally[f"class name {name!r} stands under ids {ids}", file_name, "kept"] += 1
    return dict(sorted(names.items()))


def usable_images(
    folder: Path, rows: Iterable[dict], file_name: str, tally: Tally
) -> dict[int, SheetFile | None]:
    """Every listed image id -> its sheet, or None if the sheet can't be used. Reads headers only.

    A file that is listed under several ids is one sheet, under the first of them.
    """
    names: dict[int, str] = {}
    ids: dict[str, int] = {}
    files: dict[int, SheetFile | None] = {}
    for row in rows:
        image_id, name = _whole(row.get("id")), row.get("file_name")
        if image_id is None or not isinstance(name, str) or not name:
            tally["image without a whole-number id or a file name", file_name, "dropped"] += 1
        elif image_id in names:
            if names[image_id] == name:
                tally["image listed twice", name, "repaired"] += 1
            else:
                clash = f"image id {image_id} stands for both {names[image_id]} and {name}"
                tally[f"{clash}; give each image one id", file_name, "fatal"] += 1
        else:
            names[image_id] = name
            if name in ids:
                tally["image listed under two ids: boxes joined", name, "repaired"] += 1
                files[image_id] = files[ids[name]]
            else:
                ids[name] = image_id
                files[image_id] = _sheet_file(folder, image_id, name, row, tally)
    return files


def _sheet_file(folder: Path, image_id: int, name: str, row: dict, tally: Tally) -> SheetFile | None:
    slashed = name.replace("\\", "/")  # the file may have been written on Windows
    base = slashed.rsplit("/", 1)[-1]
    places = (folder / slashed, folder / "images" / slashed, folder / base, folder / "images" / base)
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        tally["image named but missing", name, "dropped"] += 1
        return None
    try:
        size = sheet_size(path)
        if looks_truncated(path):
            raise DataError(f"{path}: truncated")
    except DataError:
        tally["image truncated or unreadable", name, "dropped"] += 1
        return None
    width, height = _number(row.get("width")), _number(row.get("height"))
    if not width or not height:
        tally["image size missing: read from the file", name, "repaired"] += 1
        return SheetFile(image_id, name, path, *size, (1.0, 1.0))
    labelled = f"labelled at {width:g} x {height:g} px, the file has {size[0]} x {size[1]}"
    scale = (size[0] / width, size[1] / height)
    if (height, width) == size and width != height:
        tally[f"{labelled}: turned (by EXIF?), label it again", name, "dropped"] += 1
        return None
    # A sheet that was scaled keeps its shape but for the rounding of its sides to whole pixels.
    if abs(scale[0] / scale[1] - 1) > 1 / min(width, height, *size):
        tally[f"{labelled}: look at its boxes", name, "repaired"] += 1
        scale = (1.0, 1.0)
    elif scale != (1.0, 1.0):
        tally[f"{labelled}: boxes scaled", name, "repaired"] += 1
    return SheetFile(image_id, name, path, *size, scale)


def clean_rows(
    rows: Iterable[dict],
    files: Mapping[int, SheetFile | None],
    names: Mapping[int, str],
    file_name: str,
    tally: Tally,
) -> Iterator[Row]:
    """Yield the usable boxes, clipped to their sheets, under the ids that the file gives."""
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
        if category_id is None or category_id not in names:
            tally["box of a class that is not listed", sheet.name, "dropped"] += 1
            continue
        labelled = _box(row.get("bbox"), sheet)
        if labelled is None:
            tally["box is not four finite numbers", sheet.name, "dropped"] += 1
            continue
        bbox = _clipped(labelled, sheet, tally)
        if bbox is None:
            continue
        if (sheet.id, category_id, bbox) in seen:
            tally["box listed twice", sheet.name, "dropped"] += 1
            continue
        seen.add((sheet.id, category_id, bbox))
        area = _number(row.get("area"))
        if area is None or area <= 0:
            tally["area missing: taken from the box", file_name, "repaired"] += 1
        keep_area = area is not None and area > 0 and bbox == labelled
        area = area * sheet.scale[0] * sheet.scale[1] if keep_area and area else bbox[2] * bbox[3]
        if "iscrowd" not in row:
            tally["iscrowd missing: set to 0", file_name, "repaired"] += 1
        yield Row(_whole(row.get("id")), sheet, category_id, bbox, area, row.get("iscrowd") in (1, "1"))


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


def _whole(value: Any) -> int | None:
    """The whole number that an id is, also from "7" and 7.0, or None."""
    try:
        number = int(value)
        return number if not isinstance(value, bool) and number == float(value) else None
    except (TypeError, ValueError, OverflowError):
        return None


def _number(value: Any) -> float | None:
    """The finite number that a value is, or None; a string is no number even if it looks like one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return None
    return float(value)


def _box(value: Any, sheet: SheetFile) -> tuple[float, float, float, float] | None:
    """x, y, width, height in px of the file, or None if the value is no box."""
    numbers = [_number(side) for side in value] if isinstance(value, list) else []
    if len(numbers) != 4 or None in numbers:
        return None
    x, y, width, height = (number for number in numbers if number is not None)
    return x * sheet.scale[0], y * sheet.scale[1], width * sheet.scale[0], height * sheet.scale[1]


def _clipped(
    bbox: tuple[float, float, float, float], sheet: SheetFile, tally: Tally
) -> tuple[float, float, float, float] | None:
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
