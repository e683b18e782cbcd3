"""How accurate a linear layer on frozen features is with 1, 2, 5, 10 and all labelled crops of each class.

    python -m schematics.symbols DATA crops
    python evaluate/shots.py --checkpoint RUN/backbone.safetensors OTHER.pth --data-dir crops --out shots

The curves of all backbones, of raw 16 x 16 pixels and of random weights come into one plot: shots.png, with
shots.csv and shots.json beside it. A figure is the mean of ten draws of labelled crops, the same ones for
every curve; its 95 % interval is of a bootstrap over the test sheets and the draws together, and so is that
of its difference to the first backbone. The weight decay is chosen on valid for each draw, as linear.py does.
"""

from dataclasses import dataclass
from pathlib import Path

from cluster.config import setting
from cluster.entry import run
from cluster.errors import UserError
from pretraining.probe_config import ProbeConfig, refuse_test_among


@dataclass(frozen=True, kw_only=True)
class ShotsConfig(ProbeConfig):
    # Backbones to judge: backbone.safetensors of pretraining runs, or weights that docs/weights.md lists.
    checkpoint: tuple[Path, ...]
    # Split from which labelled crops are drawn.
    train_split: str = "train"
    # Split on which weight decays are chosen; the same as --train-split for its crops that were not drawn.
    valid_split: str = "valid"
    # Numbers of labelled crops of each class; 0 stands for all.
    shots: tuple[int, ...] = setting((1, 2, 5, 10, 0), least=0)
    # Number of draws of labelled crops.
    draws: int = setting(10, least=1)
    # Weight decays to try, which are factors on the squared norm of the layer's weights.
    weight_decays: tuple[float, ...] = setting((1e-5, 1e-4, 1e-3, 1e-2), least=0)
    # Folder for shots.png, shots.csv and shots.json.
    out: Path = Path("shots")


def main(config: ShotsConfig) -> None:
    # Imported here, so that --help and wrong flags are answered before torch is loaded.
    from cluster import atomic
    from pretraining.baselines import open_crops
    from pretraining.plots import plot_shots
    from pretraining.probe import unseen
    from pretraining.shots import shot_curve, table, write_curves

    if not config.checkpoint:
        raise UserError("--checkpoint: name at least one backbone")
    train, valid, test = splits = config.train_split, config.valid_split, config.test_split
    refuse_test_among(*splits)
    crops = open_crops(config.checkpoint, splits, **config.seeing)
    curves, missed = {}, ""
    for one in crops.representations:
        seen = crops.features(one)
        curves[one.name] = shot_curve(
            seen[train],
            None if valid == train else seen[valid],
            seen[test],
            (crops.sheets[train], crops.sheets[test]),
            crops.classes,
            config.shots,
            config.draws,
            config.weight_decays,
            config.resamples,
            config.seed,
        )
        missed = unseen(seen[train][1], seen[test][1], crops.classes)
    print(
        f"linear, top-1 on {test} by labelled crops of each class of {train}; means of {config.draws} draws"
    )
    print(table(curves))
    if missed:
        print(missed)
    atomic.make_folder(config.out)
    write_curves(config.out, curves, config.settings)
    plot_shots(config.out / "shots.png", curves, f"top-1 on {test}")
    print(f"{config.out}: shots.png, shots.csv, shots.json")


if __name__ == "__main__":
    run(ShotsConfig, main)
