"""Many runs of our own commands, as one submitit array on Slurm or as a few processes here.

A run is a chain of commands, each of which goes on where an earlier launch of it stopped. When the last one
has ended well FOLDER/done/NAME.json is written, which holds the chain: a run with that very chain is skipped.
Output is appended to FOLDER/logs/NAME.log. All run from FOLDER/code, the code as it was at the first launch.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cluster import atomic
from cluster.errors import FAILED, UserError
from cluster.signals import requeue_signal
from cluster.snapshot import snapshot

ENDING = 60.0  # seconds that the processes of a killed launch may take to save and end
PDEATHSIG = 1  # of prctl(2)


@dataclass(frozen=True)
class Run:
    """One run: the arguments of `python` for each of its commands, and the runs that must be done before."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    after: tuple[str, ...] = ()

    def done(self, folder: Path) -> bool:
        """Whether a launch came to the end of these very commands."""
        return read_done(folder, self.name).get("commands") == [list(command) for command in self.commands]


def read_done(folder: Path, name: str) -> dict[str, Any]:
    """What the end of a run has left, {} where there is none: "commands" and "seconds" of the last launch."""
    try:
        return dict(json.loads((folder / "done" / f"{name}.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def log_of(folder: Path, name: str) -> Path:
    return folder / "logs" / f"{name}.log"


def line(command: Sequence[str]) -> str:
    """A command as it can be typed."""
    return shlex.join(["python", *command])


def run_here(runs: Sequence[Run], folder: Path, at_once: int) -> None:
    """Run all that is not done, `at_once` of them at a time. Raises UserError, which names those that failed.

    When this process dies, by whatever signal, its commands are told to save and end; until they have, a new
    launch waits.
    """
    with _alone(folder) as lock:
        code = _code(folder)
        waiting = [run for run in runs if not run.done(folder)]
        print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done, {len(waiting)} to go", flush=True)
        running: list[_Chain] = []
        failed: dict[str, str] = {}
        try:
            while waiting or running:
                to_come = {run.name for run in waiting} | {chain.run.name for chain in running}
                for run in [run for run in waiting if not to_come & {*run.after}]:
                    if lost := [name for name in run.after if name in failed]:
                        failed[run.name] = f"needs {', '.join(lost)}"
                    elif len(running) < at_once:
                        running.append(_Chain(run, folder, code, at_once, lock.fileno()))
                        print(f"{run.name}: begins; {log_of(folder, run.name)}", flush=True)
                    else:
                        continue
                    waiting.remove(run)
                time.sleep(0.1)
                for chain in [chain for chain in running if chain.ended()]:
                    running.remove(chain)
                    if chain.fault:
                        failed[chain.run.name] = chain.fault
                    told = chain.fault or f"done after {time.monotonic() - chain.begun:.0f} s"
                    print(f"{chain.run.name}: {told}", flush=True)
        except BaseException:
            for chain in running:
                chain.process.terminate()
            for chain in running:
                chain.process.wait()
            raise
    if failed:
        told = "; ".join(f"{name}: {fault}" for name, fault in failed.items())
        raise UserError(f"{len(failed)} of {len(runs)} runs are not done ({told}); the same command goes on")


def submit(runs: Sequence[Run], folder: Path, sbatch: Mapping[str, Any]) -> dict[str, str]:
    """Submit all that is neither done nor queued, and return the job of each by the name of its run.

    Runs that wait for the same others are one array, which begins when those have ended well. sbatch: long
    options of sbatch by name, such as {"time": 60}, and "at-once", the tasks of an array that run at a time.
    Raises UserError where there is no Slurm, or it refuses.
    """
    import submitit

    with _alone(folder):
        os.environ["PYTHONPATH"] = str(code := _code(folder))  # the jobs inherit it
        jobs = queued(folder)
        waiting = [run for run in runs if not run.done(folder) and run.name not in jobs]
        for after in dict.fromkeys(run.after for run in sorted(waiting, key=lambda run: len(run.after))):
            group = [run for run in waiting if run.after == after]
            before = [jobs[name] for name in after if name in jobs]
            chained = {"dependency": f"afterok:{':'.join(before)}", "kill-on-invalid-dep": "yes"}
            options = {**(chained if before else {}), **sbatch}
            at_once = options.pop("at-once", len(group))
            try:
                executor = submitit.SlurmExecutor(folder / "jobs")
                executor.update_parameters(
                    job_name=folder.name,
                    time=None,  # submitit would give 5 minutes, and a workload key of its own
                    wckey=None,
                    signal_delay_s=120,
                    array_parallelism=at_once,
                    stderr_to_stdout=True,
                    additional_parameters=options,
                )
                submitted = executor.map_array(work, group, [folder] * len(group), [code] * len(group))
            except (RuntimeError, submitit.core.utils.FailedJobError, OSError) as error:
                raise UserError(
                    f"Slurm took no array ({' '.join(str(error).split())}); --local N runs the same here"
                ) from None
            jobs |= {run.name: job.job_id for run, job in zip(group, submitted, strict=True)}
            atomic.write_text(folder / "jobs.json", json.dumps(jobs, indent=2) + "\n")
    return jobs


def queued(folder: Path) -> dict[str, str]:
    """The jobs of earlier submissions that wait or run, by the name of the run."""
    try:
        jobs = dict(json.loads((folder / "jobs.json").read_text()))
        asked = subprocess.run(["squeue", "-h", "-r", "-o", "%i"], capture_output=True, text=True, check=True)
    except (OSError, ValueError, TypeError, subprocess.CalledProcessError):
        return {}
    alive = asked.stdout.split()
    return {name: job for name, job in jobs.items() if job in alive}


def work(run: Run, folder: Path, code: Path) -> None:
    """A run as the task of an array, which ends with status 1 and a line where a command failed.

    The requeue signal of Slurm is for the command, which saves and requeues this task: blocked here, it
    neither ends this process nor a command that has no handler yet.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {requeue_signal()})
    chain = _Chain(run, folder, code)
    while not chain.ended(wait=True):
        pass
    if chain.fault:
        print(f"error: {run.name}: {chain.fault}", file=sys.stderr, flush=True)
        sys.exit(FAILED)


class _Chain:
    """The commands of a run, one process at a time."""

    def __init__(self, run: Run, folder: Path, code: Path, share: int = 1, lock: int | None = None) -> None:
        self.run, self.folder, self.code = run, folder, code
        self.share, self.lock = share, lock
        self.begun, self.fault = time.monotonic(), ""
        self.left = list(run.commands)
        self._next()

    def _next(self) -> None:
        threads = max(1, len(os.sched_getaffinity(0)) // self.share)
        env = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONPATH": str(self.code)}
        log = log_of(self.folder, self.run.name)
        atomic.make_folder(log.parent)
        with open(log, "a") as file:
            print(f"$ {line(self.left[0])}", file=file, flush=True)
            self.process = subprocess.Popen(
                [sys.executable, *self.left.pop(0)],
                cwd=self.code,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=[] if self.lock is None else [self.lock],
                preexec_fn=end_with_parent,
            )

    def ended(self, wait: bool = False) -> bool:
        """Whether the run has come to its end, or a command has failed; the next command is started."""
        status = self.process.wait() if wait else self.process.poll()
        if status is None:
            return False
        if status:
            log = log_of(self.folder, self.run.name)
            self.fault = f"exit status {status}, {last_error(log)}see {log}"
        elif self.left:
            self._next()
            return False
        else:
            done = self.folder / "done" / f"{self.run.name}.json"
            atomic.make_folder(done.parent)
            record = {"commands": self.run.commands, "seconds": round(time.monotonic() - self.begun, 1)}
            atomic.write_text(done, json.dumps(record, indent=2) + "\n")
        return True


def last_error(log: Path) -> str:
    """The last line of a log if it tells an error, and a comma; else ""."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return f"{lines[-1]}, " if lines and lines[-1].startswith("error:") else ""


def _code(folder: Path) -> Path:
    """The code of these runs; to take the present one, remove it."""
    return folder / "code" if (folder / "code").exists() else snapshot(folder)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[IO]:
    """Hold the lock of `folder`, which processes that inherit it keep. Raises UserError if others hold it."""
    atomic.make_folder(folder)
    with open(folder / ".lock", "a") as lock:
        until = time.monotonic() + ENDING
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise UserError(f"{folder}: another launch is at work there; end it first") from None
                time.sleep(0.2)
            except OSError:  # a file system without locks
                break
        yield lock


def end_with_parent() -> None:
    """Ask the kernel for a TERM when the parent dies: a stage then saves and ends."""
    with contextlib.suppress(OSError, AttributeError):  # only Linux knows this
        ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGTERM)
