"""What is written of the symbols found on drawings: predictions.json, counts.csv and annotated pictures.

And, for each tool in which they will be corrected, a folder that it imports.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cluster import atomic
from cluster.errors import UserError
from detection.detections import Detections, to_results
from detection.draw import annotate, write_png
from schematics.labelling import TOOLS, Box, Labelled, lay_out, refuse_laid_out, tool_names
from schematics.sheets import Sheet, find_sheets

Tool = Literal["label-studio", "cvat", "coco", "yolo"]  # the keys of schematics.labelling.TOOLS


def drawings(
    paths: Sequence[Path], out: Path, overwrite: bool, tools: Sequence[str]
) -> tuple[list[Sheet], Path]:
    """The sheets to look at, and the folder of all of them, to which names in predictions.json are relative.

    Raises UserError if there are none, or if `out` holds predictions already, unless they may be overwritten,
    and DataError if it holds the folder of one of the tools, which is never overwritten.
    """
    if not paths:
        raise UserError("name the sheets: image files, PDFs or folders, after the flags")
    if (out / "predictions.json").exists() and not overwrite:
        raise UserError(f"--out {out}: holds predictions; name another folder, or give --overwrite")
    refuse_laid_out(out, tools)
    sheets = [sheet for path in paths for sheet in find_sheets(path)]
    # If --out lies among the sheets, what an earlier run has put there are not drawings to look at.
    own = {(out / name).resolve() for name in ("pictures", *TOOLS)}
    sheets = [sheet for sheet in sheets if not own & set(sheet.path.resolve().parents)]
    if not sheets:
        raise UserError(f"{out}: holds the pictures of an earlier run; name the drawings")
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
    found: Mapping[int, Detections],
    categories: Sequence[tuple[int, str]],
    counts: str,
) -> str:
    """Write predictions.json and counts.csv, whose text is `counts`. Returns the text of the former."""
    text = json.dumps(to_document(images, found, categories))
    atomic.write_text(out / "predictions.json", text)
    atomic.write_text(out / "counts.csv", counts)
    return text


def write_for_tools(
    out: Path,
    tools: Sequence[str],
    sheets: Sequence[Sheet],
    images: list[dict],
    found: Mapping[int, Detections],
    categories: Sequence[tuple[int, str]],
    weights: Path,
    dpi: int,
) -> None:
    """Write a folder for each tool, and into `images` under which name the tools have each sheet."""
    if not tools:
        return
    for row, name in zip(images, tool_names(sheets), strict=True):
        row["labelled_as"] = name  # by which detection.corrections finds the sheet again
    labelled = to_labelled(sheets, images, found, [name for _, name in categories])
    lay_out(out, tools, labelled, dict(categories), "/".join(weights.parts[-2:]), dpi)


def told(out: Path, found: Mapping[int, Detections], home: Path, tools: Sequence[str], *more: str) -> str:
    """What a command says at its end. more: lines about the counts; empty ones are left out."""
    total = sum(len(detections) for detections in found.values())
    lines = [
        f"{total} symbols on {len(found)} sheets; written: {out}",
        *filter(None, more),
        f"predictions.json names sheets as they lie in {home}; labels are read from beside them",
        *(f"for {tool}: {out / tool}; python -m schematics.convert reads what it exports" for tool in tools),
    ]
    return "\n".join(lines)


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


def to_labelled(
    sheets: Sequence[Sheet], images: Sequence[dict], found: Mapping[int, Detections], names: Sequence[str]
) -> list[Labelled]:
    """The sheets with their detections as boxes to be corrected. images: COCO's entry of each sheet."""
    labelled = []
    for sheet, image in zip(sheets, images, strict=True):
        detections = found[image["id"]]
        columns = (detections.boxes, detections.scores, detections.labels)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        boxes = [Box(names[k - 1], x0, y0, x1 - x0, y1 - y0, {"score": s}) for (x0, y0, x1, y1), s, k in rows]
        labelled.append(Labelled(sheet, "train", (image["width"], image["height"]), boxes))
    return labelled


def picture_name(number: int, sheet: Sheet) -> str:
    """The file name of a sheet's picture, such as 0007-plan-page2.png. `number` keeps equal names apart."""
    page = "" if sheet.page is None else f"-page{sheet.page}"
    # File systems allow names of 255 bytes, of which some letters take three or four.
    stem = os.fsencode(sheet.path.stem)[:150].decode(errors="ignore")
    return f"{number:04}-{stem}{page}.png"


def save_picture(path: Path, image: np.ndarray, found: Detections, names: Sequence[str]) -> None:
    picture = annotate(image, found.boxes, found.labels, names, found.scores, path.stem)
    write_png(path, picture)
