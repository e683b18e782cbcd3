"""A detector exported to ONNX, run by onnxruntime on the CPU. At inference it is used like a `Detector`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster import atomic, checkpoint
from cluster.backbone import refuse_not_finite
from cluster.config import setting
from cluster.errors import UserError
from cluster.facts import check_facts
from detection.metrics.ranges import Ranges
from detection.spec import Spec

PROPERTY = "linework"  # the property of the ONNX model that holds {"spec", "thresholds"} as JSON
EXPORT = "python -m detection.export"
AGAIN = f"export it again with {EXPORT}"
INPUT, OUTPUTS = "window", ("boxes", "scores", "labels")


@dataclass(frozen=True)
class OnnxFacts:
    """What the property says beside the spec, in the order of the labels."""

    thresholds: tuple[float, ...] = setting(least=0, most=1)
    train_boxes: tuple[int, ...] = setting((), least=0, most=2**63 - 1)  # an earlier version kept none
    ranges: Ranges = setting(None)  # likewise


class OnnxDetector:
    """The detector in a file of `python -m detection.export`.

    Raises UserError if the file is damaged, of another origin or has weights that are not finite, or if onnx
    or onnxruntime isn't installed.
    """

    device = torch.device("cpu")
    bf16 = False

    def __init__(self, path: Path) -> None:
        atomic.verify(path)
        try:
            import onnx
            import onnxruntime
        except ImportError:
            raise UserError(f"{path}: needs onnx and onnxruntime: pip install 'linework[onnx]'") from None
        try:
            self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            about = json.loads(self.session.get_modelmeta().custom_metadata_map[PROPERTY])
            floats = {getattr(onnx.TensorProto, name) for name in ("FLOAT", "FLOAT16", "DOUBLE")}
            held = [one for one in onnx.load(path).graph.initializer if one.data_type in floats]
            weights = {one.name: torch.tensor(onnx.numpy_helper.to_array(one)) for one in held}
        except Exception as error:  # onnxruntime's exception classes are not public
            raise UserError(f"{path}: not a file of `{EXPORT}` ({checkpoint.brief(error)})") from None
        facts = OnnxFacts(**check_facts(OnnxFacts, about, str(path), AGAIN))
        self.spec = Spec.from_dict(about.get("spec"), str(path), AGAIN)
        self.thresholds, self.train_boxes = list(facts.thresholds), list(facts.train_boxes)
        self.ranges: Ranges | None = facts.ranges
        classes = len(self.spec.categories)
        if len(self.thresholds) != classes or len(self.train_boxes) not in (0, classes):
            raise UserError(f"{path}: thresholds or train_boxes are not one for each class; {AGAIN}")
        if self.ranges and (flaw := self.ranges.flaw()):
            raise UserError(f"{path}: {flaw}; {AGAIN}")
        # A spec may be right in itself, and not that of the network in the same file.
        inputs = [(one.name, one.shape) for one in self.session.get_inputs()]
        outputs = {one.name for one in self.session.get_outputs()}
        if inputs != [(INPUT, [3, self.spec.window, self.spec.window])] or not set(OUTPUTS) <= outputs:
            raise UserError(f"{path}: its network takes no windows of {self.spec.window} px; {AGAIN}")
        refuse_not_finite(weights, str(path), AGAIN)

    def __call__(self, windows: Iterable[Tensor]) -> list[dict[str, Tensor]]:
        """Windows uint8 [3, S, S] -> for each its detections, as `Detector` gives them in eval mode."""
        found = []
        for window in windows:
            arrays: list[Any] = self.session.run(list(OUTPUTS), {INPUT: window.numpy()})
            found.append({name: torch.from_numpy(a) for name, a in zip(OUTPUTS, arrays, strict=True)})
        return found
