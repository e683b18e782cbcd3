"""Where a view lies in its window, and which places of two views show the same.

A place in a view is (u, v), each from -1 at its left or upper edge to 1 at the other. One in a window is in
px, and (0, 0) is the outer corner of its first pixel.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# A quarter turn by numpy's rot90 shows at (u, v) what was at QUARTER @ (u, v).
QUARTER = np.array([[0.0, -1.0], [1.0, 0.0]])
MIRROR = np.diag([-1.0, 1.0])


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
    def matrix(self) -> np.ndarray:
        """float64 [3, 3]: (u, v, 1) of the view -> (x, y, 1) of the window in px."""
        linear = np.diag([self.width / 2, self.height / 2])
        middle = np.array([self.x + self.width / 2, self.y + self.height / 2])
        if self.turn is not None:  # OpenCV turns about the middle of a pixel, half a pixel further
            linear, middle = self.turn @ linear, middle + (np.eye(2) - self.turn) @ [0.5, 0.5]
        linear = (
            linear @ np.linalg.matrix_power(QUARTER, self.quarters) @ (MIRROR if self.mirrored else np.eye(2))
        )
        return np.vstack([np.column_stack([linear, middle]), [0, 0, 1]])


def across(first: Place, second: Place) -> np.ndarray:
    """float64 [2, 3]: (u, v, 1) of the first view -> (u, v) of the same ink in the second.

    Beyond -1 to 1 the second view doesn't show it. Wear moves ink by less than a pixel of a view.
    """
    return np.linalg.solve(second.matrix, first.matrix)[:2]
