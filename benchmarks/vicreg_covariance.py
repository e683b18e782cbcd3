"""Compare time and memory of our covariance term (Gram matrix) with the D x D product as published.

    python benchmarks/vicreg_covariance.py [--n 256] [--d 8192]

Forward and backward pass of one view, both ways in turn in one process. Prints the median times, the median
ratio and the size of the largest product.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from vicreg.loss import covariance


def full_covariance(z: Tensor) -> Tensor:
    """Equations (3) and (4) as published: the D x D matrix, and its squared off-diagonal elements."""
    n, d = z.shape
    z = z - z.mean(dim=0)
    matrix = z.T @ z / (n - 1)
    return (matrix.square().sum() - matrix.diagonal().square().sum()) / d


def seconds(term: Callable[[Tensor], Tensor], z: Tensor) -> float:
    start = time.perf_counter()
    term(z).backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=256, help="global batch")
    parser.add_argument("--d", type=int, default=8192, help="width of the expander")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    z = torch.randn(options.n, options.d, requires_grad=True)
    pairs = [(seconds(covariance, z), seconds(full_covariance, z)) for _ in range(options.rounds + 1)][1:]
    ours, full = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"N {options.n}  D {options.d}  torch {torch.__version__}  {torch.get_num_threads()} threads")
    print(f"gram {ours * 1e3:.0f} ms, {4 * min(options.n, options.d) ** 2 / 2**20:.2f} MiB")
    print(f"full {full * 1e3:.0f} ms, {4 * options.d**2 / 2**20:.2f} MiB")
    print(f"ratio full / gram: median of pairs {statistics.median(f / o for o, f in pairs):.1f}")


if __name__ == "__main__":
    main()
