"""Plan a detector for labelled sheets and a backbone: windows, anchors, numbers of proposals, colors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from cluster.errors import UserError
from detection.anchors import fit_anchors, recall_table
from detection.data import KEEP, MULTIPLE, crop_boxes
from detection.sheets import SheetReader, scale_sheet
from detection.spec import Spec
from schematics.coco import LabelledSheet, Split
from schematics.sheets import read_sheet
from schematics.windows import mean_and_std, tile_sheet

LARGEST_WINDOW = 1024  # px; a window is only larger if large symbols or --window ask for it
WIDEST_WINDOW = 2048  # px; large symbols can't ask for more than this
SAMPLED = 64  # number of sheets whose colors are looked at


def plan_detector(
    split: Split,
    meta: Mapping[str, Any],
    *,
    arch: str,
    norm: Literal["sync", "group"],
    head: Literal["mlp", "conv"],
    fpn_channels: int,
    window: int | None,
    overlap: int | None,
    detections: int | None,
    score_threshold: float,
    scale: float = 1.0,
) -> Spec:
    """Plan the detector for the training split, whose sheets are seen at `scale` times their size.

    meta: color_mode, mean and std with which the backbone was pretrained; what it lacks is taken from the
    sheets. window, overlap, detections: None fits them to the sheets. Raises UserError for a window that the
    feature pyramid can't take, for an overlap that is too large, and if no window shows a symbol.
    """
    sheets = [scale_sheet(sheet, scale) for sheet in split.sheets]
    window = fit_window(sheets) if window is None else window
    if window % MULTIPLE or window < 2 * MULTIPLE:
        raise UserError(f"--window {window}: give a multiple of {MULTIPLE}, {2 * MULTIPLE} or more")
    overlap = fit_overlap(sheets, window) if overlap is None else overlap
    if not 0 <= overlap <= window * 3 // 4:
        raise UserError(f"--overlap {overlap}: give 0 to {window * 3 // 4}, three quarters of --window")
    color_mode = meta.get("color_mode") or fit_color_mode(sheets)
    colors: Any = (meta["mean"], meta["std"]) if "mean" in meta else fit_colors(split, color_mode, scale)
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
        scale=scale,
    )


def describe(spec: Spec, labelled: Sequence[LabelledSheet]) -> str:
    """What was planned for the labelled sheets, as lines for the log."""
    sheets = [scale_sheet(sheet, spec.scale) for sheet in labelled]
    boxes = all_boxes(sheets)
    too_large = int(((boxes[:, 2:] - boxes[:, :2]).max(1) > spec.window).sum())
    sizes = " ".join("/".join(f"{size:g}" for size in level) for level in spec.anchors.sizes)
    return (
        f"{spec.arch}, {spec.norm} norm, {spec.head} head, {spec.color_mode}, "
        f"{len(spec.categories)} classes\n"
        + (f"sheets at {spec.scale:g} of their size\n" if spec.scale != 1 else "")
        + f"windows of {spec.window} px that overlap by {spec.overlap} px; in each at most {spec.proposals} "
        f"proposals, of which training samples {spec.rois}, and {spec.detections} detections\n"
        + (f"{too_large} of {len(boxes)} boxes are larger than a window\n" if too_large else "")
        + f"anchors of {sizes} px, height/width {' '.join(f'{ratio:g}' for ratio in spec.anchors.ratios)}\n"
        + recall_table(spec.anchors, boxes)
    )


def fit_window(sheets: Sequence[LabelledSheet]) -> int:
    """The side of a window in pixels, a multiple of MULTIPLE that makes the tiles of the sheets cheap.

    The cost of a side is the number of pixels of all tiles. Large windows waste pixels on the padding of
    small sheets, small windows on the overlap with their neighbours. The result is the largest side that
    costs at most 5 % more than the cheapest.

    The least side tried is four times that of a large symbol, up to WIDEST_WINDOW. The largest is
    LARGEST_WINDOW, or the least if that is more. Neither is larger than the longest side of a sheet needs.
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
    """Pixels that neighbouring windows share: the side of a large symbol and 16 more, at most half a window.

    So a symbol up to that size is whole in some window.
    """
    return min(large_side(sheets) + 16, window // 2)


def large_side(sheets: Sequence[LabelledSheet]) -> int:
    """The side of a large symbol in pixels: the 99 % quantile of the longer sides of the boxes.

    Raises UserError if the sheets have no boxes except crowds.
    """
    boxes = all_boxes(sheets)
    if not len(boxes):
        raise UserError("--data-dir: the training sheets have no boxes except crowds; label single symbols")
    return math.ceil(np.quantile((boxes[:, 2:] - boxes[:, :2]).max(1), 0.99))


def all_boxes(sheets: Sequence[LabelledSheet]) -> np.ndarray:
    """The boxes [N, 4] of all sheets, xyxy in pixels, without crowds."""
    return np.concatenate([np.empty((0, 4)), *(sheet.boxes[~sheet.crowd] for sheet in sheets)])


def boxes_per_window(sheets: Sequence[LabelledSheet], window: int, overlap: int) -> list[int]:
    """For each tile of the sheets the number of boxes of which it shows at least KEEP, without crowds."""
    counts = []
    for sheet in sheets:
        boxes, labels = sheet.boxes[~sheet.crowd], sheet.labels[~sheet.crowd]
        for x, y, _, _ in tile_sheet(sheet.width, sheet.height, window, overlap).tolist():
            counts.append(len(crop_boxes(boxes, labels, x, y, window, KEEP)[0]))
    return counts


def fit_rois(counts: Sequence[int]) -> int:
    """The number of proposals of a window that are sampled to train the box head: 64 to 512.

    At most a quarter of the sample are positives, so it is four times the number of boxes in a full window.
    That number is the 95 % quantile of `counts`, the numbers of boxes in the windows.
    """
    return int(min(512, max(64, 32 * math.ceil(4 * np.quantile(counts, 0.95) / 32))))


def fit_proposals(window: int) -> int:
    """The number of proposals that are kept of a window: torchvision's 2000 from about 1024 px on.

    A smaller window has fewer, by its area, but at least 128: there 2000 would cost more than the backbone.
    """
    return int(min(2000, max(128, window * window // 512)))


def fit_color_mode(sheets: Sequence[LabelledSheet]) -> Literal["gray", "rgb"]:
    """ "rgb" if any of up to SAMPLED sheets has color, else "gray"."""
    return "rgb" if any(read_sheet(sheets[n].file).ndim == 3 for n in _sampled(len(sheets))) else "gray"


def fit_colors(split: Split, color_mode: str, scale: float = 1.0) -> tuple[list[float], list[float]]:
    """Mean and std (3 floats each, in [0, 1]) over up to SAMPLED sheets; the std is at least 0.01."""
    reader = SheetReader(split, color_mode, cache_bytes=0, scale=scale)
    sampled = _sampled(len(reader))
    mean, std = mean_and_std((reader[index][0] for index in sampled), len(sampled))
    return mean, [max(value, 0.01) for value in std]


def _sampled(count: int) -> list[int]:
    """Up to SAMPLED indices that are evenly spread over 0 to count - 1."""
    return sorted({round(n) for n in np.linspace(0, count - 1, min(count, SAMPLED))})
