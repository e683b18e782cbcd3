"""Judge a frozen backbone by how well the nearest neighbours of a symbol tell its class. Nothing is trained.

    python -m schematics.symbols DATA crops
    python evaluate/knn.py --checkpoint RUN/backbone.safetensors --data-dir crops --out knn

The k crops of the train split with the most similar features vote for the class of a test crop (Wu et al.,
arXiv 1805.01978). The command prints top-1, top-5 and the mean of the accuracies of the classes, each with a
95 % interval of the bootstrap over sheets, and the same of two baselines: raw 16 x 16 pixels, and random
weights of the same architecture. DIR of --out gets knn.json and confusion.png.

With OMP_NUM_THREADS=1 on one x86-64 core, a ResNet-18 at 64 px and its baselines take 40 s of CPU for 3,030
crops of firefighting devices.
"""

from dataclasses import dataclass
from pathlib import Path

from cluster.config import setting
from cluster.entry import run
from pretraining.probe_config import ProbeConfig, refuse_test_among


@dataclass(frozen=True, kw_only=True)
class KnnConfig(ProbeConfig):
    # Backbone to judge: backbone.safetensors of a pretraining run, or weights that docs/weights.md lists.
    checkpoint: Path
    # Number of neighbours that vote.
    k: int = setting(20, least=1)
    # Folder for knn.json and confusion.png; by default nothing is written.
    out: Path | None = None


def main(config: KnnConfig) -> None:
    # Imported here, so that --help and wrong flags are answered before torch is loaded.
    from cluster import atomic
    from pretraining.baselines import open_crops
    from pretraining.judgement import Judgement, judge, report, write_judgements
    from pretraining.plots import plot_confusion
    from pretraining.probe import knn_votes, unseen

    train, test = splits = config.train_split, config.test_split
    refuse_test_among(train, None, test)
    crops = open_crops([config.checkpoint], splits, **config.seeing)
    judged, missed = {}, ""
    for one in crops.representations:
        seen = crops.features(one)
        features, labels = seen[test]
        votes = knn_votes(*seen[train], features, len(crops.classes), config.k)
        judged[one] = judge(votes, labels, crops.sheets[test], crops.classes, config.resamples)
        missed = unseen(seen[train][1], labels, crops.classes)
    print(f"kNN, {config.k} neighbours among {len(crops.sheets[train])} crops of {train}, tested on {test}")
    print(report({one.name: each for one, each in judged.items()}, crops.sheets[test], config.resample))
    if missed:
        print(missed)
    if config.out:
        atomic.make_folder(config.out)
        by_kind: dict[str, Judgement] = {one.kind: each for one, each in judged.items()}
        write_judgements(config.out / "knn.json", by_kind, crops.sheets[test], config.settings)
        plot_confusion(config.out / "confusion.png", by_kind["weights"].confusion, crops.classes)
        print(f"{config.out}: knn.json, confusion.png")


if __name__ == "__main__":
    run(KnnConfig, main)
