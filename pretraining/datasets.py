"""Turn a local copy of CIFAR-10, CIFAR-100 or STL-10 into folders of images: a pool, and crops for probes.

    python -m pretraining.datasets cifar10 COPY OUT
    python -m simclr.pretrain --data-dir OUT/train --probe-dir OUT --arch resnet18 --stem cifar \\
        --recipe simclr --image-size 32 --window 32

COPY is the folder that torchvision reads: cifar-10-batches-py, cifar-100-python or stl10_binary lies in it.
Nothing is downloaded. OUT/train and OUT/test have a folder for each class, OUT/unlabeled holds STL-10's
images without one. Pixels stay as they are (PNG).
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from cluster.config import Config
from cluster.entry import run
from cluster.errors import UserError

SPLITS: dict[str, dict[str, dict[str, Any]]] = {  # what torchvision calls them
    "cifar10": {"train": {"train": True}, "test": {"train": False}},
    "cifar100": {"train": {"train": True}, "test": {"train": False}},
    "stl10": {name: {"split": name} for name in ("train", "test", "unlabeled")},
}
READERS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10"}


@dataclass(frozen=True, kw_only=True)
class DatasetsConfig(Config):
    # The data set (cifar10, cifar100 or stl10), the folder with its local copy, and the folder to write.
    words: Positional[tuple[str, str, str]]


def main(config: DatasetsConfig) -> None:
    # Imported here, so that --help and wrong flags are answered before torch is loaded.
    import numpy as np
    from torchvision import datasets

    from schematics.folders import refuse_existing, whole_folder
    from schematics.sheets import write_png

    name, copy, out = config.words[0], Path(config.words[1]), Path(config.words[2])
    if name not in SPLITS:
        raise UserError(f"{name}: choose {', '.join(SPLITS)}")
    refuse_existing(out)
    counts: Counter[str] = Counter()
    with whole_folder(out) as whole:
        for split, chosen in SPLITS[name].items():
            reader = getattr(datasets, READERS[name])
            try:
                images = reader(str(copy), download=False, **chosen)
            except (RuntimeError, OSError) as error:  # absent, or other bytes than torchvision knows
                place = copy / getattr(reader, "base_folder", "")
                raise UserError(
                    f"{place}: no whole {name} there ({error}); unpack its archive in {copy}"
                ) from None
            folders = [whole / split / label for label in images.classes]
            for folder in folders if split != "unlabeled" else [whole / split]:
                folder.mkdir(parents=True)
            for number in range(len(images)):
                image, label = images[number]
                folder = folders[label] if label >= 0 else whole / split
                write_png(folder / f"{number:06}.png", np.asarray(image))
            counts[split] = len(images)
    for split, count in counts.items():
        print(f"{out / split}: {count} images")


if __name__ == "__main__":
    run(DatasetsConfig, main)
