"""Find symbols on sheets of any size: windows at native resolution, merged where they overlap.

detector = load_detector("model.pt")
found = detect(detector, image)          # image: uint8 [H, W] or [H, W, 3]
found.boxes, found.scores, found.labels  # sheet pixels, best first

"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.ops import nms

from cluster import checkpoint
from cluster.config import UserError
from detection.data import MULTIPLE, as_tensor
from detection.model import Detector, Spec
from schematics.sheets import to_color
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

    def above(self, threshold: float) -> Detections:
        kept = self.scores >= threshold
        return Detections(self.boxes[kept], self.scores[kept], self.labels[kept])


def load_detector(path: str | Path, device: str | torch.device = "cpu") -> Detector:
    """The detector of a model.pt, ready for `detect`.

    Raises UserError for a file that is truncated, not written by `detection.finetune`, or would run code.
    """
    state = checkpoint.read(Path(path))
    if not {"model", "spec"} <= set(state):
        raise UserError(f"{path}: not a detector; give the model.pt of `python -m detection.finetune`")
    try:
        detector = Detector(Spec.from_dict(state["spec"]))
        detector.load_state_dict(state["model"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: its weights do not fit what it says of itself ({reason})") from None
    return detector.to(device).eval()


@torch.inference_mode()
def detect(detector: Detector, image: np.ndarray, batch_size: int = 4) -> Detections:
    """Symbols on one sheet, uint8 [H, W] or [H, W, 3] RGB of any size.

    Windows go through the network `batch_size` at a time, so memory doesn't grow with the sheet.
    """
    spec, device = detector.spec, next(detector.parameters()).device
    image = to_color(image, spec.color_mode)
    paper = paper_color(image)
    height, width = image.shape[:2]
    tiles = tile_sheet(width, height, spec.window, spec.overlap)
    # A sheet smaller than a window needs no more than itself, up to the pyramid's stride.
    rows, columns = (min(spec.window, -(-side // MULTIPLE) * MULTIPLE) for side in (height, width))
    found = []
    for first in range(0, len(tiles), batch_size):
        corners = tiles[first : first + batch_size, :2].tolist()
        batch = [as_tensor(cut(image, x, y, spec.window, paper)[:rows, :columns]) for x, y in corners]
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


def to_results(found: Mapping[int, Detections], category_ids: list[int]) -> list[dict[str, Any]]:
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
