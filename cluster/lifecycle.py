"""Carry one run in one exp-dir to its signed end: ownership, resuming, checkpoints, signals, watchdog.

    with Run(exp_dir, world) as run:
        if run.finished(total_steps):
            return
        state = run.resume()
        for step in range(state["step"] if state else 0, total_steps):
            ...
            run.after_step(step + 1, lambda: {"model": model.state_dict(), ...})
        run.finish(total_steps, lambda: {...}, files=["backbone.safetensors"])

Exit status: 0 finished; 1 an error that the user can fix; 70 a crash, a hung step or a lost rank; 75 saved
but not requeued, so run the same command again; 143 saved after TERM; 130 saved after Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from cluster import atomic, checkpoint, distributed
from cluster.checkpoint import Saved, State
from cluster.distributed import World
from cluster.errors import AGAIN, CRASH, INTERRUPTED, TERMINATED, UserError
from cluster.heartbeat import Heartbeat
from cluster.owner import Owner
from cluster.signals import GO_ON, REQUEUE, STOP, Signals

BROKEN = STOP + 1  # rank 0 can't continue: a write has failed, or another run has taken over the exp-dir
SAVING = 3600.0  # seconds that a save may take before a step counts as hung


class Run:
    """One run, on this rank. Create it right after distributed.start, before any DataLoader worker exists.

    checkpoint_every: seconds between periodic checkpoints. keep: number of checkpoints to keep. step_timeout:
    seconds without a step boundary (see cluster.heartbeat) after which a rank ends itself. block_for: seconds
    to wait for Slurm to kill the job, after the save that a signal has asked for.
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
        self.owner: Owner | None = None  # set on rank 0 only
        distributed.on_main(self._claim)
        self.writer = checkpoint.Writer(self.folder, keep, self._before_commit)
        self.signals = Signals(ctrl_c=world.launcher != "slurm")
        beat = self.owner.beat if self.owner else lambda: None
        self.heart = Heartbeat(
            exp_dir / "heartbeat",
            world.rank,
            world.size,
            step_timeout,
            alongside=beat,
            asked=lambda: self.stopping,
            leave=self._leave,
        )
        self._saved_at = time.monotonic()
        self._saved_step = -1

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the heartbeat, restore the signal handlers and release the exp-dir."""
        self.heart.close()
        self.signals.close()
        if self.owner:
            self.owner.release()

    def finished(self, total_steps: int | None = None) -> bool:
        """Whether final.json signs `total_steps` or more. Raises UserError if a signed file has changed."""

        def look() -> bool:
            if not (self.exp_dir / "final.json").exists():
                return False
            step = checkpoint.check_final(self.exp_dir)["step"]
            if total_steps is not None and step < total_steps:
                return False  # it signs a shorter run
            print(f"{self.exp_dir}: finished at step {step}, nothing to do", flush=True)
            return True

        return distributed.on_main(look)

    def resume(self) -> Saved | None:
        """Content of the newest checkpoint that verifies, the same on every rank; None if there is none.

        It includes "step", the number of steps done. For each later checkpoint that is rejected the reason is
        printed. May be called again, to go back to a checkpoint.
        Raises UserError if there are checkpoints and none verifies, as a run that began anew would overwrite
        what it did; and on a rank that cannot read the checkpoint which rank 0 has found.
        """
        saved: Saved | None = None

        def find() -> Path | None:
            nonlocal saved
            self.writer.wait()
            path, content, rejected = checkpoint.load_newest(self.folder)
            if rejected and not path:
                raise UserError(
                    f"{rejected[0]}; {self.folder} holds no other checkpoint that can be read: bring one "
                    "back, or give another --exp-dir, or remove the folder to begin anew"
                )
            for reason in rejected:
                print(f"passed over: {reason}", flush=True)
            if path:
                saved = content
                print(f"going on from {path}", flush=True)
            return path

        with self.allow(SAVING):
            path = distributed.on_main(find)
            trouble = ""
            if path and not self.world.main:
                try:
                    saved = checkpoint.read(path)
                except UserError as error:
                    trouble = (
                        f"rank {self.world.rank}: {error}; do all nodes share the file system of --exp-dir?"
                    )
            (failed,) = distributed.agree(bool(trouble))
        if failed:
            raise UserError(trouble) if trouble else SystemExit(0)
        if saved:
            self._saved_step = saved["step"]
        return saved

    @property
    def stopping(self) -> bool:
        """Whether a signal has asked this rank to save and stop. Long work checks this and breaks off."""
        return self.signals.level != GO_ON

    def after_step(
        self, step: int, state: Callable[[], State], save: bool = False, hold: bool = False
    ) -> None:
        """Call when `step` steps are done: all ranks agree whether to save or stop, and then do it.

        state: returns what to save. It is called only if needed and only on rank 0, so it may not use
        collectives. save: save now, however recent the last checkpoint is (at the end of an epoch). hold:
        make no periodic checkpoint, as while steps are skipped: the run would go back to a bad state. Both
        must be the same on every rank.
        Raises SystemExit after a signal, and when another rank is lost. When a write has failed or another
        run has taken over, rank 0 raises UserError and the other ranks SystemExit.
        """
        self.heart.arrived(step)
        level: int = self.signals.level
        if self.owner and (self.writer.failed or not self.owner.held):
            level = BROKEN
        # Start earlier by the duration of a write, so that a crash in it loses no more than checkpoint_every.
        since = time.monotonic() - self._saved_at + self.writer.seconds
        late = self.world.main and since >= self.checkpoint_every and not self.writer.busy
        level, due = self._agree(step, level, save or (late and not hold))
        self.heart.left()
        if level == BROKEN:
            self._fail()
        elif level != GO_ON:
            self._stop(step, state, level)
        elif due:
            self.save(step, state)

    def save(self, step: int, state: Callable[[], State], wait: bool = False) -> None:
        """Save on rank 0, unless this step is saved already. wait: wait on all ranks until it is on disk."""
        if self.world.main and step != self._saved_step:
            with self.allow(SAVING):  # it waits if the previous checkpoint is still being written
                self.writer.save(step, state())
            self._saved_at = time.monotonic()
        self._saved_step = step
        if wait:
            with self.allow(SAVING):
                distributed.on_main(self.writer.wait)

    def finish(self, step: int, state: Callable[[], State], files: list[str], told: str = "") -> None:
        """Save, then sign `files` (relative to exp_dir) as the results of this stage, with a line on them."""
        self.save(step, state, wait=True)

        def sign() -> None:
            self._before_commit()
            checkpoint.sign_final(self.exp_dir, step, files, told)

        with self.allow(SAVING):
            distributed.on_main(sign)

    def allow(self, seconds: float) -> contextlib.AbstractContextManager[None]:
        """Use `with run.allow(seconds):` on every rank around long work: a validation, a picture."""
        return self.heart.allow(seconds)

    def _claim(self) -> None:
        self.owner = Owner(self.exp_dir)
        if self.owner.predecessor:
            print(f"{self.exp_dir}: taken over from {self.owner.predecessor}", flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic.sweep(self.exp_dir)
        atomic.sweep(self.folder)

    def _before_commit(self) -> None:
        """fsync what was logged until here, and raise UserError if another run has taken over the exp-dir."""
        metrics = self.exp_dir / "metrics.jsonl"
        if metrics.exists():
            with open(metrics, "ab") as file:
                os.fsync(file.fileno())
        if self.owner:
            self.owner.check()

    def _agree(self, step: int, *flags: int) -> tuple[int, ...]:
        try:
            return distributed.agree(*flags)
        except RuntimeError as error:  # the connection to a dead rank is reset at once
            reason = str(error).splitlines()[0][:160]
            print(f"error: step {step}: lost another rank ({reason})", file=sys.stderr, flush=True)
            raise SystemExit(CRASH) from None

    def _fail(self) -> NoReturn:
        if self.owner:
            self.writer.wait()  # raises the error of the write
            self.owner.check()
        raise SystemExit(0)  # rank 0 prints the error

    def _stop(self, step: int, state: Callable[[], State], level: int) -> NoReturn:
        self.save(step, state, wait=True)
        if self.world.main:
            print(f"step {step}: saved after {self.signals.name or 'a signal to another rank'}", flush=True)
        with self.allow(SAVING + self.block_for):
            if self.world.launcher == "slurm" and (level != REQUEUE or distributed.on_main(requeue)):
                # Wait for Slurm to kill the job: if it exited by itself, Slurm would record COMPLETED or
                # FAILED.
                time.sleep(self.block_for)
        raise SystemExit(self._status(level))

    def _leave(self) -> None:
        """End this rank after a signal, from another thread, while the main thread waits."""
        held = "waiting for data" if self.heart.step else "before the end of the first step"
        told = f"rank {self.world.rank}: {self.signals.name} {held}: ended without saving"
        print(f"{told}; the same command goes on from the newest checkpoint", flush=True)
        level = self.signals.level
        if self.world.launcher == "slurm" and (level != REQUEUE or requeue()):
            time.sleep(self.block_for)
        os._exit(self._status(level))

    def _status(self, level: int) -> int:
        if level == REQUEUE:
            return AGAIN
        return INTERRUPTED if self.signals.name == "SIGINT" else TERMINATED


def requeue() -> bool:
    """Ask Slurm to run this job again under the same job id. If Slurm refuses, print why and return False."""
    job = os.environ["SLURM_JOB_ID"]
    if array := os.environ.get(
        "SLURM_ARRAY_JOB_ID"
    ):  # one task has the array's own number, which means all tasks
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    command = ["scontrol", "requeue", job]
    for wait in (0, 2, 10):  # the controller may be restarting
        time.sleep(wait)
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            print(f"{' '.join(command)}: {error}", file=sys.stderr, flush=True)
            continue
        if answer.returncode == 0:
            print(f"{' '.join(command)}: accepted, waiting for Slurm to end this job", flush=True)
            return True
        print(f"{' '.join(command)}: {answer.stderr.strip()}", file=sys.stderr, flush=True)
    return False
