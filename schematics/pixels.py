"""What the recipes for views do to pixels: each function is one operation on a uint8 image, without chance.

An image is gray [H, W] or RGB [H, W, 3]. The operations of the photo recipes agree with torchvision's within
a level of rounding.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from schematics.sheets import to_color
from schematics.windows import Color, Image


def resize(image: Image, size: int) -> Image:
    """[h, w] or [h, w, 3] -> [size, size] or [size, size, 3], bicubic, and antialiased where it shrinks.

    To shrink, the image is first resized to 2, 4, ... times the size and then averaged down. That gives
    source pixels about the weights of INTER_AREA from the start, in half its time or less, since OpenCV is
    fast for powers of two. Up to a factor of 1.25 bicubic interpolation alone still gives every source pixel
    its weight.
    """
    finer = 1
    while max(image.shape[:2]) > 1.25 * finer * size:
        finer *= 2
    image = cv2.resize(image, (finer * size, finer * size), interpolation=cv2.INTER_CUBIC)
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA) if finer > 1 else image


def turned(image: Image, matrix: np.ndarray, width: int, height: int, paper: Color) -> Image:
    """[height, width] or [height, width, 3], whose pixel (x, y) is the image's at matrix @ (x, y, 1).

    matrix: [2, 3]. Between pixels it is linear, and beyond the edges it has the color of the paper. OpenCV is
    fast with one channel or four, and takes twice as long with three: colors get a fourth one for the time.
    """
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    if isinstance(paper, int):
        return cv2.warpAffine(image, matrix, (width, height), flags=flags, borderValue=paper)
    four = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA)
    four = cv2.warpAffine(four, matrix, (width, height), flags=flags, borderValue=(*paper, 0))
    return cv2.cvtColor(four, cv2.COLOR_RGBA2RGB)


def adjust_brightness(image: Image, factor: float) -> Image:
    """Blend with black: 0 gives black, 1 the image."""
    return cv2.convertScaleAbs(image, alpha=factor)


def adjust_contrast(image: Image, factor: float) -> Image:
    """Blend with the mean of the image's luma: 0 gives an even gray, 1 the image."""
    shift = (1 - factor) * cv2.mean(to_color(image, "gray"))[0]
    if shift >= 0:  # convertScaleAbs is the faster of the two, but gives |x| for negative x, not 0
        return cv2.convertScaleAbs(image, alpha=factor, beta=shift)
    return cv2.addWeighted(image, factor, image, 0.0, shift)


LUMA = np.full((3, 3), (0.299, 0.587, 0.114))


def adjust_saturation(image: Image, factor: float) -> Image:
    """Blend with the image's luma: 0 gives grays, 1 the image."""
    if image.ndim == 2:
        return image
    return cv2.transform(image, factor * np.eye(3) + (1 - factor) * LUMA)


def adjust_hue(image: Image, turn: float) -> Image:
    """Turn the hue by a share `turn` of the full circle, in 256 steps as Pillow does."""
    if image.ndim == 2:
        return image
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    # A row of the image as one vector: numpy is slow on every third byte. uint8 goes round from 255 to 0, as
    # the hue does.
    row = np.zeros(3 * image.shape[1], np.uint8)
    row[::3] = round(turn * 256) % 256
    rows = hsv.reshape(len(hsv), -1)
    np.add(rows, row, out=rows)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL, dst=hsv)


def blur(image: Image, sigma: float) -> Image:
    """Blur with a Gaussian whose kernel is a tenth of the side, as SimCLR and VICReg do.

    sigma: in px. Taps beyond 3 sigma are left out, since they change less than a gray level.
    """
    return smooth(image, min(image.shape[0] // 10 // 2, math.ceil(3 * sigma)), sigma)


def smooth(image: Image, radius: int, sigma: float) -> Image:
    """Blur with a Gaussian of 2 radius + 1 taps, as cv2.GaussianBlur does, in a half to a third of its time.

    Each weight is a whole number of 256ths. What rounding leaves over goes to the next weight, and the rest
    of 1 to the middle, so that even paper stays what it is. Only sums that are half-way between two gray
    levels are rounded otherwise than by cv2.GaussianBlur.
    """
    if radius == 0:
        return image
    weights = [math.exp(-0.5 * (x / sigma) ** 2) for x in range(-radius, 1)]
    scale = 256 / (2 * sum(weights) - weights[-1])
    kernel, rest = np.zeros(2 * radius + 1, np.float32), 0.0
    for i, weight in enumerate(weights[:-1]):
        exact = weight * scale + rest
        kernel[i] = kernel[-1 - i] = whole = round(exact)
        rest = exact - whole
    kernel[radius] = 256 - kernel.sum()
    kernel /= 256
    return cv2.sepFilter2D(image, -1, kernel, kernel)


def solarize(image: Image) -> Image:
    """Invert the values that are 128 or more."""
    return cv2.min(image, cv2.bitwise_not(image))


def invert(image: Image) -> Image:
    """Turn light to dark and dark to light.

    In RGB, max and min of the channels become 255 - min and 255 - max, so that a color keeps its hue.
    """
    if image.ndim == 2:
        return cv2.bitwise_not(image)
    red, green, blue = cv2.split(image)
    high = cv2.bitwise_not(cv2.max(cv2.max(red, green), blue))
    low = cv2.min(cv2.min(red, green), blue)
    return cv2.merge([cv2.add(cv2.subtract(channel, low), high) for channel in (red, green, blue)])


def jpeg(image: Image, quality: int) -> Image:
    """Compress and decompress with chroma at full resolution: at half of it a thin line loses its color."""
    full = cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444
    flags = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, full]
    data = cv2.imencode(".jpg", image, flags)[1]  # OpenCV takes RGB for BGR here, and again below
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_UNCHANGED))
