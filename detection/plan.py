"""From labelled sheets and a backbone's meta to a detector that fits them: windows, anchors, colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cluster.errors import UserError
from detection.anchors import fit_anchors, recall_table
from detection.data import KEEP, MULTIPLE, SheetReader, crop_boxes
from detection.model import Spec
from schematics.coco import LabelledSheet, Split
from schematics.sheets import read_sheet
from schematics.windows import mean_and_std, tile_sheet

LARGEST_WINDOW = 1024  # px; chosen unless symbols or flags ask for more
WIDEST_WINDOW = 2048  # px; what large symbols may ask for
SAMPLED = 64  # sheets looked at for colours


def plan_detector(
    split: Split,
    meta: Mapping[str, Any],
    *,
    arch: str,
    norm: str,
    head: str,
    fpn_channels: int,
    window: int | None,
    overlap: int | None,
    detections: int | None,
    score_threshold: float,
) -> Spec:
    """The detector for the training split.

    meta: color_mode, mean and std as the backbone was pretrained; what it lacks is taken from the sheets.
    window, overlap, detections: None fits them. Raises UserError for a window the pyramid can't take.
    """
    sheets = split.sheets
    window = fit_window(sheets) if window is None else window
    if window % MULTIPLE or window < 2 * MULTIPLE:
        raise UserError(f"--window {window}: give a multiple of {MULTIPLE}, {2 * MULTIPLE} or more")
    overlap = fit_overlap(sheets, window) if overlap is None else overlap
    if not 0 <= overlap <= window * 3 // 4:
        raise UserError(f"--overlap {overlap}: give 0 to {window * 3 // 4}, three quarters of --window")
    color_mode = meta.get("color_mode") or fit_color_mode(sheets)
    colors = (meta["mean"], meta["std"]) if "mean" in meta else fit_colors(split, color_mode)
    counts = boxes_per_window(sheets, window, overlap)
    if not any(counts):
        raise UserError(f"--window {window}: no window shows {KEEP:.0%} of any symbol; give a larger one")
    return Spec(
        arch=arch,
        norm=norm,
        head=head,
        fpn_channels=fpn_channels,
        categories=tuple((category.id, category.name) for category in split.categories),
        color_mode=color_mode,
        mean=tuple(colors[0]),
        std=tuple(colors[1]),
        window=window,
        overlap=overlap,
        anchors=fit_anchors(all_boxes(sheets)),
        rois=fit_rois(counts),
        proposals=fit_proposals(window),
        detections=detections or max(100, 2 * max(counts)),
        score_threshold=score_threshold,
    )


def describe(spec: Spec, sheets: Sequence[LabelledSheet]) -> str:
    """What was chosen, in lines for a log."""
    boxes = all_boxes(sheets)
    too_large = int(((boxes[:, 2:] - boxes[:, :2]).max(1) > spec.window).sum())
    sizes = " ".join("/".join(f"{size:g}" for size in level) for level in spec.anchors.sizes)
    return (
        f"{spec.arch}, {spec.norm} norm, head {spec.head}, {spec.color_mode}, K = {len(spec.categories)}\n"
        f"windows of {spec.window} px, {spec.overlap} px shared; in each at most {spec.proposals} proposals, "
        f"{spec.rois} sampled in training, {spec.detections} detections\n"
        + (f"{too_large} of {len(boxes)} boxes are larger than a window\n" if too_large else "")
        + f"anchors of {sizes} px, height/width {' '.join(f'{ratio:g}' for ratio in spec.anchors.ratios)}\n"
        + recall_table(spec.anchors, boxes)
    )


def fit_window(sheets: Sequence[LabelledSheet]) -> int:
    """Side in pixels: the largest of those whose tiles cover the sheets with the fewest pixels, within 5 %.

    Large windows pad small sheets, small windows share much with their neighbours. At most LARGEST_WINDOW,
    unless four times a large symbol is more; never under that, but no larger than the largest sheet needs,
    nor than WIDEST_WINDOW.
    """
    longest = max(2 * MULTIPLE, *(max(sheet.width, sheet.height) for sheet in sheets))
    least = min(longest, WIDEST_WINDOW, max(4 * large_side(sheets), 2 * MULTIPLE))
    first, last = (math.ceil(side / MULTIPLE) for side in (least, max(least, min(longest, LARGEST_WINDOW))))
    sides = [MULTIPLE * n for n in range(first, last + 1)]
    pixels = []
    for side in sides:
        overlap = fit_overlap(sheets, side)
        tiles = sum(len(tile_sheet(sheet.width, sheet.height, side, overlap)) for sheet in sheets)
        pixels.append(tiles * side**2)
    return max(side for side, cost in zip(sides, pixels, strict=True) if cost <= 1.05 * min(pixels))


def fit_overlap(sheets: Sequence[LabelledSheet], window: int) -> int:
    """Pixels shared by neighbours: a large symbol and a margin, so that each is whole in some window."""
    return min(large_side(sheets) + 16, window // 2)


def large_side(sheets: Sequence[LabelledSheet]) -> int:
    """The longer side in pixels that 99 % of the boxes stay under."""
    boxes = all_boxes(sheets)
    if not len(boxes):
        raise UserError("--data-dir: no box on the training sheets but crowds; label single symbols")
    return math.ceil(np.quantile((boxes[:, 2:] - boxes[:, :2]).max(1), 0.99))


def all_boxes(sheets: Sequence[LabelledSheet]) -> np.ndarray:
    """Boxes [N, 4] of all sheets, crowds left out."""
    return np.concatenate([np.empty((0, 4)), *(sheet.boxes[~sheet.crowd] for sheet in sheets)])


def boxes_per_window(sheets: Sequence[LabelledSheet], window: int, overlap: int) -> list[int]:
    """Number of targets in each tile of the sheets."""
    counts = []
    for sheet in sheets:
        for x, y, _, _ in tile_sheet(sheet.width, sheet.height, window, overlap).tolist():
            counts.append(len(crop_boxes(sheet.boxes, sheet.labels, x, y, window, KEEP)[0]))
    return counts


def fit_rois(counts: Sequence[int]) -> int:
    """Proposals sampled for the head in training: 64 to 512.

    A quarter of them may be symbols: four times the targets of a full window.
    """
    return int(min(512, max(64, 32 * math.ceil(4 * np.quantile(counts, 0.95) / 32))))


def fit_proposals(window: int) -> int:
    """Proposals kept of a window: torchvision's 2000 at 1024 px and above, fewer on less area, at least 128.

    On a small window 2000 proposals cost more than the backbone.
    """
    return int(min(2000, max(128, window * window // 512)))


def fit_color_mode(sheets: Sequence[LabelledSheet]) -> str:
    """ "rgb" if one of up to SAMPLED sheets has colour, else "gray"."""
    return "rgb" if any(read_sheet(sheets[n].path).ndim == 3 for n in _sampled(len(sheets))) else "gray"


def fit_colors(split: Split, color_mode: str) -> tuple[list[float], list[float]]:
    """Mean and std (3 floats each, in [0, 1]) over up to SAMPLED sheets."""
    reader = SheetReader(split, color_mode, cache_bytes=0)
    sampled = _sampled(len(reader))
    mean, std = mean_and_std((reader[index][0] for index in sampled), len(sampled))
    return mean, [max(value, 0.01) for value in std]


def _sampled(count: int) -> list[int]:
    return sorted({round(n) for n in np.linspace(0, count - 1, min(count, SAMPLED))})
