"""Find the symbols on a sheet of any size: detect in windows at native resolution, then merge.

    detector = load_detector("model.pt")
    found = detect(detector, image)           # image: uint8 [H, W] or [H, W, 3] RGB
    found = found.above(detector.thresholds)  # those that count, by the threshold of each class
    found.boxes, found.scores, found.labels   # sheet pixels, best first

`python -m detection.predict` does this for image files, PDFs and folders.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torchvision.ops import nms

from cluster import checkpoint
from cluster.backbone import refuse_not_finite
from cluster.errors import UserError
from cluster.facts import check_facts
from cluster.precision import in_bf16
from detection.detections import Detections
from detection.model import Detector, as_tensor
from detection.onnx_detector import OnnxDetector
from detection.sheets import scaled_size, shrink
from detection.spec import AGAIN, ModelFacts, Spec
from schematics.sheets import to_color
from schematics.windows import cut, paper_color, tile_sheet

NO_FIT = "its weights and the detector that it describes do not fit together"
EDGE = 4.0  # px; a box that comes this close to an edge of its window inside the sheet counts as cut by it


def load_detector(
    path: str | Path, device: str | torch.device = "cpu", precision: str = "auto"
) -> Detector | OnnxDetector:
    """Load the detector of a model.pt in eval mode, ready for `detect`.

    precision: of its backbone, pyramid and heads: fp32, bf16, or auto. That is bf16 for a detector that was
    validated in it, on a machine that computes faster in it, else fp32. Boxes and scores are float32 always.

    `detector.thresholds` holds for each class the score from which a detection counts. A .onnx file of
    `detection.export` is loaded too, and runs on the CPU. Raises UserError for a file that is truncated, was
    not written by `detection.finetune`, has weights that are not finite, or would run code.
    """
    if Path(path).suffix == ".onnx":
        return OnnxDetector(Path(path))
    state = checkpoint.read(Path(path))
    if not {"model", "spec"} <= set(state):
        raise UserError(f"{path}: not a detector; give the model.pt of `python -m detection.finetune`")
    spec = Spec.from_dict(state["spec"], str(path))
    facts = check_facts(ModelFacts, state, str(path), AGAIN)
    ids = [number for number, _ in spec.categories]
    for name in {"thresholds", "train_boxes"} & set(facts):
        if not set(ids) <= set(facts[name]):
            raise UserError(f"{path}: {name} lacks a class; {AGAIN}")
    ranges = facts.get("ranges")
    if ranges and (flaw := ranges.flaw()):
        raise UserError(f"{path}: {flaw}; {AGAIN}")
    try:
        detector = Detector(spec)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    detector.thresholds = [facts["thresholds"][number] for number in ids]
    if "train_boxes" in facts:
        detector.train_boxes = [facts["train_boxes"][number] for number in ids]
    detector.ranges = ranges
    try:
        detector.load_state_dict(state["model"])
    except (AttributeError, RuntimeError, TypeError) as error:
        raise UserError(f"{path}: {NO_FIT} ({checkpoint.brief(error)})") from None
    refuse_not_finite(detector.state_dict(), str(path), AGAIN)
    # The layout of training, in which it was validated: another one would round otherwise.
    detector.to(device, memory_format=torch.channels_last).eval()
    if precision == "auto" and facts.get("precision", "fp32") == "fp32":
        precision = "fp32"
    detector.bf16 = in_bf16(precision, detector.device, detector)
    return detector


@torch.inference_mode()
def detect(
    detector: Detector | OnnxDetector, image: np.ndarray, batch_size: int = 4, scale: float | None = None
) -> Detections:
    """Find the symbols on one sheet, uint8 [H, W] or [H, W, 3] RGB of any size.

    The sheet is seen at `scale` times its size, by default the scale of the detector's training; boxes are in
    pixels of the sheet as it is given.

    `batch_size` windows go through the network at a time, so its memory doesn't grow with the sheet. A sheet
    smaller than a window is padded with the color of its paper, as in training: GroupNorm takes statistics
    over the whole window, padding included, and on a smaller one they would be others. Raises ValueError for
    another kind of array.
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
        raise ValueError(f"a sheet is uint8 [H, W] or [H, W, 3], not {image.dtype} {list(image.shape)}")
    spec, device = detector.spec, detector.device
    image = to_color(image, spec.color_mode)
    given = image.shape[1], image.shape[0]
    width, height = scaled_size(*given, spec.scale if scale is None else scale)
    image = shrink(image, width, height)
    paper = paper_color(image)
    tiles = tile_sheet(width, height, spec.window, spec.overlap)
    found: list[dict[str, torch.Tensor]] = []
    for first in range(0, len(tiles), batch_size):
        corners = tiles[first : first + batch_size, :2].tolist()
        batch = [as_tensor(cut(image, x, y, spec.window, paper)) for x, y in corners]
        with torch.autocast(device.type, torch.bfloat16, enabled=detector.bf16):
            found += detector(torch.stack(batch).to(device))
    windows = np.repeat(np.arange(len(tiles)), [len(f["scores"]) for f in found])
    boxes = torch.cat([f["boxes"] for f in found]).double().cpu().numpy() + np.tile(tiles[windows, :2], 2)
    boxes = boxes.clip(0, (width, height, width, height))
    scores = torch.cat([f["scores"] for f in found]).double().cpu().numpy()
    labels = torch.cat([f["labels"] for f in found]).cpu().numpy()
    kept = merge(boxes, scores, labels, windows, tiles, width, height)
    factors = np.tile([given[0] / width, given[1] / height], 2)
    return Detections(boxes[kept] * factors, scores[kept], labels[kept])


def merge(
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    windows: np.ndarray,
    tiles: np.ndarray,
    width: int,
    height: int,
    iou: float = 0.5,
) -> np.ndarray:
    """Merge the detections of all windows of a sheet; returns the indices of those kept, highest score first.

    boxes: [N, 4], xyxy in sheet pixels. windows: [N], the row of tiles [T, 4] in which each was found. width,
    height: of the sheet, in pixels.

    First, a box that an edge of its window cuts inside the sheet is dropped if another window shows the
    symbol better: if that has a detection, of any class, that covers at least 70 % of the box, is either not
    cut or larger, and has at least half the box's score. Then comes NMS within each class, at the threshold
    `iou`. A symbol nested in another one of its class has a low IoU with it, so both are kept.
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
