"""Finetune a Faster R-CNN on labelled sheets, on a backbone from pretraining.

    python -m detection.finetune --data-dir DATA --backbone EXP/backbone.safetensors --exp-dir OUT

DATA holds train/ and valid/ with COCO annotations (a raw Roboflow export will do). OUT/model.pt is the best
epoch by validation AP, OUT/last.pt the last one. The same command again goes on where it stopped; with
another --lr or --scheduler it begins a new phase of the learning rate there. Recipe: arXiv 1911.05722,
appendix: all layers trained, every norm layer synced, mean and std of pretraining. docs/results.md has
times and results.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3

from cluster import checkpoint, distributed
from cluster import config as configuration
from cluster.distributed import World
from cluster.errors import UserError
from cluster.guard import Guard
from cluster.journal import Journal
from cluster.lifecycle import Run
from detection.data import Augment, SheetReader, TrainingWindows, steps_per_epoch
from detection.loop import Boundary, Progress, out_of_patience, train_to
from detection.metrics.matching import Engine, coco_classes
from detection.model import Detector, Spec
from detection.plan import describe, plan_detector
from detection.pretrained import load_backbone, read_pretrained
from detection.schedule import Phase, continue_phases, lr_at
from schematics.coco import Split, find_split, read_split
from schematics.sheets import DataError

# What may differ between a run and its continuation.
FREE = {
    "--data-dir", "--exp-dir", "--backbone", "--epochs", "--steps", "--lr", "--scheduler", "--lr-step-size",
    "--lr-gamma", "--clip-grad", "--validate-every", "--patience", "--workers", "--device", "--precision",
    "--checkpoint-every", "--keep", "--step-timeout", "--log-every", "--coco-engine",
}  # fmt: skip


# Least, and for some the largest, that a number may be.
LIMITS = {
    "epochs": (1,), "steps": (1,), "keep": (1,), "fpn_channels": (1,), "lr": (0,), "wd": (0,),
    "predictor_lr": (0,), "momentum": (0,), "lr_gamma": (0,), "clip_grad": (1e-6,), "ema_decay": (0, 1),
    "score_threshold": (0, 1), "checkpoint_every": (0,), "step_timeout": (1,), "validate_every": (1,),
    "lr_step_size": (1,), "warmup_steps": (0,), "patience": (0,), "scale_jitter": (0,),
    "photometric": (0, 1), "negatives": (0,), "repeat": (0, 1), "seed": (0, configuration.LARGEST_SEED),
    "detections_per_image": (1,), "log_every": (1,), "workers": (0,),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    # Labelled sheets: train/ and valid/ with COCO annotations.
    data_dir: Path
    # backbone.safetensors of a finished pretraining, a .pth with torchvision's keys, or none (random).
    backbone: str
    # Folder of this run; the same command again goes on from its newest valid checkpoint.
    exp_dir: Path

    # timm name of the backbone; known from a backbone.safetensors, else resnet50.
    arch: str | None = None
    # sync: BatchNorm, synced over GPUs; group: GroupNorm; auto: sync for a pretrained backbone, but group on
    # several CPU processes; group from random weights.
    norm: Literal["auto", "sync", "group"] = "auto"
    # mlp: two hidden layers; conv: four convolutions with norm, one hidden layer.
    head: Literal["mlp", "conv"] = "mlp"
    # Channels of the feature pyramid.
    fpn_channels: int = 256
    # Backbone stages kept as pretrained: 1 is up to stride 4, 4 is all of it.
    freeze_stages: int = 0

    # Passes over the windows with symbols, in all.
    epochs: int = 20
    # Optimizer steps in all, in place of --epochs.
    steps: int | None = None
    # Global batch in windows, divided among the ranks.
    batch_size: int = 8
    lr: float = 0.005
    # The box predictor's learning rate over that of the rest; 2 to 4 where labels are few.
    predictor_lr: float = 1.0
    momentum: float = 0.9
    # Weight decay.
    wd: float = 0.0005
    # constant, step (times --lr-gamma every --lr-step-size epochs) or cosine (to 0).
    scheduler: Literal["constant", "step", "cosine"] = "step"
    lr_step_size: int = 8
    lr_gamma: float = 0.1
    # Steps of linear rise; at most a tenth of the run.
    warmup_steps: int = 100
    # Largest norm of the gradient.
    clip_grad: float = 10.0
    # Epochs from one validation to the next; the last step always ends with one.
    validate_every: int = 1
    # Decay of an average of the weights that is validated and handed on, say 0.999; 0 is off.
    ema_decay: float = 0.0
    # End when validation AP has not risen for this many epochs; 0 never does.
    patience: int = 0

    # Side of a window in sheet pixels, a multiple of 64; fitted to the sheets.
    window: int | None = None
    # Pixels that neighbouring windows share; fitted to the symbols.
    overlap: int | None = None
    # Every other window is seen at 1 / (1 + s) to 1 + s of its size, antialiased.
    scale_jitter: float = 0.1
    # Strength of brightness, contrast, blur and noise, 0 to 1, in every other window.
    photometric: float = 0.3
    # Mirror windows; harmful where orientation tells classes apart.
    flip: bool = False
    # Turn windows by quarters; likewise.
    rot90: bool = False
    # Windows without symbols per window with symbols, at most.
    negatives: float = 0.5
    # Repeat-factor sampling of rare classes: threshold t of arXiv 1908.03195; 0 is off.
    repeat: float = 0.0

    # Detections below this score are not kept: low, as AP needs the tail.
    score_threshold: float = 0.01
    # Detections kept of a window; fitted to the fullest.
    detections_per_image: int | None = None
    # What computes validation AP: pycocotools, or hotcoco (pip install 'linework[fast]'), equal and faster.
    coco_engine: Engine = "pycocotools"

    # Processes that cut windows, per rank.
    workers: int = 2
    seed: int = 0
    # auto, cpu or cuda.
    device: str = "auto"
    # auto (bf16 on a GPU), fp32 or bf16; losses are float32.
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    # Seconds between checkpoints; there is one before each validation besides.
    checkpoint_every: float = 600.0
    # Checkpoints kept.
    keep: int = 3
    # Seconds a step may take before the run is ended as hung.
    step_timeout: float = 600.0
    # Steps between lines of metrics.jsonl.
    log_every: int = 10


def read_splits(data_dir: Path) -> tuple[Split, Split]:
    """Training and validation split. Raises DataError where one is absent or their classes differ."""
    train_split, valid_split = (read_split(find_split(data_dir, name)) for name in ("train", "valid"))
    if train_split.categories != valid_split.categories:
        raise DataError(
            f"{valid_split.folder}: its classes are not those of {train_split.folder}; export them together"
        )
    return train_split, valid_split


def fresh_detector(
    split: Split, backbone: str, arch: str | None, seed: int, **choices: Any
) -> tuple[Detector, str]:
    """A detector planned from the sheets, on its backbone; and what there is to say about both.

    choices: see plan_detector. Raises UserError for a backbone that doesn't fit.
    """
    tensors, meta = read_pretrained(backbone)
    known = meta.get("arch", arch or "resnet50")
    if arch not in (None, known):
        raise UserError(f"--arch {arch}: {backbone} is a {known}; leave --arch away")
    spec = plan_detector(split, meta, arch=known, **choices)
    torch.manual_seed(seed)
    detector = Detector(spec)
    audit = load_backbone(detector, tensors, backbone) if tensors else "backbone: random weights"
    return detector, f"{audit}\n{describe(spec, split.sheets)}"


def choose_norm(norm: str, backbone: str, world: World) -> str:
    """ "auto" made "sync" or "group"."""
    on_cpus = world.size > 1 and world.device.type == "cpu"
    return norm if norm != "auto" else "group" if on_cpus or backbone == "none" else "sync"


def refuse_unsynced(norm: str, world: World) -> None:
    """Raise UserError where BatchNorm would have to be synced over CPU processes."""
    if norm == "sync" and world.size > 1 and world.device.type == "cpu":
        raise UserError(
            f"--norm sync: {world.size} CPU processes can't sync BatchNorm; give --norm group, or resume in "
            "one process what was begun in one"
        )


def build_optimizer(detector: Detector, momentum: float, wd: float, predictor_lr: float) -> torch.optim.SGD:
    """SGD over what is trained; a group's `factor` is its share of the learning rate."""
    predictor = set(detector.roi_heads.box_predictor.parameters())
    trained = [p for p in detector.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p not in predictor], "factor": 1.0},
        {"params": [p for p in trained if p in predictor], "factor": predictor_lr},
    ]
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum, weight_decay=wd)


def begin(
    detector: Detector, state: dict[str, Any] | None, world: World,
    *, freeze_stages: int, momentum: float, wd: float, predictor_lr: float, ema_decay: float,
) -> Progress:  # fmt: skip
    """The detector on its device with optimizer, guard and averaged weights, anew or as `state` left them."""
    if detector.spec.norm == "sync" and world.size > 1:
        detector = convert_sync_batchnorm(detector)
    detector.to(world.device, memory_format=torch.channels_last).train()
    detector.backbone.freeze(freeze_stages)
    ema = ModelEmaV3(detector, ema_decay, use_warmup=True) if ema_decay else None
    progress = Progress(detector, build_optimizer(detector, momentum, wd, predictor_lr), Guard(), ema)
    if state:
        progress.restore(state)
        progress.guard = Guard(**state["guard"])
        progress.phases = [Phase(**phase) for phase in state["phases"]]
    return progress


def length_of(exp_dir: Path, patience: int, total: int) -> int:
    """Steps after which the run counts as finished: `total`, or fewer where its patience (in steps) ran out.

    Its last checkpoint, if it is kept at all, is from before its last validation: model.pt knows the best.
    """
    if patience and (exp_dir / "final.json").exists():
        step = checkpoint.check_final(exp_dir)["step"]
        if out_of_patience(checkpoint.read(exp_dir / "model.pt"), step, patience):
            return min(step, total)
    return total


def main(config: Config) -> None:
    world = distributed.start(config.device, rendezvous=config.exp_dir)
    distributed.per_rank(config.batch_size, world)
    configuration.refuse_outside(config, LIMITS)
    if config.freeze_stages and config.backbone == "none":
        raise UserError(f"--freeze-stages {config.freeze_stages}: random weights would stay random; give 0")
    configuration.refuse_changes(config, config.exp_dir, FREE)
    coco_classes(config.coco_engine)
    norm = choose_norm(config.norm, config.backbone, world)
    refuse_unsynced(norm, world)
    splits = read_splits(config.data_dir)
    build = functools.partial(
        fresh_detector, splits[0], config.backbone, config.arch, config.seed,
        norm=norm, head=config.head, fpn_channels=config.fpn_channels, window=config.window,
        overlap=config.overlap, detections=config.detections_per_image,
        score_threshold=config.score_threshold,
    )  # fmt: skip
    # Whatever is wrong with the input shows before the exp-dir is touched.
    fresh = None if checkpoint.listed(config.exp_dir / "checkpoints") else build()
    run = Run(
        config.exp_dir, world, checkpoint_every=config.checkpoint_every, keep=config.keep,
        step_timeout=config.step_timeout,
    )  # fmt: skip
    with run:
        state = run.resume()
        detector, story = (Detector(Spec.from_dict(state["spec"])), "") if state else fresh or build()
        spec = detector.spec
        if spec.categories != tuple((c.id, c.name) for c in splits[0].categories):
            raise UserError(f"--data-dir {config.data_dir}: {config.exp_dir} was begun with other classes")
        refuse_unsynced(spec.norm, world)
        readers = [SheetReader(split, spec.color_mode).preload() for split in splits]
        augment = Augment(True, config.scale_jitter, config.photometric, config.flip, config.rot90)
        windows = TrainingWindows(
            readers[0], spec.window, spec.overlap, config.seed, augment, config.negatives, config.repeat
        )
        per_epoch = steps_per_epoch(windows, config.batch_size)
        total = config.epochs * per_epoch if config.steps is None else config.steps
        patience = config.patience * per_epoch
        if run.finished(length_of(config.exp_dir, patience, total)):
            return
        if world.main:
            configuration.save(config, config.exp_dir / "config.json")

        progress = begin(
            detector, state, world, freeze_stages=config.freeze_stages, momentum=config.momentum,
            wd=config.wd, predictor_lr=config.predictor_lr, ema_decay=config.ema_decay,
        )  # fmt: skip
        if state is None:  # something to go back to, and a full disk shows before the first step
            run.save(0, progress.state, wait=True)
        wanted = Phase(
            0, config.lr, config.scheduler, config.lr_step_size * per_epoch, config.lr_gamma, total
        )
        progress.phases = continue_phases(progress.phases, wanted, progress.step)

        journal = Journal(config.exp_dir, world, total, progress.step, every=config.log_every)
        journal.message(story or f"going on at step {progress.step}")
        journal.message(f"{len(windows)} windows and {per_epoch} steps an epoch, {total} steps in all")
        progress.pending |= progress.step >= total
        train_to(
            total, windows, config.batch_size, config.workers, progress, world,
            Boundary(
                progress, run, journal, world, readers[1], per_epoch, total, config.validate_every,
                patience, config.coco_engine,
            ),
            lr=functools.partial(lr_at, phases=progress.phases, warmup=min(config.warmup_steps, total // 10)),
            bf16=config.precision == "bf16" or (config.precision == "auto" and world.device.type == "cuda"),
            clip_grad=config.clip_grad,
        )  # fmt: skip
        run.finish(progress.step, progress.state, ["model.pt", "last.pt"])
        journal.close()
    distributed.stop()


if __name__ == "__main__":
    configuration.run(Config, main, expected=(DataError,))
