"""The flags of training a classifier of symbols."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.config import RunConfig, setting


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(RunConfig):
    # Folder with a folder for each split, and in that a folder for each class: crops of schematics.symbols.
    data_dir: Path = Path("crops")
    # Folder of this run; the same command again goes on from its newest valid checkpoint.
    exp_dir: Path = Path("checkpoints/classifier")

    # Backbone to start from: backbone.safetensors of a pretraining run, weights that docs/weights.md lists,
    # or none (random weights). A resumed run has its own weights and doesn't read it again.
    checkpoint: str = setting()
    # Architecture by its name in timm, of random weights and of weights whose file does not tell it; by
    # default resnet50 then.
    arch: str | None = setting(None)
    # Keep the backbone as it is, with the statistics of its norm layers, and train the linear head alone.
    freeze: bool = setting(False)

    # Split that is trained on.
    train_split: str = setting("train")
    # Share of the sheets of --train-split whose crops are trained on, such as 0.05: drawn by --seed, by
    # class; a smaller share is part of a larger one.
    train_share: float = setting(1.0, least=0.0001, most=1)
    # Split on which the epoch is chosen whose weights are kept.
    valid_split: str = setting("valid")
    # Split that the kept weights are tested on.
    test_split: str = setting("test")
    # Side in pixels to which crops are scaled; by default that of pretraining, 224 for other weights.
    image_size: int | None = setting(None, least=1)
    # Strength s of the changes of training crops: moved by up to s of their side, seen at 1 / (1 + s) to
    # 1 + s of their size; 0 leaves them as they are.
    augment: float = setting(0.1, least=0, most=1)

    # Passes over the training crops, in all.
    epochs: int = 30
    # Crops in a batch over all ranks together; the number of ranks must divide it. A set with fewer crops
    # repeats some in each batch.
    batch_size: int = setting(64, least=1)
    # Learning rate at the peak, after which it falls to 0 by a cosine.
    lr: float = setting(0.05, least=0)
    # Optimizer: sgd, or adamw, for which --lr should be some 0.001.
    optimizer: Literal["sgd", "adamw"] = setting("sgd")
    # Weight decay of all but biases and norm layers; --wd is taken too.
    weight_decay: float = 0.0005
    # Largest norm of the gradient, to which longer ones are scaled down.
    clip_grad: float | None = 10.0
    # Steps over which the learning rate rises linearly at the start, but at most a tenth of the run.
    warmup_steps: int = setting(20, least=0)

    # What intervals draw again: sheets, which crops are named after, or crops where names say nothing.
    resample: Literal["sheets", "crops"] = setting("sheets", may_change=True)
    # Number of resamples for the intervals.
    resamples: int = setting(1000, least=1, may_change=True)

    @property
    def splits(self) -> tuple[str, str, str]:
        """The names of the folders to train on, to choose the epoch on and to test on."""
        return self.train_split, self.valid_split, self.test_split

    @property
    def beginning(self) -> dict[str, Any]:
        """The arguments of `begin_classifier` that flags set."""
        named = ("checkpoint", "arch", "freeze", "image_size", "data_dir", "splits", "train_share", "seed")
        return {name: getattr(self, name) for name in named}

    @property
    def judging(self) -> dict[str, Any]:
        """The arguments of `write_results` that flags set."""
        return {"resample": self.resample, "resamples": self.resamples, "settings": self.settings}

    @property
    def settings(self) -> dict[str, Any]:
        """The flags as JSON has them."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))
