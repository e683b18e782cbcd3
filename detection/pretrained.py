"""A pretrained backbone into a detector: read when signed off, loaded when every tensor matches (law 7)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster import checkpoint
from cluster.errors import UserError
from detection.model import Detector

RUNNING = ("running_mean", "running_var", "num_batches_tracked")
CLASSIFIER = ("fc.", "head.fc.", "classifier.")
# A foreign file does not say how its images were normalised; nearly all are by these.
IMAGENET = {"color_mode": "rgb", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def read_pretrained(backbone: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and meta (arch, color_mode, mean, std, ...) of a file; both empty for "none".

    A .safetensors is Linework's own: beside a config.json its run must be signed as finished. Anything else
    is a torch file of tensors under bare keys, such as the published VICReg's resnet50.pth.
    Raises UserError for an unfinished run, a file changed since, or one that is no backbone; code in it is
    never run.
    """
    path = Path(backbone)
    if backbone == "none":
        return {}, {}
    if not path.is_file():
        raise UserError(f"--backbone {backbone}: no such file; give backbone.safetensors, a .pth, or none")
    if path.suffix == ".safetensors":
        if (path.parent / "config.json").exists():
            checkpoint.check_final(path.parent)
        return checkpoint.read_backbone(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a pickle that runs code, a cut zip, a foreign format: torch raises many kinds
        raise UserError(f"{path}: refused, not a file of plain tensors; nothing in it was run") from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{path}: not a backbone; give tensors under bare keys such as conv1.weight")
    return tensors, IMAGENET


def load_backbone(detector: Detector, tensors: dict[str, Tensor], source: str) -> str:
    """Put `tensors` (bare torchvision/timm keys) into the backbone; returns the audit line (law 7).

    A classifier (`fc.*` and the like) is ignored, and under --norm group BatchNorm's running statistics are
    set aside: both are counted in the line. Raises UserError, with nothing loaded, unless every tensor of the
    backbone finds its own and nothing else is left over.
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
            "give the --arch the file was trained with, and bare keys such as conv1.weight"
        )
    body.load_state_dict({k: tensors[k] for k in wanted})
    if set_aside:
        audit += f"; {len(set_aside)} running statistics set aside (--norm group keeps none)"
    if classifier:
        audit += f"; {len(classifier)} tensors of its classifier ignored"
    return audit
