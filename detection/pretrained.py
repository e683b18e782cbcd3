"""Put pretrained weights into a detector, whole or not at all: a backbone, or all but the last layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from cluster.backbone import AGAIN, audit_backbone
from cluster.config import setting
from cluster.errors import UserError
from cluster.facts import check_facts
from detection.anchors import Anchors
from detection.model import Detector
from detection.spec import MOST_CHANNELS, Spec

RUNNING = ("running_mean", "running_var", "num_batches_tracked")
# The parts of a detector that detection.pretrain trains, by the prefixes of their keys.
PARTS = {
    "backbone": "backbone.body.",
    "FPN": "backbone.fpn.",
    "RPN": "rpn.head.",
    "head": "roi_heads.box_head.",
}
PREDICTOR = "roi_heads.box_predictor."
PER_ANCHOR = ("rpn.head.cls_logits.", "rpn.head.bbox_pred.")  # layers with outputs for each anchor


@dataclass(frozen=True)
class DetectorFacts:
    """What a pretrained.safetensors says of the detector that it holds the parts of, under "detector"."""

    norm: Literal["sync", "group"]
    head: Literal["mlp", "conv"]
    fpn_channels: int = setting(least=1, most=MOST_CHANNELS)
    anchors: Anchors = setting()


def fill(detector: Detector, tensors: dict[str, Tensor], meta: Mapping[str, Any], source: str) -> str:
    """Load the tensors of a backbone, or of a detector if `meta` says so; returns what matched.

    Raises UserError, and then loads nothing, unless all of them fit.
    """
    if "detector" in meta:
        return fill_detector(detector, tensors, meta["detector"], source)
    return fill_backbone(detector, tensors, source)


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


def parts_of(detector: Detector) -> dict[str, Tensor]:
    """The tensors that a pretrained.safetensors holds: all but those of the box predictor."""
    return {k: v for k, v in detector.state_dict().items() if k.startswith(tuple(PARTS.values()))}


def fill_detector(detector: Detector, tensors: dict[str, Tensor], said: Any, source: str) -> str:
    """Load `tensors`, as `parts_of` gives them, into a detector; returns a line that says what matched.

    said: the values of a DetectorFacts. The RPN's layers that have outputs for each anchor stay new where
    this detector has another number of anchors a location, and the line says so. Otherwise they are loaded,
    though the anchors' sizes and ratios are those of the labelled boxes. The box predictor is always new.
    Raises UserError, and then loads nothing, unless every other tensor of the parts is there in its shape and
    none is left over.
    """
    facts = DetectorFacts(**check_facts(DetectorFacts, said, source, AGAIN, closed=True))
    refuse_unlike(detector.spec, facts, source)
    here, there = (anchors_at_a_place(anchors) for anchors in (detector.spec.anchors, facts.anchors))
    own = parts_of(detector)
    new = {k for k in own if k.startswith(PER_ANCHOR)} if here != there else set()
    wanted = {k: v for k, v in own.items() if k not in new}
    fitting = {k for k, v in wanted.items() if k in tensors and tensors[k].shape == v.shape}
    audit = ", ".join(
        f"{name} {sum(k.startswith(prefix) for k in fitting)} of {sum(k.startswith(prefix) for k in wanted)}"
        for name, prefix in PARTS.items()
    )
    wrong = sorted(set(wanted) - fitting or set(tensors) - set(own))
    if wrong:
        why = "does not fit" if wrong[0] in tensors and wrong[0] in wanted else "is missing"
        why = why if wrong[0] in wanted else "has no place"
        raise UserError(f"{source}: {audit} tensors matched ({wrong[0]} {why}); {AGAIN}")
    detector.load_state_dict({k: tensors[k] for k in wanted}, strict=False)
    layers = (
        f" and {len(new)} tensors of the RPN ({here} anchors a location, {there} in the file)" if new else ""
    )
    return f"{audit} tensors matched; new: box predictor{layers}"


def refuse_unlike(spec: Spec, facts: DetectorFacts, source: str) -> None:
    """Raise UserError with the flags to give, if the detector is built otherwise than the file's."""
    wrong = [name for name in ("norm", "head", "fpn_channels") if getattr(spec, name) != getattr(facts, name)]
    if wrong:
        flags = " ".join(f"--{name.replace('_', '-')} {getattr(facts, name)}" for name in wrong)
        raise UserError(f"--backbone {source}: it holds the parts of another detector; give {flags}")


def anchors_at_a_place(anchors: Anchors) -> int:
    """Anchors at each location of a level."""
    return len(anchors.sizes[0]) * len(anchors.ratios)
