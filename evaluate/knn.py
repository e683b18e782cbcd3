"""Judge a frozen backbone by how well the nearest neighbours of a symbol tell its class. Nothing is trained.

    python -m schematics.symbols DATA crops
    python evaluate/knn.py --checkpoint RUN/backbone.safetensors --data-dir crops

The k crops of the train split with the most similar features vote for the class of a test crop (Wu et al.,
arXiv 1805.01978). The command prints the top-1 accuracy, and the mean of the accuracies of the classes, and
names the classes that test has and train lacks.

On two x86-64 cores with OMP_NUM_THREADS=1, a ResNet-18 at 64 px takes 17 s for 3,030 crops of
firefighting devices. Random weights reach top-1 0.68 there, the backbone that `make demo` pretrains on
synthetic sheets for 50 steps 0.83 (one seed).
"""

from dataclasses import dataclass
from pathlib import Path

from cluster.config import Config, setting
from cluster.entry import run


@dataclass(frozen=True, kw_only=True)
class KnnConfig(Config):
    # Backbone to judge: backbone.safetensors of a pretraining run.
    checkpoint: Path
    # Folder with a folder for each split, and in that a folder for each class.
    data_dir: Path
    # Split whose crops are the neighbours that vote.
    train_split: str = "train"
    # Split whose crops are classified.
    test_split: str = "test"
    # Number of neighbours that vote.
    k: int = setting(20, least=1)
    # Side in pixels to which crops are scaled; by default that of pretraining.
    image_size: int | None = setting(None, least=1)
    # Processes that read images.
    workers: int = setting(2, least=0)
    # Where to compute: auto (a GPU if there is one), cpu, cuda, or one GPU as cuda:1.
    device: str = "auto"


def main(config: KnnConfig) -> None:
    # Imported here, so that --help and wrong flags are answered before torch is loaded.
    from cluster import distributed
    from pretraining.features import split_features
    from pretraining.probe import accuracy, knn_predict, unseen

    device = distributed.lone_device(config.device)
    classes, (train, test) = split_features(
        config.checkpoint,
        config.data_dir,
        [config.train_split, config.test_split],
        config.image_size,
        device,
        config.workers,
    )
    top1, mean = accuracy(knn_predict(*train, test[0], len(classes), config.k), test[1])
    counts = f"{len(test[1])} crops, {len(classes)} classes, k {config.k}"
    print(f"kNN top-1 {top1:.4f}  mean over classes {mean:.4f}  ({counts})")
    if missed := unseen(train[1], test[1], classes):
        print(missed)


if __name__ == "__main__":
    run(KnnConfig, main)
