"""The small detector of several test files."""

from typing import Any

import numpy as np

from detection.anchors import fit_anchors
from detection.spec import Spec


def small_spec(**changes: Any) -> Spec:
    """Two classes, windows of 128 px, a narrow pyramid; every detection counts."""
    facts: dict[str, Any] = {
        "arch": "resnet10t",
        "norm": "group",
        "head": "mlp",
        "fpn_channels": 16,
        "categories": ((4, "relay"), (9, "lamp")),
        "color_mode": "gray",
        "mean": (0.9,) * 3,
        "std": (0.2,) * 3,
        "window": 128,
        "overlap": 32,
        "anchors": fit_anchors(np.array([[0.0, 0, 30, 30]])),
        "rois": 16,
        "proposals": 32,
        "detections": 20,
        "score_threshold": 0.0,
    }
    return Spec(**(facts | changes))
