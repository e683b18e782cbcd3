"""One run in one exp-dir, from a claim to a signed end: resume, checkpoints, signals, watchdog.

    with Run(exp_dir, world) as run:
        if run.finished(total_steps):
            return
        state = run.resume()
        for step in range(state["step"] if state else 0, total_steps):
            ...
            run.after_step(step + 1, lambda: {"model": model.state_dict(), ...})
        run.finish(total_steps, lambda: {...}, files=["backbone.safetensors"])

Exit status: 0 finished; 75 saved and to be run again (USR2); 143 saved after TERM, 130 after Ctrl-C; 1 an error.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from cluster import atomic, checkpoint, distributed
from cluster.atomic import UserError
from cluster.distributed import World
from cluster.heartbeat import Heartbeat
from cluster.owner import Owner
from cluster.signals import REQUEUE, Signals

AGAIN = 75  # EX_TEMPFAIL: the same command goes on from here
FAILED = 3  # above every level of a signal


class Run:
    """This process's part in a run. Create it right after distributed.start, before any DataLoader worker.

    checkpoint_every: seconds between periodic checkpoints. keep: how many to keep. step_timeout: seconds without a step boundary
    after which a rank ends itself. block_for: seconds to wait for Slurm's kill after a save for a signal.
    Raises UserError when another run owns exp_dir.
    """

    def __init__(
        self,
        exp_dir: Path,
        world: World,
        *,
        checkpoint_every: float = 600.0,
        keep: int = 3,
        step_timeout: float = 600.0,
        block_for: float = 600.0,
    ) -> None:
        self.exp_dir = exp_dir
        self.world = world
        self.checkpoint_every = checkpoint_every
        self.block_for = block_for
        self.folder = exp_dir / "checkpoints"
        self.owner: Owner | None = None
        distributed.on_main(self._claim)
        self.writer = checkpoint.Writer(self.folder, keep, self._may_commit)
        self.signals = Signals(ctrl_c=world.launcher != "slurm")
        beat = self.owner.beat if self.owner else lambda: None
        self.heart = Heartbeat(exp_dir / "heartbeat", world.rank, world.size, step_timeout, alongside=beat)
        self._next_save = time.monotonic() + checkpoint_every
        self._saved_step = -1

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching, give the exp-dir back."""
        self.heart.close()
        self.signals.close()
        if self.owner:
            self.owner.release()

    def _claim(self) -> None:
        self.owner = Owner(self.exp_dir)
        if self.owner.predecessor:
            print(f"{self.exp_dir}: taken over from {self.owner.predecessor}, which is gone", flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic.sweep(self.exp_dir)
        atomic.sweep(self.folder)

    def _may_commit(self) -> None:
        """Before each commit: what was logged until here is durable, and the exp-dir is still this run's."""
        metrics = self.exp_dir / "metrics.jsonl"
        if metrics.exists():
            with open(metrics, "ab") as file:
                os.fsync(file.fileno())
        if self.owner:
            self.owner.check()

    def finished(self, total_steps: int | None = None) -> bool:
        """True when final.json is signed, for at least `total_steps`. Raises UserError if its files were changed."""

        def look() -> bool:
            if not (self.exp_dir / "final.json").exists():
                return False
            step = checkpoint.check_final(self.exp_dir)["step"]
            if total_steps is not None and step < total_steps:
                return False
            print(f"{self.exp_dir}: finished at step {step}, nothing to do", flush=True)
            return True

        return distributed.on_main(look)

    def resume(self) -> checkpoint.State | None:
        """Content of the newest checkpoint that verifies, the same on every rank; None to start anew.

        Each later one that was passed over is told, with the reason.
        """
        mine: dict[str, Any] = {}

        def find() -> Path | None:
            self.writer.wait()
            path, state, rejected = checkpoint.load_newest(self.folder)
            mine.update(state)
            for reason in rejected:
                print(f"passed over: {reason}", flush=True)
            if path:
                print(f"resuming from {path}", flush=True)
            return path

        path = distributed.on_main(find)
        trouble = ""
        if path and not self.world.main:
            try:
                mine.update(checkpoint.read(path))
            except UserError as error:
                trouble = f"rank {self.world.rank}: {error}; is --exp-dir on a file system that all nodes share?"
        (failed,) = distributed.agree(bool(trouble))
        if failed:
            raise UserError(trouble) if trouble else SystemExit(1)
        if not path:
            return None
        self._saved_step = mine["step"]
        return mine

    def after_step(self, step: int, state: Callable[[], checkpoint.State], save: bool = False) -> None:
        """At the boundary before step `step`, that is when `step` steps are done: agree, then save or stop if due.

        state: what to save, called on rank 0 only when needed, so without collectives in it. save: save now
        whatever the clock says (the end of an epoch). Does not return after a signal: raises SystemExit.
        """
        self.heart.arrived(step)
        failed = bool(self.owner and (self.writer.failed or not self.owner.held))
        due = save or (self.world.main and time.monotonic() >= self._next_save and not self.writer.busy)
        stop, due = distributed.agree(FAILED if failed else self.signals.level, due)
        self.heart.left()
        if stop == FAILED:
            self._fail()
        if stop:
            self._stop(step, state, stop)
        if due:
            self.save(step, state)

    def save(self, step: int, state: Callable[[], checkpoint.State], wait: bool = False) -> None:
        """Save on rank 0; wait until it is on disk if asked to."""
        if self.world.main and step != self._saved_step:
            self.writer.save(step, state())
            self._next_save = time.monotonic() + self.checkpoint_every
        self._saved_step = step
        if wait:
            with self.patience(3600.0):
                distributed.on_main(self.writer.wait)

    def finish(self, step: int, state: Callable[[], checkpoint.State], files: list[str]) -> None:
        """Save, and sign `files` (relative to exp_dir) as the result of this stage."""
        self.save(step, state, wait=True)

        def sign() -> None:
            self._may_commit()
            checkpoint.sign_final(self.exp_dir, step, files)

        distributed.on_main(sign)

    def patience(self, seconds: float) -> contextlib.AbstractContextManager[None]:
        """`with run.patience(1800):` around what takes long on purpose: validation, compilation, a probe."""
        return self.heart.patience(seconds)

    def _fail(self) -> NoReturn:
        if self.owner:
            self.writer.wait()
            self.owner.check()
        raise SystemExit(1)

    def _stop(self, step: int, state: Callable[[], checkpoint.State], level: int) -> NoReturn:
        self.save(step, state, wait=True)
        self.heart.close()
        again = level == REQUEUE
        if self.world.main:
            print(f"step {step}: saved for {self.signals.name or 'a signal of another rank'}", flush=True)
        if self.world.launcher == "slurm":
            # Slurm's own kill tells what this was. To leave by ourselves would make the job COMPLETED or FAILED.
            if not again or distributed.on_main(requeue):
                time.sleep(self.block_for)
        if again:
            raise SystemExit(AGAIN)
        raise SystemExit(130 if self.signals.name == "SIGINT" else 143)


def requeue() -> bool:
    """Ask Slurm to run this job again, under the same job id. False, after telling why, when it won't."""
    job = os.environ["SLURM_JOB_ID"]
    for wait in (0, 2, 10):  # the controller may be restarting
        time.sleep(wait)
        try:
            answer = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            print(f"scontrol requeue {job}: {error}", file=sys.stderr, flush=True)
            continue
        if answer.returncode == 0:
            print(f"job {job} is requeued", flush=True)
            return True
        print(f"scontrol requeue {job}: {answer.stderr.strip()}", file=sys.stderr, flush=True)
    return False
