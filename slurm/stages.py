"""The chain pretrain -> (pretrain-detector ->) finetune -> evaluate: what runs, where, from which code."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import atomic, checkpoint
from cluster.errors import UserError
from cluster.snapshot import HOME, sources

STAGES = ("pretrain", "pretrain-detector", "finetune", "evaluate")
OPTIONAL = ("pretrain-detector",)  # stages that a chain has only where their flags are given


@dataclass(frozen=True)
class Stage:
    """One job of the chain.

    folder is its exp-dir, arguments are those of its .slurm file, sbatch holds flags of sbatch.
    """

    name: str
    folder: Path
    arguments: list[str]
    sbatch: list[str]

    def finished(self) -> bool:
        """Whether its signed marker is there; raises UserError when a signed file has changed since."""
        if self.name == "evaluate":
            return (self.folder / "metrics.json").exists()
        return (self.folder / "final.json").exists() and bool(checkpoint.check_final(self.folder))

    def told(self) -> str:
        """What the marker of a stage that `finished` says of its results, as that of a probed pretraining."""
        marker = self.folder / "final.json"
        return str(json.loads(marker.read_text()).get("told", "")) if self.name != "evaluate" else ""


def chain(
    run_dir: Path,
    data_dir: Path,
    unlabeled: Path,
    method: str,
    flags: Mapping[str, str],
    sbatch: Mapping[str, str],
) -> list[Stage]:
    """The stages in their order.

    flags holds what to pass on to each stage that the chain has, sbatch what to pass on to its sbatch, both
    as one text a stage in a shell's quoting; sbatch[""] is for every stage. Raises UserError for a quotation
    that is not closed.
    """
    folder = {name: run_dir / name for name in STAGES}
    backbone = folder["pretrain"] / "backbone.safetensors"
    pretrained = folder["pretrain-detector"] / "pretrained.safetensors"
    model = folder["finetune"] / "model.pt"
    ink = ["--unlabeled", unlabeled, "--backbone", backbone, "--exp-dir", folder["pretrain-detector"]]
    begun = pretrained if "pretrain-detector" in flags else backbone
    own = {
        "pretrain": [method, "--data-dir", unlabeled, "--exp-dir", folder["pretrain"]],
        "pretrain-detector": ink,
        "finetune": ["--data-dir", data_dir, "--backbone", begun, "--exp-dir", folder["finetune"]],
        "evaluate": ["--checkpoint", model, "--data-dir", data_dir, "--out", folder["evaluate"]],
    }
    shape = {"evaluate": ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1"]}
    return [
        Stage(
            name,
            folder[name],
            [*map(str, own[name]), *split(flags[name], f"--{name}")],
            [*split(sbatch[""], "--sbatch"), *shape.get(name, []), *split(sbatch[name], f"--sbatch-{name}")],
        )
        for name in STAGES
        if name in flags
    ]


def split(text: str, flag: str) -> list[str]:
    """The words of a flag whose value is flags. Raises UserError for a quotation that is not closed."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f'{flag} "{text}": {error}; close the quotation') from None


def command(stage: Stage, run_dir: Path, code: Path, after: str | None) -> list[str]:
    """The sbatch call of a stage, which starts when the job `after` has succeeded; None waits for no job."""
    log = str(run_dir / "logs" / stage.name).replace("%", "%%")
    waits = [f"--dependency=afterok:{after}"] if after else []
    if after and not any(word.startswith("--kill-on-invalid-dep") for word in stage.sbatch):
        waits.append("--kill-on-invalid-dep=yes")  # a "no" that followed would not undo it
    own = [f"--job-name=linework-{stage.name}", f"--chdir={code}", f"--output={log}-%j.log"]
    return ["sbatch", "--parsable", *own, *waits, *stage.sbatch, *script(stage, code)]


def local_command(stage: Stage, code: Path) -> list[str]:
    """The call that runs the same stage on this machine, without Slurm."""
    return ["bash", *script(stage, code)]


def script(stage: Stage, code: Path) -> list[str]:
    """The .slurm file of a stage and its arguments."""
    return [str(code / "slurm" / f"{stage.name}.slurm"), *stage.arguments]


def job_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment to start a stage in: with the Python to use, without what a surrounding job left."""
    kept = dict(environment)
    if "SLURM_JOB_ID" in kept:  # that job's task counts, CPU binding and GPUs are not those of the new one
        left = ("SLURM", "SRUN_", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
        kept = {
            name: value for name, value in kept.items() if name == "SLURM_CONF" or not name.startswith(left)
        }
    return {**kept, "LINEWORK_PYTHON": python(kept)}


def python(environment: Mapping[str, str]) -> str:
    """The interpreter of the stages: LINEWORK_PYTHON, else that of .venv beside the code, else this one."""
    given, own = environment.get("LINEWORK_PYTHON"), HOME / ".venv" / "bin" / "python"
    if given:
        return os.path.abspath(given) if os.sep in given else given  # the stages run in another folder
    return str(own) if own.exists() else sys.executable


def refuse_without_torch() -> None:
    """Raise UserError when the Python of the stages is there but has no torch."""
    name = python(os.environ)
    if not Path(name).name.startswith("python"):  # a program that takes its place
        return
    code = 'import importlib.util as u, sys; sys.exit(3 if u.find_spec("torch") is None else 0)'
    with contextlib.suppress(OSError):  # the nodes may have what this machine lacks
        if subprocess.run([name, "-c", code], stderr=subprocess.DEVNULL).returncode == 3:
            raise UserError(f"{name} has no torch: name a Python that has it in LINEWORK_PYTHON")


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep a second `submit` out of a run-dir. Without effect on a file system without locks.

    Raises UserError where another one is at work.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / ".submit.lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{run_dir}: another submit is at work there; `status` shows what it does"
            ) from None
        except OSError:
            pass
        yield


def warn_of_short_time(stage: Stage) -> None:
    """Say so when the time limit of a stage is over before its warning signal has had its lead."""
    limit = minutes(last_value(stage.sbatch, "--time", "-t") or os.environ.get("SBATCH_TIMELIMIT", ""))
    given = last_value(stage.sbatch, "--signal") or os.environ.get("SBATCH_SIGNAL", "USR2@120")
    lead = int(given.partition("@")[2] or 60) if given.partition("@")[2].isdigit() or "@" not in given else 0
    if limit is not None and 60 * limit <= lead:
        print(
            f"warning: {stage.name}: a --time of {60 * limit:.0f} s is over before --signal={given} has "
            "warned the run: it would be requeued again and again; give more time, or a shorter lead",
            file=sys.stderr,
        )


def last_value(words: list[str], *flags: str) -> str:
    """The value of the last of these flags of sbatch, as "--time 5", "--time=5", "-t 5" or "-t5"; else ""."""
    found = ""
    for word, following in zip(words, [*words, ""][1:], strict=True):
        for name in flags:
            if word == name:
                found = following
            elif word.startswith(f"{name}=" if name.startswith("--") else name):
                found = word.removeprefix(name).removeprefix("=")
    return found


def minutes(text: str) -> float | None:
    """A time limit of Slurm, D-H, D-H:M, D-H:M:S, M, M:S or H:M:S, in minutes; None for another text."""
    days, dash, rest = text.rpartition("-")
    try:
        parts = [int(part) for part in rest.split(":")]
        if dash:
            hours, more, seconds = [*parts, 0, 0][:3]
            return 1440 * int(days) + 60 * hours + more + seconds / 60
        hours, more, seconds = [0, *parts, 0][:3] if len(parts) < 3 else parts
        return 60 * hours + more + seconds / 60
    except ValueError:
        return None


def commit() -> str | None:
    """The git commit of the code, with "+changes" where its files differ from that; None without git."""

    def git(*arguments: str) -> str:
        argv = ["git", "-C", str(HOME), *arguments]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--", *sources())
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_record(
    run_dir: Path, method: str, resubmit: str, flags: Mapping[str, str], jobs: Mapping[str, str]
) -> None:
    """Write RUN_DIR/pipeline.json: what was submitted, from which commit, with which flags, as which jobs."""
    record = {
        "method": method,
        "commit": commit(),
        "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": resubmit,
        "flags": dict(flags),
        "jobs": dict(jobs),
    }
    atomic.write_text(run_dir / "pipeline.json", json.dumps(record, indent=2) + "\n")


def read_record(run_dir: Path) -> dict[str, Any]:
    """What `write_record` wrote. Raises UserError when nothing was submitted there."""
    path = run_dir / "pipeline.json"
    try:
        record = json.loads(path.read_text())
        texts = {name: record[name] for name in ("method", "command")}
        tables = {name: dict(record[name]) for name in ("jobs", "flags")}
        values = [*texts.values(), *(word for table in tables.values() for word in table.values())]
        named = {*tables["flags"], *OPTIONAL}
        if not all(isinstance(value, str) for value in values) or named != {*STAGES}:
            raise ValueError("it is not what submit writes")
        return {**record, **tables}
    except FileNotFoundError:
        raise UserError(f"{path}: absent, so no chain was submitted to {run_dir}; check --run-dir") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path}: unreadable ({reason}); remove it and submit again") from None
