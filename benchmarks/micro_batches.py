"""Exact gradients in micro-batches (GradCache): their error, the memory of a growing batch, and their price.

    python benchmarks/micro_batches.py [--quick]

A ResNet-18 with SimCLR's projector on views of 64 px, on one thread. The error is that of the gradient by its
norm, against the whole batch's. Beside it stands that of accumulation, the mean of the micro-batches' own
gradients, which is what one can do without GradCache. BatchNorm uses its running statistics there, since
those of a batch are not those of its parts. Memory is the peak of a process of its own beyond the network.
What still grows are the views as bytes and the embeddings. The price is the second forward pass.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from race import cpu_seconds, describe_machine, tell_ratio
from torch import Tensor

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from cluster.backbone import Normalise, build_backbone
from pretraining.encoder import Encoder, build_projector
from pretraining.gradcache import GradCache
from simclr.loss import nt_xent
from vicreg.loss import vicreg_loss

SIDE, MICRO = 64, 32  # pixels, windows
ROUNDS = 5


def network(joint: bool = True) -> Encoder:
    torch.manual_seed(0)
    backbone = build_backbone("resnet18")
    projector = build_projector([512, 512, 128], last_norm=joint)
    encoder = Encoder(Normalise([0.9] * 3, [0.2] * 3, torch.channels_last), backbone, projector, joint)
    return encoder.to(memory_format=torch.channels_last)


def views(windows: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, windows, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)


def step(encoder: Encoder, batch: Tensor, micro_batch: int | None, loss: Callable = nt_xent) -> Tensor:
    """The gradient of a batch, flattened."""
    encoder.zero_grad()
    cache = GradCache(encoder, micro_batch, nullcontext) if micro_batch else None
    loss(*(cache.embed(*batch) if cache else encoder(*batch)))[0].backward()
    if cache:
        cache.carry()
    return torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])


def tell_errors(windows: int) -> None:
    for name, joint, loss in (("SimCLR", True, nt_xent), ("VICReg", False, vicreg_loss)):
        encoder, batch = network(joint).eval(), views(windows)
        whole = step(encoder, batch, None, loss)
        cached = step(encoder, batch, MICRO, loss)
        parts = [step(encoder, part, None, loss) for part in batch.split(MICRO, dim=1)]
        errors = [(g - whole).norm() / whole.norm() for g in (cached, torch.stack(parts).mean(0))]
        told = f"the gradient is off by {errors[0]:.0e}, the accumulated one by {errors[1]:.2f}"
        print(f"{name}, batch {windows} by {MICRO}: {told}", flush=True)


def memory(entry: str) -> int:
    """Bytes of this process; not by getrusage, whose peak starts from that of the parent."""
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(entry))


def measure(windows: int, micro_batch: int | None) -> None:
    torch.set_num_threads(1)
    encoder = network()
    before = memory("VmRSS")
    step(encoder, views(windows), micro_batch)
    print((memory("VmHWM") - before) / 1e6)


def tell_memory(windows: int, micro_batch: int | None) -> None:
    command = [sys.executable, __file__, "--alone", str(windows), str(micro_batch or 0)]
    peak = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    grows = (2 * 3 * SIDE**2 + 2 * 128 * 4 * 6) * windows / 1e6
    how = f"{micro_batch} at a time" if micro_batch else "at once"
    print(f"batch {windows:,}, {how}: {peak:.0f} MB, of it views and embeddings {grows:.0f} MB", flush=True)


def tell_price(windows: int) -> None:
    encoder, batch = network(), views(windows)
    works = [lambda: step(encoder, batch, MICRO), lambda: step(encoder, batch, None)]
    times = [[cpu_seconds(work) for work in works] for _ in range(ROUNDS + 1)][1:]
    tell_ratio(f"step of {windows}, {MICRO} at a time", [(a, b) for a, b in times], "at once", None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small batches alone")
    parser.add_argument("--alone", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        return measure(options.alone[0], options.alone[1] or None)
    torch.set_num_threads(1)
    print(describe_machine("torch", "timm") + ", one thread", flush=True)
    tell_errors(96)
    for windows, micro_batch in ((32, None), (128, None), (128, MICRO), (1024, MICRO)):
        if windows <= 128 or not options.quick:
            tell_memory(windows, micro_batch)
    tell_price(96)


if __name__ == "__main__":
    main()
