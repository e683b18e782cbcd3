"""What stands before the first step of pretraining a detector: network, anchors, memory and length."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from timm.layers import convert_sync_batchnorm
from torch import nn

from cluster import distributed
from cluster.backbone import write_backbone
from cluster.distributed import World
from cluster.errors import UserError
from cluster.foreign import read_weights
from cluster.memory import PEAK, least_free, saved_bytes, tell_bytes
from cluster.training import rehearsal
from detection.anchors import Anchors, fit_anchors
from detection.ink_learner import InkLearner
from detection.ink_views import InkViews, collate, window_boxes
from detection.model import Detector
from detection.plan import fit_proposals
from detection.pretrained import fill, parts_of
from detection.spec import Spec
from schematics.store import WindowStore

SAMPLED = 64  # windows to whose boxes the anchors' sizes are fitted
# Height / width of the anchors. Finetuning fits its own, mostly three too: the RPN's layers then fit there.
RATIOS = (0.5, 1.0, 2.0)


def plan(
    store: WindowStore,
    meta: dict[str, Any],
    arch: str,
    norm: Literal["sync", "group"],
    head: Literal["mlp", "conv"],
    fpn_channels: int,
    image_size: int,
    anchors: Anchors,
) -> Spec:
    """The detector that is pretrained: one class, and windows of the size of a view.

    meta: mean and std by which the backbone sees its images; if it lacks them they are the pool's.
    """
    mean, std = (meta["mean"], meta["std"]) if "mean" in meta else (store.mean, store.std)
    return Spec(
        arch=arch,
        norm=norm,
        head=head,
        fpn_channels=fpn_channels,
        categories=((1, "ink"),),
        color_mode="rgb" if store.color_mode == "rgb" else "gray",
        mean=tuple(mean),
        std=tuple(std),
        window=image_size,
        overlap=0,
        anchors=anchors,
        rois=64,
        proposals=fit_proposals(image_size),
        detections=100,
        score_threshold=0.01,
    )


def build(
    store: WindowStore,
    norm: Literal["sync", "group"],
    backbone: str,
    arch: str | None,
    head: Literal["mlp", "conv"],
    fpn_channels: int,
    image_size: int,
    seed: int,
) -> tuple[Detector, str, str]:
    """A new detector that holds the backbone's weights, their method, and lines on how they were loaded.

    The sizes of its anchors are fitted to the ink of the pool.
    Raises UserError for a backbone that does not fit, as finetuning does.
    """
    tensors, meta = read_weights(backbone, arch)
    known = meta.get("arch", arch or "resnet50")
    if arch not in (None, known):
        raise UserError(f"--arch {arch}: {backbone} is a {known}; leave out --arch")
    anchors = distributed.on_main(lambda: ink_anchors(store, image_size))
    torch.manual_seed(seed)
    detector = Detector(plan(store, meta, known, norm, head, fpn_channels, image_size, anchors))
    audit = fill(detector, tensors, meta, backbone) if tensors else "backbone: random weights"
    told = "\n".join(filter(None, [meta.get("told"), audit]))
    return detector, meta.get("method", Path(backbone).name) if tensors else "none", told


def ink_anchors(store: WindowStore, image_size: int) -> Anchors:
    """Anchors whose sizes are fitted to the boxes of some windows, evenly spread over the pool.

    Raises UserError if these show no box.
    """
    chosen = np.unique(np.linspace(0, len(store) - 1, min(len(store), SAMPLED)).astype(int)).tolist()
    boxes = np.concatenate([window_boxes(store, index, image_size / 2) for index in chosen])
    if not len(boxes):
        raise UserError(
            f"{len(chosen)} windows of {store.side} px show no connected ink of the size of symbols; "
            "give a pool of drawings, or another --image-size"
        )
    return Anchors(fit_anchors(boxes).sizes, RATIOS)


def on_device(detector: Detector, seed: int, world: World) -> InkLearner:
    """What is trained, on its device in training mode, with BatchNorm synced."""
    if detector.spec.norm == "sync" and world.size > 1:
        detector = convert_sync_batchnorm(detector)
    torch.manual_seed(seed)
    learner = InkLearner(detector)
    learner.to(memory_format=torch.channels_last)
    return learner.to(world.device).train()


def describe(spec: Spec, store: WindowStore) -> str:
    """What is trained and on what, as lines for the log."""
    sizes = " ".join("/".join(f"{size:g}" for size in level) for level in spec.anchors.sizes)
    return (
        f"{spec.arch}, {spec.norm} norm, {spec.head} head, {spec.fpn_channels} channels, {spec.color_mode}\n"
        f"views of {spec.window} px in windows of {store.side} px from {len(store.sheet_names)} sheets\n"
        f"anchors of {sizes} px, height/width {' '.join(f'{ratio:g}' for ratio in spec.anchors.ratios)}"
    )


def tell_memory(learner: InkLearner, views: InkViews, batch_size: int, precision: str, world: World) -> str:
    """How much memory a step will take and how much is free, from what autograd keeps of one window."""
    large, small, boxes, _, truth, seeds = collate([views[0, 0, 0]])
    cpu = torch.device("cpu")
    with rehearsal(learner, cpu, precision) as copied:
        copied.to(cpu)
        kept = saved_bytes(lambda: copied(large, small, boxes, truth, seeds), copied)
    weights = sum(p.nbytes for p in learner.parameters())
    need = 2 * weights + PEAK * kept * batch_size / world.size
    free = least_free(world)
    told = f"a step takes about {tell_bytes(need)} of memory; {tell_bytes(free)} are free"
    return told if need <= free else f"warning: {told}; give a smaller --batch-size or --image-size"


def build_optimizer(learner: nn.Module, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD over the parameters that are trained."""
    trained = [p for p in learner.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=0.0, momentum=momentum, weight_decay=weight_decay)


def export(path: Path, detector: Detector, step: int, began_with: str) -> None:
    """Write all of the detector but the box predictor, and what finetuning must know of it."""
    spec = detector.spec
    facts = spec.to_dict()
    meta = {name: facts[name] for name in ("arch", "color_mode", "mean", "std")}
    meta |= {"method": "ink", "image_size": spec.window, "step": step, "began_with": began_with}
    meta |= {"detector": {name: facts[name] for name in ("norm", "head", "fpn_channels", "anchors")}}
    write_backbone(path, parts_of(detector), {**meta, "linework": version("linework")})
