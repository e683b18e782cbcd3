"""What is written of the symbols found on drawings: predictions.json, counts.csv and annotated pictures."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster import atomic
from cluster.errors import UserError
from detection.detections import Detections, to_results
from detection.draw import annotate, write_png
from schematics.sheets import Sheet, find_sheets


def drawings(paths: Sequence[Path], out: Path, overwrite: bool) -> tuple[list[Sheet], Path]:
    """The sheets to look at, and the folder of all of them, to which names in predictions.json are relative.

    Raises UserError if there are none, or if `out` holds predictions already, unless they may be overwritten.
    """
    if not paths:
        raise UserError("name the sheets: image files, PDFs or folders, after the flags")
    if (out / "predictions.json").exists() and not overwrite:
        raise UserError(f"--out {out}: holds predictions; name another folder, or give --overwrite")
    sheets = [sheet for path in paths for sheet in find_sheets(path)]
    # If --out lies among the sheets, the pictures of an earlier run are not drawings to look at.
    own = (out / "pictures").resolve()
    sheets = [sheet for sheet in sheets if sheet.path.resolve().parent != own]
    if not sheets:
        raise UserError(f"{out / 'pictures'}: holds the pictures of an earlier run; name the drawings")
    return sheets, Path(os.path.commonpath([sheet.path.resolve().parent for sheet in sheets]))


def clear_pictures(out: Path) -> Path:
    """Make the folder of pictures, without those of an earlier run. Returns it."""
    pictures = out / "pictures"
    atomic.make_folder(pictures)
    for picture in pictures.glob("[0-9][0-9][0-9][0-9]*.png"):
        picture.unlink()
    return pictures


def image_entry(number: int, sheet: Sheet, image: np.ndarray, home: Path) -> dict[str, Any]:
    """COCO's entry of a sheet in the folder of all of them."""
    place = replace(sheet, path=sheet.path.resolve().relative_to(home)).name
    return {"id": number, "file_name": place, "width": image.shape[1], "height": image.shape[0]}


def write_found(
    out: Path,
    images: list[dict],
    names: Sequence[str],
    found: Mapping[int, Detections],
    categories: Sequence[tuple[int, str]],
) -> str:
    """Write predictions.json and counts.csv; the text of the former. names: of the sheets, as given."""
    text = json.dumps(to_document(images, found, categories))
    atomic.write_text(out / "predictions.json", text)
    counts = to_counts(names, list(found.values()), [name for _, name in categories])
    atomic.write_text(out / "counts.csv", counts)
    return text


def told(out: Path, found: Mapping[int, Detections], home: Path) -> str:
    """What a command says at its end."""
    total = sum(len(detections) for detections in found.values())
    return (
        f"{total} symbols on {len(found)} sheets; written: {out}\n"
        f"predictions.json names sheets as they lie in {home}; labels are read from beside them"
    )


def to_document(
    images: list[dict], found: Mapping[int, Detections], categories: Sequence[tuple[int, str]]
) -> dict[str, Any]:
    """A COCO document of the detections: annotations with a score, which can be corrected and used as labels.

    images: COCO's entries; file_name is relative to the folder of all sheets, where labelling tools look for
    them. found: detections by image id. categories: (id, name) of the labels 1..K.
    """
    rows = to_results(found, [category_id for category_id, _ in categories])
    annotations = [
        {"id": n, **row, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
        for n, row in enumerate(rows, 1)
    ]
    classes = [{"id": category_id, "name": name} for category_id, name in categories]
    return {"info": {}, "images": images, "categories": classes, "annotations": annotations}


def to_counts(sheets: Sequence[str], found: Sequence[Detections], names: Sequence[str]) -> str:
    """CSV with a row for each sheet: its name, the number of symbols of each class, and their sum.

    A name that a spreadsheet would run as a formula has an apostrophe before it (OWASP, CSV injection).
    """
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["sheet", *map(_no_formula, names), "total"])
    for sheet, detections in zip(sheets, found, strict=True):
        numbers = np.bincount(detections.labels, minlength=len(names) + 1)[1:]
        writer.writerow([_no_formula(sheet), *numbers, len(detections)])
    return table.getvalue()


def _no_formula(name: str) -> str:
    return f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name


def picture_name(number: int, sheet: Sheet) -> str:
    """The file name of a sheet's picture, such as 0007-plan-page2.png. `number` keeps equal names apart."""
    page = "" if sheet.page is None else f"-page{sheet.page}"
    # File systems allow names of 255 bytes, of which some letters take three or four.
    stem = os.fsencode(sheet.path.stem)[:150].decode(errors="ignore")
    return f"{number:04}-{stem}{page}.png"


def save_picture(path: Path, image: np.ndarray, found: Detections, names: Sequence[str]) -> None:
    picture = annotate(image, found.boxes, found.labels, names, found.scores, path.stem)
    write_png(path, picture)
