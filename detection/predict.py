"""Find the symbols on drawings without labels, and count them.

    python -m detection.predict --checkpoint OUT/model.pt --out FOUND SHEETS_OR_FOLDERS...
    python -m detection.predict --out FOUND --tool label-studio --tool yolo SHEETS_OR_FOLDERS...

FOUND gets predictions.json (a COCO document with scores, for labelling tools and as labels), counts.csv
(a row for each sheet, a column for each class, ranges that hold the true numbers with 90 % probability, and
the order in which to look at the sheets) and pictures/ (an annotated PNG of each sheet). A file that can't be
read is skipped and named on stderr, and the exit status is then 1. For each --tool there is a folder more
that the tool imports, with the sheets and their boxes (docs/labelling.md). `detection.inference` does the
same for arrays, in Python.

On two x86-64 cores with OMP_NUM_THREADS=1, the detector of `make demo` (ResNet-18, windows of 256 px) takes
20 s for the demo's 16 test sheets of 512 x 512 px. It finds 253 symbols, where 244 are labelled.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tyro.conf import Positional, UseAppendAction

from cluster import atomic
from cluster.config import Config, setting
from cluster.entry import run
from cluster.errors import FAILED, UserError
from detection.counting import applying, look_first, read_ranges, tally_sheets, to_counts, without_range
from detection.detections import Detections, to_results
from detection.draw import annotate, write_png
from schematics.labelling import TOOLS, Box, Labelled, lay_out, refuse_laid_out, tool_names
from schematics.progress import progress
from schematics.sheets import DataError, Sheet, find_sheets, read_sheet

Tool = Literal["label-studio", "cvat", "coco", "yolo"]  # the keys of schematics.labelling.TOOLS


@dataclass(frozen=True, kw_only=True)
class PredictConfig(Config):
    # Detector to use: model.pt of a finetuning, or an exported .onnx.
    checkpoint: Path = setting(Path("checkpoints/detector/model.pt"), exists=True)
    # Folder for what is written.
    out: Path = Path("found")
    # Drawings to look at: image files, PDFs, folders of them.
    sheets: Positional[tuple[Path, ...]] = ()
    # Score from which a detection counts; by default each class's own, the best on the validation split.
    threshold: float | None = setting(None, least=0, most=1)
    # Ranges of the counts: ranges.json of evaluate.py on labelled sheets like these; by default those of
    # the detector, from validation.
    ranges: Path | None = None
    # Replace the predictions of an earlier run in --out.
    overwrite: bool = False
    # Tool in which boxes will be corrected: --out gets a folder that it imports. May be given several times.
    tool: UseAppendAction[tuple[Tool, ...]] = ()
    # Print predictions.json on stdout, and nothing else there.
    json: bool = False
    # Write an annotated PNG of each sheet.
    pictures: bool = True
    # Resolution in dots per inch at which PDF pages are drawn.
    dpi: int = setting(200, least=1)
    # Size at which sheets are seen, such as 0.5 for half of it; by default that of the detector's training.
    scale: float | None = setting(None, least=0.01, most=1)
    # Windows in one forward pass; memory grows with it.
    batch_size: int = setting(4, least=1)
    # Where to compute: auto (a GPU if there is one), cpu, cuda, or one GPU as cuda:1.
    device: str = "auto"
    # Arithmetic of the network: fp32, bf16, or auto: bf16 if the detector was validated in it, on a machine
    # that computes it faster in it. Boxes and scores are float32.
    precision: Literal["auto", "fp32", "bf16"] = "auto"


def main(config: PredictConfig) -> None:
    # Imported here, so that --help and wrong flags are answered before torch is loaded.
    from cluster import distributed
    from detection.inference import detect, load_detector

    if not config.sheets:
        raise UserError("name the sheets: image files, PDFs or folders, after the flags")
    pictures = config.out / "pictures"
    if (config.out / "predictions.json").exists() and not config.overwrite:
        raise UserError(f"--out {config.out}: holds predictions; name another folder, or give --overwrite")
    refuse_laid_out(config.out, config.tool)
    device = distributed.lone_device(config.device)
    sheets = [sheet for path in config.sheets for sheet in find_sheets(path)]
    # If --out lies among the sheets, what an earlier run has put there are not drawings to look at.
    own = {(config.out / name).resolve() for name in ("pictures", *TOOLS)}
    sheets = [sheet for sheet in sheets if not own & set(sheet.path.resolve().parents)]
    if not sheets:
        raise UserError(f"{config.out}: holds the pictures of an earlier run; name the drawings")
    home = Path(os.path.commonpath([sheet.path.resolve().parent for sheet in sheets]))
    detector = load_detector(config.checkpoint, device, config.precision)
    names = [name for _, name in detector.spec.categories]
    given = detector.thresholds if config.threshold is None else [config.threshold] * len(names)
    thresholds, scale = np.array(given), detector.spec.scale if config.scale is None else config.scale
    known = read_ranges(config.ranges) if config.ranges else detector.ranges
    ranges, said = applying(known, names, thresholds, scale, config.checkpoint)
    atomic.make_folder(pictures)
    for picture in pictures.glob("[0-9][0-9][0-9][0-9]*.png"):
        picture.unlink()
    images, read, made, found, skipped = list[dict](), list[Sheet](), list[Detections](), {}, []
    for number, sheet in enumerate(progress(sheets, "prediction"), start=1):
        try:
            image = read_sheet(sheet, config.dpi)
        except DataError as error:
            skipped.append(str(error))
            continue
        height, width = image.shape[:2]
        place = replace(sheet, path=sheet.path.resolve().relative_to(home)).name
        images.append({"id": number, "file_name": place, "width": width, "height": height})
        read.append(sheet)
        made.append(detect(detector, image, config.batch_size, config.scale))
        found[number] = made[-1].above(thresholds)
        if config.pictures:
            save_picture(pictures / picture_name(number, sheet), image, found[number], names)
    if config.tool:
        for row, name in zip(images, tool_names(read), strict=True):
            row["labelled_as"] = name  # by which detection.corrections finds the sheet again
        labelled = to_labelled(read, images, found, names)
        model = "/".join(config.checkpoint.parts[-2:])
        lay_out(config.out, config.tool, labelled, dict(detector.spec.categories), model, config.dpi)
    text = json.dumps(to_document(images, found, detector.spec.categories))
    atomic.write_text(config.out / "predictions.json", text)
    counted = tally_sheets(made, thresholds)
    called = [sheet.name for sheet in read]
    atomic.write_text(config.out / "counts.csv", to_counts(called, counted, names, ranges))
    if config.json:
        print(text)
    else:
        total = sum(len(detections) for detections in found.values())
        print(f"{total} symbols on {len(images)} sheets; written: {config.out}")
        places = [image["file_name"] for image in images]
        more = [look_first(ranges, counted, places), without_range(ranges)] if ranges else []
        print("\n".join(filter(None, [said, *more])))
        print(f"predictions.json names sheets as they lie in {home}; labels are read from beside them")
        for tool in config.tool:
            print(f"for {tool}: {config.out / tool}; python -m schematics.convert reads what it exports")
    for line in skipped:
        print(f"skipped: {line}", file=sys.stderr)
    if skipped:
        raise SystemExit(FAILED)


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


if __name__ == "__main__":
    run(PredictConfig, main)
