"""Put a pretrained backbone into a detector, whole or not at all."""

from __future__ import annotations

from torch import Tensor

from cluster.backbone import audit_backbone
from detection.model import Detector

RUNNING = ("running_mean", "running_var", "num_batches_tracked")


def fill_backbone(detector: Detector, tensors: dict[str, Tensor], source: str) -> str:
    """Load `tensors` into the detector's backbone; returns a line that says how many matched.

    Raises UserError as `audit_backbone` does, and then loads nothing. With GroupNorm, which has none,
    BatchNorm's running statistics are set aside.
    """
    body = detector.backbone.body
    wanted = body.state_dict()
    unkept = RUNNING if detector.spec.norm == "group" else ()
    audit = audit_backbone(wanted, tensors, detector.spec.arch, source, unkept)
    body.load_state_dict({k: tensors[k] for k in wanted})
    return audit
