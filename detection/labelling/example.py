"""An example of a symbol: a box on a sheet, or a picture of its own, turned, mirrored and scaled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from schematics.sheets import to_color
from schematics.windows import Image, cut

SURROUNDINGS = 1.0  # of the longer side: what is seen around an example
TURNS = 8  # 0 to 3 are turns by 90 degrees, 4 to 7 the same mirrored
SCALES = (0.63, 0.79, 1.0, 1.26, 1.59)  # of a symbol on a sheet, in units of its example
LEAST_SIDE = 4  # px of a box that can be an example


@dataclass(frozen=True)
class Example:
    """A symbol with its surroundings. image: uint8 [H, W]. box: its x0 y0 x1 y1 there, whole px."""

    image: Image
    box: tuple[int, int, int, int]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the symbol, px."""
        x0, y0, x1, y1 = self.box
        return x1 - x0, y1 - y0

    @property
    def crop(self) -> Image:
        """The symbol alone, uint8 [h, w]."""
        x0, y0, x1, y1 = self.box
        return self.image[y0:y1, x0:x1]


@dataclass(frozen=True)
class Pose:
    """An example as it may stand on a sheet: turned by `turn`, then scaled. box: in px of the image, real."""

    image: Image
    box: tuple[float, float, float, float]
    turn: int
    scale: float


def example_from(sheet: Image, box: Sequence[float]) -> Example:
    """The example in a box x0 y0 x1 y1, px, of a sheet uint8 [H, W] or [H, W, 3].

    Raises ValueError for a box that is not wholly on the sheet, has a side below LEAST_SIDE px, or shows but
    one color.
    """
    gray = to_color(sheet, "gray")
    height, width = gray.shape
    x0, y0, x1, y1 = (round(float(edge)) for edge in box)
    if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
        raise ValueError(f"the box reaches beyond the sheet of {width} x {height} px")
    if min(x1 - x0, y1 - y0) < LEAST_SIDE:
        raise ValueError(f"the box is smaller than {LEAST_SIDE} px")
    if np.ptp(gray[y0:y1, x0:x1]) < 2:
        raise ValueError("there is nothing in the box but one color")
    around = int(SURROUNDINGS * max(x1 - x0, y1 - y0)) + 1
    side = max(x1 - x0, y1 - y0) + 2 * around
    window = cut(gray, x0 - around, y0 - around, side)
    window = window[: y1 - y0 + 2 * around, : x1 - x0 + 2 * around]
    return Example(window, (around, around, around + x1 - x0, around + y1 - y0))


def turned(image: Image, turn: int) -> Image:
    """The image in one of TURNS orientations."""
    image = np.rot90(image, turn % 4)
    return np.ascontiguousarray(image[:, ::-1] if turn >= 4 else image)


def poses(example: Example, scales: Sequence[float], turns: Sequence[int]) -> Iterator[Pose]:
    """The example in each of the turns at each of the scales. It stands in the middle of its image."""
    width, height = example.size
    for scale in scales:
        for turn in turns:
            image = turned(example.image, turn)
            w, h = (width, height) if turn % 2 == 0 else (height, width)
            x0, y0 = (image.shape[1] - w) / 2, (image.shape[0] - h) / 2
            size = tuple(max(1, round(side * scale)) for side in image.shape[::-1])
            how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
            seen = image if scale == 1 else cv2.resize(image, size, interpolation=how)
            fx, fy = size[0] / image.shape[1], size[1] / image.shape[0]
            yield Pose(seen, (x0 * fx, y0 * fy, (x0 + w) * fx, (y0 + h) * fy), turn, scale)
