"""What stands before the first step of pretraining: pool, network, memory and schedule."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from cluster import distributed, foreign
from cluster.backbone import SMALL, Normalise, build_backbone, read_backbone, write_backbone
from cluster.distributed import World
from cluster.errors import UserError
from pretraining.dense import WIDTHS, DenseHead, DenseLoss, Loss, choose_map, with_dense
from pretraining.encoder import Encoder, build_projector, keep_statistics
from pretraining.schedule import (
    ADAMW_KEPT_LR,
    ADAMW_LR,
    ONWARD_RATE,
    ONWARD_WARMUP,
    WARMUP,
    Schedule,
    peak_lr,
)
from schematics.recipes import default_extent
from schematics.store import WindowStore


@dataclass(frozen=True, kw_only=True)
class Method:
    """The facts in which methods differ; everything else is shared.

    base_lr: the published learning rate per 256 windows, as a function of global batch size and length in
    epochs. joint: whether both views go through the network as one batch (see Encoder). last_norm: whether a
    BatchNorm follows the projector's last layer. dense: the loss of local vectors (see `with_dense`), None if
    the method has none.
    """

    name: str
    loss: Loss
    joint: bool
    last_norm: bool
    base_lr: Callable[[int, float], float]
    dense: DenseLoss | None = None

    def whole_loss(self, dense_weight: float) -> Loss:
        """The loss, with the dense term if it has a weight. Raises UserError if the method has none."""
        if dense_weight == 0:
            return self.loss
        if self.dense is None:
            raise UserError(f"--dense-weight {dense_weight:g}: {self.name} has no dense term; leave it out")
        return with_dense(self.loss, self.dense, dense_weight)


@dataclass(frozen=True)
class Beginning:
    """The architecture, and the weights of --init with their meta; both are empty for random weights."""

    arch: str
    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    def colors(self, store: WindowStore) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and std by which the network sees its images: those of its weights, else the pool's."""
        return (self.meta["mean"], self.meta["std"]) if "mean" in self.meta else (store.mean, store.std)

    @property
    def origin(self) -> dict[str, Any]:
        """What the backbone's meta says of --init."""
        return {"init": self.meta["init"]} if self.meta else {}


def refuse_small_batch(batch_size: int, joint: bool, world: World) -> None:
    """Raise UserError if BatchNorm would see only one sample, or if the ranks do not divide the batch."""
    share = distributed.per_rank(batch_size, world)
    unsynced = world.device.type == "cpu" and not joint  # each rank then normalises each view by itself
    if batch_size < 2 or (unsynced and share < 2):
        raise UserError(
            f"--batch-size {batch_size}: BatchNorm needs 2 windows on each rank; give {2 * world.size}"
        )


def view_extent(view: int | None, recipe: str, size: int, store: WindowStore) -> int:
    """Side of what a view shows at most, in px of the sheet. Raises UserError for one that can't be had."""
    if view and recipe != "drawing":
        raise UserError(
            f"--view {view}: the recipe {recipe} crops the whole window; leave it out, or give --window"
        )
    if view and view > store.side:
        raise UserError(
            f"--view {view}: a window has {store.side} px; give at most that, or a larger --window"
        )
    return view or min(store.side, default_extent(size, store.line))


def with_stem(arch: str | None, stem: str, init: Path | None) -> str | None:
    """The name of the architecture with that of its stem; None for the default, or what --init tells.

    Raises UserError for a stem beside --init alone, which might tell another.
    """
    if stem == "imagenet":
        return arch
    if arch is None and init:
        raise UserError(f"--stem {stem}: give --arch too, which --init must then agree with")
    return (arch or "resnet50").removesuffix(SMALL) + SMALL


def begin_from(init: Path | None, arch: str | None, kept: Path, new: bool, dry_run: bool) -> Beginning:
    """What the network begins from; says on rank 0 how --init was read.

    A new run keeps the weights of --init in the file `kept`, with all that its meta says. A resumed one reads
    them there, so it needs the file of --init no longer.
    Raises UserError unless --init holds the whole of a backbone, and one of `arch` if that is given.
    """
    if init is None:
        return Beginning(arch or "resnet50", {}, {})

    def convert() -> tuple[dict[str, Tensor], dict[str, Any]]:
        if not init.is_file():
            raise UserError(f"--init {init}: no such file; give a backbone.safetensors or a .pth")
        tensors, meta, story = foreign.convert(str(init), arch)
        print(f"--init {story}", flush=True)
        return tensors, meta

    def keep() -> None:
        if new or not kept.exists():
            write_backbone(kept, *convert())

    if dry_run:
        tensors, meta = distributed.on_main(convert)
    else:
        distributed.on_main(keep)
        tensors, meta = read_backbone(kept)
    return Beginning(meta["arch"], tensors, meta)


def build_encoder(
    beginning: Beginning,
    projector: tuple[int, ...],
    method: Method,
    store: WindowStore,
    world: World,
    seed: int,
    kept_statistics: bool,
    dense: tuple[int, int] | None,
) -> Encoder:
    """The network on this rank's device, equal on all ranks. Raises UserError if its arch does not exist.

    kept_statistics: see `keep_statistics`. dense: stride and side of a view in px for the dense term, or
    None; the other weights are the same with and without it.

    Weights that it begins from go on to see images by the mean and std that they were trained with, so their
    features are at the first step what they were; a network with random weights sees the pool's.
    """
    torch.manual_seed(seed)
    backbone = build_backbone(beginning.arch)
    if beginning.tensors:
        backbone.load_state_dict(beginning.tensors)
    widths = [int(backbone.num_features), *projector]
    normalise = Normalise(*beginning.colors(store), torch.channels_last)
    encoder = Encoder(normalise, backbone, build_projector(widths, method.last_norm), method.joint)
    if dense:
        stride, size = dense
        stage, channels, cells = choose_map(backbone, beginning.arch, size, stride)
        encoder.dense = DenseHead(stage, cells, build_projector([channels, *WIDTHS], method.last_norm))
    if world.size > 1 and world.device.type == "cuda":
        encoder = convert_sync_batchnorm(encoder)
    if kept_statistics:
        keep_statistics(encoder.backbone)
    encoder.to(memory_format=torch.channels_last)
    return encoder.to(world.device)


def plan_rate(
    method: Method,
    batch_size: int,
    per_epoch: int,
    total: int,
    onward: bool,
    kept: bool,
    optimizer: str,
    base_lr: float | None,
    lr_scaling: str,
    warmup_epochs: float | None,
    min_lr_ratio: float,
) -> Schedule:
    """The course of the learning rate over `total` steps.

    onward: whether weights exist, which are to be changed less. kept: whether BatchNorm keeps the statistics
    that they hold. base_lr, warmup_epochs: None for the default, which is the method's, or AdamW's, and
    another for weights that exist.
    """
    if base_lr is None and kept and optimizer == "adamw":
        base_lr = ADAMW_KEPT_LR
    if base_lr is None:
        base_lr = ADAMW_LR if optimizer == "adamw" else method.base_lr(batch_size, total / per_epoch)
        base_lr *= ONWARD_RATE if onward else 1
    if warmup_epochs is None:
        warmup_epochs = ONWARD_WARMUP if onward else WARMUP
    peak = peak_lr(base_lr, batch_size, lr_scaling)
    warmup = min(round(warmup_epochs * per_epoch), total // 10)
    return Schedule(per_epoch, total, warmup, peak, peak * min_lr_ratio)


def describe(
    arch: str, batch_size: int, encoder: Encoder, store: WindowStore, schedule: Schedule, world: World
) -> str:
    """A description of the run for the log, in several lines."""
    size = sum(p.numel() for p in encoder.parameters()) / 1e6
    widths = [layer.out_features for layer in encoder.projector.modules() if isinstance(layer, nn.Linear)]
    lines = [
        f"{arch} with projector {'-'.join(map(str, widths))}, {size:.1f}M parameters",
        f"{len(store)} {store.color_mode} windows of {store.side} px from {len(store.sheet_names)} sheets",
        f"{schedule.total} steps, {schedule.per_epoch} an epoch, batch {batch_size} = {world.size} x "
        f"{batch_size // world.size}, peak lr {schedule.peak:.4g} after {schedule.warmup} steps",
    ]
    if world.size > 1 and world.device.type == "cpu":
        lines.append("BatchNorm's statistics are per rank: torch's SyncBatchNorm takes no CPU tensor")
    return "\n".join(lines)
