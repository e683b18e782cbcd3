"""What became of a chain: Slurm's word on each job if it can be had, and what the stages wrote."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from stages import Stage

from cluster.errors import UserError

ENDED = {
    "COMPLETED",
    "FAILED",
    "TIMEOUT",
    "CANCELLED",
    "NODE_FAIL",
    "PREEMPTED",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "FORGOTTEN",
}
FIGURES = (
    "loss",
    "knn",
    "knn_start",
    "valid_AP",
    "valid_AP50",
    "AP",
    "AP50",
)  # shown where a stage wrote them
TAIL = 1 << 18  # so many bytes at the end of a log or of metrics.jsonl are read


@dataclass(frozen=True)
class Job:
    """A job. state: one of Slurm's; FORGOTTEN when Slurm has no such job; UNKNOWN when it can't be asked."""

    id: str
    state: str = "UNKNOWN"
    reason: str = ""

    @property
    def alive(self) -> bool:
        return self.state not in {*ENDED, "UNKNOWN"}


@dataclass
class Line:
    """One stage in the table.

    step: how many are done. told: what a finished stage says of its results. error: the last `error: ...`
    line of the log.
    """

    stage: str
    job: str
    state: str
    reason: str
    step: int | None
    figures: dict[str, float]
    finished: bool
    told: str
    log: str | None
    error: str | None


def jobs_of(record: Mapping, code: Path) -> dict[str, Job]:
    """What Slurm says of each recorded job, by stage: squeue, or sacct where squeue no longer knows the job.

    A job whose folder is not `code`, the snapshot of this chain, is another's that was given the same number.
    Raises UserError when squeue is there but its controller can't be asked.
    """
    ids = record["jobs"]
    if not ids or not shutil.which("squeue"):
        return {name: Job(number) for name, number in ids.items()}
    wanted = ",".join(ids.values())
    answer = ask("squeue", "-h", "-t", "all", "-j", wanted, "-o", "%i|%T|%r|%Z")
    if answer.returncode and "nvalid job id" not in answer.stderr:
        raise UserError(f"squeue can't say how the jobs stand: {' '.join(answer.stderr.split())}")
    known = {}
    for line in answer.stdout.splitlines():
        number, state, reason, folder = line.split("|", 3)
        if Path(folder).resolve() == code:
            known[number] = Job(number, state, "" if reason == "None" else reason)
    if set(ids.values()) - set(known) and shutil.which("sacct"):
        answer = ask("sacct", "-nXP", "-j", wanted, "-o", "JobID,State,WorkDir")
        for line in answer.stdout.splitlines():
            number, state, folder = line.split("|", 2)
            if Path(folder).resolve() == code and number not in known:
                known[number] = Job(number, state.split()[0])  # sacct writes "CANCELLED by 0"
    return {name: known.get(number, Job(number, "FORGOTTEN")) for name, number in ids.items()}


def ask(*command: str) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands; the caller looks at its exit code."""
    return subprocess.run(command, capture_output=True, text=True)


def lines_of(stages: list[Stage], jobs: Mapping[str, Job], logs: Path) -> list[Line]:
    """What there is to say of each stage, from its job, its folder and its log."""
    lines = []
    for stage in stages:
        job = jobs.get(stage.name, Job(""))
        try:
            finished, damage = stage.finished(), None
        except UserError as error:
            finished, damage = False, f"error: {error}"
        log = logs / f"{stage.name}-{job.id}.log"
        errors = (line for line in newest_first(log) if line.startswith("error:"))
        try:
            step, figures = progress(stage)
        except UserError as error:
            step, figures, finished, damage = None, {}, False, f"error: {error}"
        lines.append(
            Line(
                stage=stage.name,
                job=job.id,
                state=job.state,
                reason=job.reason,
                step=step,
                figures=figures,
                finished=finished,
                told=stage.told() if finished else "",
                log=str(log) if log.exists() else None,
                error=damage or next(errors, None),
            )
        )
    return lines


def progress(stage: Stage) -> tuple[int | None, dict[str, float]]:
    """The number of steps done, and the newest of each of FIGURES, from metrics.jsonl or metrics.json.

    Raises UserError for a metrics.json that holds no figures.
    """
    if stage.name == "evaluate":
        path = stage.folder / "metrics.json"
        try:
            coco = json.loads(path.read_text())["coco"] if path.exists() else {}
            return None, {name: float(coco[name]) for name in FIGURES if coco.get(name) is not None}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: holds no figures; remove it and submit again") from None
    step: int | None = None
    figures: dict[str, float] = {}
    for line in newest_first(stage.folder / "metrics.jsonl"):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # of a line that is half written
            entry = json.loads(line)
            if step is None and "loss" in entry:
                step = int(entry["step"]) + 1  # the journal counts from 0
            figures = {name: float(entry[name]) for name in FIGURES if name in entry} | figures
    return step, figures


def newest_first(path: Path) -> list[str]:
    """The lines in the last TAIL bytes of a file, the last one first; none when it can't be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - TAIL))
            return file.read().decode(errors="replace").splitlines()[::-1]
    except OSError:
        return []


def explain(lines: list[Line], cancel: str, resubmit: str) -> list[str]:
    """Why the chain does not go on, and the commands that clear it and go on; nothing while it goes on."""
    stuck = [line for line in lines if not line.finished and line.state in ENDED]
    stuck += [line for line in lines if line.error and not line.finished and not line.job]
    stuck += [line for line in lines if line.reason == "DependencyNeverSatisfied" and line not in stuck]
    if not stuck:
        return []
    first = stuck[0]
    said = f"{first.stage}: job {first.job} {first.state}" if first.job else f"{first.stage}: stopped"
    if first.state == "COMPLETED":
        said += ", but the stage is not finished"
    told = [said + (f"; {first.error}" if first.error else "") + (f"; log: {first.log}" if first.log else "")]
    for line in stuck[1:]:
        verb = "waits for ever" if line.state == "PENDING" else "was cancelled"
        if line.reason == "DependencyNeverSatisfied":
            told.append(
                f"{line.stage}: job {line.job} {verb}, as {first.stage} did not succeed ({line.reason})"
            )
    if any(line.state == "PENDING" for line in stuck):
        told.append(f"clear it with:  {cancel}")
    return [*told, f"go on with:  {resubmit}"]


def table(lines: list[Line]) -> str:
    """The lines as a table for a reader."""
    rows = [("stage", "job", "state", "step", "figures")]
    for line in lines:
        state = line.state + (f" ({line.reason})" if line.reason and line.state == "PENDING" else "")
        figures = ", ".join(f"{name} {value:.4g}" for name, value in line.figures.items())
        step = "-" if line.step is None else str(line.step)
        state = "finished" if line.finished else state
        said = "; ".join(filter(None, (figures, line.told)))
        rows.append((line.stage, line.job or "-", state, step, said or "-"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def as_json(lines: list[Line], told: list[str]) -> str:
    """The lines and the explanation of `explain` for a program."""
    return json.dumps({"stages": [asdict(line) for line in lines], "explanation": told}, indent=2)
