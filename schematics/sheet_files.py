"""Find the files of the images that a COCO file lists, and whether boxes fit a sheet of another size.

A name in another form is looked for. Where a sheet was resized since it was labelled, its ink shows whether
its boxes can be scaled. Each function counts in a tally what it repairs or leaves out. docs/data-format.md
lists all of it.
"""

import itertools
import os
import posixpath
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import cv2
import numpy as np

from schematics.containers import looks_truncated
from schematics.rows import Tally, drawn_box, finite, printable, whole_number
from schematics.sheets import SUFFIXES, DataError, Sheet, read_sheet, sheet_header, walk
from schematics.uploads import before_upload, served_path
from schematics.windows import ink_mask

# Standard errors by which boxes must hold more ink where a repair puts them than elsewhere. On 148 sheets of
# two data sets, each padded, cropped and turned so that the repair is wrong, the most was 2.2.
CLEAR = 3.0
LEAST_BOXES = 5


@dataclass(frozen=True)
class SheetFile:
    """A listed image whose file is there; width and height are those of the file, in px."""

    id: int
    name: str
    file: Sheet
    width: int
    height: int
    scale: tuple[float, float]  # what boxes must be multiplied by along x and y, if labelled at another size


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
        image_id, name = whole_number(row.get("id")), _path(row.get("file_name"))
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
        sizes = [[finite(r.get(side)) or 0 for side in ("width", "height")] for r in (rows[name], row)]
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
        if (image_id := whole_number(row.get("image_id"))) in names:
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
    percent-encoding, without its first folders and without what Label Studio adds to it, and taken where just
    one file fits that no other name has.
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
            paths = (path, served_path(path), before_upload(served_path(path)))
            files = next((fits[end] for one in paths for end in _ends(_form(one)) if end in fits), set())
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


def _ends(path: str) -> list[str]:
    """A path, and what is left of it without its first folders."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    return ["/".join(parts[start:]) for start in range(len(parts))]


def _by_form(folders: Sequence[Path], taken: Set[Path]) -> dict[str, set[Path]]:
    """The drawings in the folders that are not taken, by the form of their path there."""
    fits = defaultdict(set)
    for folder in folders:
        for path in walk(folder):
            if path.suffix.lower() in SUFFIXES and path not in taken:
                fits[_form(path.relative_to(folder).as_posix())].add(path)
    return fits


def sheet_named(name: str | Path) -> Sheet:
    """The sheet that `Sheet.name` calls so: a path, with "#page=N" where the file has pages."""
    path, page = _page(str(name))
    return Sheet(Path(path), page)


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
    listed = tuple(finite(row.get(side)) or 0.0 for side in ("width", "height"))
    sheet = SheetFile(image_id, said, file, width, height, (1.0, 1.0))
    if min(listed) <= 0:
        tally["image size missing: read from the file", where, "repaired"] += 1
    if min(listed) <= 0 or listed == (width, height):
        # Of the other turns the size tells, since they swap the sides.
        if turn in (2, 3, 4) or (turn != 1 and (width == height or min(listed) <= 0)):
            tally["image carries an EXIF turn: look at its boxes", where, "kept"] += 1
        return sheet
    labelled = f"image labelled at {listed[0]:g} x {listed[1]:g} px, the file has {width} x {height}"
    boxes = np.array([box for a in annotations if (box := drawn_box(a)[0])], float).reshape(-1, 4)
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
