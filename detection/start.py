"""What stands before the first step of finetuning: sheets, detector, memory and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from timm.layers import convert_sync_batchnorm

from cluster import checkpoint, distributed
from cluster.distributed import World
from cluster.errors import UserError
from cluster.foreign import read_weights
from cluster.memory import least_free
from cluster.precision import settle
from cluster.training import rehearsal
from detection.growth import grow
from detection.inference import detect
from detection.memory import Fit, fit_to_memory, measure_footprint
from detection.model import Detector
from detection.plan import describe, plan_detector
from detection.pretrained import fill
from detection.sheets import (
    CACHE,
    SheetReader,
    cached_bytes,
    decoded_bytes,
    pack_split,
    scale_sheet,
    scaled_size,
)
from detection.spec import Spec
from detection.validation import out_of_patience
from schematics.coco import Split, find_split, read_split
from schematics.windows import tile_sheet

Norm = Literal["sync", "group"]  # see Spec


def read_splits(data_dir: Path) -> tuple[Split, Split]:
    """The training and the validation split. Raises DataError if one is absent."""
    return read_split(find_split(data_dir, "train")), read_split(find_split(data_dir, "valid"))


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """What a detector is built from and fitted to, before its first step.

    window, batch_size: given ones, which stay, or None. grow: a model.pt to go on from, in place of a
    backbone and of choices. averaged: whether an average of the weights is kept beside them. unlabelled:
    windows in a step beside a batch of so many. choices: see plan_detector.
    """

    splits: tuple[Split, Split]
    backbone: str
    arch: str | None
    norm: Norm
    seed: int
    window: int | None
    batch_size: int | None
    precision: str
    grow: Path | None
    averaged: bool
    unlabelled: Callable[[int], int]
    choices: dict[str, Any]
    world: World

    def new(self) -> tuple[Detector, str, Fit]:
        """A new detector of the largest window that fits into memory, lines for the log, and what it takes.

        Raises UserError for a backbone that doesn't fit the detector, and where nothing fits into memory.
        """
        detector, story = self.build(self.window)
        fit = self.fit(detector, self.window)
        suits = detector.spec.window
        if fit.window != suits:
            detector, story = self.build(fit.window)
            story += f"\nwindows of {suits} px would suit the sheets, but not the memory"
        return detector, story, fit

    def build(self, window: int | None) -> tuple[Detector, str]:
        """A new detector that is planned for the sheets and holds the backbone's weights; lines for the log.

        The lines say how the backbone was loaded and what was planned.
        """
        if self.grow:
            detector, grown = grow(self.grow, self.splits[0], window, self.seed)
            return detector, f"{grown}\n{describe(detector.spec, self.splits[0].sheets)}"
        tensors, meta = read_weights(self.backbone, self.arch)
        known = meta.get("arch", self.arch or "resnet50")
        if self.arch not in (None, known):
            raise UserError(f"--arch {self.arch}: {self.backbone} is a {known}; leave out --arch")
        spec = plan_detector(self.splits[0], meta, arch=known, norm=self.norm, window=window, **self.choices)
        torch.manual_seed(self.seed)
        try:
            detector = Detector(spec)
        except UserError as error:
            raise UserError(
                f"--backbone {self.backbone}: {error}" if "arch" in meta else str(error)
            ) from None
        audit = fill(detector, tensors, meta, self.backbone) if tensors else "backbone: random weights"
        told = [meta.get("told"), audit, warning(self.backbone, meta), describe(spec, self.splits[0].sheets)]
        return detector, "\n".join(filter(None, told))

    def fit(self, detector: Detector, window: int | None) -> Fit:
        """The window and the batch of the detector that fit into the memory of every rank."""
        precision, _ = settle(self.precision, self.world, detector)
        footprint = measure_footprint(detector, precision, 3 if self.averaged else 2)
        free, spec = least_free(self.world), detector.spec
        if self.world.device.type == "cpu":
            scales = (spec.scale, 1.0)  # see `open_sheets`
            kept = zip(self.splits, scales, strict=True)
            free -= sum(cached_bytes(split, spec.color_mode, scale) for split, scale in kept)
        sheets = [scale_sheet(sheet, spec.scale) for sheet in self.splits[0].sheets]
        return fit_to_memory(
            footprint,
            spec.window,
            spec.overlap,
            sheets,
            window,
            self.batch_size,
            self.world.size,
            free,
            self.unlabelled,
        )


def warning(backbone: str, meta: Mapping[str, Any]) -> str:
    """A line if the backbone's own pretraining found it worse than the weights it began with; else ""."""
    judged = meta.get("judged", {})
    if judged.get("verdict") != "worse":
        return ""
    return f"warning: {backbone}: {judged['told']}; finetune from those, or pretrain again at a lower rate"


def choose_norm(norm: Literal["auto"] | Norm, backbone: str, world: World) -> Norm:
    """The kind of norm layers, "sync" or "group": `norm` itself, unless it is "auto".

    "auto" gives "group" on several CPU processes, over which torch can't sync BatchNorm, and from random
    weights, where GroupNorm learns faster (docs/log.md). Otherwise it gives "sync".
    """
    on_cpus = world.size > 1 and world.device.type == "cpu"
    if norm != "auto":
        return norm
    return "group" if on_cpus or backbone == "none" else "sync"


def refuse_unsynced(norm: Norm, world: World) -> None:
    """Raise UserError if BatchNorm would have to be synced over several CPU processes, which torch can't."""
    if norm == "sync" and world.size > 1 and world.device.type == "cpu":
        raise UserError(
            f"--norm sync: {world.size} CPU processes can't sync BatchNorm; give --norm group, or resume in "
            "one process a run that was begun in one"
        )


def open_sheets(split: Split, color_mode: str, scale: float, store_dir: Path, world: World) -> SheetReader:
    """The sheets of a split, read and found whole: in memory if they fit into CACHE, else in a store.

    Rank 0 builds the store, in a folder of `store_dir` that runs on the same sheets share. Raises DataError
    for a sheet that can't be used.
    """
    if decoded_bytes(split, color_mode, scale) <= CACHE:
        return SheetReader(split, color_mode, scale=scale).preload()
    store = distributed.on_main(lambda: pack_split(split, color_mode, scale, store_dir))
    reader = SheetReader(split, color_mode, scale=scale, store=store)
    if world.main and reader.store:
        megabytes = reader.store.index["bytes"] / 1e6
        print(f"{len(reader)} sheets packed in {store}, {megabytes:.0f} MB", flush=True)
    return reader


def refuse_other_classes(spec: Spec, split: Split, data_dir: Path, exp_dir: Path) -> None:
    """Raise UserError if the run in exp_dir was begun with other classes than those of the split."""
    if spec.categories != tuple((c.id, c.name) for c in split.categories):
        raise UserError(
            f"--data-dir {data_dir}: {exp_dir} was begun with other classes; give the data that it was begun "
            "with, or another --exp-dir"
        )


def build_optimizer(
    detector: Detector, momentum: float, weight_decay: float, predictor_lr: float
) -> torch.optim.SGD:
    """SGD over the parameters that are trained: one group for the box predictor, one for all others.

    `GuardedStep` sets each group's learning rate before each step, to the step's rate times its "factor".
    """
    predictor = set(detector.roi_heads.box_predictor.parameters())
    trained = [p for p in detector.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p not in predictor], "factor": 1.0},
        {"params": [p for p in trained if p in predictor], "factor": predictor_lr},
    ]
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum, weight_decay=weight_decay)


def put_on_device(detector: Detector, world: World, freeze_stages: int) -> Detector:
    """Put the detector on its device in training mode, with BatchNorm synced and its first stages frozen."""
    if detector.spec.norm == "sync" and world.size > 1:
        detector = convert_sync_batchnorm(detector)
    detector.to(world.device, memory_format=torch.channels_last).train()
    detector.backbone.freeze(freeze_stages)
    return detector


def length_of(exp_dir: Path, patience_steps: int, total: int) -> int:
    """Steps after which the run counts as finished: `total`, or fewer if --patience ended it early.

    The step of the best validation is read from model.pt. The last checkpoint doesn't know the outcome of the
    last validation, because it was saved before it, and it may have been removed.
    """
    if patience_steps and (exp_dir / "final.json").exists():
        step = checkpoint.check_final(exp_dir)["step"]
        if out_of_patience(checkpoint.read(exp_dir / "model.pt"), step, patience_steps):
            return min(step, total)
    return total


def steps_in(seconds: float, step: float, validation: float, between: int, burns_in: bool = False) -> int:
    """Steps for which there is time, at least one. between: steps from one validation to the next.

    burns_in: whether there is one more validation, at the end of a burn-in.
    """
    left = seconds - (1 + burns_in) * validation
    return max(1, int(left / (step + validation / between)))


def validation_seconds(detector: Detector, reader: SheetReader, world: World) -> float:
    """Seconds that a validation takes, by that of its first sheet and the windows of all."""
    spec = detector.spec
    tiles = [
        len(tile_sheet(*scaled_size(*size, spec.scale), spec.window, spec.overlap)) for size in reader.sizes
    ]
    begun = time.monotonic()
    with rehearsal(detector, world.device, "fp32") as copied:
        copied.eval()
        detect(copied, reader[0][0])
    seconds = (time.monotonic() - begun) * sum(tiles) / tiles[0] / world.size
    return distributed.agree(round(seconds * 1e6))[0] / 1e6
