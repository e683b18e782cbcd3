"""Parts of chaos.py that need no Slurm: kills during the write of a checkpoint, the cost of checkpoints."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from statistics import median

INTERVAL = 0.5  # seconds between checkpoints in `kills`
FLOATS = 10_000_000  # 40 MB
STATES = {"Faster R-CNN R50": 334e6, "VICReg R50, projector 8192 x 3": 1.4e9}  # bytes of a checkpoint


def kills(options: argparse.Namespace, count: int = 100) -> str:
    """kill -9 at `count` random moments of a write. Each next launch must resume, and lose little work."""
    from cluster import checkpoint

    rng = random.Random(options.seed)
    lost: list[float] = []
    outside, unreadable, passed_over = 0, 0, 0
    with tempfile.TemporaryDirectory(prefix="linework-kills-") as name:
        folder = Path(name) / "checkpoints"
        seconds = 0.2  # an estimate of the duration of a write
        while len(lost) < count:
            pid = os.fork()
            if pid == 0:
                train(Path(name))
            until_written(folder)
            began = time.monotonic()
            time.sleep(rng.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
            killed = time.monotonic()
            os.waitpid(pid, 0)
            if not list(folder.glob(".step_*.pt.tmp-*")):
                outside += 1
                seconds = max(0.02, 0.9 * (killed - began))
                continue
            path, state, rejected = checkpoint.load_newest(folder)
            passed_over += len(rejected)
            if path is None or set(state["weights"].numpy()[:: FLOATS // 1000]) != {state["step"]}:
                unreadable += 1
                continue
            lost.append(killed - state["when"])
            seconds = max(seconds, 1.2 * (killed - began))
    options.failed |= bool(unreadable or passed_over) or max(lost) > INTERVAL + 0.1  # for a step, a wake-up
    text = (
        f"{count} x kill -9 while the temporary of a 40 MB checkpoint was being written, at random moments, "
        f"a checkpoint every {INTERVAL} s ({outside} more kills came after the rename and are not counted): "
        f"{unreadable} unreadable, {passed_over} damaged files met. Work lost, in seconds: median "
        f"{median(lost):.2f}, at most {max(lost):.2f}."
    )
    return f"### Killed inside the write\n\n{text}"


def train(exp_dir: Path) -> None:
    """Take steps of 2 ms until killed. The state holds its step and the time at which it was copied."""
    import torch

    from cluster.distributed import World
    from cluster.lifecycle import Run

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    with Run(exp_dir, World(), checkpoint_every=INTERVAL) as run:
        state = run.resume() or {"step": 0, "weights": torch.zeros(FLOATS)}
        weights = state["weights"]
        for step in itertools.count(state["step"] + 1):
            time.sleep(0.002)

            def now(step: int = step) -> dict:
                return {"weights": weights.fill_(step), "when": time.monotonic()}

            run.after_step(step, now)


def until_written(folder: Path) -> None:
    """Wait until this launch has saved a checkpoint and is writing the next one."""
    began = time.time()
    while not written_since(folder, began):
        time.sleep(0.001)
    while not list(folder.glob(".step_*.pt.tmp-*")):
        time.sleep(0.001)


def written_since(folder: Path, when: float) -> bool:
    """Whether a checkpoint is later than `when`, a time.time(). Old ones may be removed meanwhile."""
    for path in folder.glob("step_*.pt"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime > when:
                return True
    return False


def overhead(options: argparse.Namespace, rounds: int = 3) -> str:
    """Seconds that a checkpoint adds to training, as a share of a minute; below 1 % if cores are idle."""
    columns = (
        "state",
        "size",
        "step held up by the copy, s",
        "until durable, s",
        "added, all cores at work, s",
        "share of 60 s",
        "added, one core at work, s",
        "share of 60 s",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, size in STATES.items():
        held, durable, busy = added(int(size), os.cpu_count() or 1, rounds)
        _, _, one = added(int(size), 1, rounds)
        options.failed |= one >= 0.6
        lines.append(
            f"| {name} | {size / 1e6:.0f} MB | {held:.3f} | {durable:.1f} "
            f"| {busy:.2f} | {busy / 0.6:.1f} % | {one:.2f} | {one / 0.6:.1f} % |"
        )
    text = (
        "A training loop (ResNet-18, 8 x 3 x 64 x 64, forward and backward on CPU) over a fixed number of "
        f"steps, with one checkpoint and without, in turn, median of {rounds} rounds; the state is tensors "
        "of that size. One core at work is nearer to a GPU node, whose CPUs have time to hash and write."
    )
    return "\n".join(["### What a checkpoint costs", "", text, "", *lines])


def added(size: int, threads: int, rounds: int) -> tuple[float, float, float]:
    """Median seconds: in save(), until the file is on disk, and added to the training loop meanwhile."""
    import torch
    from torchvision.models import resnet18

    from cluster import checkpoint

    torch.set_num_threads(threads)
    model, images = resnet18(), torch.rand(8, 3, 64, 64)
    state = {str(n): torch.rand(size // 400) for n in range(100)}

    def steps(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            model(images).sum().backward()
        return time.perf_counter() - began

    steps(3)
    count = max(10, int((4 + size / 1e8) / (steps(10) / 10)))  # long enough that the write ends first
    held, durable, extra = [], [], []
    with tempfile.TemporaryDirectory(prefix="linework-overhead-", dir=".") as name:
        writer = checkpoint.Writer(Path(name), keep=1)
        for number in range(rounds + 1):  # the first round allocates the host memory
            without = steps(count)
            began = time.perf_counter()
            writer.save(number, state)
            held.append(time.perf_counter() - began)
            done = 0
            while writer.busy and done < count:
                steps(1)
                done += 1
            durable.append(time.perf_counter() - began)
            steps(count - done)
            writer.wait()
            extra.append(time.perf_counter() - began - without)
    return median(held[1:]), median(durable[1:]), median(extra[1:])
