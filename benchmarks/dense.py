"""What the dense term costs: a step of SimCLR and of VICReg with --dense-weight against one without.

    python benchmarks/dense.py [--arch resnet18] [--batch 32] [--size 96]

One thread, float32, channels_last; a step is both views, the losses, the backward pass and LARS. The ratio is
the time without the term by that with it, and the goal of 0.95 is a cost of 5 %. A pair of views is made with
and without the matrix that carries a place of one into the other, which is a step's other cost.

The cost is the projector on 49 places a view and the weights by which the map is read; it does not grow with
the network, so a ResNet-18 on views of 96 px, where it is 3 to 6 %, is near the worst case.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

import torch
from race import describe_machine, race

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from cluster.backbone import Normalise, build_backbone
from cluster.guard import Guard
from cluster.training import GuardedStep
from pretraining.dense import WIDTHS, DenseHead, choose_map, with_dense
from pretraining.encoder import Encoder, build_projector
from pretraining.schedule import build_optimizer
from schematics.drafting import draw_sheet
from schematics.places import across
from schematics.recipes import RECIPES, placed_views, two_views
from simclr.loss import dense_nt_xent, nt_xent
from vicreg.loss import dense_vicreg, vicreg_loss

CPU, STRIDE, GOAL = torch.device("cpu"), 16, 0.95
METHODS = {"SimCLR": (True, nt_xent, dense_nt_xent), "VICReg": (False, vicreg_loss, dense_vicreg)}


def step_of(
    method: str, arch: str, batch: list[torch.Tensor], widths: tuple[int, ...], weight: float
) -> Callable[[], object]:
    """A step on the views and `across` of a batch; without the term if its weight is 0."""
    torch.manual_seed(0)
    joint, plain, dense = METHODS[method]
    backbone = build_backbone(arch)
    loss = with_dense(plain, dense, weight) if weight else plain
    projector = build_projector([int(backbone.num_features), *widths], joint)
    normalise = Normalise((0.9,) * 3, (0.2,) * 3, torch.channels_last)
    encoder = Encoder(normalise, backbone, projector, joint)
    if weight:
        stage, channels, cells = choose_map(backbone, arch, batch[0].shape[-1], STRIDE)
        encoder.dense = DenseHead(stage, cells, build_projector([channels, *WIDTHS], joint))
    encoder = encoder.to(memory_format=torch.channels_last).train()
    optimizer = build_optimizer(encoder, "lars", 0.9, 1e-6)
    guarded = GuardedStep(encoder, optimizer, lambda _: 0.01, Guard(), CPU)
    own = batch if weight else batch[:2]

    def step() -> None:
        with guarded.forward():
            parts = encoder(*own)
        guarded.take(0, loss(*(part.float() for part in (*parts, *own[2:])))[0])

    return step


def race_steps(arch: str, windows: int, size: int, rounds: int) -> None:
    views = torch.randint(0, 256, (2, windows, 1, size, size), dtype=torch.uint8)
    batch = [*views, torch.eye(2, 3) + 0.2 * torch.randn(windows, 2, 3)]
    for method, widths in (("SimCLR", (2048, 128)), ("VICReg", (512, 512))):
        ours, peer = (step_of(method, arch, batch, widths, weight) for weight in (1.0, 0.0))
        work = f"{method} step with the dense term, {arch}, {windows} x 2 views of {size} px"
        race(work, ours, peer, "without it", GOAL, rounds)


def race_views(size: int, rounds: int) -> None:
    """Both make the same pairs: each counts up its own samples."""
    window = draw_sheet(0, 0)[0]

    def with_matrix(recipe: str, samples: Iterator[int]) -> None:
        (_, place1), (_, place2) = placed_views(window, recipe, size, 0, 0, next(samples))
        across(place1, place2)

    def without(recipe: str, samples: Iterator[int]) -> None:
        two_views(window, recipe, size, 0, 0, next(samples))

    for recipe in RECIPES:
        ours, peer = (partial(make, recipe, count()) for make in (with_matrix, without))
        work = f"a pair of views of {size} px by {recipe} with its matrix"
        race(work, ours, peer, "without it", GOAL, rounds, repeat=400)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--batch", type=int, default=32, help="windows")
    parser.add_argument("--size", type=int, default=96, help="of a view, px")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{describe_machine('torch', 'timm')}; one thread", flush=True)
    race_steps(options.arch, options.batch, options.size, options.rounds)
    race_views(options.size, options.rounds)


if __name__ == "__main__":
    main()
