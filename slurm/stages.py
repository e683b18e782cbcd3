"""The chain pretrain -> finetune -> evaluate: what runs, in which folders, from which code."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import atomic, checkpoint
from cluster.errors import UserError

STAGES = ("pretrain", "finetune", "evaluate")
SOURCES = ("schematics", "cluster", "pretraining", "simclr", "vicreg", "detection", "evaluate", "slurm")
HOME = Path(__file__).resolve().parent.parent  # the code that this file is part of


@dataclass(frozen=True)
class Stage:
    """One job of the chain. folder: its exp-dir. arguments: of its .slurm file. sbatch: flags of sbatch."""

    name: str
    folder: Path
    arguments: list[str]
    sbatch: list[str]

    def finished(self) -> bool:
        """Whether its signed marker is there; raises UserError when a signed file has changed since."""
        if self.name == "evaluate":
            return (self.folder / "metrics.json").exists()
        return (self.folder / "final.json").exists() and bool(checkpoint.check_final(self.folder))


def chain(
    run_dir: Path,
    data_dir: Path,
    unlabeled: Path,
    method: str,
    flags: Mapping[str, str],
    sbatch: Mapping[str, str],
) -> list[Stage]:
    """The stages. flags and sbatch: what to pass on to each and to its sbatch; sbatch[""] is for all."""
    folder = {name: run_dir / name for name in STAGES}
    own = {
        "pretrain": [method, "--data-dir", unlabeled, "--exp-dir", folder["pretrain"]],
        "finetune": ["--data-dir", data_dir, "--backbone", folder["pretrain"] / "backbone.safetensors",
                     "--exp-dir", folder["finetune"]],
        "evaluate": ["--checkpoint", folder["finetune"] / "model.pt", "--data-dir", data_dir,
                     "--out", folder["evaluate"]],
    }  # fmt: skip
    shape = {"pretrain": [], "finetune": [], "evaluate": ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1"]}
    return [
        Stage(
            name,
            folder[name],
            [*map(str, own[name]), *split(flags[name], f"--{name}")],
            [*split(sbatch[""], "--sbatch"), *shape[name], *split(sbatch[name], f"--sbatch-{name}")],
        )
        for name in STAGES
    ]


def split(text: str, flag: str) -> list[str]:
    """The words of a flag that holds flags."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f'{flag} "{text}": {error}; close the quotation') from None


def command(stage: Stage, run_dir: Path, code: Path, after: str | None) -> list[str]:
    """The sbatch call of a stage. after: the job whose success it waits for."""
    log = str(run_dir / "logs" / stage.name).replace("%", "%%")
    waits = [f"--dependency=afterok:{after}"] if after else []
    if after and not any(word.startswith("--kill-on-invalid-dep") for word in stage.sbatch):
        waits.append("--kill-on-invalid-dep=yes")  # a "no" that followed would not undo it
    return ["sbatch", "--parsable", f"--job-name=linework-{stage.name}", f"--chdir={code}",
            f"--output={log}-%j.log", *waits, *stage.sbatch,
            str(code / "slurm" / f"{stage.name}.slurm"), *stage.arguments]  # fmt: skip


def local_command(stage: Stage, code: Path) -> list[str]:
    """The same stage here, without Slurm."""
    return ["bash", str(code / "slurm" / f"{stage.name}.slurm"), *stage.arguments]


def job_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment to start a stage in: without what a surrounding job left, with the Python to use."""
    kept = dict(environment)
    if "SLURM_JOB_ID" in kept:  # its task counts, CPU binding and GPUs are not those of the new job
        left = ("SLURM", "SRUN_", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
        kept = {
            name: value for name, value in kept.items() if name == "SLURM_CONF" or not name.startswith(left)
        }
    return {**kept, "LINEWORK_PYTHON": python(kept)}


def python(environment: Mapping[str, str]) -> str:
    """The interpreter of the stages: LINEWORK_PYTHON, that of the .venv beside the code, or this one."""
    given, own = environment.get("LINEWORK_PYTHON"), HOME / ".venv" / "bin" / "python"
    if given:
        return os.path.abspath(given) if os.sep in given else given  # the stages run in another folder
    return str(own) if own.exists() else sys.executable


def snapshot(run_dir: Path) -> Path:
    """Copies the code as it is on disk to RUN_DIR/code, so that later edits don't reach queued jobs."""
    code, fresh = run_dir / "code", run_dir / ".code-new"
    shutil.rmtree(fresh, ignore_errors=True)
    for name in SOURCES:
        shutil.copytree(HOME / name, fresh / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.rmtree(code, ignore_errors=True)
    fresh.rename(code)
    return code


def commit() -> str | None:
    """The git commit of the code, with "+changes" when the files differ from it; None without git."""

    def git(*arguments: str) -> str:
        argv = ["git", "-C", str(HOME), *arguments]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", *SOURCES) else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_record(
    run_dir: Path, method: str, resubmit: str, flags: Mapping[str, str], jobs: Mapping[str, str]
) -> None:
    """RUN_DIR/pipeline.json: what was submitted, from which commit, each stage with what, as which jobs."""
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
        return {**record, "jobs": dict(record["jobs"])}
    except FileNotFoundError:
        raise UserError(f"{path}: absent, so no chain was submitted to {run_dir}; check --run-dir") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: unreadable ({error}); remove it and submit again") from None
