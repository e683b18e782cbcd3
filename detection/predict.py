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

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tyro.conf import Positional, UseAppendAction

from cluster.config import Config, setting
from cluster.entry import run
from cluster.errors import FAILED
from detection.counting import applying, look_first, read_ranges, tally_sheets, to_counts, without_range
from detection.detections import Detections
from detection.output import (
    Tool,
    clear_pictures,
    drawings,
    image_entry,
    picture_name,
    save_picture,
    told,
    write_for_tools,
    write_found,
)
from schematics.progress import progress
from schematics.sheets import DataError, Sheet, read_sheet


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

    sheets, home = drawings(config.sheets, config.out, config.overwrite, config.tool)
    device = distributed.lone_device(config.device)
    detector = load_detector(config.checkpoint, device, config.precision)
    categories = detector.spec.categories
    names = [name for _, name in categories]
    given = detector.thresholds if config.threshold is None else [config.threshold] * len(names)
    thresholds, scale = np.array(given), detector.spec.scale if config.scale is None else config.scale
    known = read_ranges(config.ranges) if config.ranges else detector.ranges
    ranges, said = applying(known, names, thresholds, scale, config.checkpoint)
    pictures = clear_pictures(config.out)
    images, read, made, found, skipped = list[dict](), list[Sheet](), list[Detections](), {}, []
    for number, sheet in enumerate(progress(sheets, "prediction"), start=1):
        try:
            image = read_sheet(sheet, config.dpi)
        except DataError as error:
            skipped.append(str(error))
            continue
        images.append(image_entry(number, sheet, image, home))
        read.append(sheet)
        made.append(detect(detector, image, config.batch_size, config.scale))
        found[number] = made[-1].above(thresholds)
        if config.pictures:
            save_picture(pictures / picture_name(number, sheet), image, found[number], names)
    counted = tally_sheets(made, thresholds)
    counts = to_counts([sheet.name for sheet in read], counted, names, ranges)
    write_for_tools(config.out, config.tool, read, images, found, categories, config.checkpoint, config.dpi)
    text = write_found(config.out, images, found, categories, counts)
    places = [image["file_name"] for image in images]
    more = [look_first(ranges, counted, places), without_range(ranges)] if ranges else []
    print(text if config.json else told(config.out, found, home, config.tool, said, *more))
    for line in skipped:
        print(f"skipped: {line}", file=sys.stderr)
    if skipped:
        raise SystemExit(FAILED)


if __name__ == "__main__":
    run(PredictConfig, main)
