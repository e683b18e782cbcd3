"""A detector exported to ONNX, run by onnxruntime on the CPU. At inference it is used like a `Detector`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster import atomic
from cluster.errors import UserError
from detection.model import Spec

PROPERTY = "linework"  # the property of the ONNX model that holds {"spec", "thresholds"} as JSON
INPUT, OUTPUTS = "window", ("boxes", "scores", "labels")


class OnnxDetector:
    """The detector in a file of `python -m detection.export`.

    Raises UserError if the file is damaged or of another origin, or if onnxruntime isn't installed.
    """

    device = torch.device("cpu")

    def __init__(self, path: Path) -> None:
        atomic.verify(path)
        try:
            import onnxruntime
        except ImportError:
            raise UserError(f"{path}: needs onnxruntime: pip install 'linework[onnx]'") from None
        try:
            self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            about = json.loads(self.session.get_modelmeta().custom_metadata_map[PROPERTY])
            self.spec = Spec.from_dict(about["spec"])
            self.thresholds = [float(value) for value in about["thresholds"]]
            self.train_boxes = [int(value) for value in about.get("train_boxes", [])]
        except Exception as error:  # onnxruntime's exception classes are not public
            reason = (str(error) or type(error).__name__).splitlines()[0][:120]
            raise UserError(f"{path}: not a file of `python -m detection.export` ({reason})") from None

    def __call__(self, windows: Iterable[Tensor]) -> list[dict[str, Tensor]]:
        """Windows uint8 [3, S, S] -> for each its detections, as `Detector` gives them in eval mode."""
        found = []
        for window in windows:
            arrays: list[Any] = self.session.run(list(OUTPUTS), {INPUT: window.numpy()})
            found.append({name: torch.from_numpy(a) for name, a in zip(OUTPUTS, arrays, strict=True)})
        return found
