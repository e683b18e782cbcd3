"""Where to look on a sheet: windows that hold ink, and a grid of tiles that covers everything.

The side of a window is given in pixels of the sheet, never as a share of it, so that a line of 2 px stays one
of 2 px however large the sheet is. Paper is whatever color is most frequent, so that a dark CAD screen works
like white paper. Where that leaves too much ink, as on a photograph with a shadow, paper is whatever is most
frequent nearby.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Image = np.ndarray  # uint8 [H, W] gray or [H, W, 3] RGB
Color = int | tuple[int, int, int]  # a gray level or (r, g, b), each 0 to 255

# Gray levels from the paper's up to which a pixel is still paper. Noise of JPEG and scanners stays below,
# thin anti-aliased lines are above.
INK_TOLERANCE = 40
PAPER_SAMPLE = 1 << 12  # evenly spread pixels that are looked at to find the paper, about
# A sheet is uneven if one color of paper leaves a share of ink above MUCH_INK, and the paper nearby less than
# EVEN of that. Drawings have 5 % of ink, and 1 in 50 has much. Photographs of paper have 14 to 66 %, of which
# 7 to 54 % are left. The few drawings that are uneven have panels or margins of a second color.
MUCH_INK, EVEN = 0.125, 0.6
STEP = 7  # px; on uneven sheets the paper is found for blocks of this side
NEARBY = 17  # blocks a side, 119 px, whose median is the paper of the block in their middle


def mean_and_std(images: Iterable[Image], count: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of three channels, in [0, 1], over `count` uint8 images of equal weight.

    A gray image counts as three equal channels.
    """
    moments = np.zeros((2, 3))
    for image in images:  # OpenCV sums up in double precision; a float32 sum saturates on a large sheet
        mean, std = (np.broadcast_to(m[:, 0], 3) / 255 for m in cv2.meanStdDev(image))
        moments += np.array([mean, std**2 + mean**2]) / count
    mean, square = moments
    return mean.tolist(), np.sqrt(np.maximum(square - mean**2, 0)).tolist()


def paper_color(image: Image) -> Color:
    """The most frequent color of an image [H, W] or [H, W, 3]: a gray level, or (r, g, b).

    Colors are counted in bins of 8 levels, so that the noise of JPEG doesn't split the paper into many
    colors. The median of the fullest bin is returned.
    """
    step = max(1, int(np.sqrt(image.shape[0] * image.shape[1] / PAPER_SAMPLE)))
    pixels = image[::step, ::step].reshape(-1, 1 if image.ndim == 2 else 3)
    bins = (pixels >> 3).astype(np.int32) @ (32 ** np.arange(pixels.shape[1]))
    paper = np.median(pixels[bins == np.bincount(bins).argmax()], axis=0).astype(int).tolist()
    return paper[0] if image.ndim == 2 else tuple(paper)


def ink_mask(
    image: Image, paper: Color | Image | None = None, tolerance: int = INK_TOLERANCE
) -> NDArray[np.bool_]:
    """Bool [H, W]: the pixels that differ from the paper by more than `tolerance` levels in any channel.

    paper: its color, or an image of the same shape with its color everywhere; if not given, its color is
    looked for.
    """
    if isinstance(paper, np.ndarray):
        margin = np.uint8(tolerance)
        lowest, highest = np.maximum(paper, margin) - margin, np.minimum(paper, 255 - margin) + margin
    else:
        level = np.array(paper_color(image) if paper is None else paper, dtype=float, ndmin=1)
        lowest, highest = level - tolerance, level + tolerance
    return cv2.inRange(image, lowest, highest) == 0


@dataclass(frozen=True)
class Uneven:
    """The paper of a sheet on which its color changes from place to place, as with a shadow or a panel.

    blocks: its color in each block of STEP x STEP px, uint8 [ceil(H / STEP), ceil(W / STEP)], in color with 3
    channels. tolerance: gray levels from it up to which a pixel is still paper.
    """

    blocks: Image
    tolerance: int

    def paper(self, top: int, bottom: int, width: int) -> Image:
        """Its color at each pixel of the rows from `top` to `bottom` of the sheet, [bottom - top, width]."""
        blocks = self.blocks[top // STEP : -(-bottom // STEP)]
        size = (blocks.shape[1] * STEP, blocks.shape[0] * STEP)
        return cv2.resize(blocks, size, interpolation=cv2.INTER_NEAREST)[top % STEP :][: bottom - top, :width]


def uneven_paper(image: Image, paper: Color | None = None) -> Uneven | None:
    """The paper of an uneven sheet [H, W] or [H, W, 3]; None if one color is the paper of all of it.

    The paper of a block is the median nearby, which lines and symbols hardly move, be it light or dark.
    Squared paper has lines of its own, fainter than the pen's: ink is what differs from the paper by at least
    half as much as the strongest hundredth of the pixels. paper: the most frequent color, looked for if not
    given.
    """
    samples = np.ascontiguousarray(image[::STEP, ::STEP])
    share = ink_mask(samples, paper_color(image) if paper is None else paper).mean()
    if share <= MUCH_INK:
        return None
    blocks = cv2.medianBlur(samples, NEARBY)
    apart = cv2.absdiff(samples, blocks).reshape(*samples.shape[:2], -1).max(axis=2)
    tolerance = max(INK_TOLERANCE, int(np.quantile(apart, 0.99) / 2))
    return Uneven(blocks, tolerance) if (apart > tolerance).mean() < EVEN * share else None


def ink_and_bare(image: Image, boxes: np.ndarray) -> tuple[float, NDArray[np.bool_]]:
    """The share of a sheet's pixels that are ink, and bool [N]: which boxes [N, 4] xyxy hold none.

    Whatever differs from the paper nearby is ink here, be it the lines of squared paper or a faded symbol:
    it is to tell labels that are wrong, and no others.
    """
    paper = paper_color(image)
    uneven = uneven_paper(image, paper)
    ink = ink_mask(image, uneven.paper(0, *image.shape[:2]) if uneven else paper)
    corners = np.hstack([np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:])]).astype(int).tolist()
    return float(ink.mean()), np.array([not ink[y0:y1, x0:x1].any() for x0, y0, x1, y1 in corners], bool)


def nearby_paper(window: Image) -> Image:
    """The color of the paper at each pixel of a window of an uneven sheet, as an image of the same shape."""
    blocks = cv2.medianBlur(np.ascontiguousarray(window[::STEP, ::STEP]), NEARBY)
    return Uneven(blocks, INK_TOLERANCE).paper(0, *window.shape[:2])


def line_width(ink: NDArray[np.bool_]) -> float:
    """Width in px of the lines on bool [H, W], about; 0 where there is no ink.

    A pixel taken off one side of each line leaves (width - 1) / width of the ink.
    """
    area = np.count_nonzero(ink)
    thinner = np.count_nonzero(cv2.erode(ink.view(np.uint8), np.ones((2, 2), np.uint8)))
    return area / max(1, area - thinner)


def starts(length: int, side: int, stride: int) -> NDArray[np.int64]:
    """Evenly spread starts, at most `stride` apart, of intervals `side` long that cover 0 to `length`."""
    count = max(1, -(-(length - side) // stride) + 1)
    return np.linspace(0, max(0, length - side), count).astype(np.int64)


def ink_windows(
    image: Image,
    side: int,
    stride: int,
    min_ink: float,
    paper: Color | None = None,
    uneven: Uneven | None = None,
) -> NDArray[np.int64]:
    """Corners [N, 2], x y in px, of the windows in which at least a share `min_ink` of the pixels is ink.

    side, stride: of the windows in px. A sheet no larger than `side` is one window, and its ink is compared
    with side² pixels. paper: its color, looked for on the image if not given. uneven: its paper where one
    color is not enough.
    """
    height, width = image.shape[:2]
    paper = paper_color(image) if paper is None else paper
    xs, ys = starts(width, side, stride), starts(height, side, stride)
    columns = np.unique([xs, np.minimum(xs + side, width)])
    rows = np.unique([ys, np.minimum(ys + side, height)])
    # The number of pixels of ink above rows[i] and left of columns[j]. This integral image is kept only at
    # the corners of windows, and the sheet is worked on in bands, so that a sheet of 20,000 px a side needs
    # little memory.
    integral = np.zeros((len(rows), len(columns)), dtype=np.int64)
    for i in range(1, len(rows)):
        top, bottom = rows[i - 1], rows[i]
        if uneven:
            ink = ink_mask(image[top:bottom], uneven.paper(top, bottom, width), uneven.tolerance)
        else:
            ink = ink_mask(image[top:bottom], paper)
        per_column = np.concatenate([[0], np.cumsum(np.count_nonzero(ink, axis=0))])
        integral[i] = integral[i - 1] + per_column[columns]
    above, below = np.searchsorted(rows, ys), np.searchsorted(rows, np.minimum(ys + side, height))
    left, right = np.searchsorted(columns, xs), np.searchsorted(columns, np.minimum(xs + side, width))
    strips = integral[below] - integral[above]
    counts = strips[:, right] - strips[:, left]
    row, column = np.nonzero(counts >= max(1, min_ink * side * side))
    return np.stack([xs[column], ys[row]], axis=1)


def cut(image: Image, x: int, y: int, side: int, paper: Color | None = None) -> Image:
    """A copy of the window [side, side] or [side, side, 3] whose upper left corner is at (x, y).

    Beyond the edge of the sheet it has the color of the paper. paper: that color, looked for on the image if
    it is needed and not given.
    """
    height, width = image.shape[:2]
    x0, y0, x1, y1 = max(0, x), max(0, y), min(width, x + side), min(height, y + side)
    if (x0, y0, x1, y1) == (x, y, x + side, y + side):
        return image[y:y1, x:x1].copy()
    window = np.empty((side, side, *image.shape[2:]), dtype=np.uint8)
    window[:] = paper_color(image) if paper is None else paper
    if x0 < x1 and y0 < y1:
        window[y0 - y : y1 - y, x0 - x : x1 - x] = image[y0:y1, x0:x1]
    return window


def tile_sheet(width: int, height: int, side: int, overlap: int) -> NDArray[np.int64]:
    """Tiles [N, 4], x0 y0 x1 y1 in px of the sheet, that cover the sheet row by row.

    Neighbours share at least `overlap` px, and no tile reaches over the sheet's edge. A sheet no larger than
    `side` is one tile of its own size. Raises ValueError unless 0 <= overlap < side.
    """
    if not 0 <= overlap < side:
        raise ValueError(f"overlap must be in [0, side), got {overlap} with side {side}")
    xs, ys = starts(width, side, side - overlap), starts(height, side, side - overlap)
    x, y = (grid.ravel() for grid in np.meshgrid(xs, ys))
    return np.stack([x, y, np.minimum(x + side, width), np.minimum(y + side, height)], axis=1)
