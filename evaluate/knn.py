"""How well a frozen backbone tells classes apart: a vote of nearest neighbours, nothing is trained.

    python -m schematics.symbols DATA crops
    python evaluate/knn.py --checkpoint RUN/backbone.safetensors --data-dir crops

Prints the top-1 accuracy and its mean over classes (Wu et al., arXiv 1805.01978).
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.config import run
from pretraining.features import split_features
from pretraining.probe import accuracy, knn_predict
from schematics.sheets import DataError


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    # backbone.safetensors of a pretraining run.
    checkpoint: Path
    # Folder with one folder a split, and in it one a class.
    data_dir: Path
    # Split whose crops vote.
    train_split: str = "train"
    # Split whose crops are told apart.
    test_split: str = "test"
    # Neighbours that vote.
    k: int = 20
    # Side in pixels to which crops are brought; default: that of pretraining.
    image_size: int | None = None
    # Processes that read images.
    workers: int = 2
    # cpu or cuda.
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def main(config: KnnConfig) -> None:
    classes, (train, test) = split_features(
        config.checkpoint, config.data_dir, [config.train_split, config.test_split],
        config.image_size, config.device, config.workers,
    )  # fmt: skip
    top1, mean = accuracy(knn_predict(*train, test[0], len(classes), config.k), test[1])
    counts = f"{len(test[1])} crops, {len(classes)} classes, k {config.k}"
    print(f"kNN top-1 {top1:.4f}  mean over classes {mean:.4f}  ({counts})")


if __name__ == "__main__":
    run(KnnConfig, main, expected=(DataError,))
