"""Record the metrics of a run: metrics.jsonl, TensorBoard, and a bar on a terminal or lines in a log.

metrics.jsonl has one JSON object a line, each with "step" (the number of steps done before it, from 0).
Numbers that JSON cannot express are the strings "nan", "inf" and "-inf", which float() reads.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import atomic
from cluster.dashboard import Dashboard
from cluster.errors import failing_disk

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from cluster.distributed import World


class Journal:
    """The record of a run, which rank 0 writes; on other ranks every method does nothing.

    start_step: the step from which the run continues. What an earlier launch logged for this step and later
    ones is dropped, since it will be logged again. every: steps from one log line to the next; see `due`.
    batch_size: over all ranks, from which images/s are computed. Speeds and memory go to the log and to
    TensorBoard, not into metrics.jsonl, which is equal for equal runs. wandb_project: of Weights & Biases, if
    metrics go there too; see `Dashboard`.
    """

    def __init__(
        self,
        exp_dir: Path,
        world: World,
        total_steps: int,
        start_step: int = 0,
        every: int = 10,
        batch_size: int = 1,
        wandb_project: str | None = None,
    ) -> None:
        self.main = world.main
        self.folder = exp_dir
        self.total_steps = total_steps
        self.every = max(1, every)
        self.batch_size = batch_size
        self.device = world.device
        self._dashboard = Dashboard(wandb_project, exp_dir) if wandb_project and self.main else None
        if self.main:
            with atomic.named(self.folder / "tensorboard"):
                self._open(start_step)

    def _open(self, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        truncate(path, start_step, self.every)
        # Without a buffer: what a full disk does not take would be written again at exit, with a traceback.
        self._lines = open(path, "ab", buffering=0)  # noqa: SIM115 closed by close()
        _number_lives(self.folder / "tensorboard")
        self._hook, threading.excepthook = threading.excepthook, _hushed(threading.excepthook)
        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=start_step)
        self._bar: Any = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=self.total_steps, initial=start_step, unit="step", dynamic_ncols=True)
        self._since = (time.monotonic(), start_step)  # seconds and steps done at the last log line
        self._waited = 0.0  # seconds since then in which data were awaited

    def due(self, step: int) -> bool:
        """Whether step `step` is one to log: each `every`-th step is, and the last one."""
        return step % self.every == 0 or step + 1 == self.total_steps

    def log(self, step: int, **scalars: float | Tensor) -> None:
        """Record the metrics of step `step` (0-based: the first step of a run is 0) and show them."""
        figures = {name: float(value) for name, value in scalars.items()}
        self.record(step, **figures)
        if self.main:
            self._tell(step, figures)

    def record(self, step: int, **scalars: float) -> None:
        """Record metrics of a validation after `step` steps; a run that resumes at `step` drops them."""
        if not self.main:
            return
        line = {"step": step} | {name: _json_float(value) for name, value in scalars.items()}
        with atomic.named(self.folder / "metrics.jsonl"):
            text = (json.dumps(line) + "\n").encode()
            while text:  # a disk that is nearly full takes a part, and none of the rest
                text = text[self._lines.write(text) :]
        with atomic.named(self.folder / "tensorboard"):  # the error of its thread is raised here
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
        if self._dashboard:
            self._dashboard.record(step, scalars)

    def waited(self, seconds: float) -> None:
        """Count `seconds` as waiting for data."""
        if self.main:
            self._waited += seconds

    def embeddings(self, step: int, tensor: Tensor, thumbnails: Tensor, names: Sequence[str]) -> None:
        """Add embeddings to TensorBoard's projector: tensor [N, D], thumbnails [N, 3, H, W] in 0 to 1."""
        if not self.main:
            return
        # Each name is a line of a file.
        plain = [" ".join(name.encode(errors="replace").decode().split()) for name in names]
        with atomic.named(self.folder / "tensorboard"):
            self._board.add_embedding(tensor, plain, thumbnails, step)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Add a picture, uint8 [H, W, 3] RGB, to TensorBoard."""
        if self.main:
            with atomic.named(self.folder / "tensorboard"):
                self._board.add_image(name, image, step, dataformats="HWC")

    def message(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if not self.main:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, flush=True)

    def rewind(self, step: int) -> None:
        """Drop what was logged for `step` and later steps, since the run goes back to `step`."""
        if self.main:
            self._close()
            self._open(step)

    def close(self) -> None:
        if self.main:
            self._close()
            if self._dashboard:
                self._dashboard.close()

    def _close(self) -> None:
        self._lines.close()
        with atomic.named(self.folder / "tensorboard"):
            self._board.close()
        threading.excepthook = self._hook
        if self._bar is not None:
            self._bar.close()

    def _tell(self, step: int, figures: dict[str, float]) -> None:
        done, now = step + 1, time.monotonic()
        then, told = self._since
        speed = {}
        if done > told and self.due(step):
            rate = (now - then) / (done - told)  # seconds per step
            share = self._waited / max(1e-9, now - then)
            speed = {
                "images_per_s": self.batch_size / max(1e-9, rate),
                "data_share": share,
                "peak_gib": self._peak(),
            }
            with atomic.named(self.folder / "tensorboard"):
                for name, value in speed.items():
                    self._board.add_scalar(f"speed/{name}", value, step)
            self._since, self._waited = (now, done), 0.0
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in figures.items()}, refresh=False)
        elif speed:
            left = int(rate * max(0, self.total_steps - done))
            text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
            print(
                f"step {done}/{self.total_steps}  {text}  {1000 * rate:.0f} ms/step  "
                f"{speed['images_per_s']:.3g} images/s  data {speed['data_share']:.0%}  "
                f"peak {speed['peak_gib']:.2f} GiB  ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}",
                flush=True,
            )

    def _peak(self) -> float:
        """The most memory that was in use so far, GiB: of the GPU, or of this process without its workers."""
        if self.device.type == "cuda":
            import torch

            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def truncate(path: Path, start_step: int, every: int = 1) -> None:
    """Remove lines of metrics.jsonl with step >= start_step, incomplete lines, and lines that are not JSON.

    every: steps from one line to the next. A line on stdout says what was damaged, and one whether the file
    ends before the checkpoint of `start_step`. The file is replaced, not shortened: a lost rank of an earlier
    launch may still write to the old file.
    """
    if not path.exists():
        return
    kept, steps, damaged = [], [0], 0
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        try:
            step: int = json.loads(line if line.endswith("\n") else "")["step"]
            if step < start_step:
                kept.append(line)
            steps.append(step)
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged += 1
    if damaged:
        print(f"{path}: {damaged} torn or damaged lines are cut", flush=True)
    # An earlier launch may have logged more rarely than this one.
    rhythm = max([every, *(later - step for step, later in pairwise(steps))])
    if max(steps) < start_step - rhythm:
        print(
            f"{path}: ends at step {max(steps)}, the checkpoint is of step {start_step}: lines are lost",
            flush=True,
        )
    atomic.write_text(path, "".join(kept))


def _hushed(hook: Callable[[threading.ExceptHookArgs], object]) -> Callable[[threading.ExceptHookArgs], None]:
    """`hook`, but silent about a disk that fails TensorBoard's thread: its next call raises that too."""

    def silent(args: threading.ExceptHookArgs) -> None:
        ours = type(args.thread).__module__.startswith("tensorboard.")
        if not (ours and args.exc_value and failing_disk(args.exc_value)):
            hook(args)

    return silent


def _number_lives(folder: Path) -> None:
    """Rename the event files of earlier launches so that they sort, in order, before the file of this launch.

    TensorBoard reads event files in the order of their names, and a later file replaces points of earlier
    ones. The names begin with the time of a node's clock. Clocks differ, so an earlier launch's file could
    sort last.
    """
    for life, path in enumerate(sorted(folder.glob("events.out.tfevents.*"))):
        path.rename(folder / f"events.out.tfevents.{life:010}.life")


def _json_float(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
