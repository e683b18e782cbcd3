"""How long a step of pretraining takes on 1 to 64 nodes, by a model of what it computes and sends.

    python benchmarks/scaling.py --step-ms 120 --windows 256 [--method vicreg] [--gpus-per-node 8] ...

--step-ms is the measured step of one GPU on its share of --windows, loss left out (`make gpu` prints it). The
bytes that are sent are counted on the network itself. docs/scaling.md says what the model leaves out, and
where it was held against measured steps.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from timm.layers import convert_sync_batchnorm
from torch import nn

from cluster.backbone import Normalise, build_backbone
from pretraining.encoder import Encoder, build_projector

PROJECTORS = {"simclr": ((2048, 128), True), "vicreg": ((8192, 8192, 8192), False)}
NODES = (1, 2, 4, 8, 16, 32, 64)
BACKWARD = 2 / 3  # of a step is its backward pass, behind which gradients are reduced
LAST_BUCKET = 25e6  # bytes, DDP's: they come when the backward pass is over and hide behind nothing


def count(arch: str, method: str) -> tuple[int, int, int]:
    """Bytes of the gradient, width of the embedding, and norm layers that SyncBatchNorm syncs."""
    projector, last_norm = PROJECTORS[method]
    backbone = build_backbone(arch)
    network = build_projector([int(backbone.num_features), *projector], last_norm)
    encoder = Encoder(Normalise([0.5] * 3, [0.5] * 3), backbone, network, method == "simclr")
    synced = convert_sync_batchnorm(encoder)
    norms = sum(isinstance(module, nn.SyncBatchNorm) for module in synced.modules())
    return sum(p.numel() * 4 for p in encoder.parameters()), projector[-1], norms


def loss_seconds(method: str, windows: int, width: int, flops: float) -> float:
    """Of the loss, which every rank computes on the whole batch: the matrix products of both passes.

    Both products are symmetric, so half of them is computed; SimCLR's again in the backward pass.
    """
    if method == "simclr":
        return 4 * (2 * windows) ** 2 * width / flops
    return 2 * 3 * min(windows, width) * windows * width / flops


def ring(size: float, ranks: int, bandwidth: float, latency: float) -> float:
    """Seconds of a ring all_reduce of `size` bytes (Patarasuk and Yuan 2009): 2 (W - 1) messages a rank."""
    return 2 * (ranks - 1) * (size / ranks / bandwidth + latency)


def step_seconds(
    options: argparse.Namespace, gradient: int, width: int, norms: int, ranks: int
) -> dict[str, float]:
    """The parts of a step on `ranks` ranks, in seconds."""
    bandwidth = 1e9 * (options.inner_gb if ranks <= options.gpus_per_node else options.outer_gb)
    latency = 1e-6 * options.latency_us
    total = options.windows * (ranks if options.weak else 1)
    share = total / ranks
    compute = 1e-3 * options.step_ms * share / options.windows
    reduced = ring(gradient, ranks, bandwidth, latency)
    exposed = (
        max(reduced - BACKWARD * compute, reduced * min(1.0, LAST_BUCKET / gradient)) if ranks > 1 else 0.0
    )
    # Each rank sends its rows of both views once around the ring; the backward pass sends nothing.
    gather = 2 * (ranks - 1) * (share * width * 4 / bandwidth + latency)
    # A layer gathers means once, and reduces gradients once; a method that isn't joint does so for each view.
    passes = 1 if options.method == "simclr" else 2
    norm = passes * norms * 3 * (ranks - 1).bit_length() * latency
    loss = loss_seconds(options.method, total, width, 1e12 * options.tflops)
    return {"compute": compute, "reduce": exposed, "gather": gather, "norms": norm, "loss": loss}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=sorted(PROJECTORS), default="vicreg")
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument(
        "--step-ms", type=float, required=True, help="of one GPU on --windows, without the loss"
    )
    parser.add_argument("--windows", type=int, required=True, help="the batch that --step-ms was measured on")
    parser.add_argument(
        "--weak", action="store_true", help="the batch grows with the ranks (else it is fixed)"
    )
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--inner-gb", type=float, default=200.0, help="GB/s of a GPU's links within a node")
    parser.add_argument("--outer-gb", type=float, default=25.0, help="GB/s of a GPU's share between nodes")
    parser.add_argument("--latency-us", type=float, default=10.0, help="of one message")
    parser.add_argument("--tflops", type=float, default=40.0, help="of float32 matrix products of one GPU")
    options = parser.parse_args()
    gradient, width, norms = count(options.arch, options.method)
    print(
        f"gradient {gradient / 1e6:.0f} MB, embeddings {4 * width * 2} bytes a window, {norms} synced norms"
    )
    alone = sum(step_seconds(options, gradient, width, norms, 1).values())
    columns = ("compute", "reduce", "gather", "norms", "loss")
    title = "".join(f"{name:>9}" for name in columns)
    print(f"nodes ranks   batch{title}   step ms  efficiency")
    for nodes in NODES:
        ranks = nodes * options.gpus_per_node
        total = options.windows * (ranks if options.weak else 1)
        if total < 2 * ranks:
            print(f"{nodes:5}{ranks:6}{total:8}  fewer than two windows a rank")
            continue
        parts = step_seconds(options, gradient, width, norms, ranks)
        step = sum(parts.values())
        efficiency = total / step / ranks / (options.windows / alone)
        shown = "".join(f"{1e3 * seconds:9.2f}" for seconds in parts.values())
        print(f"{nodes:5}{ranks:6}{total:8}{shown}{1e3 * step:10.1f}{100 * efficiency:10.0f} %")


if __name__ == "__main__":
    main()
