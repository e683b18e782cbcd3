"""Find the symbols on drawings without labels, and count them.

    python -m detection.predict --checkpoint model.pt --out FOUND SHEETS_OR_FOLDERS...

FOUND gets predictions.json (a COCO document with scores), counts.csv (sheets by classes) and an annotated PNG
a sheet. Files that can't be read are named, skipped, and make the exit status 1. From Python, on an array:
detection.inference.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from tyro.conf import Positional

from cluster import atomic, distributed
from cluster.config import Config, setting
from cluster.entry import run
from cluster.errors import FAILED, UserError
from detection.draw import annotate, write_png
from detection.inference import Detections, detect, load_detector, to_results
from schematics.sheets import DataError, Sheet, find_sheets, read_sheet


@dataclass(frozen=True, kw_only=True)
class PredictConfig(Config):
    # Detector to use: model.pt of a finetuning, or an exported .onnx.
    checkpoint: Path
    # Folder for what is written.
    out: Path
    # Drawings to look at: image files, PDFs, folders of them.
    sheets: Positional[tuple[Path, ...]] = ()
    # Score from which a detection counts; by default each class's own, the best on the validation split.
    threshold: float | None = setting(None, least=0, most=1)
    # Replace the predictions of an earlier run in --out.
    overwrite: bool = False
    # Print predictions.json on stdout, and nothing else there.
    json: bool = False
    # Write an annotated PNG of each sheet.
    pictures: bool = True
    # Resolution in dots per inch at which PDF pages are drawn.
    dpi: int = setting(200, least=1)
    # Windows in one forward pass; memory grows with it.
    batch_size: int = setting(4, least=1)
    # Where to compute: auto (a GPU if there is one), cpu, cuda, or one GPU as cuda:1.
    device: str = "auto"


def main(config: PredictConfig) -> None:
    if not config.sheets:
        raise UserError("name the sheets: image files, PDFs or folders, after the flags")
    pictures = config.out / "pictures"
    if (config.out / "predictions.json").exists() and not config.overwrite:
        raise UserError(f"--out {config.out}: holds predictions; name another folder, or give --overwrite")
    device = distributed.start(config.device).device
    sheets = [sheet for path in config.sheets for sheet in find_sheets(path)]
    own = pictures.resolve()  # an earlier run's, where --out lies among the sheets
    sheets = [sheet for sheet in sheets if sheet.path.resolve().parent != own]
    detector = load_detector(config.checkpoint, device)
    names = [name for _, name in detector.spec.categories]
    thresholds = np.array(detector.thresholds) if config.threshold is None else config.threshold
    atomic.make_folder(pictures)
    for picture in pictures.glob("[0-9][0-9][0-9][0-9]*.png"):
        picture.unlink()
    images, read, found, skipped = [], list[str](), {}, []
    for number, sheet in enumerate(tqdm(sheets, unit="sheet", disable=None), start=1):
        try:
            image = read_sheet(sheet, config.dpi)
        except DataError as error:
            skipped.append(str(error))
            continue
        height, width = image.shape[:2]
        place = replace(sheet, path=Path(os.path.relpath(sheet.path.resolve(), config.out.resolve()))).name
        images.append({"id": number, "file_name": place, "width": width, "height": height})
        read.append(sheet.name)
        found[number] = detect(detector, image, config.batch_size).above(thresholds)
        if config.pictures:
            save_picture(pictures / picture_name(number, sheet), image, found[number], names)
    text = json.dumps(to_document(images, found, detector.spec.categories))
    atomic.write_text(config.out / "predictions.json", text)
    atomic.write_text(config.out / "counts.csv", to_counts(read, list(found.values()), names))
    if config.json:
        print(text)
    else:
        total = sum(len(detections) for detections in found.values())
        print(f"{total} symbols on {len(images)} sheets; written: {config.out}")
    for line in skipped:
        print(f"skipped: {line}", file=sys.stderr)
    if skipped:
        raise SystemExit(FAILED)


def to_document(
    images: list[dict], found: Mapping[int, Detections], categories: Sequence[tuple[int, str]]
) -> dict[str, Any]:
    """A COCO document of what was found: annotations with a score, ready to be corrected as labels.

    images: their file_name is relative to the folder that the document goes to.
    """
    rows = to_results(found, [category_id for category_id, _ in categories])
    annotations = [
        {"id": n, **row, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0}
        for n, row in enumerate(rows, 1)
    ]
    classes = [{"id": category_id, "name": name} for category_id, name in categories]
    return {"info": {}, "images": images, "categories": classes, "annotations": annotations}


def to_counts(sheets: Sequence[str], found: Sequence[Detections], names: Sequence[str]) -> str:
    """CSV with a row a sheet, a column a class and their sum."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["sheet", *names, "total"])
    for sheet, detections in zip(sheets, found, strict=True):
        numbers = np.bincount(detections.labels, minlength=len(names) + 1)[1:]
        writer.writerow([sheet, *numbers, len(detections)])
    return table.getvalue()


def picture_name(number: int, sheet: Sheet) -> str:
    page = "" if sheet.page is None else f"-page{sheet.page}"
    stem = os.fsencode(sheet.path.stem)[:150].decode(errors="ignore")  # a name may have 255 bytes
    return f"{number:04}-{stem}{page}.png"


def save_picture(path: Path, image: np.ndarray, found: Detections, names: Sequence[str]) -> None:
    picture = annotate(image, found.boxes, found.labels, names, found.scores, path.stem)
    write_png(path, picture)


if __name__ == "__main__":
    run(PredictConfig, main)
