"""A sheet whose symbols are known: a random circuit, its lettering and a frame, printed and scanned."""

from __future__ import annotations

import cv2
import numpy as np

from schematics.circuit import CLASSES, Drawing, draw_circuit
from schematics.strokes import FINER, Canvas, line, text_width

LETTER = 7.0  # px, the height of a symbol's lettering
PREFIX = {"resistor": "R", "capacitor": "C", "inductor": "L", "diode": "D", "transistor": "Q", "op-amp": "U"}
PREFIX |= {"switch": "S", "lamp": "H", "motor": "M", "fuse": "F", "battery": "B"}
VALUES = {
    "resistor": ("10k", "470", "4k7", "1M", "220", "33k"),
    "capacitor": ("100n", "10u", "22p", "1u", "470u"),
    "inductor": ("10mH", "4u7", "33uH"),
    "diode": ("1N4148", "1N4007", "BAT54"),
    "transistor": ("BC547", "2N3904", "BC337"),
    "op-amp": ("LM358", "TL072", "741"),
    "lamp": ("12V", "24V"),
    "fuse": ("2A", "500mA", "T1A"),
    "battery": ("9V", "12V", "3V"),
}
TITLES = ("DRIVER BOARD", "POWER SUPPLY", "LAMP CONTROL", "PUMP STATION", "AUDIO STAGE", "RELAY PANEL")


def draw_sheet(
    seed: int, index: int, width: int = 512, height: int = 512, noise: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw a sheet: image uint8 [H, W], boxes float64 [N, 4] x0 y0 x1 y1 in px, labels int64 [N] from 1.

    noise: from 0, a clean print, to 1, a bad scan with skew, uneven paper, specks, blur and JPEG. Boxes
    follow the skew. Each holds the ink of its symbol without the wires, and no two overlap.
    """
    rng = np.random.default_rng([seed, index])
    angle = np.radians(0.5 * noise * rng.uniform(-1, 1))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    middle = np.array([width / 2, height / 2])
    canvas = Canvas(
        ink=np.zeros((FINER * height, FINER * width), np.uint8),
        skew=np.column_stack([turn, middle - turn @ middle]),
        pen=float(rng.choice([1.0, 1.5, 2.0, 2.5], p=[0.15, 0.4, 0.3, 0.15])),
    )
    drawing = Drawing(canvas, rng, unit=rng.uniform(38, 54))
    draw_circuit(drawing, width, height)
    _draw_frame(drawing, width, height)
    _letter(drawing)
    ink = cv2.resize(canvas.ink, (width, height), interpolation=cv2.INTER_AREA)
    image = cv2.addWeighted(ink, -rng.uniform(0.8, 1.0), ink, 0.0, 255)
    if noise > 0:
        image = _scan(image, noise, rng)
    return image, np.array(drawing.boxes).reshape(-1, 4), np.array(drawing.labels, dtype=np.int64)


def _draw_frame(drawing: Drawing, width: int, height: int) -> None:
    """Draw a border with zone marks, a title block at the lower right and notes at the lower left."""
    canvas, rng = drawing.canvas, drawing.rng
    for edge in (6, 18):
        x1, y1 = width - edge, height - edge
        canvas.draw([line((edge, edge), (x1, edge), (x1, y1), (edge, y1), (edge, edge))], pen=1.0)
    for length, across, names in ((width, False, "12345678"), (height, True, "ABCDEFGH")):
        zones = min(len(names), max(2, length // 160))
        for k in range(zones):
            middle, border = 6 + (length - 12) * (k + 0.5) / zones, 6 + (length - 12) * k / zones
            canvas.write(names[k], *((9.5, middle + 3) if across else (middle - 3, 15.0)), 6)
            if k > 0:
                ends = ((6, border), (18, border)) if across else ((border, 6), (border, 18))
                canvas.draw([line(*ends)], pen=1.0)
    w, h = min(176, width // 2), 40
    x, y = width - 18 - w, height - 18 - h
    canvas.draw([line((x, y + h), (x, y), (x + w, y)), line((x, y + 22), (x + w, y + 22))], pen=1.0)
    canvas.draw([line((x + w * k / 3, y + 22), (x + w * k / 3, y + h)) for k in (1, 2)], pen=1.0)
    canvas.write(str(rng.choice(TITLES)), x + 8, y + 15, 9)
    year, month, sheet = rng.integers(1998, 2026), rng.integers(1, 13), rng.integers(1, 13)
    for k, text in enumerate((f"{year}-{month:02}", f"SHEET {sheet}", f"REV {rng.choice(list('ABCD'))}")):
        canvas.write(text, x + w * k / 3 + 4, y + 34, 5.5)
    for k, text in enumerate(("ALL RESISTORS 0.25 W", "DO NOT SCALE")[: 2 * int(w == 176)]):
        canvas.write(text, 26, y + 16 + 14 * k, 6)


def _letter(drawing: Drawing) -> None:
    """Write name and value of each symbol beside it, on the first side where the paper is blank.

    Where no side has room for both, the name stands alone; where none has room for the name, nothing does.
    """
    canvas, rng = drawing.canvas, drawing.rng
    counts: dict[str, int] = {}
    for box, label in zip(drawing.boxes, drawing.labels, strict=True):
        name = CLASSES[label - 1]
        if name not in PREFIX:
            continue
        counts[name] = counts.get(name, 0) + 1
        rows = [f"{PREFIX[name]}{counts[name]}"]
        if name in VALUES:
            rows.append(str(rng.choice(VALUES[name])))
        for text in (rows, rows[:1]):
            if place := _blank_place(canvas, box, text):
                for k, row in enumerate(text):
                    canvas.write(row, place[0], place[1] + LETTER + k * (LETTER + 4), LETTER)
                break


def _blank_place(canvas: Canvas, box: np.ndarray, rows: list[str]) -> tuple[float, float] | None:
    """The upper left corner of a blank place for the rows of text beside the box, or None.

    Above and below come first for a flat symbol, right and left for an upright one.
    """
    w, h = max(text_width(row, LETTER) for row in rows), len(rows) * (LETTER + 4) - 4
    x, y = (box[:2] + box[2:]) / 2 - [w / 2, h / 2]
    above_below = [(x, box[1] - h - 5), (x, box[3] + 5)]
    beside = [(box[2] + 5, y), (box[0] - w - 5, y)]
    flat = box[2] - box[0] >= box[3] - box[1]
    for left, top in above_below + beside if flat else beside + above_below:
        if canvas.is_free(left - 3, top - 3, w + 6, h + 6):
            return left, top
    return None


def _scan(image: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """What a scanner makes of a print: blur, grain, gray and uneven paper, specks, JPEG, all by `noise`."""
    height, width = image.shape
    shade = cv2.resize(rng.uniform(0, 24, (3, 3)).astype(np.float32), (width, height))
    grain = 5 * rng.standard_normal(image.shape, dtype=np.float32)
    page = cv2.GaussianBlur(image, (0, 0), 0.15 + 0.6 * noise * rng.random()).astype(np.float32)
    page += noise * (grain - shade * (page / 255))
    for _ in range(rng.poisson(noise * 60 * width * height / 512**2)):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        cv2.circle(page, (x, y), int(rng.integers(2)), float(rng.uniform(40, 160)), -1)
    page8 = np.clip(page, 0, 255).astype(np.uint8)
    quality = int(95 - 40 * noise * rng.random())
    data = cv2.imencode(".jpg", page8, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_GRAYSCALE))
