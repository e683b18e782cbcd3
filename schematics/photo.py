"""The published photo recipes, SimCLR's and VICReg's, by which a window becomes a view.

Everything is worked on as uint8 with OpenCV. A name in `without` leaves out that change, whose random numbers
are drawn all the same.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import cv2
import numpy as np

from schematics.pixels import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    blur,
    resize,
    solarize,
)
from schematics.places import Place
from schematics.sheets import to_color
from schematics.windows import Image


@dataclass(frozen=True)
class Photo:
    """The published numbers of a photo recipe's view.

    All have in common: a crop of 8 % of the area to all of it, mirrored with probability 0.5, jittered in
    color with 0.8, turned gray with 0.2.
    """

    brightness: float  # largest change of the factor 1
    contrast: float  # largest change of the factor 1
    saturation: float  # largest change of the factor 1
    hue: float  # largest turn, as a share of the full circle
    blur: float  # probability; the kernel is a tenth of the side, sigma U(0.1, 2)
    solarize: float  # probability; the threshold is 128


SIMCLR = Photo(0.8, 0.8, 0.8, 0.2, blur=0.5, solarize=0.0)  # arXiv 2002.05709, appendix A
VICREG = (  # arXiv 2105.04906, appendix C.1: the two views differ, as in BYOL
    Photo(0.4, 0.4, 0.2, 0.1, blur=1.0, solarize=0.0),
    Photo(0.4, 0.4, 0.2, 0.1, blur=0.1, solarize=0.2),
)
PHOTO = {"simclr": (SIMCLR, SIMCLR), "vicreg": VICREG}


def photo_view(
    image: Image,
    size: int,
    rng: np.random.Generator,
    strength: float,
    photo: Photo,
    without: Collection[str],
) -> tuple[Image, Place]:
    """A view of the image, gray [size, size] or RGB [size, size, 3], and where it lies there.

    The others: see `recipes.placed_views`.
    """
    x, y, w, h = random_resized_crop(image.shape[1], image.shape[0], rng)
    if "crop" in without:
        x, y, w, h = 0, 0, image.shape[1], image.shape[0]
    image = resize(image[y : y + h, x : x + w], size)
    mirrored = rng.random() < 0.5 and "mirror" not in without
    if mirrored:
        image = cv2.flip(image, 1)
    if rng.random() < 0.8:
        jittered = _color_jitter(image, rng, strength, photo)
        image = image if "jitter" in without else jittered
    if rng.random() < 0.2 and "gray" not in without:
        image = to_color(image, "gray")
    if rng.random() < photo.blur:
        sigma = rng.uniform(0.1, 2.0)
        image = image if "blur" in without else blur(image, sigma)
    if rng.random() < photo.solarize and "solarize" not in without:
        image = solarize(image)
    return image, Place(x, y, w, h, mirrored=mirrored)


LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))


def random_resized_crop(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw a crop x, y, w, h in px: 8 % of the window's area to all of it, w / h log-uniform in 3/4 to 4/3.

    A crop that the window doesn't hold is drawn anew; after ten tries it is the largest one in the middle.
    """
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(*LOG_RATIO))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


def _color_jitter(image: Image, rng: np.random.Generator, strength: float, photo: Photo) -> Image:
    """Change brightness, contrast, saturation and hue in random order, by factors drawn from the ranges."""
    ranges = (strength * largest for largest in (photo.brightness, photo.contrast, photo.saturation))
    factors = [rng.uniform(max(0.0, 1 - most), 1 + most) for most in ranges]
    turn = rng.uniform(-1, 1) * min(0.5, strength * photo.hue)
    for operation in rng.permutation(4).tolist():
        if operation == 0:
            image = adjust_brightness(image, factors[0])
        elif operation == 1:
            image = adjust_contrast(image, factors[1])
        elif operation == 2:
            image = adjust_saturation(image, factors[2])
        else:
            image = adjust_hue(image, turn)
    return image
