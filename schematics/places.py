"""Where a view lies in its window, and which places of two views show the same.

A place in a view is (u, v), each from -1 at its left or upper edge to 1 at the other. One in a window is in
px, and (0, 0) is the outer corner of its first pixel.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Row = tuple[float, float, float]


class Place(NamedTuple):
    """What was done to a window, in this order, to get the geometry of a view.

    x, y, width, height: the crop in px of the window. turn: [2, 2], by which the crop was turned and sheared
    about its middle, as `pixels.turned` takes it; None if it was not. quarters: quarter turns by rot90.
    mirrored: left to right.
    """

    x: float
    y: float
    width: float
    height: float
    turn: np.ndarray | None = None
    quarters: int = 0
    mirrored: bool = False

    def moved(self, x: float, y: float) -> Place:
        """The same in an image whose corner lies at (-x, -y) of this one's."""
        return self._replace(x=self.x + x, y=self.y + y)

    @property
    def rows(self) -> tuple[Row, Row]:
        """[2, 3]: (u, v, 1) of the view -> (x, y) of the window in px."""
        x, y = self.x + self.width / 2, self.y + self.height / 2  # the middle
        a, b, c, d = self.width / 2, 0.0, 0.0, self.height / 2
        if self.turn is not None:
            (e, f), (g, h) = self.turn.tolist()
            x, y = x + (1 - e - f) / 2, y + (1 - g - h) / 2  # OpenCV turns about the middle of a pixel
            a, b, c, d = e * a, f * d, g * a, h * d
        for _ in range(self.quarters):  # a view turned by rot90 shows at (u, v) what was at (-v, u)
            a, b, c, d = b, -a, d, -c
        if self.mirrored:
            a, c = -a, -c
        return (a, b, x), (c, d, y)


def across(first: Place, second: Place) -> np.ndarray:
    """float32 [2, 3]: (u, v, 1) of the first view -> (u, v) of the same ink in the second.

    Beyond -1 to 1 the second view doesn't show it. Wear moves ink by less than a pixel of a view. It is
    worked out in plain numbers: numpy's solver would add a tenth to the time that a pair of views takes.
    """
    (a, b, x), (c, d, y) = second.rows
    (e, f), (g, h), (i, j) = zip(*first.rows, strict=True)
    area = a * d - b * c
    i, j = i - x, j - y
    rows = [[d * e - b * f, d * g - b * h, d * i - b * j], [a * f - c * e, a * h - c * g, a * j - c * i]]
    return (np.array(rows) / area).astype(np.float32)
