"""What probes compare, and on which crops: weights, and always beside them raw pixels and random weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from cluster.backbone import Normalise, build_backbone
from cluster.distributed import lone_device
from pretraining.features import ClassFolder, class_features, class_names, frozen, open_weights

PIXELS = 16  # side of the crops whose pixels are features themselves


@dataclass(frozen=True, eq=False)
class Representation:
    """A way to turn crops into features.

    name: for tables. network: in eval mode, uint8 [B, 3, size, size] -> [B, D]. size: of the crops in pixels.
    """

    name: str
    kind: Literal["weights", "raw", "random"]
    network: nn.Module
    size: int
    color_mode: str


def with_baselines(
    files: Sequence[Path], arch: str | None, image_size: int | None, seed: int
) -> tuple[list[Representation], list[str]]:
    """The weights of the files, raw pixels, and random weights of each of their architectures.

    arch: of files that don't tell it. image_size: in place of that of each file's pretraining, in pixels.
    Returns lines too, on how the files were read. Raises UserError as `open_weights` does.
    """
    given, random, stories = [], {}, []
    for file in dict.fromkeys(files):
        network, meta, story = open_weights(file, arch)
        size = image_size or meta["image_size"]
        given.append(Representation(str(file), "weights", network, size, meta["color_mode"]))
        if meta["arch"] not in random:
            random[meta["arch"]] = random_weights(meta, size, seed)
        stories.append(story)
    return [*given, raw_pixels(), *random.values()], stories


def raw_pixels() -> Representation:
    """The 16 x 16 x 3 pixels of a crop themselves, in 0..1."""
    network = nn.Sequential(Normalise((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), nn.Flatten())
    return Representation(f"raw {PIXELS} x {PIXELS} pixels", "raw", network, PIXELS, "rgb")


def random_weights(meta: dict, size: int, seed: int) -> Representation:
    """The architecture of `meta` as a pretraining of this seed begins, which sees crops as `meta` says."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = build_backbone(meta["arch"])
    return Representation(
        f"random {meta['arch']}", "random", frozen(backbone, meta), size, meta["color_mode"]
    )


@dataclass(frozen=True)
class LabelledCrops:
    """The labelled crops of some splits, and the representations that are compared on them.

    folders: by split, the crops. sheets: by split, of each of them what is drawn again for intervals.
    """

    classes: list[str]
    folders: dict[str, ClassFolder]
    sheets: dict[str, list[str]]
    representations: list[Representation]
    device: torch.device
    workers: int

    def features(self, representation: Representation) -> dict[str, tuple[Tensor, Tensor]]:
        """By split, the features [N, D] and the labels int64 [N] of its crops."""
        seen = {}
        for split, folder in self.folders.items():
            folder = folder.seen_at(representation.size, representation.color_mode)
            seen[split] = class_features(representation.network, folder, self.device, self.workers)
        return seen


def open_crops(
    files: Sequence[Path],
    splits: Sequence[str],
    data_dir: Path,
    arch: str | None,
    image_size: int | None,
    resample: str,
    seed: int,
    device: str,
    workers: int,
    shares: Mapping[str, float] | None = None,
) -> LabelledCrops:
    """Open the crops of all splits and the weights of the files, beside their baselines; says what was read.

    resample: what intervals draw again, sheets or crops. shares: by split, what share of its sheets is
    labelled, all of them if not named. The others as for `with_baselines` and `lone_device`. Raises UserError
    and DataError as these, `class_names` and `ClassFolder` do.
    """
    classes = class_names(data_dir, list(dict.fromkeys(splits)))
    folders = {split: ClassFolder(data_dir / split, classes, PIXELS, "gray") for split in splits}
    drawn = [folders[split].take_share(share, seed) for split, share in (shares or {}).items()]
    sheets = {split: folder.drawn_again(resample) for split, folder in folders.items()}
    representations, stories = with_baselines(files, arch, image_size, seed)
    print("\n".join([*stories, *filter(None, drawn)]), flush=True)
    return LabelledCrops(classes, folders, sheets, representations, lone_device(device), workers)
