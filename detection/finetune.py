"""Finetune a Faster R-CNN on labelled sheets, starting from a pretrained backbone.

    python -m detection.finetune --data-dir DATA --backbone EXP/backbone.safetensors --exp-dir OUT

DATA holds train/ and valid/ with COCO annotations; a raw Roboflow export will do. OUT/model.pt is the
detector after the epoch with the best validation AP, OUT/last.pt the one after the last epoch. The same
command again goes on where the run stopped; with another --lr or --scheduler it begins a new phase of the
learning rate there. The recipe is that of arXiv 1911.05722, appendix: all layers are trained, every BatchNorm
is synced over ranks, and mean and std are those of pretraining.

On two x86-64 cores, 320 steps of four windows of 256 px with a ResNet-18 take 3 minutes and reach test AP
0.70 and AP50 0.93 on the synthetic sheets of `make demo`. On 80 real circuits with 31 classes, 300 steps take
6 to 7 minutes of CPU time and reach test AP 0.13 from a pretrained backbone, 0.07 from random weights
(docs/results.md). Training on a GPU has not been measured.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import nn

from cluster import checkpoint, distributed, entry
from cluster import config as configuration
from cluster.batches import Batches
from cluster.config import RunConfig, setting
from cluster.distributed import World
from cluster.errors import UserError
from cluster.guard import Guard
from cluster.journal import Journal
from cluster.lifecycle import Run
from cluster.memory import free_memory
from cluster.rendezvous import place
from cluster.training import (
    TIMING,
    GuardedStep,
    begin,
    in_bf16,
    paced,
    parallel,
    rehearsal,
    seconds_per_step,
    tell_seconds,
    train_guarded,
)
from cluster.weights import read_weights
from detection.classes import boxes_by_class
from detection.data import (
    Augment,
    SheetReader,
    TrainingWindows,
    cached_bytes,
    collate,
    scale_sheet,
    scaled_size,
    steps_per_epoch,
)
from detection.inference import detect
from detection.loop import Boundary, Progress, train
from detection.memory import BATCHES, Fit, fit_to_memory, measure_footprint
from detection.metrics.engines import Engine, check_engine
from detection.model import MOST_BOXES, MOST_CHANNELS, Detector, Spec
from detection.plan import describe, plan_detector
from detection.pretrained import fill_backbone
from detection.schedule import Phase, continue_phases, lr_at
from detection.validation import out_of_patience
from schematics import draws
from schematics.coco import Split, find_split, losses, read_split
from schematics.windows import tile_sheet

# What a few CPU cores can train in half an hour; network and window are the backbone's and the sheets'.
LAPTOP: dict[str, Any] = {
    "fpn_channels": 128,
    "batch_size": 4,
    "lr": 0.01,
    "scheduler": "cosine",
    "warmup_steps": 20,
    "minutes": 30,
}


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    presets: ClassVar[dict[str, dict[str, Any]]] = {"laptop": LAPTOP}

    # Defaults for a machine: laptop is a narrow pyramid, batches of 4 and half an hour, for a few CPU cores.
    # Flags that are given win.
    preset: Literal["laptop"] | None = setting(None, may_change=True)
    # Labelled sheets: train/ and valid/ with COCO annotations.
    data_dir: Path = Path("data")
    # Folder of this run; the same command again goes on from its newest valid checkpoint.
    exp_dir: Path = Path("checkpoints/detector")
    # Backbone to start from: backbone.safetensors of a finished pretraining, a .pth with torchvision's keys,
    # or none (random weights).
    backbone: str = setting("checkpoints/vicreg/backbone.safetensors", may_change=True, exists=True)

    # Name of the backbone in timm; by default the one that backbone.safetensors names, else resnet50.
    arch: str | None = setting(None)
    # Norm layers: sync (BatchNorm, synced over GPUs), group (GroupNorm), or auto: sync for a pretrained
    # backbone, but group on several CPU processes and from random weights.
    norm: Literal["auto", "sync", "group"] = setting("auto")
    # Head on each proposal: mlp (two hidden layers) or conv (four convolutions with norm, one hidden layer).
    head: Literal["mlp", "conv"] = setting("mlp")
    # Channels of the feature pyramid.
    fpn_channels: int = setting(256, least=1, most=MOST_CHANNELS)
    # Stages of the backbone kept as pretrained: 1 freezes it up to stride 4, 4 all of it.
    freeze_stages: int = setting(0)

    # Passes over the windows with symbols, in all.
    epochs: int = 20
    # Windows in a batch over all ranks together; the number of ranks must divide it. By default 8, or 4 or 2
    # if memory is short.
    batch_size: int | None = setting(None, least=1)
    # Learning rate at the peak.
    lr: float = setting(0.005, least=0, may_change=True)
    # Factor on the learning rate of the box predictor, the last layers for class and box.
    predictor_lr: float = setting(1.0, least=0)
    # Momentum of SGD.
    momentum: float = 0.9
    # Weight decay (L2) of all weights; --wd is taken too.
    weight_decay: float = 0.0005
    # Course of the learning rate: constant, step (--lr-gamma every --lr-step-size epochs) or cosine (to 0).
    scheduler: Literal["constant", "step", "cosine"] = setting("step", may_change=True)
    # Epochs from one drop of the learning rate to the next, with --scheduler step.
    lr_step_size: int = setting(8, least=1, may_change=True)
    # Factor on the learning rate at each drop, with --scheduler step.
    lr_gamma: float = setting(0.1, least=0, may_change=True)
    # Steps over which the learning rate rises linearly at the start, but at most a tenth of the run.
    warmup_steps: int = setting(100, least=0)
    # Largest norm of the gradient, to which longer ones are scaled down.
    clip_grad: float = 10.0
    # Epochs from one validation to the next; the last step always ends with one.
    validate_every: int = setting(1, least=1, may_change=True)
    # Decay, such as 0.999, of a moving average of the weights, which is validated and saved in their place; 0
    # keeps no average.
    ema_decay: float = setting(0.0, least=0, most=1)
    # Epochs without a rise of validation AP after which the run ends; 0 never ends it early.
    patience: int = setting(0, least=0, may_change=True)

    # Seconds from one checkpoint to the next; there is also one before each validation.
    checkpoint_every: float = 600.0

    # Size at which sheets are seen, such as 0.5 for half of it, in training and by the detector ever after.
    scale: float = setting(1.0, least=0.01, most=1)
    # Side of a window in pixels of the scaled sheet, a multiple of 64; by default fitted to the sheets, and
    # to the memory if that is short.
    window: int | None = setting(None)
    # Pixels that neighbouring windows share; by default fitted to the symbols.
    overlap: int | None = setting(None)
    # Strength s of the scale jitter: every other window is seen at 1 / (1 + s) to 1 + s of its size.
    scale_jitter: float = setting(0.1, least=0)
    # Strength of brightness, contrast, blur and noise in every other window, from 0 to 1.
    photometric: float = setting(0.3, least=0, most=1)
    # Mirror windows; harmful where orientation tells classes apart.
    flip: bool = setting(False)
    # Turn windows by quarters; harmful where orientation tells classes apart.
    rot90: bool = setting(False)
    # Windows without symbols that an epoch has at most for each window with symbols.
    negatives: float = setting(0.5, least=0)
    # Threshold t of repeat-factor sampling, which shows rare classes more often (arXiv 1908.03195); 0 is off.
    repeat: float = setting(0.0, least=0, most=1)

    # Score below which detections are dropped; low, because AP counts uncertain detections too.
    score_threshold: float = setting(0.01, least=0, most=1)
    # Detections kept of a window, at most; by default fitted to the fullest window.
    detections_per_image: int | None = setting(None, least=1, most=MOST_BOXES)
    # Program that computes validation AP: linework, or to compare with it pycocotools or hotcoco
    # (pip install 'linework[fast]'), which give the same.
    coco_engine: Engine = setting("linework", may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.freeze_stages and self.backbone == "none":
            raise UserError(f"--freeze-stages {self.freeze_stages}: random weights would stay random; give 0")

    @property
    def choices(self) -> dict[str, Any]:
        """Arguments of `plan_detector` that flags set; None lets it fit a value to the sheets."""
        return {
            "head": self.head,
            "fpn_channels": self.fpn_channels,
            "overlap": self.overlap,
            "detections": self.detections_per_image,
            "score_threshold": self.score_threshold,
            "scale": self.scale,
        }


def read_splits(data_dir: Path) -> tuple[Split, Split]:
    """The training and the validation split. Raises DataError if one is absent."""
    return read_split(find_split(data_dir, "train")), read_split(find_split(data_dir, "valid"))


def fresh_detector(
    split: Split, backbone: str, arch: str | None, seed: int, **choices: Any
) -> tuple[Detector, str]:
    """A new detector that is planned for the sheets and holds the backbone's weights; and lines for the log.

    The lines say how the backbone was loaded and what was planned. seed: of the weights that the backbone
    does not give. choices: see plan_detector. Raises UserError for a backbone that doesn't fit.
    """
    tensors, meta = read_weights(backbone)
    known = meta.get("arch", arch or "resnet50")
    if arch not in (None, known):
        raise UserError(f"--arch {arch}: {backbone} is a {known}; leave out --arch")
    spec = plan_detector(split, meta, arch=known, **choices)
    torch.manual_seed(seed)
    try:
        detector = Detector(spec)
    except UserError as error:
        raise UserError(f"--backbone {backbone}: {error}" if "arch" in meta else str(error)) from None
    audit = fill_backbone(detector, tensors, backbone) if tensors else "backbone: random weights"
    return detector, f"{audit}\n{describe(spec, split.sheets)}"


def choose_norm(norm: str, backbone: str, world: World) -> str:
    """The kind of norm layers, "sync" or "group": `norm` itself, unless it is "auto".

    "auto" gives "group" on several CPU processes, over which torch can't sync BatchNorm, and from random
    weights, where GroupNorm learns faster (docs/log.md). Otherwise it gives "sync".
    """
    on_cpus = world.size > 1 and world.device.type == "cpu"
    return norm if norm != "auto" else "group" if on_cpus or backbone == "none" else "sync"


def refuse_unsynced(norm: str, world: World) -> None:
    """Raise UserError if BatchNorm would have to be synced over several CPU processes, which torch can't."""
    if norm == "sync" and world.size > 1 and world.device.type == "cpu":
        raise UserError(
            f"--norm sync: {world.size} CPU processes can't sync BatchNorm; give --norm group, or resume in "
            "one process a run that was begun in one"
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


def refuse_other_classes(spec: Spec, split: Split, data_dir: Path, exp_dir: Path) -> None:
    """Raise UserError if the run in exp_dir was begun with other classes than those of the split."""
    if spec.categories != tuple((c.id, c.name) for c in split.categories):
        raise UserError(
            f"--data-dir {data_dir}: {exp_dir} was begun with other classes; give the data that it was begun "
            "with, or another --exp-dir"
        )


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


def fit_memory(
    detector: Detector,
    splits: Sequence[Split],
    window: int | None,
    batch_size: int | None,
    precision: str,
    averaged: bool,
    world: World,
) -> Fit:
    """The window and the batch of the detector that fit into the memory of every rank.

    window, batch_size: given ones, which stay. averaged: whether an average of the weights is kept beside
    them. Raises UserError where nothing fits.
    """
    footprint = measure_footprint(detector, in_bf16(precision, world.device), 3 if averaged else 2)
    free = free_memory(world.device, place().local_size)
    if world.device.type == "cpu":
        free -= sum(cached_bytes(split, detector.spec.color_mode) for split in splits)
    free = -distributed.agree(-free)[0]  # the least of all ranks
    spec, sheets = detector.spec, [scale_sheet(sheet, detector.spec.scale) for sheet in splits[0].sheets]
    return fit_to_memory(footprint, spec.window, spec.overlap, sheets, window, batch_size, world.size, free)


def steps_in(seconds: float, step: float, validation: float, between: int) -> int:
    """Steps for which there is time, at least one. between: steps from one validation to the next."""
    return max(1, int((seconds - validation) / (step + validation / between)))


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


def main(config: FinetuneConfig) -> None:
    config = configuration.recorded(config, config.exp_dir)
    world = distributed.start(**config.joining)
    distributed.per_rank(config.batch_size or BATCHES[0], world)
    configuration.refuse_changes(config, config.exp_dir)
    check_engine(config.coco_engine)
    norm = choose_norm(config.norm, config.backbone, world)
    refuse_unsynced(norm, world)
    splits = read_splits(config.data_dir)
    for line in filter(None, map(losses, splits)):
        if world.main:
            print(line, flush=True)

    def fit(detector: Detector, window: int | None) -> Fit:
        averaged = config.ema_decay > 0
        return fit_memory(detector, splits, window, config.batch_size, config.precision, averaged, world)

    def build(window: int | None) -> tuple[Detector, str]:
        return fresh_detector(
            splits[0],
            config.backbone,
            config.arch,
            config.seed,
            norm=norm,
            window=window,
            **config.choices,
        )

    def begin_new() -> tuple[Detector, str, Fit]:
        detector, story = build(config.window)
        fitted = fit(detector, config.window)
        suits = detector.spec.window
        if fitted.window != suits:
            detector, story = build(fitted.window)
            story += f"\nwindows of {suits} px would suit the sheets, but not the memory"
        return detector, story, fitted

    # A new detector is built before the exp-dir is touched, so that bad input leaves no folder behind.
    folder = config.exp_dir / "checkpoints"
    (there,) = distributed.agree(bool(checkpoint.listed(folder)))
    fresh = None if there else begin_new()
    with contextlib.nullcontext() if config.dry_run else Run(config.exp_dir, world, **config.saving) as run:
        saved = run.resume() if run else checkpoint.load_newest(folder)[1] if there else None
        if saved:
            if config.batch_size is None:
                raise UserError(f"{config.exp_dir}: config.json is gone; give the run's --batch-size")
            detector, story = Detector(Spec.from_dict(saved["spec"], str(folder))), ""
            fitted = fit(detector, detector.spec.window)
        else:
            detector, story, fitted = fresh or begin_new()
        batch = fitted.batch
        config = replace(config, batch_size=batch)
        refuse_other_classes(detector.spec, splits[0], config.data_dir, config.exp_dir)
        refuse_unsynced(detector.spec.norm, world)
        augment = Augment(True, config.scale_jitter, config.photometric, config.flip, config.rot90)
        # Validation sees the sheets as `detect` gets them, which scales them itself.
        readers = [
            SheetReader(split, detector.spec.color_mode, scale=scale).preload()
            for split, scale in zip(splits, (detector.spec.scale, 1.0), strict=True)
        ]
        side, overlap = detector.spec.window, detector.spec.overlap
        windows = TrainingWindows(
            readers[0], side, overlap, config.seed, augment, config.negatives, config.repeat
        )
        per_epoch = steps_per_epoch(windows, batch)
        total = config.epochs * per_epoch if config.steps is None else config.steps
        patience_steps = config.patience * per_epoch
        to_time = config.minutes is not None and config.steps is None
        if run and not to_time and run.finished(length_of(config.exp_dir, patience_steps, total)):
            return
        told = [story or f"going on at step {saved['step'] if saved else 0}", str(fitted)]
        detector = put_on_device(detector, world, config.freeze_stages)
        order = functools.partial(windows.order, at_least=batch)
        batches = Batches(windows, order, per_epoch, batch, world, config.workers, collate)
        build_sgd = functools.partial(
            build_optimizer,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            predictor_lr=config.predictor_lr,
        )
        if to_time or (config.dry_run and fitted.fits):
            if world.main:  # at once, as the steps that are timed may take minutes
                print("\n".join([*told, "timing a few steps"]), flush=True)
            told = []

            def attempt(model: nn.Module, guarded: GuardedStep, rest: Iterable, journal: Journal) -> None:
                train(model, guarded, rest, journal, lambda step: True)

            with run.allow(TIMING) if run else contextlib.nullcontext():
                step = seconds_per_step(detector, build_sgd, batches, world, config.precision, attempt)
                validation = validation_seconds(detector, readers[1], world)
            between = per_epoch * config.validate_every
            if config.minutes is not None and config.steps is None:
                total = steps_in(60 * config.minutes, step, validation, between)
                config = replace(config, steps=total)
                if run and run.finished(length_of(config.exp_dir, patience_steps, total)):
                    return
            length = tell_seconds(total * step + math.ceil(total / between) * validation)
            told.append(
                f"{tell_seconds(step)} a step, {tell_seconds(validation)} a validation: about {length} in all"
            )
        told.append(f"{len(windows)} windows and {per_epoch} steps an epoch, {total} steps in all")
        if not run:
            if world.main:
                print("\n".join(told))
            return
        if world.main:
            configuration.save(config, config.exp_dir / "config.json")

        optimizer = build_sgd(detector)
        ema = ModelEmaV3(detector, config.ema_decay, use_warmup=True) if config.ema_decay else None
        progress = Progress(detector, optimizer, Guard(), ema)
        begin(run, saved, progress.guard, progress.state, progress.restore)
        wanted = Phase(
            0, config.lr, config.scheduler, config.lr_step_size * per_epoch, config.lr_gamma, total
        )
        begun = [Phase(**phase) for phase in saved["phases"]] if saved else []
        progress.phases = continue_phases(begun, wanted, progress.step)
        # A run that is resumed at its last step still has to validate, which writes model.pt and last.pt.
        progress.pending |= progress.step >= total

        journal = Journal(config.exp_dir, world, total, progress.step, config.log_every, batch)
        journal.message("\n".join(told))
        if saved and saved.get("draws") != draws.VERSION:
            journal.message(draws.CHANGED)
        if begun and progress.phases != begun:
            rates = [lr_at(progress.step, phases, 0) for phases in (begun, progress.phases)]
            journal.message(
                f"a new phase of the learning rate begins at step {progress.step}: "
                f"{rates[1]:.4g} where it was {rates[0]:.4g}"
            )
        # Windows have one size, but a head of convolutions sees a varying number of proposals.
        torch.backends.cudnn.benchmark = not config.deterministic and detector.spec.head == "mlp"
        model = parallel(detector, world)
        lr = functools.partial(lr_at, phases=progress.phases, warmup=min(config.warmup_steps, total // 10))
        guarded = GuardedStep(
            model, optimizer, lr, progress.guard, world.device, config.clip_grad, config.precision
        )
        boundary = Boundary(
            progress,
            run,
            journal,
            readers[1],
            per_epoch,
            total,
            train_boxes=boxes_by_class(splits[0]),
            validate_every=config.validate_every,
            patience=patience_steps,
            engine=config.coco_engine,
        )

        def train_on(rest: Iterable[tuple[int, Any]]) -> None:
            if not progress.pending or boundary.validate():
                train(model, guarded, paced(rest, total, journal, world.device), journal, boundary)

        train_guarded(train_on, batches, progress.guard, run, journal, progress.restore, progress.step, total)
        run.finish(progress.step, progress.state, ["model.pt", "last.pt"])
        journal.close()
    distributed.stop()


if __name__ == "__main__":
    entry.run(FinetuneConfig, main)
