"""Pen strokes of twelve circuit symbols, and the canvas on which they are drawn.

A symbol is given in units about its own origin, x to the right and y down; it is about one unit long.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import cv2
import numpy as np

# Sheets are drawn at this many times their size and averaged down, for even edges and pens of half a pixel.
FINER = 2
SHIFT = 6  # fractional bits of the coordinates that OpenCV is given
# OpenCV draws this font as strokes up to version 4 and as outlines since version 5, so that the lettering of
# a sheet depends on the version.
FONT = cv2.FONT_HERSHEY_SIMPLEX

Point = tuple[float, float]


@dataclass(frozen=True)
class Stroke:
    """A polyline through points [N, 2]. A filled one is closed, a bold one has twice the pen's width."""

    points: np.ndarray
    filled: bool = False
    bold: bool = False


@dataclass(frozen=True)
class Shape:
    """The strokes of a symbol, and the leads that join it to wires and don't belong to its box.

    A symbol with two pins has no leads: its wires end at (-pin, 0) and (pin, 0).
    """

    strokes: tuple[Stroke, ...]
    pin: float = 0.0
    leads: tuple[Stroke, ...] = ()


def line(*points: Point, filled: bool = False, bold: bool = False) -> Stroke:
    """A stroke through the points in their order."""
    return Stroke(np.array(points, dtype=float), filled, bold)


def arc(
    center: Point | np.ndarray, radius: float, start: float = 0.0, end: float = 360.0, filled: bool = False
) -> Stroke:
    """A stroke along a circle from angle `start` to `end`, in degrees clockwise from east."""
    angle = np.radians(np.linspace(start, end, 33))
    return Stroke(center + radius * np.column_stack([np.cos(angle), np.sin(angle)]), filled)


def _plate(x: float, half: float, bold: bool = False) -> Stroke:
    """An upright stroke at x, `half` long above and below the axis."""
    return line((x, -half), (x, half), bold=bold)


_ZIGZAG = [(-0.5, 0.0), *((-0.4167 + i / 6, 0.17 * (-1) ** (i + 1)) for i in range(6)), (0.5, 0.0)]
_M = ((-0.17, 0.19), (-0.17, -0.19), (0, 0.06), (0.17, -0.19), (0.17, 0.19))

SHAPES: dict[str, Shape] = {
    "resistor": Shape((line(*_ZIGZAG),), pin=0.5),
    "capacitor": Shape((_plate(-0.12, 0.4), _plate(0.12, 0.4)), pin=0.12),
    "inductor": Shape(tuple(arc((-0.375 + i / 4, 0), 0.125, 180, 360) for i in range(4)), pin=0.5),
    "diode": Shape(
        (line((-0.33, -0.38), (-0.33, 0.38), (0.33, 0), filled=True), _plate(0.33, 0.38)), pin=0.33
    ),
    "transistor": Shape(
        (
            arc((-0.22, 0), 0.5),
            line((-0.72, 0), (-0.39, 0)),
            _plate(-0.39, 0.27, bold=True),
            line((-0.39, -0.1), (0, -0.3), (0, -0.449)),
            line((-0.39, 0.1), (0, 0.3), (0, 0.449)),
            line((-0.03, 0.29), (-0.22, 0.27), (-0.14, 0.13), filled=True),
        ),
        leads=(line((-0.72, 0), (-0.8, 0)), line((0, -0.449), (0, -0.8)), line((0, 0.449), (0, 0.8))),
    ),
    "ground": Shape((_plate(-0.18, 0.42), _plate(0, 0.27), _plate(0.18, 0.11)), pin=0.18),
    "op-amp": Shape(
        (
            line((-0.5, -0.5), (0.5, 0), (-0.5, 0.5), (-0.5, -0.5)),
            line((-0.41, -0.25), (-0.25, -0.25)),
            line((-0.41, 0.25), (-0.25, 0.25)),
            line((-0.33, 0.17), (-0.33, 0.33)),
        ),
        leads=(
            line((0.5, 0), (0.8, 0)),
            line((-0.5, -0.25), (-0.7, -0.25), (-0.7, 0), (-0.8, 0)),
            line((-0.5, 0.25), (-0.7, 0.25), (-0.7, 0.66), (0, 0.66), (0, 0.8)),
        ),
    ),
    "switch": Shape(
        (arc((-0.42, 0), 0.07), arc((0.42, 0), 0.07), line((-0.36, -0.04), (0.36, -0.34))), pin=0.49
    ),
    "lamp": Shape(
        (arc((0, 0), 0.4), line((-0.283, -0.283), (0.283, 0.283)), line((-0.283, 0.283), (0.283, -0.283))),
        pin=0.4,
    ),
    "motor": Shape((arc((0, 0), 0.4), line(*_M)), pin=0.4),
    "fuse": Shape(
        (
            line((-0.5, -0.17), (0.5, -0.17), (0.5, 0.17), (-0.5, 0.17), (-0.5, -0.17)),
            line((-0.5, 0), (0.5, 0)),
        ),
        pin=0.5,
    ),
    "battery": Shape(
        (_plate(-0.24, 0.42), _plate(-0.08, 0.19, True), _plate(0.08, 0.42), _plate(0.24, 0.19, True)),
        pin=0.24,
    ),
}


def placed(
    strokes: Iterable[Stroke], at: np.ndarray, unit: float, quarter: int = 0, mirror: bool = False
) -> list[Stroke]:
    """The strokes on a sheet, in px: their origin is at `at` [2], one unit is `unit` px long.

    mirror: whether they are first mirrored about the x axis, y to -y. quarter: by how many quarter turns they
    are then turned clockwise, so that 0 leaves the x axis pointing east and 1 makes it point south.
    """
    turn = np.linalg.matrix_power(np.array([[0.0, -1.0], [1.0, 0.0]]), quarter % 4)
    matrix = unit * turn @ np.diag([1.0, -1.0 if mirror else 1.0])
    return [Stroke(s.points @ matrix.T + at, s.filled, s.bold) for s in strokes]


def text_width(text: str, height: float) -> float:
    """The width in px of a text whose capitals are `height` px tall."""
    return cv2.getTextSize(text, FONT, FINER * height / 21, FINER)[0][0] / FINER


@dataclass
class Canvas:
    """A sheet to draw on: ink uint8 [FINER * H, FINER * W], from 0 for paper to 255 for ink.

    Everything is drawn at places in px of the sheet, which the matrix `skew` [2, 3] turns a little.
    """

    ink: np.ndarray
    skew: np.ndarray
    pen: float  # width of a stroke, px

    def draw(self, strokes: Iterable[Stroke], pen: float | None = None) -> None:
        """Draw strokes over what is there. pen: their width in px, the canvas's own if not given."""
        self.stamp(*self.sketch(strokes, pen))

    def sketch(self, strokes: Iterable[Stroke], pen: float | None = None) -> tuple[np.ndarray, int, int]:
        """The strokes on a patch of their own, and where its corner (x, y) belongs, in pixels of `ink`."""
        strokes, pen = list(strokes), pen or self.pen
        points = [FINER * (s.points @ self.skew[:, :2].T + self.skew[:, 2]) for s in strokes]
        edge = 2 * round(FINER * pen) + 2
        low = np.floor(np.min([p.min(axis=0) for p in points], axis=0)).astype(int) - edge
        high = np.ceil(np.max([p.max(axis=0) for p in points], axis=0)).astype(int) + edge
        patch = np.zeros((high - low)[::-1], np.uint8)
        for stroke, stroke_points in zip(strokes, points, strict=True):
            fixed = [np.rint((stroke_points - low) * 2**SHIFT).astype(np.int32)]
            thickness = max(1, round(FINER * pen * (2 if stroke.bold else 1)))
            cv2.polylines(patch, fixed, stroke.filled, 255, thickness, cv2.LINE_AA, SHIFT)
            if stroke.filled:
                cv2.fillPoly(patch, fixed, 255, cv2.LINE_AA, SHIFT)
        return patch, int(low[0]), int(low[1])

    def stamp(self, patch: np.ndarray, x: int, y: int) -> None:
        """Lay the ink of a patch over what is there; ink beyond the edges of the sheet is lost."""
        x0, y0 = max(0, x), max(0, y)
        area = self.ink[y0 : max(0, y + patch.shape[0]), x0 : max(0, x + patch.shape[1])]
        patch = patch[y0 - y :, x0 - x :][: area.shape[0], : area.shape[1]]
        np.maximum(area, patch, out=area)

    def is_free(self, x: float, y: float, width: float, height: float) -> bool:
        """Whether the rectangle, in px, lies wholly on the sheet and holds no ink."""
        x0, y0, x1, y1 = (round(FINER * v) for v in (x, y, x + width, y + height))
        on_sheet = x0 >= 0 and y0 >= 0 and x1 <= self.ink.shape[1] and y1 <= self.ink.shape[0]
        return on_sheet and not self.ink[y0:y1, x0:x1].any()

    def write(self, text: str, x: float, y: float, height: float) -> None:
        """Write a text with its lower left corner at (x, y) px and capitals `height` px tall."""
        u, v = (round(c) for c in FINER * (self.skew @ [x, y, 1]))
        cv2.putText(self.ink, text, (u, v), FONT, FINER * height / 21, 255, FINER, cv2.LINE_AA)
