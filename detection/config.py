"""The flags of finetuning."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from cluster.config import RunConfig, setting
from cluster.errors import UserError
from detection.metrics.engines import Engine
from detection.schedule import Phase
from detection.spec import MOST_BOXES, MOST_CHANNELS, MOST_PIXELS

# What a few CPU cores can train in half an hour; network and window are the backbone's and the sheets'.
LAPTOP: dict[str, Any] = {
    "fpn_channels": 128,
    "batch_size": 4,
    "lr": 0.01,
    "scheduler": "cosine",
    "warmup_steps": 20,
    "minutes": 30,
}

TEACHER_DECAY = 0.999  # of the average that teaches, unless --ema-decay says otherwise


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
    # Folder for the packed sheets of a set that is too large for memory (1 GiB decoded), which runs on the
    # same sheets share; by default the one that holds --exp-dir.
    store_dir: Path | None = setting(None, may_change=True)
    # Backbone to start from: backbone.safetensors of a finished pretraining, a .pth with torchvision's keys,
    # or none (random weights).
    backbone: str = setting(
        "checkpoints/vicreg/backbone.safetensors", may_change=True, exists=True, unless="--grow"
    )

    # Detector (model.pt) to go on from, in place of a backbone: classes of the same name keep their weights,
    # others are added or dropped. Architecture, anchors and scale are its own. --from is taken too.
    grow: Path | None = setting(None, also="--from")
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
    # keeps no average, or with --unlabeled that of 0.999.
    ema_decay: float = setting(0.0, least=0, most=1)
    # Epochs without a rise of validation AP after which the run ends; 0 never ends it early.
    patience: int = setting(0, least=0, may_change=True)

    # Seconds from one checkpoint to the next; there is also one before each validation.
    checkpoint_every: float = 600.0

    # Share of the labelled training sheets to train on, such as 0.05: drawn by --seed, by class; a smaller
    # share is part of a larger one.
    train_share: float = setting(1.0, least=0.0001, most=1)
    # Size at which sheets are seen, such as 0.5 for half of it, in training and by the detector ever after.
    scale: float = setting(1.0, least=0.01, most=1)
    # Side of a window in pixels of the scaled sheet, a multiple of 64; by default fitted to the sheets, and
    # to the memory if that is short.
    window: int | None = setting(None, most=MOST_PIXELS)
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
    # Labelled symbols of other sheets that are laid on a window at most, on blank paper or in wires; rare
    # classes come more often (arXiv 2012.07177); 0 is off.
    paste: int = setting(0, least=0)
    # Windows without symbols that an epoch has at most for each window with symbols.
    negatives: float = setting(0.5, least=0)
    # Threshold t of repeat-factor sampling, which shows rare classes more often (arXiv 1908.03195); 0 is off.
    repeat: float = setting(0.0, least=0, most=1)

    # Folder of unlabelled sheets. After --burn-in the averaged detector labels windows of them, and what it
    # is sure of is learnt on changed ones (arXiv 2102.09480). Labels there are measured with, no more.
    unlabeled: Path | None = setting(None, may_change=True)
    # Windows of these in a step beside --batch-size, over all ranks together; by default as many.
    unlabeled_batch: int | None = setting(None, least=1)
    # Weight of the losses on them.
    unlabeled_weight: float = setting(1.0, least=0)
    # Share of the run that is trained without --unlabeled at first.
    burn_in: float = setting(0.3, least=0.001, most=0.999)

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
    def beginning(self) -> dict[str, Any]:
        """The arguments of `Beginning` that flags set."""
        named = ("backbone", "grow", "arch", "seed", "window", "batch_size", "precision", "choices")
        facts = {"averaged": self.decay > 0, "unlabelled": self.unlabelled}
        return {**facts, **{name: getattr(self, name) for name in named}}

    @property
    def decay(self) -> float:
        """Of the average of the weights; 0 keeps none."""
        return self.ema_decay or (TEACHER_DECAY if self.unlabeled else 0.0)

    def teaching(self, steps: int) -> tuple[float, int] | None:
        """The weight of the losses on unlabelled windows, and the steps before them; None without these."""
        return (self.unlabeled_weight, max(1, round(self.burn_in * steps))) if self.unlabeled else None

    @property
    def validating(self) -> dict[str, Any]:
        """The arguments of `Boundary` that flags set."""
        return {
            "validate_every": self.validate_every,
            "engine": self.coco_engine,
            "compiled": self.compile,
        }

    @property
    def pool(self) -> dict[str, Any]:
        """The arguments of `beside` that flags set."""
        size = self.unlabelled(self.batch_size or 0)
        return {"folder": self.unlabeled, "size": size, "store_dir": self.store}

    def unlabelled(self, batch: int) -> int:
        """Unlabelled windows in a step beside a batch of so many, over all ranks together."""
        return (self.unlabeled_batch or batch) if self.unlabeled else 0

    @property
    def augmenting(self) -> dict[str, Any]:
        """The arguments of `Augment` that flags set."""
        named = ("photometric", "flip", "rot90", "paste")
        return {"scale": self.scale_jitter, **{name: getattr(self, name) for name in named}}

    @property
    def optimizing(self) -> dict[str, Any]:
        """The arguments of `build_optimizer`."""
        named = ("momentum", "weight_decay", "predictor_lr")
        return {name: getattr(self, name) for name in named}

    def phase(self, per_epoch: int, stop: int) -> Phase:
        """The course of the learning rate from step 0 to step `stop`, of which an epoch has `per_epoch`."""
        drop = self.lr_step_size * per_epoch
        return Phase(0, self.lr, self.scheduler, drop, self.lr_gamma, stop)

    @property
    def store(self) -> Path:
        """The folder for packed sheets."""
        return self.store_dir or self.exp_dir.parent

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
