"""Run a study, arms x numbers of labels x seeds, and say what it came to.

    python evaluate/study.py plan STUDY.toml
    python evaluate/study.py run STUDY.toml --local 2
    python evaluate/study.py status STUDY.toml
    python evaluate/study.py report STUDY.toml

`plan` lists the runs and their commands, with --hours what they will take. `run` submits all that is not done
to Slurm as arrays, or with --local runs it here; the same command again goes on where that stopped. `report`
writes table.md, results.csv, figures.png and curves.png into the study's folder. evaluate/studies/ holds
studies to begin with, docs/studies.md says what a study's file holds.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from cluster import array, atomic
from cluster.config import Config, setting
from cluster.entry import run
from cluster.errors import UserError
from detection.studies import Study, read_study

SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True, kw_only=True)
class StudyConfig(Config):
    # What to do: plan, run, status or report.
    what: Positional[Literal["plan", "run", "status", "report"]] = "plan"
    # The study's TOML file.
    file: Positional[Path | None] = None
    # Run it on this machine, so many runs at a time; by default it is submitted to Slurm.
    local: int | None = setting(None, least=1)
    # Time a few steps of each kind of run on this machine, to plan the hours; that takes minutes.
    hours: bool = False
    # Number of resamples of the test sheets behind the intervals of the report.
    resamples: int = setting(1000, least=1)


def main(config: StudyConfig) -> None:
    if config.file is None:
        raise UserError("name the study's file: python evaluate/study.py plan STUDY.toml")
    study = read_study(config.file)
    if config.what == "plan":
        plan(study, config.hours)
    elif config.what == "run":
        launch(study, config.local)
    elif config.what == "status":
        print(status(study))
    else:
        report(study, config.resamples)


def plan(study: Study, hours: bool) -> None:
    """Print each run, whether it is done, and its commands; with `hours` how long all that is left takes."""
    runs = study.runs()
    for each in runs:
        needs = f", after {each.after[0]}" if each.after else ""
        print(f"{each.name}: {'done' if each.done(study.folder) else 'to do'}{needs}")
        print("".join(f"    {array.line(command)}\n" for command in each.commands), end="")
    left = [each for each in runs if not each.done(study.folder)]
    print(f"{len(runs)} runs, {len(left)} to do")
    if not hours:
        print("--hours times a few steps of each kind of run")
        return
    commands = {each.name: each.commands[0] for each in runs}
    known: dict[str, float | None] = {}
    total, unknown = 0.0, list[str]()
    for each in left:
        # Runs that differ by their seed and weights alone take alike.
        kind = re.sub(r"--(seed|exp-dir|backbone|checkpoint) \S+", "", array.line(each.commands[0]))
        if kind not in known:
            known[kind] = estimate(each.commands[0], commands[each.after[0]] if each.after else ())
        total += known[kind] or 0
        unknown += [each.name] if known[kind] is None else []
    told = f"; not counted: {', '.join(unknown)}" if unknown else ""
    print(f"about {total / 3600:.2f} h of training, one after the other, without evaluations{told}")


def estimate(command: tuple[str, ...], before: tuple[str, ...]) -> float | None:
    """Seconds that a training will take, by its own --dry-run; None for a command that has none.

    before: the pretraining that it begins from. Until that is done random weights of its network take alike.
    """
    if "--exp-dir" not in command:
        return None
    script = [str(Path(__file__).parents[1] / command[0])] if command[0] != "-m" else []
    words = [*script, *command[len(script) :]]
    begun = 1 + words.index("--checkpoint" if "--checkpoint" in words else "--backbone") if before else 0
    if before and not Path(words[begun]).exists():
        words[begun] = "none"
        words += before[before.index("--arch") :][:2] if "--arch" in before else []
    asked = subprocess.run([sys.executable, *words, "--dry-run"], capture_output=True, text=True)
    if asked.returncode:
        raise UserError(f"{array.line(words)} --dry-run: {' '.join(asked.stderr.split())[-400:]}")
    found = re.search(r"([\d.e+]+) (s|min|h) (?:in all|for \d+ steps)", asked.stdout)
    return float(found[1]) * SECONDS[found[2]] if found else None


def launch(study: Study, local: int | None) -> None:
    """Run what is not done, here or as arrays of Slurm."""
    study.refuse_changes()
    if local:
        array.run_here(study.runs(), study.folder, local)
        return
    for name, job in array.submit(study.runs(), study.folder, study.slurm).items():
        print(f"{name}: job {job}")


def status(study: Study) -> str:
    """A line a run: done, queued, at which step, or what it ended with."""
    jobs = array.queued(study.folder)
    lines = []
    for each in study.runs():
        metrics = study.folder / each.name / "metrics.jsonl"
        steps = re.findall(r'"step": (\d+)', metrics.read_text()) if metrics.exists() else []
        state = "done" if each.done(study.folder) else f"at step {steps[-1]}" if steps else "not begun"
        if each.name in jobs:
            state += f", job {jobs[each.name]}"
        elif state != "done" and (error := array.last_error(array.log_of(study.folder, each.name))):
            state += f", ended: {error.removesuffix(', ')}"
        lines.append(f"{each.name}: {state}")
    return "\n".join(lines)


def report(study: Study, resamples: int) -> None:
    """Write tables and plots of the runs that have results, and print the table."""
    from detection import study_results as results

    groups, missing = results.read_groups(study, resamples)
    if not groups:
        raise UserError(f"{study.folder}: no run has a result yet; python evaluate/study.py run begins them")
    out = study.folder / "report"
    atomic.make_folder(out)
    table = results.as_markdown(study, groups, missing, results.training_minutes(study, groups))
    atomic.write_text(out / "table.md", table)
    atomic.write_text(out / "results.csv", results.as_csv(study, groups))
    results.plot_figures(out / "figures.png", study, groups)
    results.plot_curves(out / "curves.png", study, groups)
    print(f"{table}\n{out}: table.md, results.csv, figures.png, curves.png")


if __name__ == "__main__":
    run(StudyConfig, main)
