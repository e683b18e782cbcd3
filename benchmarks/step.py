"""A step of SimCLR against lightly's recipe of it: both views, NT-Xent, backward pass, LARS.

    python benchmarks/step.py [--arch resnet50] [--batch 8] [--size 96]

One thread, channels_last for both, the same arithmetic for both (bf16 means autocast, losses in float32).
lightly's recipe is its SimCLR example: a call of backbone and head for each view, its own loss and LARS;
its views arrive normalised in float32, ours as uint8 pixels. Ours also takes the norm of the gradient and
keeps what the guard needs to undo the step. A share of the peak is that of a matrix product of 2,048 x 2,048
in the same arithmetic, measured here.

What limits ours, by a profile of ResNet-50 in bf16: convolutions are half of the step (42 % backward), and
both have them from oneDNN; LARS is 16 %, the norm layers 14 %, casts and copies 9 %. A LARS over all tensors
at once is the next thing to try; with larger batches its share dwindles.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from race import cpu_seconds, describe_machine, race
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from cluster.backbone import Normalise, build_backbone
from cluster.guard import Guard
from cluster.training import GuardedStep
from pretraining.encoder import Encoder, build_projector
from pretraining.schedule import build_optimizer
from simclr.loss import nt_xent

CPU = torch.device("cpu")
TEMPERATURE, RATE = 0.1, 0.01


def step_of_ours(arch: str, views: list[torch.Tensor], precision: str) -> Callable[[], object]:
    backbone = build_backbone(arch)
    width = int(backbone.num_features)
    normalise = Normalise((0.9,) * 3, (0.2,) * 3, torch.channels_last)
    encoder = Encoder(normalise, backbone, build_projector([width, width, 128], True), True)
    encoder = encoder.to(memory_format=torch.channels_last).train()
    optimizer = build_optimizer(encoder, "lars", 0.9, 1e-6)
    guarded = GuardedStep(encoder, optimizer, lambda _: RATE, Guard(), CPU, None, precision)

    def step() -> None:
        with guarded.forward():
            z1, z2 = encoder(*views)
        guarded.take(0, nt_xent(z1.float(), z2.float(), TEMPERATURE)[0])

    return step


def step_of_lightly(arch: str, views: list[torch.Tensor], precision: str) -> Callable[[], object]:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.utils.lars import LARS

    backbone = timm.create_model(arch, num_classes=0)
    head = SimCLRProjectionHead(backbone.num_features, backbone.num_features, 128)
    model = nn.Sequential(backbone, head).to(memory_format=torch.channels_last).train()
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    weights = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": weights, "weight_decay": 1e-6}, {"params": vectors, "weight_decay": 0.0}]
    optimizer, criterion = LARS(groups, lr=RATE, momentum=0.9), NTXentLoss(temperature=TEMPERATURE)
    views = [((v / 255 - 0.9) / 0.2).contiguous(memory_format=torch.channels_last) for v in views]

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            z1, z2 = map(model, views)
        loss = criterion(z1.float(), z2.float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def peak(precision: str) -> float:
    """FLOP/s of a matrix product of this precision, the best of three."""
    a, b = torch.randn(2, 2048, 2048).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    return 2 * 2048**3 / min(cpu_seconds(lambda: a @ b) for _ in range(3))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=96, help="of a view, px")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{describe_machine('torch', 'timm', 'lightly')}; one thread, views without any resampling")
    views = list(torch.randint(0, 256, (2, options.batch, 3, options.size, options.size), dtype=torch.uint8))
    for precision in ("bf16", "fp32"):
        ours = step_of_ours(options.arch, views, precision)
        lightly = step_of_lightly(options.arch, views, precision)
        work = f"SimCLR step, {options.arch}, {options.batch} x 2 views of {options.size} px, {precision}"
        race(work, ours, lightly, "lightly", 1.15, options.rounds)
        with FlopCounterMode(display=False) as counted:
            ours()
        rate, most = counted.get_total_flops() / cpu_seconds(ours), peak(precision)
        print(f"  {rate / 1e9:.0f} GFLOP/s, {rate / most:.0%} of a matrix product's {most / 1e9:.0f}")


if __name__ == "__main__":
    main()
