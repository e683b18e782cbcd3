"""The flags that all probes of a frozen backbone share."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.config import LARGEST_SEED, Config, setting
from cluster.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(Config):
    # Folder with a folder for each split, and in that a folder for each class: crops of schematics.symbols.
    data_dir: Path
    # Split whose labels are used to classify others.
    train_split: str = "train"
    # Split whose crops are classified.
    test_split: str = "test"
    # Architecture by its name in timm, of weights whose file does not tell it; by default resnet50 then.
    arch: str | None = None
    # Side in pixels to which crops are scaled; by default that of pretraining.
    image_size: int | None = setting(None, least=1)
    # What intervals draw again: sheets, which crops are named after, or crops where names say nothing.
    resample: Literal["sheets", "crops"] = "sheets"
    # Number of resamples for the intervals.
    resamples: int = setting(1000, least=1)
    # Number from which the random weights and all that is drawn come.
    seed: int = setting(0, least=0, most=LARGEST_SEED)
    # Processes that read images.
    workers: int = setting(2, least=0)
    # Where to compute: auto (a GPU if there is one), cpu, cuda, or one GPU as cuda:1.
    device: str = "auto"

    @property
    def seeing(self) -> dict[str, Any]:
        """The arguments of `baselines.open_crops` that are flags of every probe."""
        names = ("data_dir", "arch", "image_size", "resample", "seed", "device", "workers")
        return {name: getattr(self, name) for name in names}

    @property
    def settings(self) -> dict[str, Any]:
        """The flags as JSON has them."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


def refuse_test_among(train_split: str, valid_split: str | None, test_split: str) -> None:
    """Raise UserError if labels that are fitted to, or by which something is chosen, are tested on."""
    if test_split == train_split:
        raise UserError(f"--test-split {test_split}: it is also the --train-split; give another")
    if test_split == valid_split:
        raise UserError(
            f"--valid-split {test_split}: it is also the --test-split; give the --train-split for "
            "cross-validation over its sheets"
        )
