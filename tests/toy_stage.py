"""A minimal stage for tests. It runs as every stage does: flags, ranks, workers, checkpoints, a journal."""

import hashlib
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from cluster import checkpoint, distributed, entry
from cluster.batches import Batches, Key
from cluster.guard import Guard
from cluster.journal import Journal
from cluster.lifecycle import Run
from cluster.training import GuardedStep, begin, load_optimizer, parallel, train_guarded


@dataclass(frozen=True)
class Toy:
    """Fit a line."""

    # Folder of the run.
    exp_dir: Path
    # Optimizer steps in all.
    steps: int = 40
    # Number of DataLoader workers.
    workers: int = 0
    # Seconds between checkpoints.
    checkpoint_every: float = 0.1
    # Seconds that each step sleeps.
    nap: float = 0.01
    # Number of floats that are saved besides the model.
    ballast: int = 0
    # Batches whose samples are NaN: from the first number up to, but without, the second.
    poison: tuple[int, int] = (0, 0)
    # Seconds that a step may take before the run is ended as hung.
    step_timeout: float = 30.0
    # Batch whose samples never come; -1 for none.
    stall_at: int = -1
    # Step at which the last rank hangs; -1 for never.
    hang_at: int = -1
    # Step at which every rank raises an exception; -1 for never.
    crash_at: int = -1
    # Seconds that step 2 sleeps in addition, after asking the run to allow them.
    patience: float = 0.0
    # Largest file that may be written, in bytes: a stand-in for a full disk.
    file_limit: int = 0


class Line(Dataset):
    """A batch is two samples, the second twice the first; their numbers depend only on its position."""

    def __init__(self, poison: tuple[int, int], stall_at: int) -> None:
        self.poison, self.stall_at = range(*poison), stall_at

    def __getitem__(self, key: Key) -> Tensor:
        batch, factor = key[2] // 2, 1 + key[2] % 2
        if batch == self.stall_at:
            time.sleep(1000)
        x = torch.randn(8, generator=torch.Generator().manual_seed(batch))
        return factor * (x * float("nan") if batch in self.poison else x)

    def source(self, key: Key) -> str:
        return f"position {key[2] // 2}"


def main(toy: Toy) -> None:
    world = distributed.start("cpu", toy.exp_dir)
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    guard = Guard()

    def state() -> checkpoint.State:
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        return content | {"guard": guard.state(), "ballast": torch.zeros(toy.ballast)}

    def restore(content: checkpoint.Saved) -> None:
        model.load_state_dict(content["model"])
        load_optimizer(optimizer, content)

    timeout = {"checkpoint_every": toy.checkpoint_every, "step_timeout": toy.step_timeout}
    with Run(toy.exp_dir, world, **timeout) as run:
        if run.finished(toy.steps):
            return
        if toy.file_limit and world.main:
            _limit_files(toy.file_limit)
        start = begin(run, run.resume(), guard, state, restore)
        journal = Journal(toy.exp_dir, world, toy.steps, start, every=1)
        wrapped = parallel(model, world)
        guarded = GuardedStep(wrapped, optimizer, lambda _: 0.05, guard, world.device, clip_grad=1.0)
        # One epoch, longer than any run, whose samples come in the order of their index.
        batches = Batches(
            Line(toy.poison, toy.stall_at), lambda _: np.arange(1 << 20), 1 << 19, 2, world, toy.workers
        )

        def train_on(rest: Iterable[tuple[int, Any]]) -> None:
            train(toy, wrapped, guarded, rest, journal, run, state)

        train_guarded(train_on, batches, guard, run, journal, restore, start, toy.steps)
        digest = hashlib.sha256(model.weight.detach().numpy().tobytes()).hexdigest()
        journal.close()
        if world.main:
            checkpoint.write_file(toy.exp_dir / "model.pt", {"model": model.state_dict(), "digest": digest})
        run.finish(toy.steps, state, ["model.pt"])
    distributed.stop()


def train(
    toy: Toy,
    model: nn.Module,
    guarded: GuardedStep,
    batches: Iterable[tuple[int, Tensor]],
    journal: Journal,
    run: Run,
    state: Callable[[], checkpoint.State],
) -> None:
    """Take one optimizer step for each (step, x [n, 8]), and cause the failures that the flags ask for."""
    for step, x in batches:
        time.sleep(toy.nap)
        if step == toy.crash_at:
            raise RuntimeError("no line fits")
        if step == toy.hang_at and run.world.rank == run.world.size - 1:
            time.sleep(1000)
        if toy.patience and step == 2:
            with run.allow(toy.patience):
                time.sleep(toy.patience)
        with guarded.forward():
            loss = ((model(x) - 1) ** 2).mean()
        guarded.take(step, loss)
        journal.log(step, loss=loss.item(), position=step + guarded.guard.offset)
        run.after_step(step + 1, state, hold=guarded.guard.skipped > 0)


def _limit_files(limit: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def entry_point(*flags: str) -> None:
    """Do what `python -m toy_stage FLAGS` would do."""
    sys.argv = ["toy_stage", *flags]
    entry.run(Toy, main)
