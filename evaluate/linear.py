"""Judge a frozen backbone by how well a linear layer on its features tells the classes of symbols.

    python -m schematics.symbols DATA crops
    python evaluate/linear.py --checkpoint RUN/backbone.safetensors --data-dir crops --out linear

The features are standardised. For each weight decay of a grid, a multinomial logistic regression is fitted to
the train split, and the one with the best accuracy on valid is taken. The command prints top-1, top-5 and the
mean of the accuracies of the classes on test, each with a 95 % interval of the bootstrap over sheets, and the
same of two baselines: raw 16 x 16 pixels, and random weights of the same architecture. DIR of --out gets
linear.json and confusion.png. `--train-split valid` fits as the firefighting study does (docs/probes.md).

With OMP_NUM_THREADS=1 on one x86-64 core, an EfficientNet-lite0 at 64 px and its baselines take 79 s of CPU
for 3,785 crops of firefighting devices (docs/results.md).
"""

from dataclasses import dataclass
from pathlib import Path

from cluster.config import setting
from cluster.entry import run
from pretraining.probe_config import ProbeConfig, refuse_test_among


@dataclass(frozen=True, kw_only=True)
class LinearConfig(ProbeConfig):
    # Backbone to judge: backbone.safetensors of a pretraining run, or weights that docs/weights.md lists.
    checkpoint: Path
    # Split that the linear layer is fitted to.
    train_split: str = "train"
    # Share of the sheets of --train-split whose crops are fitted to, such as 0.05: drawn by --seed, by class;
    # a smaller share is part of a larger one.
    train_share: float = setting(1.0, least=0.0001, most=1)
    # Split on which the weight decay is chosen; the same as --train-split for cross-validation over sheets.
    valid_split: str = "valid"
    # Weight decays to try, which are factors on the squared norm of the layer's weights.
    weight_decays: tuple[float, ...] = setting((1e-5, 1e-4, 1e-3, 1e-2), least=0)
    # Folder for linear.json and confusion.png; by default nothing is written.
    out: Path | None = None


def main(config: LinearConfig) -> None:
    # Imported here, so that --help and wrong flags are answered before torch is loaded.
    from cluster import atomic
    from pretraining.baselines import open_crops
    from pretraining.judgement import Judgement, judge, report, write_judgements
    from pretraining.plots import plot_confusion
    from pretraining.probe import linear_probe, unseen

    train, valid, test = splits = config.train_split, config.valid_split, config.test_split
    refuse_test_among(*splits)
    shares = {train: config.train_share}
    crops = open_crops([config.checkpoint], splits, **config.seeing, shares=shares)
    judged, decays, missed = {}, {}, ""
    for one in crops.representations:
        seen = crops.features(one)
        features, labels = seen[test]
        chooser = crops.sheets[train] if valid == train else seen[valid]
        probe = linear_probe(seen[train], chooser, features, len(crops.classes), config.weight_decays)
        judged[one] = judge(probe.scores, labels, crops.sheets[test], crops.classes, config.resamples)
        decays[one.kind] = probe.weight_decay
        missed = unseen(seen[train][1], labels, crops.classes)
    how = f"cross-validation over {config.resample}" if valid == train else f"accuracy on {valid}"
    if len(config.weight_decays) == 1:
        how = "--weight-decays"
    print(
        f"linear, fitted to {len(crops.sheets[train])} crops of {train}, tested on {test}; weight decay "
        f"{decays['weights']:g} by {how}"
    )
    print(report({one.name: each for one, each in judged.items()}, crops.sheets[test], config.resample))
    if missed:
        print(missed)
    if config.out:
        atomic.make_folder(config.out)
        settings = config.settings | {"weight_decay": decays, "weight_decay_by": how}
        by_kind: dict[str, Judgement] = {one.kind: each for one, each in judged.items()}
        write_judgements(config.out / "linear.json", by_kind, crops.sheets[test], settings)
        plot_confusion(config.out / "confusion.png", by_kind["weights"].confusion, crops.classes)
        print(f"{config.out}: linear.json, confusion.png")


if __name__ == "__main__":
    run(LinearConfig, main)
