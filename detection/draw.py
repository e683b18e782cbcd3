"""Draw a sheet with its boxes and a legend, and put two such pictures side by side."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cluster import atomic

LONGEST = (1000, 2400)  # a sheet is scaled so that its longer side has at least and at most this many pixels
# The font to try first. It has Latin, Greek and Cyrillic letters.
COLORS = 48  # classes that have a color of their own
NAMED = 150  # with more boxes than this, only the legend names classes; with fewer, each box does too


def color_of(label: int) -> tuple[int, int, int]:
    """The RGB color of label 1, 2, ...; labels that are COLORS apart share one."""
    red, green, blue = _palette()[(label - 1) % COLORS].tolist()
    return red, green, blue


@functools.cache
def _palette() -> np.ndarray:
    """uint8 [COLORS, 3] RGB: colors that differ, dark enough for white text on them and no gray or black.

    Each is the one that is farthest from those before it in CIELAB, where distances are about as large as
    they look.
    """
    steps = np.array(range(0, 256, 15), np.uint8)
    colors = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 1, 3)
    lab = cv2.cvtColor(colors.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[:, 0]
    usable = (lab[:, 0] > 25) & (lab[:, 0] < 62) & (np.hypot(lab[:, 1], lab[:, 2]) > 30)
    colors, lab = colors[usable, 0], lab[usable]
    chosen = [int(np.hypot(lab[:, 1], lab[:, 2]).argmax())]
    apart = np.full(len(lab), np.inf)
    while len(chosen) < COLORS:
        apart = np.minimum(apart, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
        chosen.append(int(apart.argmax()))
    return colors[chosen]


def annotate(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    scores: np.ndarray | None = None,
    title: str = "",
) -> np.ndarray:
    """Draw a picture, uint8 [h, w, 3] RGB: the sheet with its boxes, below `title` and a legend with counts.

    image: uint8 [H, W] or [H, W, 3] RGB; it is scaled so that its longer side suits a screen. boxes: [N, 4],
    xyxy in pixels of the image. labels: int64 [N], 1..K. names: [K]; if no font on this machine can write the
    third, "class 3" stands for it. scores: [N], 0 to 1, shown in percent; None shows none.
    """
    canvas, factor = _canvas(image)
    file = find_font("".join(sorted({*"".join(names), *title})))
    known = _characters(file)
    names = [name if known.issuperset(name) else f"class {k}" for k, name in enumerate(names, 1)]
    title = "".join(letter if letter in known else "?" for letter in title)
    font = ImageFont.truetype(file, size=12)
    picture = Image.fromarray(canvas)
    pen = ImageDraw.Draw(picture)
    for box, label in zip((boxes * factor).tolist(), labels.tolist(), strict=True):
        pen.rectangle(box, outline=color_of(label), width=2)
    if len(boxes) <= NAMED:
        for n, (x0, y0, _, y1) in enumerate((boxes * factor).tolist()):
            text = names[labels[n] - 1] + ("" if scores is None else f" {100 * scores[n]:.0f}")
            _tag(pen, x0, y0, y1, text, color_of(int(labels[n])), font, picture.size)
    return np.vstack([_legend(picture.width, labels, names, title, file), np.asarray(picture)])


# matplotlib is imported where it is needed, since that takes longer than all else before a first picture.


@functools.cache
def find_font(letters: str) -> Path:
    """A font file with all these letters: DejaVu, or else one of the system's, or DejaVu if none has them."""
    import matplotlib

    dejavu = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    if _characters(dejavu).issuperset(letters):
        return dejavu
    from matplotlib.font_manager import findSystemFonts

    files = map(Path, sorted(findSystemFonts()))
    return next((file for file in files if _characters(file).issuperset(letters)), dejavu)


@functools.cache
def _characters(file: Path) -> frozenset[str]:
    """The characters that a font file has; none if FreeType can't read it."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(map(chr, FT2Font(str(file)).get_charmap()))
    except (OSError, RuntimeError):  # a bitmap font, or a broken file
        return frozenset()


def side_by_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Two pictures next to each other on white.

    They are aligned at the bottom, so that their sheets are level though their legends differ in height.
    """
    height = max(len(left), len(right))
    padded = [np.pad(p, ((height - len(p), 0), (0, 0), (0, 0)), constant_values=255) for p in (left, right)]
    return np.hstack([padded[0], np.full((height, 12, 3), 255, np.uint8), padded[1]])


def _canvas(image: np.ndarray) -> tuple[np.ndarray, float]:
    """An RGB copy of the sheet at a size that suits a screen, and the factor by which it was scaled."""
    longer = max(image.shape[:2])
    factor = min(max(longer, LONGEST[0]), LONGEST[1]) / longer
    if factor < 1:
        image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    elif factor > 1:
        image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    return (cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) if image.ndim == 2 else image), factor


def _tag(
    pen: ImageDraw.ImageDraw,
    x: float,
    top: float,
    bottom: float,
    text: str,
    color: tuple[int, int, int],
    font: ImageFont.FreeTypeFont,
    size: tuple[int, int],
) -> None:
    """Write `text` on a patch of `color` above its box, or below the box if there is no room above."""
    width, height = pen.textlength(text, font=font) + 6, 15
    x = max(0.0, min(x, size[0] - width))
    y = top - height if top >= height else min(bottom, size[1] - height)
    pen.rectangle((x, y, x + width, y + height), fill=color)
    pen.text((x + 3, y), text, fill="white", font=font)


def _legend(width: int, labels: np.ndarray, names: Sequence[str], title: str, file: Path) -> np.ndarray:
    """A strip, uint8 [h, width, 3]: the title, then each class that occurs, with its number of boxes."""
    font = ImageFont.truetype(file, size=14)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    places, x, y = [], 8, 32 if title else 6
    for label, count in Counter(labels.tolist()).most_common():
        text = f"{names[label - 1]}  {count}"
        extent = 24 + int(measure.textlength(text, font=font)) + 16
        if x > 8 and x + extent > width:
            x, y = 8, y + 22
        places.append((x, y, label, text))
        x += extent
    strip = Image.new("RGB", (width, y + 26), "white")
    pen = ImageDraw.Draw(strip)
    pen.text((8, 6), title, fill="black", font=ImageFont.truetype(file, size=18))
    for x, y, label, text in places:
        pen.rectangle((x, y + 2, x + 14, y + 16), fill=color_of(label))
        pen.text((x + 20, y), text, fill="black", font=font)
    return np.asarray(strip)


def write_png(path: Path, picture: np.ndarray) -> None:
    """Write an RGB picture, whole or not at all. Raises UserError if the file can't be written."""
    data = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].tobytes()
    atomic.replace(path, lambda file: file.write(data))
