"""Put a pretrained backbone into a detector, whole or not at all."""

from __future__ import annotations

from torch import Tensor

from cluster.errors import UserError
from detection.model import Detector

RUNNING = ("running_mean", "running_var", "num_batches_tracked")
CLASSIFIER = ("fc.", "head.fc.", "classifier.")


def fill_backbone(detector: Detector, tensors: dict[str, Tensor], source: str) -> str:
    """Load `tensors` into the detector's backbone; returns a line that says how many matched.

    tensors: by torchvision's or timm's keys, without a prefix. source: their file, for an error. A classifier
    (`fc.*` and the like) is ignored, and with GroupNorm, which has none, so are BatchNorm's running
    statistics; the line counts both. Raises UserError, and loads nothing, unless every tensor of the backbone
    is given in its shape and no other tensor is left over.
    """
    body = detector.backbone.body
    wanted = body.state_dict()
    fitting = {k for k, v in wanted.items() if k in tensors and tensors[k].shape == v.shape}
    left = set(tensors) - set(wanted)
    classifier = {k for k in left if k.startswith(CLASSIFIER)}
    set_aside = {k for k in left if k.endswith(RUNNING) and detector.spec.norm == "group"}
    stray = left - classifier - set_aside
    audit = f"backbone: {len(fitting)} of {len(wanted)} tensors matched"
    if len(fitting) < len(wanted) or stray:
        problem = sorted(set(wanted) - fitting or stray)[0]
        why = "has another shape" if problem in tensors else "is missing"
        if problem in stray:
            why = "has no place"
        raise UserError(
            f"{source}: {audit} for {detector.spec.arch} ({problem} {why}, {len(stray)} left over); "
            "give the --arch the file was trained with, and keys without a prefix, such as conv1.weight"
        )
    body.load_state_dict({k: tensors[k] for k in wanted})
    if set_aside:
        audit += f"; {len(set_aside)} running statistics set aside (--norm group keeps none)"
    if classifier:
        audit += f"; {len(classifier)} tensors of its classifier ignored"
    return audit
