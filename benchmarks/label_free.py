"""Which figure that needs no labels says whether a pretraining has helped? Short runs, and kNN as the truth.

    python benchmarks/label_free.py --data-dir ci2n_circuits --imagenet efficientnet-lite0.pth --out OUT

Trains the short runs of RUNS on the training sheets (those that are finished are not run again), then takes
the weights that each began and ended with. The truth is kNN top-1 of labelled crops. The candidates see
windows of the validation sheets only, in which no run was trained: RankMe (arXiv 2210.02885), alpha-ReQ
(2202.05808), LiDAR (2312.04000), and how often a window's second view is the one nearest to its first.
Printed are the figures, and for each candidate: Spearman's rank correlation with kNN over all weights, that
of its change over a run with the change of kNN, and how many changes have the sign of kNN's. It takes half an
hour to an hour of CPU.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from cluster import checkpoint
from pretraining.benefit import Probe
from pretraining.data import Pairs
from pretraining.features import embed, open_backbone
from pretraining.probe import pair_accuracy, rank_me
from schematics.store import WindowStore, build_store

ROOT = Path(__file__).resolve().parents[1]
SIDE, WINDOW, EXTENT = 64, 256, 112  # px of a view, of a window, and of what a view shows of it at most
STEPS, BATCH = 120, 64
CROPS = 1024  # that vote, and that are classified
WINDOWS, VIEWS = 512, 8  # held-out windows with two views each; an eighth of them with VIEWS


@dataclass(frozen=True)
class Short:
    """A short run. init: whether it begins from ImageNet's weights. lr: base rate, scaled by sqrt."""

    method: str
    arch: str
    optimizer: str
    lr: float
    init: bool = False

    @property
    def name(self) -> str:
        start = "-imagenet" if self.init else ""
        return f"{self.method}-{self.arch.removeprefix('tf_')}{start}-{self.optimizer}-{self.lr:g}"


LITE = "tf_efficientnet_lite0"
RUNS = (
    Short("simclr", "resnet18", "lars", 0.3),
    Short("simclr", LITE, "lars", 0.3, True),
    Short("simclr", LITE, "adamw", 1.5e-4, True),
    Short("simclr", "resnet18", "adamw", 1.5e-4),
    Short("simclr", "resnet18", "lars", 3.0),
    Short("simclr", LITE, "lars", 0.3),
    Short("simclr", LITE, "adamw", 1.5e-4),
    Short("vicreg", "resnet18", "lars", 0.8),
    Short("vicreg", LITE, "lars", 0.8, True),
    Short("vicreg", LITE, "adamw", 1.5e-4, True),
)


def train(run: Short, pool: Path, imagenet: Path, out: Path) -> Path:
    """The exp-dir of the finished run."""
    folder = out / run.name
    if (folder / "final.json").exists():
        return folder
    flags = ["--init", imagenet] if run.init else ["--arch", run.arch]
    flags += ["--projector", "512", "512" if run.method == "vicreg" else "128", "--workers", "0"]
    flags += ["--precision", "bf16" if run.arch == "resnet18" else "fp32", "--device", "cpu", "--keep", "2"]
    flags += ["--checkpoint-every", "86400"]  # the first checkpoint stays
    flags += ["--image-size", SIDE, "--window", WINDOW, "--batch-size", BATCH, "--steps", STEPS]
    flags += ["--optimizer", run.optimizer, "--base-lr", run.lr, "--lr-scaling", "sqrt"]
    command = [sys.executable, "-m", f"{run.method}.pretrain", "--data-dir", pool, "--exp-dir", folder]
    subprocess.run([*map(str, command + flags)], cwd=ROOT, check=True)
    return folder


def effective_rank(eigenvalues: Tensor, eps: float = 1e-7) -> float:
    p = eigenvalues.clamp_min(0) / eigenvalues.clamp_min(0).sum() + eps
    return torch.exp(-(p * p.log()).sum()).item()


def alpha_req(z: Tensor, first: int = 10, last: int = 100) -> float:
    """How near to 1 the exponent of the power law of the covariance's eigenvalues is: -|alpha - 1|."""
    spectrum = torch.linalg.svdvals((z - z.mean(0)).double()).square()[first - 1 : last].clamp_min(1e-12)
    ranks = torch.arange(first, first + len(spectrum)).double().log()
    x, y = ranks - ranks.mean(), spectrum.log() - spectrum.log().mean()
    return -abs(-(x * y).sum() / x.square().sum() - 1).item()


def lidar(z: Tensor, delta: float = 1e-4) -> float:
    """Effective rank of the linear discriminants between windows: z [windows, views, D]."""
    z = z.double()
    means = z.mean(1)
    within = (z - means[:, None]).flatten(0, 1)
    within = within.T @ within / len(within) + delta * torch.eye(z.shape[2])
    values, vectors = torch.linalg.eigh(within)
    whitened = (means - means.mean(0)) @ vectors / values.sqrt()
    return effective_rank(torch.linalg.svdvals(whitened).square() / (len(z) - 1))


@torch.no_grad()
def figures(network: nn.Module, pairs: Tensor, many: Tensor, seen: Tensor) -> dict[str, float]:
    """The candidates by the backbone's features.

    pairs, seen: uint8 [2, N, 3, S, S], of held-out windows and of the pool's; many: [n, VIEWS, 3, S, S].
    """
    z1, z2 = (embed(network, views) for views in pairs)
    mean = torch.cat([z1, z2]).mean(0)
    return {
        "RankMe": rank_me(z1).item(),
        "alpha-ReQ": alpha_req(z1),
        "LiDAR": lidar(embed(network, many.flatten(0, 1)).unflatten(0, many.shape[:2])),
        "pairs": pair_accuracy(z1, z2).item(),
        "pairs, centred": pair_accuracy(z1 - mean, z2 - mean).item(),
        "pairs of the pool": pair_accuracy(*(embed(network, views) for views in seen)).item(),
    }


def views_of(store: WindowStore, extent: int) -> tuple[Tensor, Tensor]:
    """Views of evenly spread windows: [2, WINDOWS, 3, S, S] and [WINDOWS / VIEWS, VIEWS, 3, S, S]."""
    pairs = Pairs(store, "drawing", SIDE, extent, 1, 1.0, False)  # of another seed than the runs'
    chosen = [i * len(store) // WINDOWS for i in range(WINDOWS)]

    def views(epoch: int, some: list[int]) -> Tensor:  # [N, 2, 3, S, S]
        return torch.stack([torch.stack(pairs[epoch, 0, i]) for i in some]).expand(-1, -1, 3, -1, -1)

    many = [views(epoch, chosen[::VIEWS]) for epoch in range(VIEWS // 2)]
    return views(0, chosen).transpose(0, 1), torch.cat(many, 1)


def spearman(x: list[float], y: list[float]) -> float:
    ranks = torch.stack([torch.tensor(v).argsort().argsort().double() for v in (x, y)])
    return torch.corrcoef(ranks)[0, 1].item()


def start_of(folder: Path, network: nn.Module) -> nn.Module:
    """The network with the weights of the run's first checkpoint."""
    encoder = checkpoint.read(checkpoint.step_path(folder / "checkpoints", 0))["encoder"]
    prefix = "backbone."
    network[1].load_state_dict(
        {k.removeprefix(prefix): v for k, v in encoder.items() if k.startswith(prefix)}
    )
    return network


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data-dir", type=Path, required=True, help="train/ and valid/ with COCO annotations"
    )
    parser.add_argument("--imagenet", type=Path, required=True, help="weights of EfficientNet-lite0")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    crops = args.out / "crops"
    if not crops.exists():
        cut = [sys.executable, "-m", "schematics.symbols", args.data_dir.resolve(), crops.resolve()]
        subprocess.run([*map(str, cut)], cwd=ROOT, check=True)
    pool, imagenet, out = args.data_dir.resolve() / "train", args.imagenet.resolve(), args.out.resolve()
    folders = {run: train(run, pool, imagenet, out) for run in RUNS}

    probe = Probe(crops, SIDE, "rgb", torch.device("cpu"))
    for labelled in (probe.train, probe.test):
        labelled.files = labelled.files[:: len(labelled) // CROPS]
    pairs, many = views_of(build_store(args.data_dir / "valid", out / "held-out", WINDOW), EXTENT)
    seen, _ = views_of(WindowStore(Path((folders[RUNS[0]] / "store.txt").read_text())), EXTENT)
    kept = out / "figures.json"  # of each weights, so that none are measured twice
    measured: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.exists() else {}
    changes = []
    for run, folder in folders.items():
        network, _ = open_backbone(folder / "backbone.safetensors")
        begun = f"{run.arch}{' of ImageNet' if run.init else ''}"
        for name in (run.name, begun):
            if name not in measured:
                if name == begun:
                    start_of(folder, network)
                measured[name] = {"kNN": probe(network)} | figures(network, pairs, many, seen)
                kept.write_text(json.dumps(measured, indent=2))
        start, end = measured[begun], measured[run.name]
        if not changes:
            print(f"| run | {' | '.join(end)} |\n|{'---|' * (1 + len(end))}")
        print(f"| {run.name} | {' | '.join(f'{start[k]:.3g} to {end[k]:.3g}' for k in end)} |", flush=True)
        changes.append({name: end[name] - start[name] for name in end})
    tell_agreement(list(measured.values()), changes)


def tell_agreement(levels: list[dict[str, float]], changes: list[dict[str, float]]) -> None:
    """levels: the figures of all weights. changes: how much each changed from a run's start to its end."""
    print("\n| candidate | rank correlation over weights | over changes | same sign |\n|---|---|---|---|")
    for name in list(levels[0])[1:]:
        over = [
            spearman([row["kNN"] for row in rows], [row[name] for row in rows]) for rows in (levels, changes)
        ]
        signs = sum((change["kNN"] > 0) == (change[name] > 0) for change in changes)
        print(f"| {name} | {over[0]:.2f} | {over[1]:.2f} | {signs} of {len(changes)} |")


if __name__ == "__main__":
    main()
