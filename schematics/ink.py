"""Boxes around connected ink, as proposals of where a symbol may be: no labels and no network are needed.

Selective search (Uijlings et al. 2013, DOI 10.1007/s11263-013-0620-5) finds objects of photographs by merging
regions of color and texture. A drawing has neither, but its paper is blank, so its symbols are parts of
connected ink. Wires connect them to one another; so straight runs longer than each of some lengths are taken
out, and what is left is closed by kernels of several sizes. All lengths are in widths of this drawing's
lines. It works on windows and on sheets, with dark and light paper and on photographs.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from schematics.windows import Color, Image, ink_mask, line_width, nearby_paper, paper_color, uneven_paper

MOST = 2000  # boxes of an image, by default
COMPARED = 1000  # boxes that are compared with one another, at least: all with all would take long
# Below, lengths are for lines of up to 2 px, and grow with wider ones.
CLOSINGS = (1, 3, 5, 9, 15, 25)  # sides of the kernels that close the ink as it is
RUNS = (12, 20, 32, 48, 80, 140)  # straight runs at least this long are taken out
# Width and height of the kernels that close the rest.
CUT_CLOSINGS = ((1, 1), (5, 5), (9, 9), (15, 15), (9, 1), (1, 9))
BARS = (7, 13, 21)  # gaps across which parallel short runs are one box, as the plates of a capacitor are
SHORT = 60  # length of a short run, at most
ENDS = (8, 12, 18)  # sides of the squares around the ends of runs, where terminals are
SMALLEST = 6.0  # px, of a box's longer side
NEAR = 1.2  # two boxes whose sides and places differ by less than about this factor count as one
# A symbol's sides: the rank of smaller boxes sinks in proportion. On circuits 10 % of the boxes of 16 to 32
# line widths were a symbol's, and 2 % of those of 8 or less.
SYMBOL = 14
# Lines that leave a symbol's box: fewer are a letter's, more are those of a box that cuts through a drawing.
LEADS = (0.5, 6.0)
DENSITY = (0.08, 0.5)  # share of a symbol's box that is ink
SINK = 0.5  # factor on the rank of a box outside either range
OUTWARD = np.array((-1, -1, 1, 1))  # times a margin, it moves the sides of a box


def ink_boxes(
    image: Image,
    most: int = MOST,
    overlap: float = 0.7,
    paper: Color | None = None,
    tolerance: int | None = None,
) -> NDArray[np.float32]:
    """Boxes float32 [N, 4], x0 y0 x1 y1 in px, of an image uint8 [H, W] or [H, W, 3], the likeliest first.

    most: number of boxes, at most. overlap: no two boxes have a larger IoU. paper, tolerance: the color of
    even paper, and the tolerance of ink on uneven paper, as a store of windows knows them; without both they
    are looked for on the image.
    """
    ink = _ink(image, paper, tolerance)
    if not ink.any():
        return np.empty((0, 4), np.float32)
    height, width = ink.shape
    line = line_width(ink.view(bool))
    boxes, votes = _merge(*_candidates(ink, line), width, height)
    small = (boxes[:, 2:] - boxes[:, :2]).max(1) < 0.4 * max(width, height)
    # Plates need the room between them, and labels often leave some.
    around = [_squares(boxes[small]), _grown(boxes[small], 1.4)]
    votes = np.concatenate([votes, *2 * [votes[small] / 2]])
    boxes, votes = _merge(np.concatenate([boxes, *around]), votes, width, height)
    rank = _rank(boxes, votes, ink, line)
    first = np.argsort(-rank, kind="stable")[: max(COMPARED, 4 * most)]
    boxes, rank = boxes[first], rank[first]
    sides = np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]])
    kept = np.asarray(cv2.dnn.NMSBoxes(sides.tolist(), rank.tolist(), 0.0, overlap), np.intp).ravel()
    return boxes[kept[:most]].astype(np.float32)


def _ink(image: Image, paper: Color | None, tolerance: int | None) -> Image:
    """uint8 [H, W]: 1 where there is ink."""
    if tolerance is not None:
        return ink_mask(image, nearby_paper(image), tolerance).view(np.uint8)
    if paper is None:
        paper = paper_color(image)
        if uneven := uneven_paper(image, paper):
            everywhere = uneven.paper(0, *image.shape[:2])
            return ink_mask(image, everywhere, uneven.tolerance).view(np.uint8)
    return ink_mask(image, paper).view(np.uint8)


def _candidates(ink: Image, line: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Boxes [N, 4], many of them alike, and a vote [N] of each. line: width of the lines, px."""
    unit = max(1.0, line / 2)
    found = [_components(_closed(ink, (side, side), unit)) for side in CLOSINGS]
    holes = _holes(ink) + line * OUTWARD
    groups: list[tuple[float, list[NDArray[np.float64]]]] = [(1.0, found), (3.0, [holes])]
    for length in RUNS:
        runs = _runs(ink, round(length * unit), math.ceil(1.7 * line))
        rest = ink & ~(runs[0] | runs[1])
        groups.append((1.0, [_components(_closed(rest, kernel, unit)) for kernel in CUT_CLOSINGS]))
        if length == RUNS[0]:
            alone = [_components(run) for run in runs]
            groups.append((0.5, [_ends(boxes, axis, unit) for axis, boxes in enumerate(alone)]))
            groups.append((2.0, [_bars(ink, boxes, axis, unit) for axis, boxes in enumerate(alone)]))
    boxes = [np.concatenate(group) for _, group in groups]
    votes = [np.full(len(part), vote) for (vote, _), part in zip(groups, boxes, strict=True)]
    return np.concatenate(boxes), np.concatenate(votes)


def _components(mask: Image) -> NDArray[np.float64]:
    """The boxes [N, 4] of the connected components of a mask."""
    x, y, width, height, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)[2][1:].T.astype(float)
    return np.stack([x, y, x + width, y + height], 1)


def _holes(ink: Image) -> NDArray[np.float64]:
    """The boxes [N, 4] of the blank areas that ink encloses, as that of a frame."""
    height, width = ink.shape
    blank = cv2.connectedComponentsWithStats(1 - ink, connectivity=4)[2][1:]
    x, y, w, h, area = blank.T
    inside = (x > 0) & (y > 0) & (x + w < width) & (y + h < height) & (area >= 6)
    x, y, w, h = blank[inside, :4].T.astype(float)
    return np.stack([x, y, x + w, y + h], 1)


def _closed(mask: Image, kernel: tuple[int, int], unit: float) -> Image:
    sides = [1 if side == 1 else round(side * unit) | 1 for side in kernel]
    return (
        mask if sides == [1, 1] else cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones(sides[::-1], np.uint8))
    )


def _runs(ink: Image, length: int, thick: int) -> tuple[Image, Image]:
    """Masks of the straight runs along x and along y, from `length` px long and up to `thick` px wide."""

    def opened(mask: Image, height: int, width: int) -> Image:
        return cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((height, width), np.uint8))

    along_x, along_y = opened(ink, 1, length), opened(ink, length, 1)
    return along_x & ~opened(along_x, thick + 1, 1), along_y & ~opened(along_y, 1, thick + 1)


def _ends(runs: NDArray[np.float64], axis: int, unit: float) -> NDArray[np.float64]:
    """Squares around both ends of the runs [N, 4] along an axis, 0 for x."""
    squares = []
    for end in (runs[:, :2], runs[:, 2:]):
        point = (runs[:, :2] + runs[:, 2:]) / 2
        point[:, axis] = end[:, axis]
        squares += [np.hstack([point - side * unit / 2, point + side * unit / 2]) for side in ENDS]
    return np.concatenate(squares)


def _bars(ink: Image, runs: NDArray[np.float64], axis: int, unit: float) -> NDArray[np.float64]:
    """The boxes of short parallel runs [N, 4] along an axis that lie beside each other."""
    mask = np.zeros_like(ink)
    for x0, y0, x1, y1 in runs[runs[:, 2 + axis] - runs[:, axis] < SHORT * unit].astype(int).tolist():
        mask[y0:y1, x0:x1] = 1
    kernels = [(1, gap) if axis == 0 else (gap, 1) for gap in BARS]
    return np.concatenate([_components(_closed(mask, kernel, unit)) for kernel in kernels])


def _squares(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Boxes [N, 4] whose shorter side is made as long as the longer one."""
    middle, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).max(1, keepdims=True) / 2
    return np.hstack([middle - half, middle + half])


def _grown(boxes: NDArray[np.float64], factor: float) -> NDArray[np.float64]:
    middle, half = (boxes[:, :2] + boxes[:, 2:]) / 2, factor * (boxes[:, 2:] - boxes[:, :2]) / 2
    return np.hstack([middle - half, middle + half])


def _merge(
    boxes: NDArray[np.float64], votes: NDArray[np.float64], width: int, height: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """One of each set of boxes that are about the same, clipped to the image, with the sum of their votes.

    Sides are put into bins that are a factor NEAR wide, and middles into a grid as fine as such a bin. That
    takes no longer for each box of a large sheet than of a small one.
    """
    boxes = np.clip(boxes, 0, (width, height, width, height))
    sides = boxes[:, 2:] - boxes[:, :2]
    large = (sides.max(1) >= SMALLEST) & (sides.min(1) >= 1)
    boxes, votes, sides = boxes[large], votes[large], sides[large]
    bins = np.rint(np.log(sides) / math.log(NEAR))
    grid = np.rint((boxes[:, :2] + boxes[:, 2:]) / 2 / (NEAR**bins * (NEAR - 1)))
    _, first, place = np.unique(np.hstack([bins, grid]), axis=0, return_index=True, return_inverse=True)
    return boxes[first], np.bincount(place.ravel(), votes, len(first)).astype(float)


def _rank(
    boxes: NDArray[np.float64], votes: NDArray[np.float64], ink: Image, line: float
) -> NDArray[np.float64]:
    """How likely each box [N, 4] is a symbol's, by its votes, its size, and the ink in it and at its edge."""
    integral = cv2.integral(ink)
    height, width = ink.shape

    def count(margin: int) -> NDArray[np.float64]:
        moved = np.rint(boxes).astype(int) + margin * OUTWARD
        x0, y0, x1, y1 = np.clip(moved, 0, (width, height, width, height)).T
        return (integral[y1, x1] - integral[y0, x1] - integral[y1, x0] + integral[y0, x0]).astype(float)

    sides = boxes[:, 2:] - boxes[:, :2]
    leads, density = (count(2) - count(1)) / line, count(0) / sides.prod(1)
    rank = np.log1p(votes) * np.minimum(1, sides.min(1) / (SYMBOL * line))
    for value, (least, greatest) in ((leads, LEADS), (density, DENSITY)):
        rank = np.where((value > least) & (value < greatest), rank, SINK * rank)
    return rank
