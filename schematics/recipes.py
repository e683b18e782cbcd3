"""Recipes that change a window at random into the two views that pretraining sees.

`drawing` is made for line art; `simclr` (arXiv 2002.05709) and `vicreg` (arXiv 2105.04906) are the published
photo recipes. docs/views.md says what each does to a drawing, and why.

A view is a function of (seed, epoch, sample, view) and of nothing else: all its random numbers are from
schematics.draws. Everything is worked on as uint8 with OpenCV, on as many threads as OpenCV is set to.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from functools import cache
from statistics import NormalDist
from typing import Any

import cv2
import numpy as np

from schematics.draws import Use, draw
from schematics.photo import PHOTO, photo_view
from schematics.pixels import invert, jpeg, resize, smooth, turned
from schematics.places import Place
from schematics.sheets import to_color
from schematics.windows import INK_TOLERANCE, Color, Image, ink_mask, nearby_paper, paper_color

# The changes of each recipe by name, each of which can be left out. What they are is said in docs/views.md.
PARTS: dict[str, tuple[str, ...]] = {
    "drawing": ("crop", "turn", "pen", "blur", "jitter", "invert", "noise", "jpeg"),
    "simclr": ("crop", "mirror", "jitter", "gray", "blur"),
    "vicreg": ("crop", "mirror", "jitter", "gray", "blur", "solarize"),
}
RECIPES: tuple[str, ...] = tuple(PARTS)


def other_parts(recipe: str, without: Iterable[str]) -> str:
    """A line on the first name of `without` that is no change of the recipe; empty if all are."""
    wrong = [name for name in without if name not in PARTS[recipe]]
    return f"--without {wrong[0]}: the recipe {recipe} has {', '.join(PARTS[recipe])}" if wrong else ""


def two_views(*window_and_numbers: Any, **flags: Any) -> tuple[Image, Image]:
    """The images alone of `placed_views`, which takes the same arguments."""
    (first, _), (second, _) = placed_views(*window_and_numbers, **flags)
    return first, second


def placed_views(
    window: Image,
    recipe: str,
    size: int,
    seed: int,
    epoch: int,
    sample: int,
    strength: float = 1.0,
    orientation: bool = False,
    extent: int | None = None,
    tolerance: int | None = None,
    paper: Color | None = None,
    color_mode: str = "rgb",
    without: Collection[str] = (),
) -> tuple[tuple[Image, Place], tuple[Image, Place]]:
    """Two views, uint8 RGB [size, size, 3] each, of a window uint8 [H, W] or [H, W, 3], and where they lie.

    recipe: one of RECIPES. size: side of a view, px. strength: multiplies the ranges of the color jitter.
    orientation: whether `drawing` mirrors and makes quarter turns too, which erases classes that are told
    apart by their orientation; the photo recipes mirror in any case. extent: side of what the views of
    `drawing` show of the window at most, px; that for 2-px lines if not given. tolerance: of ink on
    uneven paper, for `drawing`; None if the paper is even. paper: the color of even paper, looked for on the
    window if not given. color_mode: "gray" for views [size, size] in one channel, which are what a gray
    window's three channels would be. without: names of PARTS that are left out; their random numbers are
    drawn all the same, so the other changes stay what they are. Raises ValueError for an unknown recipe or
    part.
    """
    if recipe in PARTS and (wrong := other_parts(recipe, without)):
        raise ValueError(wrong)
    if recipe == "drawing":
        extent = extent or default_extent(size, None)
        placed = _drawing_pair(
            window, size, seed, epoch, sample, strength, orientation, extent, tolerance, paper, without
        )
    elif recipe in PHOTO:
        placed = [
            photo_view(window, size, draw(Use.VIEWS, seed, epoch, sample, view), strength, photo, without)
            for view, photo in enumerate(PHOTO[recipe])
        ]
    else:
        raise ValueError(f"recipe {recipe!r} is none of {', '.join(RECIPES)}")
    (first, place1), (second, place2) = placed
    return (to_color(first, color_mode), place1), (to_color(second, color_mode), place2)


# The region that both views show has this many times a view's side where lines are 2 px wide: they stay more
# than a pixel wide.
REACH = 1.75
# A crop's side as a share of the region's. Even with the ratio below it is over a half: two crops overlap.
SHARE = (0.56, 1.0)
RATIO = 0.1  # a crop's width / height is drawn from exp(-2 * RATIO) to exp(2 * RATIO)
TRIES = 64  # random pixels that are looked at for ink before all pixels are
PAIR = 2  # the number of the stream for what both views share; views 0 and 1 have streams of their own
GRAINS = 1 << 18  # pixels of the strip of noise from which a view takes a random piece, at least
GRAIN = 32.0  # gray levels, the strip's standard deviation


def default_extent(size: int, line: float | None) -> int:
    """Side of what views of `drawing`, drawn at `size` px, show at most, in px of the sheet.

    Lines of at least 2 px stay over a pixel wide. line: width in px of the pool's thinner lines, if known.
    """
    return round(REACH / 2 * max(2, int(line or 2)) * size)


def _drawing_pair(
    window: Image,
    size: int,
    seed: int,
    epoch: int,
    sample: int,
    strength: float,
    orientation: bool,
    extent: int,
    tolerance: int | None,
    paper: Color | None,
    without: Collection[str],
) -> list[tuple[Image, Place]]:
    """Both views show the same region around ink, whose sides are at most `extent` px."""
    if paper is None or tolerance is not None:  # a window of an uneven sheet has a color of its own
        paper = paper_color(window)
    nearby = None if tolerance is None else nearby_paper(window)
    tolerance = INK_TOLERANCE if tolerance is None else tolerance
    width, height = (min(side, extent) for side in window.shape[1::-1])
    rng = draw(Use.VIEWS, seed, epoch, sample, PAIR)
    x, y = _around_ink(window, paper if nearby is None else nearby, tolerance, width, height, rng)
    here = np.s_[y : y + height, x : x + width]
    placed = [
        _drawing_view(
            window[here],
            paper,
            paper if nearby is None else nearby[here],
            tolerance,
            size,
            draw(Use.VIEWS, seed, epoch, sample, view),
            strength,
            orientation,
            without,
        )
        for view in (0, 1)
    ]
    return [(view, place.moved(x, y)) for view, place in placed]


def _around_ink(
    image: Image,
    paper: Color | Image,
    tolerance: int,
    width: int,
    height: int,
    rng: np.random.Generator,
) -> tuple[int, int]:
    """Corner x, y of a crop that has a random pixel of ink in its middle half, as far as the edges allow.

    paper, tolerance: see `ink_mask`.
    """
    high, wide = image.shape[:2]
    spots = rng.random((2, TRIES))
    ys, xs = (spots[0] * high).astype(np.intp), (spots[1] * wide).astype(np.intp)
    there = paper[ys, xs][:, None] if isinstance(paper, np.ndarray) else paper
    ink = ink_mask(image[ys, xs][:, None], there, tolerance)
    x, y, first = wide / 2, high / 2, int(ink.argmax())
    if ink[first]:
        x, y = int(xs[first]), int(ys[first])
    else:  # there is so little ink that every pixel must be looked at
        hits = np.flatnonzero(ink_mask(image, paper, tolerance))
        if len(hits):
            y, x = divmod(int(hits[rng.integers(len(hits))]), wide)
    x, y = x - rng.uniform(0.25, 0.75) * width, y - rng.uniform(0.25, 0.75) * height
    return min(max(int(x), 0), wide - width), min(max(int(y), 0), high - height)


def _drawing_view(
    region: Image,
    paper: Color,
    nearby: Color | Image,
    tolerance: int,
    size: int,
    rng: np.random.Generator,
    strength: float,
    orientation: bool,
    without: Collection[str],
) -> tuple[Image, Place]:
    crop, place = _crop(region, paper, nearby, tolerance, rng, without)
    image = resize(crop, size)
    if orientation:
        place = place._replace(quarters=int(rng.integers(4)), mirrored=rng.random() < 0.5)
        image = np.rot90(image, place.quarters)
        image = np.ascontiguousarray(image[:, ::-1] if place.mirrored else image)
    return redrawn(image, paper, rng, strength, without), place


def redrawn(
    image: Image,
    paper: Color,
    rng: np.random.Generator,
    strength: float = 1.0,
    without: Collection[str] = (),
) -> Image:
    """The image as another pen, copier or scanner might have left it: what `drawing` does but for geometry.

    strength, without: see `two_views`.
    """
    image = _wear(image, paper, rng, without)
    image = _tone(image, paper, rng, strength, without)
    if rng.random() < 0.3:
        noisy = scan_noise(image, rng.uniform(2, 10), rng)
        image = image if "noise" in without else noisy
    if rng.random() < 0.2:
        quality = int(rng.integers(30, 91))
        image = image if "jpeg" in without else jpeg(image, quality)
    return image


def _crop(
    region: Image,
    paper: Color,
    nearby: Color | Image,
    tolerance: int,
    rng: np.random.Generator,
    without: Collection[str],
) -> tuple[Image, Place]:
    """Cut a crop around ink out of the region, four times in ten turned and sheared by a few degrees."""
    height, width = region.shape[:2]
    share, ratio = rng.uniform(*SHARE), math.exp(rng.uniform(-RATIO, RATIO))
    w = max(1, min(width, round(width * share * ratio)))
    h = max(1, min(height, round(height * share / ratio)))
    x, y = _around_ink(region, nearby, tolerance, w, h, rng)
    if "crop" in without:
        x, y, w, h = 0, 0, width, height
    crop, place = region[y : y + h, x : x + w], Place(x, y, w, h)
    if rng.random() < 0.6:
        return crop, place
    # The crop is turned before it is shrunk, since interpolation costs a thin line less at this resolution.
    angle, shear = math.radians(rng.uniform(-4, 4)), rng.uniform(-0.06, 0.06)
    if "turn" in without:
        return crop, place
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[cos, -sin], [sin, cos]]) @ [[1, shear], [0, 1]]
    shift = np.array([x, y]) + (np.eye(2) - turn) @ [w / 2, h / 2]
    return turned(region, np.column_stack([turn, shift]), w, h, paper), place._replace(turn=turn)


SQUARE = np.ones((2, 2), np.uint8)


def _is_light(paper: Color) -> bool:
    return paper > 127 if isinstance(paper, int) else sum(paper) > 3 * 127


def _wear(image: Image, paper: Color, rng: np.random.Generator, without: Collection[str]) -> Image:
    """Do to lines what pens and copiers do: make them thicker or thinner, blur them, or leave them alone."""
    kind = rng.random()
    if kind < 0.4 and "pen" in without:
        return image
    if kind < 0.25:  # thicker by a pixel
        return (cv2.erode if _is_light(paper) else cv2.dilate)(image, SQUARE)
    if kind < 0.4:  # thinner, but only by half: a whole pixel would wipe out lines that are one pixel wide
        thin = (cv2.dilate if _is_light(paper) else cv2.erode)(image, SQUARE)
        return cv2.addWeighted(image, 0.5, thin, 0.5, 0)
    if kind < 0.7:
        sigma = rng.uniform(0.2, 0.7)
        return image if "blur" in without else smooth(image, 2, sigma)
    return image


GRAYS = np.full((3, 3), 1 / 3)
COLORS = np.eye(3) - GRAYS
ACROSS = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)


def _tone(
    image: Image, paper: Color, rng: np.random.Generator, strength: float, without: Collection[str]
) -> Image:
    """Change the contrast against the paper, the brightness and a little of the colors, and invert at times.

    All of it but the inversion is one linear map of (color - paper) and a shift by the brightness, so that
    the paper changes in brightness only.
    """
    contrast = 1 + strength * rng.uniform(-0.3, 0.1)
    brightness = strength * rng.uniform(-25, 25)
    saturation = 1 + strength * rng.uniform(-0.2, 0.2)
    angle = 2 * math.pi * strength * rng.uniform(-0.02, 0.02)
    inverted = rng.random() < 0.2 and "invert" not in without
    if "jitter" in without:
        return invert(image) if inverted else image
    if isinstance(paper, int):
        image = cv2.addWeighted(image, contrast, image, 0.0, (1 - contrast) * paper + brightness)
    else:  # where a drawing has color it tells classes apart, so hues turn by 7 degrees at most
        turn = GRAYS + math.cos(angle) * COLORS + math.sin(angle) * ACROSS  # about r = g = b
        matrix = contrast * (GRAYS + saturation * (turn - GRAYS))
        affine = np.empty((3, 4))
        affine[:, :3], affine[:, 3] = matrix, paper - matrix @ paper + brightness
        image = cv2.transform(image, affine)
    return invert(image) if inverted else image


@cache
def _grains(count: int, channels: int) -> Image:
    """Normal noise about 128 with the deviation GRAIN, uint8 [count, channels], equal in all channels."""
    levels = [128 + GRAIN * NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)]
    quantiles = np.frombuffer(np.random.Generator(np.random.Philox(0)).bytes(count), np.uint8)
    noise = cv2.LUT(quantiles, np.rint(levels).astype(np.uint8))
    return cv2.merge([noise] * channels).reshape(count, channels)


def scan_noise(image: Image, sigma: float, rng: np.random.Generator) -> Image:
    """Add Gaussian noise of `sigma` gray levels, equal in all channels: a piece of one long strip of it.

    The strip is always the same, so that only the place of the piece is drawn: in a tenth of the time that
    numbers of its own for each pixel take.
    """
    pixels = image.shape[0] * image.shape[1]
    count = max(GRAINS, 2 * pixels)
    first = int(rng.integers(count - pixels + 1))
    noise = _grains(count, image.size // pixels)[first : first + pixels].reshape(image.shape)
    return cv2.addWeighted(image, 1.0, noise, sigma / GRAIN, -128 * sigma / GRAIN)
