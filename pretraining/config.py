"""The flags of pretraining that all methods share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from cluster.config import RunConfig, setting
from cluster.errors import UserError

# What two CPU cores can train in half an hour (docs/results.md); a method adds what it owns.
LAPTOP: dict[str, Any] = {
    "arch": "resnet18",
    "batch_size": 64,
    "image_size": 96,
    "window": 256,
    "minutes": 30,
}


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    presets: ClassVar[dict[str, dict[str, Any]]] = {"laptop": LAPTOP}

    # Defaults for a machine: laptop is a small network and half an hour for a few CPU cores. Flags that are
    # given win.
    preset: Literal["laptop"] | None = setting(None, may_change=True)
    # Pool of unlabelled drawings: a folder (or tree) of images and PDFs, a COCO split, or a packed store.
    data_dir: Path = Path("data/unlabeled")

    # Folder for the pool's decoded windows, which runs on one pool share; by default the one that holds
    # --exp-dir.
    store_dir: Path | None = setting(None, may_change=True)

    # Backbone to go on from, in place of random weights: a backbone.safetensors, or weights of torchvision,
    # timm, VICReg, solo-learn, lightly, MoCo, stable-pretraining or a SimCLR repository. A resumed run has
    # its own weights and doesn't read it again.
    init: Path | None = setting(None)
    # Mean and variance that BatchNorm uses: init, those that the layers of --init hold, which then stay as
    # they are, or batch, those of the pool's batches, which made ImageNet's EfficientNet worse
    # (docs/pretraining.md). By default init with --init.
    statistics: Literal["init", "batch"] | None = setting(None)
    # Backbone by its name in timm; a ResNet's keys are torchvision's. By default the one that --init tells,
    # else resnet50.
    arch: str | None = setting(None)
    # First layers of a ResNet: imagenet as timm has them, or cifar for images of some 32 px: 3 x 3 with
    # stride 1, no max pooling. The architecture is then called resnet18.cifar, and detection can't use it.
    stem: Literal["imagenet", "cifar"] = setting("imagenet", may_change=True)
    # Widths of the projector's layers.
    projector: tuple[int, ...] = setting(least=1)

    # Weight of the dense term, by which local features of two views that show the same place agree
    # (docs/pretraining.md); 0 leaves it out.
    dense_weight: float = setting(0.0, least=0)
    # The dense term reads the deepest feature map whose cells are at most so many pixels of a view apart.
    dense_stride: int = setting(16, least=1)

    # Passes over the pool's windows, in all.
    epochs: int = 100
    # Windows in a batch over all ranks together; the number of ranks must divide it.
    batch_size: int = 256
    # Windows that go through the network at a time on each rank, with the gradient of the whole batch; they
    # must divide a rank's share of it. By default all of them, or as many as the memory takes.
    micro_batch: int | None = setting(None, least=2)

    # Learning rate per 256 windows of the batch; by default the one that the method's authors published, or
    # 1.5e-4 with adamw; with --init a third of it, or 6e-4 with adamw and --statistics init.
    base_lr: float | None = setting(None, least=0)
    # How the batch size B scales the learning rate: linear (base * B / 256) or sqrt (base * sqrt(B) / 4).
    lr_scaling: Literal["linear", "sqrt"] = setting("linear")
    # Epochs of linear warm-up, but at most a tenth of the run; by default 10, or 1 with --init.
    warmup_epochs: float | None = setting(None, least=0)
    # Learning rate at the end of the cosine, as a share of the peak.
    min_lr_ratio: float = setting(0.0, least=0)
    # Optimizer: lars, sgd or adamw; by default lars for a ResNet, and adamw for a network with depthwise
    # convolutions or other norms than BatchNorm, which lars makes worse.
    optimizer: Literal["lars", "sgd", "adamw"] | None = setting(None)
    # Weight decay of all but biases and norm layers, by default 1e-6, or 0.1 with adamw; --wd is taken too.
    weight_decay: float | None = None

    # How a window becomes two views: drawing (line art), or simclr and vicreg (the published photo recipes).
    recipe: Literal["drawing", "simclr", "vicreg"] = setting("drawing")
    # Changes of the recipe that are left out, such as: blur jitter. docs/views.md has the names. The random
    # numbers of the other changes stay what they are.
    without: tuple[str, ...] = setting(())
    # Side of a view in pixels.
    image_size: int = setting(224, least=1)
    # Pixels of the sheet that a drawing view shows at most; by default as many as leave lines a pixel wide.
    view: int | None = setting(None, least=1)
    # Side of a window in pixels of the sheet.
    window: int = setting(512, least=1)
    # Pixels from one window to the next; by default half a window.
    stride: int | None = setting(None, least=1)
    # Factor on the ranges of the color jitter.
    strength: float = setting(1.0, least=0)
    # Mirror and turn views in the drawing recipe too; this erases classes told apart by their orientation.
    orientation: bool = setting(False)
    # Channels of the views: gray, rgb, or auto (gray if every drawing of the pool is).
    color_mode: Literal["auto", "gray", "rgb"] = setting("auto")
    # Resolution in dots per inch at which PDF pages are drawn.
    dpi: int = setting(200, least=1)

    # Epochs from one checkpoint to the next, in addition to those of --checkpoint-every; 0 makes none.
    checkpoint_epochs: int = setting(10, least=0, may_change=True)
    # Epochs from one picture of the embedding in TensorBoard to the next; the last step always draws one.
    embed_every: int = setting(10, least=0, may_change=True)

    # Folder of labelled crops, as schematics.symbols cuts them. The backbone is tried on them at the start,
    # now and then and at the end, and the run says whether it has helped. Crops of train vote on those of
    # valid, or of test where there is no valid; training sees none of them.
    probe_dir: Path | None = setting(None, may_change=True)
    # Epochs from one such trial to the next.
    probe_every: int = setting(10, least=1, may_change=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.statistics == "init" and self.init is None:
            raise UserError("--statistics init: random weights have none to keep; give --init")
        if self.without:
            from schematics.recipes import other_parts  # only here, as it imports OpenCV

            if wrong := other_parts(self.recipe, self.without):
                raise UserError(wrong)

    @property
    def pool(self) -> dict[str, Any]:
        """The arguments of `schematics.store.pack`."""
        named = ("data_dir", "exp_dir", "store_dir", "window", "stride", "color_mode", "dpi")
        return {name: getattr(self, name) for name in named}

    @property
    def views(self) -> dict[str, Any]:
        """The arguments of `Pairs` that flags set."""
        named = ("recipe", "seed", "strength", "orientation", "without")
        own = {"size": self.image_size, "across": self.dense_weight > 0}
        return {**own, **{name: getattr(self, name) for name in named}}

    @property
    def dense(self) -> tuple[int, int] | None:
        """Stride of the dense term's map and side of a view, in px of a view; None without the term."""
        return (self.dense_stride, self.image_size) if self.dense_weight > 0 else None

    @property
    def optimizing(self) -> dict[str, Any]:
        """The arguments of `build_optimizer`."""
        return {"name": self.optimizer, "momentum": self.momentum, "weight_decay": self.weight_decay}

    @property
    def rates(self) -> dict[str, Any]:
        """The arguments of `plan_rate` that flags set."""
        named = ("optimizer", "base_lr", "lr_scaling", "warmup_epochs", "min_lr_ratio")
        onward = {"onward": self.init is not None, "kept": self.statistics == "init"}
        return {**onward, **{name: getattr(self, name) for name in named}}

    @property
    def due(self) -> dict[str, int]:
        """Epochs from one checkpoint, one picture of the embedding and one probe to the next."""
        return {name: getattr(self, name) for name in ("checkpoint_epochs", "embed_every", "probe_every")}
