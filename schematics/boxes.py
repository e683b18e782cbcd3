"""How boxes lie on each other: float64 [..., 4], xyxy. No torch."""

from __future__ import annotations

import numpy as np


def box_iou(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """IoU of each box with each, [N, 4] and [M, 4] -> float64 [N, M]."""
    return paired_iou(one[:, None], other[None])


def paired_iou(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """IoU of boxes with those in the same place, [..., 4] and [..., 4] -> float64 [...]."""
    shared = _shared(one, other)
    return shared / np.maximum(_area(one) + _area(other) - shared, 1e-9)


def share_within(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """float64 [N, M]: the share of each of the others, [M, 4], that lies in each of the boxes, [N, 4]."""
    return _shared(boxes[:, None], others[None]) / np.maximum(_area(others)[None], 1e-9)


def _shared(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    low, high = np.maximum(one[..., :2], other[..., :2]), np.minimum(one[..., 2:], other[..., 2:])
    return (high - low).clip(0).prod(-1)


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[..., 2:] - boxes[..., :2]).clip(0).prod(-1)
