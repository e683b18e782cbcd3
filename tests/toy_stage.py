"""A stage as small as can be, run as any stage is: flags, ranks, workers, checkpoints, a journal."""

import hashlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from cluster import checkpoint, config, distributed
from cluster.errors import UserError
from cluster.guard import Guard
from cluster.journal import Journal
from cluster.lifecycle import Run


@dataclass(frozen=True)
class Toy:
    """Fit a line."""

    # Folder of the run.
    exp_dir: Path
    steps: int = 40
    # DataLoader workers.
    workers: int = 0
    # Seconds between checkpoints.
    checkpoint_every: float = 0.1
    # Seconds a step lasts.
    nap: float = 0.01
    # Floats in the checkpoint beside the model.
    ballast: int = 0
    # Data positions from .. to that are not finite.
    poison: tuple[int, int] = (0, 0)
    step_timeout: float = 30.0
    # Step at which the last rank hangs: -1 is never.
    hang_at: int = -1
    # Step at which every rank raises.
    crash_at: int = -1
    # Seconds of patience for a nap of that length after step 2.
    patience: float = 0.0
    # The largest file that may be written, in bytes: a stand-in for a full disk.
    file_limit: int = 0


class Line(Dataset):
    """A sample is a function of its position (law 1)."""

    def __init__(self, start: int, stop: int, poison: tuple[int, int]) -> None:
        self.positions = range(start, stop)
        self.poison = range(*poison)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Tensor:
        position = self.positions[index]
        x = torch.randn(8, generator=torch.Generator().manual_seed(position))
        return x * float("nan") if position in self.poison else x


def main(toy: Toy) -> None:
    world = distributed.start("cpu", toy.exp_dir)
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    wrapped = DistributedDataParallel(model) if world.size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def state() -> checkpoint.State:
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        return content | {"guard": guard.state(), "ballast": torch.zeros(toy.ballast)}

    def load(content: checkpoint.State) -> int:
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        return content["step"]

    timeout = {"checkpoint_every": toy.checkpoint_every, "step_timeout": toy.step_timeout}
    with Run(toy.exp_dir, world, **timeout) as run:
        if run.finished(toy.steps):
            return
        if toy.file_limit and world.main:
            _limit_files(toy.file_limit)
        content = run.resume()
        start = load(content) if content else 0
        guard = Guard(**content["guard"]) if content else Guard()
        journal = Journal(toy.exp_dir, world, toy.steps, start, every=1)
        while bad := train(toy, wrapped, optimizer, run, guard, journal, start, state):
            verdict, step = bad
            content = run.resume() or {}
            if verdict == "stop":
                last = checkpoint.step_path(run.folder, content["step"])
                words = guard.last_words(step, [f"position {step + guard.offset}"], str(last))
                raise UserError(words) if world.main else SystemExit(0)
            start = load(content)
            guard.roll_back(step, start)
            journal.rewind(start)
        digest = hashlib.sha256(model.weight.detach().numpy().tobytes()).hexdigest()
        journal.close()
        if world.main:
            checkpoint.write_file(toy.exp_dir / "model.pt", {"model": model.state_dict(), "digest": digest})
        run.finish(toy.steps, state, ["model.pt"])
    distributed.stop()


def train(toy, model, optimizer, run, guard, journal, start, state) -> tuple[str, int] | None:
    """Until the end, or (verdict, step) where the guard no longer skips."""
    data = Line(start + guard.offset, toy.steps + guard.offset, toy.poison)
    for step, x in enumerate(_batches(data, toy.workers), start):
        time.sleep(toy.nap)
        if step == toy.crash_at:
            raise RuntimeError("no line fits")
        if step == toy.hang_at and run.world.rank == run.world.size - 1:
            time.sleep(1000)
        if toy.patience and step == 2:
            with run.patience(toy.patience):
                time.sleep(toy.patience)
        loss = ((model(x[run.world.rank :: run.world.size]) - 1) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        verdict = guard.judge(bool(torch.isfinite(norm)))
        if verdict == "ok":
            optimizer.step()
        elif verdict != "skip":
            return verdict, step
        journal.log(step, loss=loss.item(), position=step + guard.offset)
        run.after_step(step + 1, state, hold=guard.skipped > 0)
    return None


def _batches(data: Line, workers: int) -> Iterator[Tensor]:
    context = "fork" if workers else None
    loader = DataLoader(data, batch_size=None, num_workers=workers, multiprocessing_context=context)
    for x in loader:
        yield x.expand(2, 8) * torch.tensor([[1.0], [2.0]])


def _limit_files(limit: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def entry(*flags: str) -> None:
    """What `python -m toy_stage FLAGS` would do."""
    sys.argv = ["toy_stage", *flags]
    config.run(Toy, main)
