"""NT-Xent and VICReg against the losses of lightly and solo-learn and the published formula; their memory.

    python benchmarks/losses.py [--quick]

Forward and backward pass on one thread. Before each race the values and gradients of both are compared, and
the largest difference of a gradient is printed, by the largest entry of it. The memory of a loss is the peak
of a process of its own beyond what it had before the loss, with the gradients.

solo-learn's module is read from the installed package, whose own import asks for versions that exclude ours:
`pip install --no-deps solo-learn`. Without it that peer is left out, and the script says so. The published
VICReg formula is written down here from the paper's Algorithm 1: the authors' code is no package.

The limit of ours is the matrix product: it takes 70 to 90 % of NT-Xent (two products of [2N, 2N] x D, where
lightly has three of them and passes over [2N, 2N] matrices in main memory) and of VICReg (1.5 of [N, N] x D a
view; at N 4,096 80 % of the time by torch's profiler, 6.2 s at the 135 GFLOP/s that a core has reached here).
"""

import argparse
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from race import describe_machine, race
from torch import Tensor

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from simclr.loss import nt_xent
from vicreg.loss import vicreg_loss

Loss = Callable[[Tensor, Tensor], Tensor]
TEMPERATURE = 0.1


def published_vicreg(z1: Tensor, z2: Tensor) -> Tensor:
    """Algorithm 1 of arXiv 2105.04906, with the D x D covariance matrices."""
    n, d = z1.shape
    std_loss, cov_loss = 0.0, 0.0
    for z in (z1, z2):
        std_loss = std_loss + F.relu(1 - torch.sqrt(z.var(dim=0) + 1e-4)).mean() / 2
        centred = z - z.mean(dim=0)
        cov = centred.T @ centred / (n - 1)
        off_diagonal = cov.flatten()[:-1].view(d - 1, d + 1)[:, 1:]
        cov_loss = cov_loss + off_diagonal.pow(2).sum() / d
    return 25 * F.mse_loss(z1, z2) + 25 * std_loss + cov_loss


def lightly_loss() -> Loss:
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=TEMPERATURE)


def solo_loss() -> Loss | None:
    """solo-learn's, without the import of its package; None if that is not installed."""
    try:
        file = metadata.distribution("solo-learn").locate_file("solo/losses/simclr.py")
    except metadata.PackageNotFoundError:
        return None
    spec = importlib.util.spec_from_file_location("solo_simclr", str(file))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda z1, z2: module.simclr_loss_func(z1, z2, TEMPERATURE)


OURS: dict[str, Loss] = {
    "NT-Xent": lambda z1, z2: nt_xent(z1, z2, TEMPERATURE)[0],
    "VICReg": lambda z1, z2: vicreg_loss(z1, z2)[0],
}


def embeddings(n: int, d: int) -> tuple[Tensor, Tensor]:
    """Two views of n windows, alike as in training: each [n, d]."""
    generator = torch.Generator().manual_seed(n)
    shared, own1, own2 = torch.randn(3, n, d, generator=generator)
    return (shared + own1).requires_grad_(), (shared + own2).requires_grad_()


def both_passes(loss: Loss, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and its gradient [2, N, D]."""
    value = loss(z1, z2)
    return value.detach(), torch.stack(torch.autograd.grad(value, (z1, z2)))


def compare(name: str, peer: Loss, peer_name: str, n: int, d: int, goal: float, repeat: int) -> None:
    z1, z2 = embeddings(n, d)
    (mine, gradient), (theirs, expected) = (both_passes(loss, z1, z2) for loss in (OURS[name], peer))
    apart = ((gradient - expected).abs().max() / expected.abs().max()).item()
    assert abs(mine - theirs) < 1e-5 * abs(theirs) and apart < 1e-4, (mine, theirs, apart)
    work = f"{name}, N {n:,}, D {d:,} (gradients differ by {apart:.0e} at most)"
    del gradient, expected
    race(
        work,
        lambda: both_passes(OURS[name], z1, z2),
        lambda: both_passes(peer, z1, z2),
        peer_name,
        goal,
        rounds=5,
        repeat=repeat,
    )


def measure(loss: Loss, n: int, d: int) -> None:
    """In a process of its own: CPU seconds, MB of the peak beyond the embeddings, MB of their gradients."""
    torch.set_num_threads(1)
    z1, z2 = embeddings(64, d)
    loss(z1, z2).backward()  # what the libraries allocate once
    z1, z2 = embeddings(n, d)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, begun = memory("VmRSS"), time.process_time()
    loss(z1, z2).backward()
    seconds = time.process_time() - begun
    print(seconds, (memory("VmHWM") - before) / 1e6, 2 * z1.nbytes / 1e6)


def memory(entry: str) -> int:
    """Bytes of this process; not by getrusage, whose peak starts from that of the parent."""
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(entry))


def tell_alone(loss: str, n: int, d: int, goal: float, seconds: float | None = None) -> None:
    """goal: MB. seconds: the goal for them, if there is one."""
    work = f"{loss} alone, N {n:,}, D {d:,}"
    command = [sys.executable, __file__, "--alone", loss, str(n), str(d)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(f"{work}: ended with status {done.returncode}", flush=True)
        return
    took, peak, gradients = map(float, done.stdout.split())
    missed = ", missed" if peak > goal or took > (seconds or took) else ""
    goals = f"goal {goal:,.0f} MB{f', {seconds:g} s' if seconds else ''}{missed}"
    print(f"{work}: {took:.1f} s, {peak:,.0f} MB, of it gradients {gradients:.0f} ({goals})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small batches alone")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        peers = {"lightly": lightly_loss, "published": lambda: published_vicreg}
        name, n, d = options.alone
        return measure(OURS[name] if name in OURS else peers[name](), int(n), int(d))
    torch.set_num_threads(1)
    print(describe_machine("torch", "lightly") + ", one thread", flush=True)
    peers = {"lightly": lightly_loss(), "solo-learn": solo_loss()}
    for n, repeat in ((1024, 5), (4096, 1))[: 1 if options.quick else 2]:
        for peer_name, peer in peers.items():
            if peer is None:
                print(f"{peer_name} is not installed (pip install --no-deps {peer_name})")
            else:
                compare("NT-Xent", peer, peer_name, n, 128, 2, repeat)
    for n, goal in ((256, 33), (1024, 7))[: 1 if options.quick else 2]:
        compare("VICReg", published_vicreg, "published", n, 8192, goal, 1)
    if options.quick:
        return
    for name in ("NT-Xent", "lightly"):
        tell_alone(name, 4096, 128, 2000)
    tell_alone("NT-Xent", 32768, 128, 2000)  # 65,536 embeddings
    tell_alone("VICReg", 4096, 8192, 1000, 8)


if __name__ == "__main__":
    main()
