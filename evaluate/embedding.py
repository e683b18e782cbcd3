"""Show what a frozen backbone takes to be alike: a t-SNE picture by class, and the neighbours of crops.

    python -m schematics.symbols DATA crops
    python evaluate/embedding.py --checkpoint RUN/backbone.safetensors --data-dir crops --out embedding

embedding.png has the crops of the test split by t-SNE (van der Maaten and Hinton 2008) of the backbone's
features, of raw 16 x 16 pixels and of random weights of the same architecture. neighbours.html, one file that
loads nothing, has each of those crops beside the most similar ones of the train split. embedding.json says
how often the nearest one is of the same class, as linear.json does.
"""

from dataclasses import dataclass
from pathlib import Path

from cluster.config import setting
from cluster.entry import run
from pretraining.probe_config import ProbeConfig, refuse_test_among


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig(ProbeConfig):
    # Backbone to look into: backbone.safetensors of a pretraining run, or weights that docs/weights.md lists.
    checkpoint: Path
    # Split among whose crops the neighbours are.
    train_split: str = "train"
    # Split whose crops are shown.
    test_split: str = "test"
    # Number of neighbours that are shown of each crop.
    k: int = setting(8, least=1)
    # Largest number of crops that are shown; of more, evenly spaced ones are taken.
    most: int = setting(500, least=4)
    # Folder for embedding.png, neighbours.html and embedding.json.
    out: Path = Path("embedding")


def main(config: EmbeddingConfig) -> None:
    # Imported here, so that --help and wrong flags are answered before torch is loaded.
    from cluster import atomic
    from pretraining.baselines import open_crops
    from pretraining.embedding import evenly, tsne, write_neighbours
    from pretraining.judgement import Judgement, judge, report, write_judgements
    from pretraining.plots import plot_embeddings
    from pretraining.probe import knn_votes, neighbours, unseen

    train, test = splits = config.train_split, config.test_split
    refuse_test_among(train, None, test)
    crops = open_crops([config.checkpoint], splits, **config.seeing)
    shown = evenly(len(crops.sheets[test]), config.most)
    judged, maps, near, missed = {}, {}, {}, ""
    for one in crops.representations:
        seen = crops.features(one)
        (x, y), (features, labels) = seen[train], seen[test]
        votes = knn_votes(x, y, features, len(crops.classes), k=1)
        judged[one] = judge(votes, labels, crops.sheets[test], crops.classes, config.resamples)
        maps[one.name] = tsne(features[shown], config.seed), labels[shown].tolist()
        near[one.kind] = neighbours(x, features[shown], config.k)
        missed = unseen(y, labels, crops.classes)
    print(f"the nearest crop of {train} is of the same class, for crops of {test}")
    print(report({one.name: each for one, each in judged.items()}, crops.sheets[test], config.resample))
    if missed:
        print(missed)
    atomic.make_folder(config.out)
    by_kind: dict[str, Judgement] = {one.kind: each for one, each in judged.items()}
    write_judgements(config.out / "embedding.json", by_kind, crops.sheets[test], config.settings)
    plot_embeddings(config.out / "embedding.png", maps, crops.classes)
    page = config.out / "neighbours.html"
    write_neighbours(page, crops, splits, shown, near["weights"], str(config.checkpoint))
    print(f"{config.out}: embedding.png, neighbours.html, embedding.json; {len(shown)} crops shown")


if __name__ == "__main__":
    run(EmbeddingConfig, main)
