"""What a detector is built from, as model.pt and an ONNX file say it, with the bounds of every value."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from cluster.config import setting
from cluster.errors import UserError
from cluster.facts import LEAST_STD, check_facts
from detection.anchors import STRIDES, Anchors
from detection.metrics.ranges import Ranges

AGAIN = "copy the file again from where it was made, or finetune again"
MOST_CHANNELS, MOST_PIXELS, MOST_BOXES = 4096, 32768, 1_000_000  # far above what any machine can train


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What it takes to build a detector again and to feed it as in training. It is a part of model.pt."""

    arch: str
    norm: Literal["sync", "group"]  # BatchNorm, synced over ranks if there are several; or GroupNorm
    head: Literal["mlp", "conv"]  # two hidden layers; or four convolutions with norm, one hidden layer
    fpn_channels: int = setting(least=1, most=MOST_CHANNELS)
    # (id in the data set, name) of the labels 1..K
    categories: tuple[tuple[int, str], ...] = setting(least=-(2**63), most=2**63 - 1)
    color_mode: Literal["gray", "rgb"]
    mean: tuple[float, float, float] = setting(least=0, most=1)  # of three channels
    std: tuple[float, float, float] = setting(least=LEAST_STD, most=1)  # likewise
    window: int = setting(least=STRIDES[-1], most=MOST_PIXELS)  # side in pixels, a multiple of 64
    overlap: int = setting(least=0, most=MOST_PIXELS)  # pixels that neighbouring windows share
    anchors: Anchors
    rois: int = setting(least=1, most=MOST_BOXES)  # proposals per window sampled to train the box head
    proposals: int = setting(least=1, most=MOST_BOXES)  # proposals per window that the RPN keeps
    detections: int = setting(least=1, most=MOST_BOXES)  # detections per window, at most
    score_threshold: float = setting(least=0, most=1)  # detections with a lower score are dropped
    # Size at which sheets are seen; all pixels above are those of the scaled sheet.
    scale: float = setting(1.0, least=0.01, most=1)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: Any, source: str = "spec", cure: str = AGAIN) -> Spec:
        """The inverse of `to_dict`, also if JSON has turned tuples into lists in between.

        source, cure: the file, and how to get another. Raises UserError for values that no finetuning writes.
        """
        spec = Spec(**check_facts(Spec, values, source, cure, closed=True))
        levels, ids = [len(sizes) for sizes in spec.anchors.sizes], [number for number, _ in spec.categories]
        for wrong, said in (
            (spec.window % STRIDES[-1], f"window is {spec.window}, no multiple of {STRIDES[-1]}"),
            (spec.overlap > spec.window * 3 // 4, f"overlap is {spec.overlap}, over 3/4 of a window"),
            (len(levels) != len(STRIDES), f"anchors.sizes has {len(levels)} levels, not {len(STRIDES)}"),
            (not (spec.categories and spec.anchors.ratios and all(levels)), "no categories or no anchors"),
            (len(set(levels)) > 1, "anchors.sizes has levels of different lengths"),
            (len(set(ids)) < len(ids), "categories names an id twice"),
        ):
            if wrong:
                raise UserError(f"{source}: {said}; {cure}")
        return spec


@dataclass(frozen=True)
class ModelFacts:
    """What a model.pt says beside its spec, by category id."""

    thresholds: dict[int, float] = setting(least=0, most=1)
    train_boxes: dict[int, int] = setting(None, least=0, most=2**63 - 1)  # an earlier version kept none
    ranges: Ranges = setting(None)  # of the counts at these thresholds; an earlier version kept none
    # Arithmetic in which it was validated, and in which the thresholds were fitted.
    precision: Literal["fp32", "bf16"] = "fp32"
