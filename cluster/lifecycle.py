"""One run in one exp-dir, from a claim to a signed end: resume, checkpoints, signals, watchdog.

    with Run(exp_dir, world) as run:
        if run.finished(total_steps):
            return
        state = run.resume()
        for step in range(state["step"] if state else 0, total_steps):
            ...
            run.after_step(step + 1, lambda: {"model": model.state_dict(), ...})
        run.finish(total_steps, lambda: {...}, files=["backbone.safetensors"])

Exit status: 0 finished; 1 an error to mend; 70 a crash, a hung step or a lost rank; 75 saved and not
requeued, so run it again; 143 saved after TERM; 130 saved after Ctrl-C.
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
from cluster.checkpoint import State
from cluster.distributed import World
from cluster.errors import AGAIN, CRASH, INTERRUPTED, TERMINATED, UserError
from cluster.heartbeat import Heartbeat
from cluster.owner import Owner
from cluster.signals import GO_ON, REQUEUE, STOP, Signals

BROKEN = STOP + 1  # rank 0 can't go on: the disk is full, another run has taken over
SAVING = 3600.0  # seconds that a save may take before a step counts as hung


class Run:
    """This process's part in a run. Create it right after distributed.start, before a DataLoader has workers.

    checkpoint_every: seconds between periodic checkpoints. keep: how many of them to keep. step_timeout:
    seconds without a step boundary after which a rank ends itself. block_for: seconds to wait for Slurm's
    kill after the save for a signal. Raises UserError when another run owns exp_dir.
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
        self.owner: Owner | None = None  # on rank 0
        distributed.on_main(self._claim)
        self.writer = checkpoint.Writer(self.folder, keep, self._before_commit)
        self.signals = Signals(ctrl_c=world.launcher != "slurm")
        beat = self.owner.beat if self.owner else lambda: None
        self.heart = Heartbeat(exp_dir / "heartbeat", world.rank, world.size, step_timeout, alongside=beat)
        self._saved_at = time.monotonic()
        self._saved_step = -1

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching and give the exp-dir back."""
        self.heart.close()
        self.signals.close()
        if self.owner:
            self.owner.release()

    def finished(self, total_steps: int | None = None) -> bool:
        """Whether final.json is signed, for at least `total_steps`. Raises UserError if its files changed."""

        def look() -> bool:
            if not (self.exp_dir / "final.json").exists():
                return False
            step = checkpoint.check_final(self.exp_dir)["step"]
            if total_steps is not None and step < total_steps:
                (self.exp_dir / "final.json").unlink()  # it signs a shorter run, whose files will change
                return False
            print(f"{self.exp_dir}: finished at step {step}, nothing to do", flush=True)
            return True

        return distributed.on_main(look)

    def resume(self) -> State | None:
        """Content of the newest checkpoint that verifies, the same on every rank; None where there is none.

        Every later one that was passed over is told, with the reason. Includes "step", the steps done. May be
        called again, to go back.
        """
        state: State = {}

        def find() -> Path | None:
            self.writer.wait()
            path, content, rejected = checkpoint.load_newest(self.folder)
            state.update(content)
            for reason in rejected:
                print(f"passed over: {reason}", flush=True)
            if path:
                print(f"going on from {path}", flush=True)
            return path

        with self.allow(SAVING):
            path = distributed.on_main(find)
            trouble = ""
            if path and not self.world.main:
                try:
                    state.update(checkpoint.read(path))
                except UserError as error:
                    trouble = (
                        f"rank {self.world.rank}: {error}; do all nodes share the file system of --exp-dir?"
                    )
            (failed,) = distributed.agree(bool(trouble))
        if failed:
            raise UserError(trouble) if trouble else SystemExit(0)
        if not path:
            return None
        self._saved_step = state["step"]
        return state

    @property
    def stopping(self) -> bool:
        """Whether a signal asks this rank to save and stop: what takes long looks here and makes way."""
        return self.signals.level != GO_ON

    def after_step(
        self, step: int, state: Callable[[], State], save: bool = False, hold: bool = False
    ) -> None:
        """At the boundary before step `step`, when `step` steps are done: agree, then save or stop if due.

        state: what to save; called when needed and on rank 0 only, so without collectives in it.
        save: save now whatever the clock says (the end of an epoch). hold: do not save by the clock, as while
        steps are skipped: the state to go back to would be the bad one. Both are the same on every rank.
        After a signal it does not return but raises SystemExit.
        """
        self.heart.arrived(step)
        level: int = self.signals.level
        if self.owner and (self.writer.failed or not self.owner.held):
            level = BROKEN
        # Earlier by the time to write: a crash in the write then costs no more than the interval.
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
        """Save on rank 0, unless this step is saved; `wait`, on all ranks, until it is on disk."""
        if self.world.main and step != self._saved_step:
            with self.allow(SAVING):  # the one before may still be on its way to the disk
                self.writer.save(step, state())
            self._saved_at = time.monotonic()
        self._saved_step = step
        if wait:
            with self.allow(SAVING):
                distributed.on_main(self.writer.wait)

    def finish(self, step: int, state: Callable[[], State], files: list[str]) -> None:
        """Save, and sign `files` (relative to exp_dir) as the result of this stage."""
        self.save(step, state, wait=True)

        def sign() -> None:
            self._before_commit()
            checkpoint.sign_final(self.exp_dir, step, files)

        with self.allow(SAVING):
            distributed.on_main(sign)

    def allow(self, seconds: float) -> contextlib.AbstractContextManager[None]:
        """`with run.allow(1800):`, on every rank, around what takes long: a validation, a picture."""
        return self.heart.allow(seconds)

    def _claim(self) -> None:
        self.owner = Owner(self.exp_dir)
        if self.owner.predecessor:
            print(f"{self.exp_dir}: taken over from {self.owner.predecessor}", flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic.sweep(self.exp_dir)
        atomic.sweep(self.folder)

    def _before_commit(self) -> None:
        """What was logged until here is durable, and the exp-dir is still this run's."""
        metrics = self.exp_dir / "metrics.jsonl"
        if metrics.exists():
            with open(metrics, "ab") as file:
                os.fsync(file.fileno())
        if self.owner:
            self.owner.check()

    def _agree(self, step: int, *flags: int) -> tuple[int, ...]:
        try:
            return distributed.agree(*flags)
        except RuntimeError as error:  # a dead rank resets the connection at once
            reason = str(error).splitlines()[0][:160]
            print(f"error: step {step}: lost another rank ({reason})", file=sys.stderr, flush=True)
            raise SystemExit(CRASH) from None

    def _fail(self) -> NoReturn:
        if self.owner:
            self.writer.wait()  # raises what went wrong
            self.owner.check()
        raise SystemExit(0)  # rank 0 tells

    def _stop(self, step: int, state: Callable[[], State], level: int) -> NoReturn:
        self.save(step, state, wait=True)
        again = level == REQUEUE
        if self.world.main:
            print(f"step {step}: saved after {self.signals.name or 'a signal to another rank'}", flush=True)
        with self.allow(SAVING + self.block_for):
            if self.world.launcher == "slurm" and (not again or distributed.on_main(requeue)):
                # Slurm's kill tells what this was; to leave earlier would make the job COMPLETED or FAILED.
                time.sleep(self.block_for)
        if again:
            raise SystemExit(AGAIN)
        raise SystemExit(INTERRUPTED if self.signals.name == "SIGINT" else TERMINATED)


def requeue() -> bool:
    """Ask Slurm to run this job again, under the same job id. False, after telling why, when it won't."""
    command = ["scontrol", "requeue", os.environ["SLURM_JOB_ID"]]
    for wait in (0, 2, 10):  # the controller may be restarting
        time.sleep(wait)
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            print(f"{' '.join(command)}: {error}", file=sys.stderr, flush=True)
            continue
        if answer.returncode == 0:
            print(f"{' '.join(command)}: done, waiting to be ended", flush=True)
            return True
        print(f"{' '.join(command)}: {answer.stderr.strip()}", file=sys.stderr, flush=True)
    return False
