"""Let only one run at a time write into an exp-dir, by the file owner.json. No torch is imported here.

A new run takes over at once from an owner that is certainly dead: an earlier start of its own Slurm job, a
process of this host that is gone, a job that squeue no longer lists as running. Otherwise it takes over only
if owner.json has not been touched for STALE seconds, and else ends with one line. An old owner that is still
running (on a node that has lost the Slurm controller) finds owner.json changed at its next beat or before it
completes its next checkpoint, and ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster import atomic
from cluster.errors import GONE, UserError

STALE = 60.0  # seconds without a beat after which an owner counts as dead


class Owner:
    """The claim of this run to an exp-dir. Raises UserError, which names the run that holds it already."""

    def __init__(self, exp_dir: Path, stale: float = STALE) -> None:
        self.path = exp_dir / "owner.json"
        self.me = describe_self()
        atomic.make_folder(exp_dir)
        with _locked(exp_dir / ".owner.lock"):
            holder = _read(self.path)
            why = _alive(holder, self.me, self.path, stale) if holder else ""
            if why:
                raise UserError(
                    f"{exp_dir}: in use by {name(holder)}, {why}; end that run, take another --exp-dir, "
                    f"or remove {self.path} if you know that it is gone"
                )
            atomic.write_text(self.path, json.dumps(self.me, indent=2) + "\n")
        self.predecessor = name(holder) if holder else ""
        self.held = True  # as of the last beat

    def beat(self) -> None:
        """Touch owner.json, if it is still this run's, to show that this run is alive."""
        with contextlib.suppress(OSError):
            self.held = self.mine()
            if self.held:
                os.utime(self.path)

    def mine(self) -> bool:
        return _read(self.path).get("uuid") == self.me["uuid"]

    def check(self) -> None:
        """Raise UserError if another run has taken over."""
        if not self.mine():
            holder = _read(self.path)
            taken = f"{name(holder)} has taken over" if holder else "the file is gone"
            if not self.path.parent.exists():
                taken = GONE
            raise UserError(f"{self.path}: {taken}; this run ({name(self.me)}) writes nothing more and ends")

    def release(self) -> None:
        """Let the next run take over at once; where the disk fails it does so when this process is gone."""
        with contextlib.suppress(OSError):
            if self.mine():
                self.path.unlink(missing_ok=True)


def describe_self() -> dict[str, Any]:
    """The facts by which another process can judge whether this one is still running."""
    return {
        "uuid": uuid.uuid4().hex,
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "step": os.environ.get("SLURM_STEP_ID", ""),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        "host": socket.gethostname(),
        "boot": _boot_id(),
        "pids": _pid_space(),
        "pid": os.getpid(),
        "pid_start": _start_time(os.getpid()),
        "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": " ".join(sys.argv),
    }


def name(owner: dict[str, Any]) -> str:
    job = f"job {owner['job']} (restart {owner.get('restart', 0)}), " if owner.get("job") else ""
    return f"{job}pid {owner.get('pid')} on {owner.get('host')} since {owner.get('since')}"


def _alive(holder: dict[str, Any], me: dict[str, Any], path: Path, stale: float) -> str:
    """Why the holder must be considered alive; empty if it is dead."""
    if holder.get("job") and holder["job"] == me["job"] and holder.get("restart", 0) < me["restart"]:
        return ""  # an earlier start of this job: Slurm has ended it, or has lost its node
    if holder.get("host") == me["host"]:
        if holder.get("boot") != me["boot"]:
            return ""
        if holder.get("pids") == me["pids"]:
            return "which is running" if _start_time(holder["pid"]) == holder.get("pid_start") else ""
    age = _seconds_since_beat(path)
    if age > stale or (holder.get("job") and _slurm_has_ended(holder)):
        return ""
    return f"which gave a sign of life {age:.0f} s ago (considered dead after {stale:.0f} s)"


def _slurm_has_ended(holder: dict[str, Any]) -> bool:
    """Whether squeue answers but lists no running step of the holder (or running job, without a step id)."""
    what = ["--steps", f"{holder['job']}.{holder['step']}", "-o", "%i"] if holder.get("step") else []
    what = what or ["-t", "RUNNING,COMPLETING,SUSPENDED", "-j", holder["job"], "-o", "%i"]
    try:
        answer = subprocess.run(["squeue", "-h", *what], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    if answer.returncode:
        return "nvalid job id" in answer.stderr
    return not answer.stdout.strip()


def _seconds_since_beat(path: Path) -> float:
    """Seconds since the last beat. Both times are the file system's, since the clocks of nodes differ."""
    lock = path.with_name(".owner.lock")
    os.utime(lock)
    return lock.stat().st_mtime - path.stat().st_mtime


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock a file, so that two new runs decide in turn. Without effect on a file system without locks."""
    with open(path, "a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(path: Path) -> dict[str, Any]:
    """The owner; empty if there is none. Other OSErrors are raised: they do not show that there is none."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _start_time(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process: they tell it from a later one with the same pid."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _pid_space() -> str:
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""
