"""Normalised cross-correlation of pixels: what finding by features has to be better than."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from detection.labelling.correlation import LEAST, PEAKS, Places
from detection.labelling.example import TURNS, Example, poses
from schematics.windows import Image


def match_pixels(sheet: Image, crops: Sequence[Image]) -> Places:
    """The places on a sheet uint8 [H, W] where its pixels correlate with one of the crops uint8 [h, w].

    This is OpenCV's TM_CCOEFF_NORMED, without any network.
    """
    boxes, scores, which = [np.zeros((0, 4))], [np.zeros(0)], [np.zeros(0, np.int64)]
    for n, crop in enumerate(crops):
        height, width = crop.shape
        if height > sheet.shape[0] or width > sheet.shape[1] or np.ptp(crop) == 0:
            continue
        response = cv2.matchTemplate(sheet, crop, cv2.TM_CCOEFF_NORMED)
        highest = cv2.dilate(response, np.ones((5, 5), np.uint8))
        y, x = np.nonzero((response == highest) & (response > LEAST))
        best = np.argsort(-response[y, x], kind="stable")[:PEAKS]
        x, y = x[best], y[best]
        boxes.append(np.stack([x, y, x + width, y + height], 1).astype(float))
        scores.append(response[y, x].astype(float))
        which.append(np.full(len(x), n))
    return Places(np.concatenate(boxes), np.concatenate(scores), np.concatenate(which))


def crops_of(examples: Sequence[Example], scales: Sequence[float], upright: bool) -> list[Image]:
    """Each example in all poses, as pixels uint8 [h, w]."""
    crops = []
    for one in examples:
        for pose in poses(one, scales, range(1 if upright else TURNS)):
            x0, y0, x1, y1 = (round(edge) for edge in pose.box)
            crops.append(np.ascontiguousarray(pose.image[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]))
    return crops
