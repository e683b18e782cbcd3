"""COCO figures of a finetuned detector on a labelled split, in sheet coordinates.

    python evaluate/evaluate.py --checkpoint OUT/model.pt --data-dir DATA --split test --out REPORT

REPORT gets validation_results.txt (the 12 COCO figures and what they leave out), metrics.json,
predictions.json (COCO results, with the data set's own ids) and pictures/ (truth left, prediction right).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import torch
from tqdm import tqdm

from cluster import atomic, distributed
from cluster.config import UserError, run
from detection.coco_metrics import Figures, evaluate
from detection.draw import annotate, side_by_side
from detection.model import Spec
from detection.predict import Detections, detect, load_detector, to_results
from schematics.coco import Category, LabelledSheet, Split, find_split, read_split, to_coco
from schematics.sheets import DataError, read_sheet


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    # model.pt of a finetuning.
    checkpoint: Path
    # Labelled sheets, as for finetuning.
    data_dir: Path
    # train, valid or test.
    split: str = "valid"
    # Folder for what is written; default: evaluate-SPLIT beside the checkpoint.
    out: Path | None = None
    # Sheets to draw, from the first.
    pictures: int = 6
    # Detections drawn; the figures count all of them.
    draw_threshold: float = 0.5
    # Windows per forward pass.
    batch_size: int = 4
    # auto, cpu or cuda.
    device: str = "auto"


def main(config: EvaluateConfig) -> None:
    world = distributed.start(config.device)
    split = read_split(find_split(config.data_dir, config.split))
    detector = load_detector(config.checkpoint, world.device)
    refuse_other_classes(config.checkpoint, detector.spec, split.folder, split.categories)
    out = config.out or config.checkpoint.parent / f"evaluate-{config.split}"
    (out / "pictures").mkdir(parents=True, exist_ok=True)

    found = {}
    for n, sheet in enumerate(tqdm(split.sheets, unit="sheet", disable=None)):
        image = read_sheet(sheet.path)
        found[sheet.image_id] = detect(detector, image, config.batch_size)
        if n < config.pictures:
            draw(
                out / "pictures" / f"{n + 1:02}.png",
                image,
                sheet,
                found[sheet.image_id],
                split,
                config.draw_threshold,
            )
    results = to_results(found, [category.id for category in split.categories])
    figures = evaluate(to_coco(split), results)

    atomic.write_text(out / "predictions.json", json.dumps(results))
    settings = {"checkpoint": str(config.checkpoint), "data_dir": str(config.data_dir), "split": config.split}
    metrics = {"settings": {**settings, **settings_of(detector.spec, figures)}, **figures.to_dict()}
    atomic.write_text(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    atomic.write_text(out / "validation_results.txt", f"{figures.table()}\n\n{figures.details()}\n")
    print(f"{figures.table()}\n\n{figures.details()}\n")
    print(f"written: {out}/validation_results.txt, metrics.json, predictions.json, pictures/")


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


def settings_of(spec: Spec, figures: Figures) -> dict[str, Any]:
    """What the figures depend on besides checkpoint and data."""
    return {
        "window": spec.window,
        "overlap": spec.overlap,
        "score_threshold": spec.score_threshold,
        "detections_per_window": spec.detections,
        "max_detections": sorted({1, 10, 100, figures.max_detections}),
        "torch": torch.__version__,
    }


def draw(
    path: Path, image: Any, sheet: LabelledSheet, found: Detections, split: Split, threshold: float
) -> None:
    """Truth beside prediction, as one PNG."""
    names = [category.name for category in split.categories]
    shown = found.above(threshold)
    truth = annotate(image, sheet.boxes, sheet.labels, names, title=f"Truth: {sheet.file_name}")
    title = f"Found, score {threshold:g} and above"
    prediction = annotate(image, shown.boxes, shown.labels, names, shown.scores, title)
    cv2.imwrite(str(path), cv2.cvtColor(side_by_side(truth, prediction), cv2.COLOR_RGB2BGR))


if __name__ == "__main__":
    run(EvaluateConfig, main, expected=(DataError,))
