"""COCO figures of a finetuned detector on a labelled split, in sheet coordinates.

    python evaluate/evaluate.py --checkpoint OUT/model.pt --data-dir DATA --split test --out REPORT

REPORT gets report.html (see docs/report.md), validation_results.txt (the 12 COCO figures and what they leave
out), metrics.json, predictions.json (COCO results with the data set's own ids) and pictures/ (truth beside
prediction).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cluster import atomic, checkpoint, distributed
from cluster.config import Config, setting
from cluster.entry import run
from cluster.errors import UserError
from detection.draw import annotate, side_by_side, write_png
from detection.inference import Detections, detect, load_detector, to_results
from detection.metrics.analysis import analyse
from detection.metrics.coco import measure
from detection.metrics.matching import Engine, coco_classes
from detection.model import Spec
from detection.report.page import CHOSEN_HERE, write_report
from schematics.coco import Category, LabelledSheet, find_split, read_split, to_coco
from schematics.sheets import read_sheet


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Config):
    # Detector to measure: model.pt of a finetuning, or an exported .onnx.
    checkpoint: Path
    # Labelled sheets, as for finetuning.
    data_dir: Path
    # Split to measure on: train, valid or test.
    split: str = "valid"
    # Folder for what is written; by default evaluate-SPLIT beside the checkpoint.
    out: Path | None = None
    # Number of sheets to draw, from the first.
    pictures: int = 6
    # Score from which a detection is drawn and counted; by default each class's own, the best on valid.
    threshold: float | None = setting(None, least=0, most=1)
    # Measure a model.pt whose finetuning has not signed its end: its best so far.
    unfinished: bool = False
    # Program that computes the figures: pycocotools, or hotcoco, which gives the same ones faster
    # (pip install 'linework[fast]').
    coco_engine: Engine = "pycocotools"
    # Size at which sheets are seen, such as 0.5 for half of it; by default that of the detector's training.
    scale: float | None = setting(None, least=0.01, most=1)
    # Windows in one forward pass; memory grows with it.
    batch_size: int = setting(4, least=1)
    # Where to compute: auto (a GPU if there is one), cpu, cuda, or one GPU as cuda:1.
    device: str = "auto"


def main(config: EvaluateConfig) -> None:
    if not config.unfinished:
        refuse_unfinished(config.checkpoint)
    device = distributed.start(config.device).device
    coco_classes(config.coco_engine)
    split = read_split(find_split(config.data_dir, config.split))
    detector = load_detector(config.checkpoint, device)
    spec = detector.spec
    refuse_other_classes(config.checkpoint, spec, split.folder, split.categories)
    thresholds = (
        detector.thresholds if config.threshold is None else [config.threshold] * len(spec.categories)
    )
    if config.threshold is not None:
        thresholds_from = f"--threshold {config.threshold:g} for all classes"
    elif config.split == "valid":
        thresholds_from = f"the detector's, {CHOSEN_HERE}"
    else:
        thresholds_from = "the detector's, of the highest F1 on its validation sheets"
    out = config.out or config.checkpoint.parent / f"evaluate-{config.split}"
    atomic.make_folder(out / "pictures")
    for picture in (out / "pictures").glob("[0-9][0-9].png"):  # an earlier run may have drawn more sheets
        picture.unlink()

    ids, names = zip(*spec.categories, strict=True)
    found = {}
    for n, sheet in enumerate(tqdm(split.sheets, unit="sheet", disable=None)):
        image = read_sheet(sheet.path)
        found[sheet.image_id] = detect(detector, image, config.batch_size, config.scale)
        if n < config.pictures:
            shown = found[sheet.image_id].above(np.array(thresholds))
            draw(out / "pictures" / f"{n + 1:02}.png", image, sheet, shown, names)
    truth, results = to_coco(split), to_results(found, ids)
    figures, matches = measure(truth, results, engine=config.coco_engine)
    analysis = analyse(matches, thresholds=dict(zip(ids, thresholds, strict=True)))
    settings = {
        "checkpoint": str(config.checkpoint),
        "data_dir": str(config.data_dir),
        "split": config.split,
        "window": spec.window,
        "overlap": spec.overlap,
        "scale": spec.scale if config.scale is None else config.scale,
        "score_threshold": spec.score_threshold,
        "detections_per_window": spec.detections,
        "max_detections": sorted({1, 10, 100, figures.max_detections}),
        "coco_engine": config.coco_engine,
        "torch": torch.__version__,
    }
    metrics = {
        "settings": {**settings, "thresholds": thresholds_from},
        **figures.to_dict(),
        "analysis": analysis.to_dict(),
    }
    summary = f"{figures.table()}\n\n{figures.details()}\n"
    atomic.write_text(out / "predictions.json", json.dumps(results))
    atomic.write_text(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    atomic.write_text(out / "validation_results.txt", summary)
    title = f"{config.data_dir.resolve().name}, {config.split}"
    report = write_report(
        out / "report.html",
        split,
        figures,
        analysis,
        title=title,
        thresholds_from=thresholds_from,
        settings=settings,
    )
    print(f"{summary}\nreport: {report}\nbeside it: figures, predictions and pictures")


def refuse_unfinished(path: Path) -> None:
    """Raise UserError for a file in the exp-dir of a finetuning that has not signed it."""
    if not (path.parent / "config.json").exists():
        return  # a copy elsewhere: its sha256 is checked, its history is its owner's affair
    try:
        signed = checkpoint.check_final(path.parent)
    except UserError as error:
        raise UserError(f"{error}; or give --unfinished to measure {path} as it is") from None
    if path.suffix == ".pt" and path.name not in signed["files"]:
        raise UserError(
            f"{path}: is none of the results that {path.parent / 'final.json'} signs; give model.pt"
        )


def refuse_other_classes(checkpoint: Path, spec: Spec, folder: Path, categories: Sequence[Category]) -> None:
    """Raise UserError unless the detector's classes are those of the data, by id and name."""
    of_data = tuple((category.id, category.name) for category in categories)
    if spec.categories == of_data:
        return
    odd = sorted(set(spec.categories) ^ set(of_data)) or list(of_data)
    raise UserError(
        f"{checkpoint}: finds {len(spec.categories)} classes, {folder} has {len(of_data)} and they differ "
        f"(id {odd[0][0]}, {odd[0][1]!r}); evaluate on the data set it was finetuned on"
    )


def draw(
    path: Path, image: np.ndarray, sheet: LabelledSheet, found: Detections, names: Sequence[str]
) -> None:
    """Write truth beside prediction, as one PNG. Raises UserError where the file can't be written."""
    truth = annotate(image, sheet.boxes, sheet.labels, names, title=f"Truth: {sheet.file_name}")
    prediction = annotate(image, found.boxes, found.labels, names, found.scores, title="Found")
    write_png(path, side_by_side(truth, prediction))


if __name__ == "__main__":
    run(EvaluateConfig, main)
