"""Find the symbols on drawings without labels, and count them.

    python -m detection.predict --checkpoint OUT/model.pt --out FOUND SHEETS_OR_FOLDERS...

FOUND gets predictions.json (a COCO document with scores, for labelling tools and as labels), counts.csv
(a row for each sheet, a column for each class) and pictures/ (an annotated PNG of each sheet). A file that
can't be read is skipped and named on stderr, and the exit status is then 1. `detection.inference` does the
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
from tyro.conf import Positional

from cluster.config import Config, setting
from cluster.entry import run
from cluster.errors import FAILED
from detection.output import (
    clear_pictures,
    drawings,
    image_entry,
    picture_name,
    save_picture,
    told,
    write_found,
)
from schematics.progress import progress
from schematics.sheets import DataError, read_sheet


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
    # Replace the predictions of an earlier run in --out.
    overwrite: bool = False
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

    sheets, home = drawings(config.sheets, config.out, config.overwrite)
    device = distributed.lone_device(config.device)
    detector = load_detector(config.checkpoint, device, config.precision)
    names = [name for _, name in detector.spec.categories]
    thresholds = np.array(detector.thresholds) if config.threshold is None else config.threshold
    pictures = clear_pictures(config.out)
    images, read, found, skipped = [], list[str](), {}, []
    for number, sheet in enumerate(progress(sheets, "prediction"), start=1):
        try:
            image = read_sheet(sheet, config.dpi)
        except DataError as error:
            skipped.append(str(error))
            continue
        images.append(image_entry(number, sheet, image, home))
        read.append(sheet.name)
        found[number] = detect(detector, image, config.batch_size, config.scale).above(thresholds)
        if config.pictures:
            save_picture(pictures / picture_name(number, sheet), image, found[number], names)
    text = write_found(config.out, images, read, found, detector.spec.categories)
    print(text if config.json else told(config.out, found, home))
    for line in skipped:
        print(f"skipped: {line}", file=sys.stderr)
    if skipped:
        raise SystemExit(FAILED)


if __name__ == "__main__":
    run(PredictConfig, main)
