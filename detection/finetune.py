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

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3

from cluster import checkpoint, distributed, entry
from cluster import config as configuration
from cluster.batches import Batches
from cluster.config import RunConfig, setting
from cluster.distributed import World
from cluster.errors import UserError
from cluster.guard import Guard
from cluster.journal import Journal
from cluster.lifecycle import Run
from cluster.training import GuardedStep, begin, parallel, train_guarded
from cluster.weights import read_weights
from detection.classes import boxes_by_class
from detection.data import Augment, SheetReader, TrainingWindows, collate, steps_per_epoch
from detection.loop import Boundary, Progress, train
from detection.metrics.matching import Engine, coco_classes
from detection.model import Detector, Spec
from detection.plan import describe, plan_detector
from detection.pretrained import fill_backbone
from detection.schedule import Phase, continue_phases, lr_at
from detection.validation import out_of_patience
from schematics import draws
from schematics.coco import Split, find_split, losses, read_split


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
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
    fpn_channels: int = setting(256, least=1)
    # Stages of the backbone kept as pretrained: 1 freezes it up to stride 4, 4 all of it.
    freeze_stages: int = setting(0)

    # Passes over the windows with symbols, in all.
    epochs: int = 20
    # Windows in a batch over all ranks together; the number of ranks must divide it.
    batch_size: int = 8
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

    # Side of a window in sheet pixels, a multiple of 64; by default fitted to the sheets.
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
    detections_per_image: int | None = setting(None, least=1)
    # Program that computes validation AP: pycocotools, or hotcoco, which gives the same figures faster
    # (pip install 'linework[fast]').
    coco_engine: Engine = setting("pycocotools", may_change=True)

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
            "window": self.window,
            "overlap": self.overlap,
            "detections": self.detections_per_image,
            "score_threshold": self.score_threshold,
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
    detector = Detector(spec)
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


def main(config: FinetuneConfig) -> None:
    world = distributed.start(**config.joining)
    distributed.per_rank(config.batch_size, world)
    configuration.refuse_changes(config, config.exp_dir)
    coco_classes(config.coco_engine)
    norm = choose_norm(config.norm, config.backbone, world)
    refuse_unsynced(norm, world)
    splits = read_splits(config.data_dir)
    for line in filter(None, map(losses, splits)):
        if world.main:
            print(line, flush=True)

    def build() -> tuple[Detector, str]:
        return fresh_detector(
            splits[0], config.backbone, config.arch, config.seed, norm=norm, **config.choices
        )

    # A new detector is built before the exp-dir is touched, so that bad input leaves no folder behind.
    fresh = None if checkpoint.listed(config.exp_dir / "checkpoints") else build()
    with Run(config.exp_dir, world, **config.saving) as run:
        saved = run.resume()
        detector, story = (Detector(Spec.from_dict(saved["spec"])), "") if saved else fresh or build()
        refuse_other_classes(detector.spec, splits[0], config.data_dir, config.exp_dir)
        refuse_unsynced(detector.spec.norm, world)
        augment = Augment(True, config.scale_jitter, config.photometric, config.flip, config.rot90)
        readers = [SheetReader(split, detector.spec.color_mode).preload() for split in splits]
        side, overlap = detector.spec.window, detector.spec.overlap
        windows = TrainingWindows(
            readers[0], side, overlap, config.seed, augment, config.negatives, config.repeat
        )
        per_epoch = steps_per_epoch(windows, config.batch_size)
        total = config.epochs * per_epoch if config.steps is None else config.steps
        patience_steps = config.patience * per_epoch
        if run.finished(length_of(config.exp_dir, patience_steps, total)):
            return
        if world.main:
            configuration.save(config, config.exp_dir / "config.json")

        detector = put_on_device(detector, world, config.freeze_stages)
        optimizer = build_optimizer(detector, config.momentum, config.weight_decay, config.predictor_lr)
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

        journal = Journal(config.exp_dir, world, total, progress.step, config.log_every, config.batch_size)
        journal.message(story or f"going on at step {progress.step}")
        if saved and saved.get("draws") != draws.VERSION:
            journal.message(draws.CHANGED)
        if begun and progress.phases != begun:
            rates = [lr_at(progress.step, phases, 0) for phases in (begun, progress.phases)]
            journal.message(
                f"a new phase of the learning rate begins at step {progress.step}: "
                f"{rates[1]:.4g} where it was {rates[0]:.4g}"
            )
        journal.message(f"{len(windows)} windows and {per_epoch} steps an epoch, {total} steps in all")
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
        order = functools.partial(windows.order, at_least=config.batch_size)
        batches = Batches(windows, order, per_epoch, config.batch_size, world, config.workers, collate)

        def train_on(rest: Iterable[tuple[int, Any]]) -> None:
            if not progress.pending or boundary.validate():
                train(model, guarded, rest, journal, boundary)

        train_guarded(train_on, batches, progress.guard, run, journal, progress.restore, progress.step, total)
        run.finish(progress.step, progress.state, ["model.pt", "last.pt"])
        journal.close()
    distributed.stop()


if __name__ == "__main__":
    entry.run(FinetuneConfig, main)
