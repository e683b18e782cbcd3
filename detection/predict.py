"""Find symbols on sheets of any size: windows at native resolution, merged where they overlap.

    python -m detection.predict --checkpoint model.pt --out FOUND SHEETS_OR_FOLDERS...

FOUND gets predictions.json (a COCO document with scores), counts.csv (sheets by classes) and an annotated PNG
a sheet. Files that can't be read are named, skipped, and make the exit status 1. From Python:

    detector = load_detector("model.pt")
    found = detect(detector, image)          # uint8 [H, W] or [H, W, 3] RGB
    found.boxes, found.scores, found.labels  # sheet pixels, best first; found.above(0.5) has the likely ones
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
import torch
from torchvision.ops import nms
from tqdm import tqdm
from tyro.conf import Positional

from cluster import atomic, checkpoint, distributed
from cluster import config as configuration
from cluster.errors import UserError
from detection.data import as_tensor
from detection.draw import annotate, write_png
from detection.model import Detector, Spec
from detection.onnx_detector import OnnxDetector
from schematics.sheets import DataError, Sheet, find_sheets, read_sheet, to_color
from schematics.windows import cut, paper_color, tile_sheet

EDGE = 4.0  # pixels: a box that ends this near an inner edge of its window counts as cut by it


@dataclass(frozen=True)
class Detections:
    """Of one sheet, best first: boxes float64 [N, 4] xyxy pixels, scores float64 [N], labels int64 [N]."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, threshold: float | np.ndarray) -> Detections:
        """Those with at least this score; an array [K] has one threshold a class."""
        kept = self.scores >= (np.asarray(threshold)[self.labels - 1] if np.ndim(threshold) else threshold)
        return Detections(self.boxes[kept], self.scores[kept], self.labels[kept])


def load_detector(path: str | Path, device: str | torch.device = "cpu") -> Detector | OnnxDetector:
    """The detector of a model.pt, ready for `detect`; `detector.thresholds` holds those of its classes.

    A .onnx of `detection.export` will do, on the CPU. Raises UserError for a file that is truncated, not
    written by `detection.finetune`, or would run code.
    """
    if Path(path).suffix == ".onnx":
        return OnnxDetector(Path(path))
    state = checkpoint.read(Path(path))
    if not {"model", "spec"} <= set(state):
        raise UserError(f"{path}: not a detector; give the model.pt of `python -m detection.finetune`")
    try:
        detector = Detector(Spec.from_dict(state["spec"]))
        detector.load_state_dict(state["model"])
        detector.thresholds = [float(state["thresholds"][number]) for number, _ in detector.spec.categories]
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: its weights do not fit what it says of itself ({reason})") from None
    return detector.to(device).eval()


@torch.inference_mode()
def detect(detector: Detector | OnnxDetector, image: np.ndarray, batch_size: int = 4) -> Detections:
    """Symbols on one sheet, uint8 [H, W] or [H, W, 3] RGB of any size. Raises ValueError for another array.

    Windows go through the network `batch_size` at a time, so memory doesn't grow with the sheet. A small
    sheet is padded to a window as in training: GroupNorm's statistics are the window's, paper included.
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
        raise ValueError(f"a sheet is uint8 [H, W] or [H, W, 3], not {image.dtype} {list(image.shape)}")
    spec, device = detector.spec, detector.device
    image = to_color(image, spec.color_mode)
    paper = paper_color(image)
    height, width = image.shape[:2]
    tiles = tile_sheet(width, height, spec.window, spec.overlap)
    found: list[dict[str, torch.Tensor]] = []
    for first in range(0, len(tiles), batch_size):
        corners = tiles[first : first + batch_size, :2].tolist()
        batch = [as_tensor(cut(image, x, y, spec.window, paper)) for x, y in corners]
        found += detector(torch.stack(batch).to(device))
    windows = np.repeat(np.arange(len(tiles)), [len(f["scores"]) for f in found])
    boxes = torch.cat([f["boxes"] for f in found]).double().cpu().numpy() + np.tile(tiles[windows, :2], 2)
    boxes = boxes.clip(0, (width, height, width, height))
    scores = torch.cat([f["scores"] for f in found]).double().cpu().numpy()
    labels = torch.cat([f["labels"] for f in found]).cpu().numpy()
    kept = merge(boxes, scores, labels, windows, tiles, width, height)
    return Detections(boxes[kept], scores[kept], labels[kept])


def merge(
    boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, windows: np.ndarray, tiles: np.ndarray,
    width: int, height: int, iou: float = 0.5,
) -> np.ndarray:  # fmt: skip
    """Indices of the detections that stay, best first.

    boxes [N, 4] in sheet pixels, windows [N] the row of tiles [T, 4] each was seen in. A detection cut by an
    edge inside the sheet gives way to one, of any class, that holds most of it and that another window sees
    whole or more of, unless that one is much less certain. Then NMS within each class, by IoU: a symbol
    nested in another of its class stays.
    """
    seen_in = tiles[windows]
    inner = seen_in != np.array([0, 0, width, height])
    is_cut = (inner & (np.abs(boxes - seen_in) <= EDGE)).any(1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    stays = area > 0
    others = np.flatnonzero(area > 0)
    for chunk in np.array_split(np.flatnonzero(is_cut & stays), max(1, is_cut.sum() // 64)):
        low = np.maximum(boxes[chunk, None, :2], boxes[None, others, :2])
        high = np.minimum(boxes[chunk, None, 2:], boxes[None, others, 2:])
        held = (high - low).clip(0).prod(2) >= 0.7 * area[chunk, None]  # [cut, others]
        sees_more = ~is_cut[None, others] | (area[None, others] > area[chunk, None])
        certain = scores[None, others] >= 0.5 * scores[chunk, None]
        elsewhere = windows[None, others] != windows[chunk, None]
        stays[chunk] = ~(held & sees_more & certain & elsewhere).any(1)

    kept = []
    for label in np.unique(labels[stays]):
        rows = np.flatnonzero(stays & (labels == label))
        kept.append(rows[nms(torch.from_numpy(boxes[rows]), torch.from_numpy(scores[rows]), iou).numpy()])
    rows = np.concatenate([np.empty(0, int), *kept])
    return rows[np.argsort(-scores[rows], kind="stable")]


def to_results(found: Mapping[int, Detections], category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """COCO results of {image_id: detections}, with the data set's own ids: label k is category_ids[k - 1]."""
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[label - 1],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": score,
        }
        for image_id, detections in found.items()
        for (x0, y0, x1, y1), score, label in zip(
            detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True
        )
    ]


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    # model.pt of a finetuning.
    checkpoint: Path
    # Folder for what is written.
    out: Path
    # Drawings: image files, PDFs, folders of them.
    sheets: Positional[tuple[Path, ...]] = ()
    # Score from which a detection counts; default: each class's own, best on the validation split.
    threshold: float | None = None
    # Replace the predictions of an earlier run in --out.
    overwrite: bool = False
    # Print predictions.json on stdout, and nothing else there.
    json: bool = False
    # Write an annotated PNG a sheet.
    pictures: bool = True
    # Resolution at which PDF pages are drawn.
    dpi: int = 200
    # Windows per forward pass.
    batch_size: int = 4
    # auto, cpu or cuda.
    device: str = "auto"


def main(config: PredictConfig) -> None:
    if not config.sheets:
        raise UserError("name the sheets: image files, PDFs or folders, after the flags")
    configuration.refuse_outside(config, {"batch_size": (1,), "dpi": (1,), "threshold": (0, 1)})
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
        raise SystemExit(1)


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
    configuration.run(PredictConfig, main, expected=(DataError,))
