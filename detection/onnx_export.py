"""The ONNX graph of a detector, and whether two programs find the same on a sheet."""

from __future__ import annotations

import io
import json
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cluster.errors import UserError
from detection.detections import Detections
from detection.model import Detector
from detection.onnx_detector import INPUT, OUTPUTS, PROPERTY

OPSET = 17
# Detections with a lower score aren't compared: rounding decides which of them fill the list's last places.
LEAST_SCORE = 0.05
PIXELS, SCORE = 0.05, 1e-3  # largest differences, of a coordinate in px and of a score, that are rounding


class OneWindow(nn.Module):
    """A detector for one window, with tensors in place of lists and dicts, as an ONNX graph needs them."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector

    def forward(self, window: Tensor) -> tuple[Tensor, ...]:
        """uint8 [3, S, S] -> boxes [N, 4], scores [N], labels [N]."""
        (found,) = self.detector(window[None])
        return tuple(found[name] for name in OUTPUTS)


def to_onnx(detector: Detector) -> bytes:
    """Turn a detector in eval mode on the CPU into the bytes of an ONNX file.

    Raises UserError if onnx isn't installed.
    """
    try:
        import onnx
    except ImportError:
        raise UserError("--out: ONNX needs two more packages: pip install 'linework[onnx]'") from None
    side = detector.spec.window
    file: Any = io.BytesIO()
    window = torch.randint(0, 256, (3, side, side), dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns that shapes become constants, as they should
        torch.onnx.export(
            OneWindow(detector).eval(),
            (window,),
            file,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            dynamic_axes={name: {0: "N"} for name in OUTPUTS},
            opset_version=OPSET,
            dynamo=False,  # the newer exporter fails on torchvision's NMS (torch 2.14)
        )
    model = onnx.load_from_string(file.getvalue())
    about = {
        "spec": detector.spec.to_dict(),
        "thresholds": detector.thresholds,
        "train_boxes": detector.train_boxes,
        **({"ranges": detector.ranges.to_dict()} if detector.ranges else {}),
    }
    onnx.helper.set_model_props(model, {PROPERTY: json.dumps(about)})
    return model.SerializeToString()


def compare(one: Detections, other: Detections) -> tuple[int, float, float]:
    """Look for each detection of `one` with a score of LEAST_SCORE or more in `other`, for the same sheet.

    A detection's partner has the same label, coordinates that differ by at most PIXELS and a score that
    differs by at most SCORE. Returns the number of detections without a partner, and for those with one the
    largest difference of a coordinate in pixels and of a score.
    """
    alone, pixels, scores = 0, 0.0, 0.0
    for box, score, label in zip(one.boxes, one.scores, one.labels, strict=True):
        if score < LEAST_SCORE:
            continue
        apart = abs(other.boxes - box).max(1, initial=0.0)
        off = abs(other.scores - score)
        near = (other.labels == label) & (apart <= PIXELS) & (off <= SCORE)
        if not near.any():
            alone += 1
            continue
        best = np.flatnonzero(near)[apart[near].argmin()]
        pixels, scores = max(pixels, float(apart[best])), max(scores, float(off[best]))
    return alone, pixels, scores
