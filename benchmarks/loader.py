"""The loader of pretraining: pairs of views a second on one core, and what the main process has left to do.

    python benchmarks/loader.py [--batches 8] [--rounds 5]

A GPU takes 2,000 to 3,000 pairs a second (a ResNet-50 at 224 px on an H100), so that 450 pairs a core want
seven cores, and the process that feeds it must take 10,000 itself. The pool is four sheets of 1,600 x
1,200 px, gray or in color, in a packed store; batches are of 64 windows of 512 px, two views of 224 px each.

- one core: CPU seconds of all that a worker does, from the store to the batch, in this process.
- workers: CPU seconds of this process and of 1 or 2 workers together, their start included.
- main process: its own alone, from the second batch on, where views are there already. It receives the
  batches of 1 or 2 workers, or puts them together itself with 0. With a GPU it copies them to pinned memory
  and there.

The pool is decoded into memory first, as a run does it with up to 1 GiB. The goal of a core is met on an AMD
EPYC and missed in color by a fifth on a shared Intel Xeon, where 46 % of simclr's time is resizing and 16 %
the turn of the hue, of `drawing` resizing 35 %, the turn of crops 20 % and JPEG 13 %. There is no peer: the
goals are a rate. CPU seconds are counted, so that load from elsewhere weighs less, but two threads on one
core slow each other.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
import torch
from race import describe_machine

sys.path.insert(0, str(Path(__file__).parents[1]))
from cluster.batches import Batches, Key, default_workers
from cluster.distributed import World
from pretraining.data import Pairs, collate, epoch_order
from schematics.drafting import draw_sheet
from schematics.recipes import RECIPES, default_extent
from schematics.sheets import write_png
from schematics.store import WindowStore, build_store

SIZE, SIDE, BATCH = 224, 512, 64
CORE, MAIN = 450.0, 10_000.0  # goals, pairs a second


class Ready:
    """A pair of views that is there already, whatever the key."""

    def __init__(self, pair: tuple[torch.Tensor, torch.Tensor]):
        self.pair = pair

    def __getitem__(self, key: Key) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pair

    def source(self, key: Key) -> str:
        return ""


def pool(folder: Path, color: bool) -> WindowStore:
    """Four scanned drawings in a packed store; in color each has red ink on one half."""
    sheets = folder / f"sheets-{color}"
    sheets.mkdir()
    for n in range(4):
        image = draw_sheet(0, n, 1600, 1200, noise=0.3)[0]
        if color:
            image = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
            image[:, :800, 0] = np.maximum(image[:, :800, 0], 180)
        write_png(sheets / f"{n}.png", image)
    return build_store(sheets, folder / f"store-{color}", SIDE).preload()


def cpu() -> tuple[float, float]:
    """CPU seconds so far: of this process with all its threads, and of its workers that have ended."""
    own, ended = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime, ended.ru_utime + ended.ru_stime


def rates(
    samples: Any, windows: int, workers: int, batches: int, device: torch.device
) -> tuple[float, float]:
    """Pairs a CPU second of all processes, and of the main process alone from the second batch on."""

    def order(epoch: int) -> np.ndarray:
        return np.resize(epoch_order(0, windows)(epoch), BATCH * batches)

    loader = Batches(samples, order, batches, BATCH, World(device=device), workers, collate)
    begun = first = cpu()
    for step, (view1, view2) in loader.between(0, batches):
        assert len(view1) == len(view2) == BATCH
        first = cpu() if step == 0 else first
    if device.type == "cuda":
        torch.cuda.synchronize()
    end = cpu()
    return batches * BATCH / (sum(end) - sum(begun)), (batches - 1) * BATCH / (end[0] - first[0])


def tell(work: str, found: list[float], goal: float | None = None) -> None:
    rate = median(found)
    held = "" if goal is None else f" (goal {goal:,.0f}{'' if rate >= goal else ', missed'})"
    print(f"{work}: {rate:,.0f} pairs/s; {len(found)} rounds{held}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batches", type=int, default=8, help="Batches a round (default 8).")
    parser.add_argument("--rounds", type=int, default=5, help="Rounds to take the median over (default 5).")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(describe_machine("opencv-python-headless", "torch"), flush=True)
    print(f"batches go to {device}; workers by default: {default_workers(device)}")
    with tempfile.TemporaryDirectory() as folder:
        for color in (False, True):
            store, name = pool(Path(folder), color), "color" if color else "gray"
            extent = min(SIDE, default_extent(SIZE, store.line))
            for recipe in RECIPES:
                pairs = Pairs(store, recipe, SIZE, extent, 0, 1.0, False)
                few = range(args.rounds)
                rates(pairs, len(store), 0, 2, device)  # not counted
                alone = [rates(pairs, len(store), 0, args.batches, device)[0] for _ in few]
                tell(f"{name}, {recipe}, one core", alone, CORE)
                for workers in (1, 2) if recipe == "drawing" else ():
                    found = [rates(pairs, len(store), workers, args.batches, device) for _ in few]
                    tell(f"{name}, {recipe}, {workers} workers, a core", [each[0] for each in found])
            ready = Ready(pairs[0, 0, 0])
            for workers in (0, 1, 2):
                found = [rates(ready, len(store), workers, 8 * args.batches, device) for _ in few]
                tell(f"{name}, main process, {workers} workers", [each[1] for each in found], MAIN)


if __name__ == "__main__":
    main()
