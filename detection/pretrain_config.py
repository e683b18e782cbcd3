"""The flags of pretraining a detector on unlabelled drawings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from cluster.config import RunConfig, setting
from cluster.errors import UserError
from detection.spec import MOST_CHANNELS, MOST_PIXELS

# What a few CPU cores can train in half an hour; the network is the backbone's.
LAPTOP: dict[str, Any] = {"fpn_channels": 128, "batch_size": 8, "warmup_steps": 20, "minutes": 30}
STEP = 128  # px; the side of a view is a multiple of this, so that half of it fits the pyramid


@dataclass(frozen=True, kw_only=True)
class InkConfig(RunConfig):
    presets: ClassVar[dict[str, dict[str, Any]]] = {"laptop": LAPTOP}

    # Defaults for a machine: laptop is a narrow pyramid, batches of 8 and half an hour, for a few CPU cores.
    # Flags that are given win.
    preset: Literal["laptop"] | None = setting(None, may_change=True)
    # Pool of unlabelled drawings: a folder (or tree) of images and PDFs, a COCO split, or a packed store;
    # --unlabeled is taken too.
    data_dir: Path = setting(Path("data/unlabeled"), may_change=True, exists=True, also="--unlabeled")
    # Folder of this run; the same command again goes on from its newest valid checkpoint.
    exp_dir: Path = Path("checkpoints/ink")
    # Folder for the pool's decoded windows, which runs on one pool share; by default the one that holds
    # --exp-dir.
    store_dir: Path | None = setting(None, may_change=True)
    # Backbone to start from: backbone.safetensors of a finished pretraining, a .pth with torchvision's keys,
    # or none (random weights).
    backbone: str = setting("checkpoints/vicreg/backbone.safetensors", may_change=True, exists=True)

    # Name of the backbone in timm; by default the one that backbone.safetensors names, else resnet50.
    arch: str | None = setting(None)
    # Norm layers: sync (BatchNorm, synced over GPUs), group (GroupNorm), or auto, as in finetuning.
    norm: Literal["auto", "sync", "group"] = setting("auto")
    # Head on each proposal: mlp or conv, as in finetuning, which must be given the same.
    head: Literal["mlp", "conv"] = setting("mlp")
    # Channels of the feature pyramid; finetuning must be given the same.
    fpn_channels: int = setting(256, least=1, most=MOST_CHANNELS)

    # Passes over the pool's windows, in all.
    epochs: int = 20
    # Windows in a batch over all ranks together; the number of ranks must divide it.
    batch_size: int = setting(16, least=1)
    # Learning rate at the peak, from where it falls to 0 by a cosine.
    lr: float = setting(0.01, least=0)
    # Weight decay (L2) of all weights; --wd is taken too.
    weight_decay: float = 0.0001
    # Steps over which the learning rate rises linearly at the start, but at most a tenth of the run.
    warmup_steps: int = setting(100, least=0)
    # Largest norm of the gradient, to which longer ones are scaled down.
    clip_grad: float = 10.0
    # Temperature of the cosine similarities between the embeddings of boxes.
    temperature: float = setting(0.1, least=1e-6)
    # Weight of the loss that makes the features of a box agree between its views.
    contrast: float = setting(1.0, least=0)
    # Weight of the losses of the RPN, which learns to propose the boxes.
    propose: float = setting(1.0, least=0)

    # Side of a view in pixels, a multiple of 128.
    image_size: int = setting(256, least=STEP, most=MOST_PIXELS)
    # Side of a window in pixels of the sheet; by default as much as a view may show.
    window: int | None = setting(None, least=1)
    # Pixels from one window to the next; by default half a window.
    stride: int | None = setting(None, least=1)
    # Strength s of the scale jitter: a view shows 1 / (1 + s) to 1 + s times its own side of the sheet.
    scale_jitter: float = setting(0.5, least=0)
    # Factor on the ranges of the color jitter.
    strength: float = setting(1.0, least=0)
    # Boxes of a window whose features are compared, at most.
    boxes: int = setting(8, least=1)
    # Channels of the views: gray, rgb, or auto (gray if every drawing of the pool is).
    color_mode: Literal["auto", "gray", "rgb"] = setting("auto")
    # Resolution in dots per inch at which PDF pages are drawn.
    dpi: int = setting(200, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % STEP:
            raise UserError(f"--image-size {self.image_size}: give a multiple of {STEP}")
        if not self.contrast + self.propose:
            raise UserError("--contrast 0 --propose 0: nothing would be trained; give one of them")

    @property
    def side(self) -> int:
        """Side of a window, px."""
        return self.window or round(self.image_size * (1 + self.scale_jitter))

    @property
    def pool(self) -> dict[str, Any]:
        """The arguments of `schematics.store.pack`."""
        named = ("data_dir", "exp_dir", "store_dir", "stride", "color_mode", "dpi")
        return {"window": self.side, **{name: getattr(self, name) for name in named}}

    @property
    def views(self) -> dict[str, Any]:
        """The arguments of `InkViews` that flags set."""
        named = {"size": self.image_size, "scale": self.scale_jitter, "count": self.boxes}
        return {**named, "seed": self.seed, "strength": self.strength}

    @property
    def network(self) -> dict[str, Any]:
        """The arguments of `build` that flags set."""
        named = ("backbone", "arch", "head", "fpn_channels", "image_size", "seed")
        return {name: getattr(self, name) for name in named}
