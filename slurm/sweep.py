"""Search the flags of pretraining for those with the best figure, with optuna.

    python slurm/sweep.py --method simclr --count 20 --space SPACE.toml --local 2

SPACE.toml holds the flags of every trial in [flags] and what is searched in [search]:

    [flags]
    data-dir = "SHEETS"
    steps = 500
    probe-dir = "crops"
    [search]
    base-lr = {low = 0.01, high = 1.0, log = true}
    batch-size = {choices = [64, 128]}

Each trial is a pretraining in a folder of --exp-dir. A trial whose figure is below the median of the others
at the same step is ended early. The same command again goes on with the trials that were under way. Without
--local the workers are an array on Slurm; the same command then shows how far they are. It leaves trials.csv,
importances.png and parallel.png (docs/studies.md).
"""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # `cluster`, also where it is not installed

from cluster import array, atomic
from cluster.config import Config, setting
from cluster.entry import run
from cluster.errors import AGAIN, INTERRUPTED, TERMINATED, UserError
from cluster.flags import Flags, read_toml, words
from cluster.snapshot import methods

if TYPE_CHECKING:
    import optuna

POLL = 1.0  # seconds from one look at a trial's figures to the next
FIRST = 4  # trials that are never ended early


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Config):
    # Method of pretraining: simclr, vicreg or another package of this project.
    method: str = "simclr"
    # What to search, a TOML file with [flags] and [search].
    space: Path
    # Trials in all.
    count: int = setting(20, least=1)
    # Folder of the sweep; the same command again goes on there.
    exp_dir: Path = Path("checkpoints/sweep")
    # Figure in metrics.jsonl to judge by: knn is that of --probe-dir.
    objective: str = "knn"
    # Search the lowest figure in place of the highest.
    minimize: bool = False
    # End trials early that are below the median of the others.
    prune: bool = True
    # Trials at a time on this machine; by default the workers are submitted to Slurm.
    local: int | None = setting(None, least=1)
    # Workers, each of which runs its share of the trials one after the other; by default as many as --local.
    workers: int = setting(4, least=1)
    # Number from which the search is drawn.
    seed: int = setting(0, least=0)
    # Folder that relative paths in --space begin from; by default the current one.
    home: Path = Path()
    # This process is that worker, from 0 on; the sweep starts them itself.
    worker: int | None = None


def main(config: SweepConfig) -> None:
    if config.method not in methods():
        raise UserError(f"--method {config.method}: give one of {', '.join(methods())}")
    flags, search = read_space(config.space)
    folder, count = config.exp_dir.absolute(), config.count
    study = open_study(folder, config.minimize, config.prune, config.seed + (config.worker or 0))
    workers = min(config.local or config.workers, count)
    if config.worker is not None:
        share = count // workers + (config.worker < count % workers)
        command = ("-m", f"{config.method}.pretrain", *words(flags, config.home))
        work(study, folder, config.worker, share, search, command, config.objective)
        return
    again: Flags = {"space": config.space.absolute(), "exp-dir": folder, "home": config.home.absolute()}
    again |= {name: getattr(config, name) for name in ("method", "count", "objective", "seed")}
    again |= {"workers": workers, "minimize": config.minimize, "prune": config.prune}
    runs = [
        array.Run(f"worker_{k}", (("slurm/sweep.py", *words(again), "--worker", str(k)),))
        for k in range(workers)
    ]
    try:
        if config.local:
            array.run_here(runs, folder, config.local)
        else:
            for name, job in array.submit(runs, folder, {}).items():
                print(f"{name}: job {job}")
    finally:
        report(study, folder, count)


def read_space(path: Path) -> tuple[Flags, Flags]:
    """[flags] and [search] of the file. Raises UserError for what is unknown in it or wrong."""
    table = read_toml(path)
    if unknown := set(table) - {"flags", "search"}:
        raise UserError(f"{path}: unknown table {sorted(unknown)[0]}; give [flags] and [search]")
    search = table.get("search", {})
    for name, row in search.items():
        kinds = ({"choices"}, {"low", "high"}, {"low", "high", "log"})
        if not isinstance(row, dict) or {*row} not in kinds:
            raise UserError(f"{path}: search.{name}: give {{choices = [...]}} or {{low = ..., high = ...}}")
    if not search:
        raise UserError(f"{path}: [search] is required, the flags to search")
    return table.get("flags", {}), search


def open_study(folder: Path, minimize: bool, prune: bool, seed: int) -> optuna.Study:
    """The study in FOLDER/journal.log. Raises UserError where optuna is not installed."""
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ModuleNotFoundError:
        raise UserError("optuna is not installed: pip install 'linework[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    atomic.make_folder(folder)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / "journal.log")))
    return optuna.create_study(
        storage=storage,
        study_name="sweep",
        load_if_exists=True,
        direction="minimize" if minimize else "maximize",
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=FIRST) if prune else optuna.pruners.NopPruner(),
    )


def work(
    study: optuna.Study,
    folder: Path,
    worker: int,
    share: int,
    search: Flags,
    command: tuple[str, ...],
    objective: str,
) -> None:
    """Go on with this worker's trial that was under way, then run others, until it has had its share."""
    import optuna

    while True:
        own = [trial for trial in study.trials if trial.user_attrs.get("worker") == worker]
        under_way = [trial for trial in own if not trial.state.is_finished()]
        if under_way:
            trial = optuna.trial.Trial(study, under_way[0]._trial_id)
        elif len(own) >= share:
            return
        else:
            trial = study.ask()
            trial.set_user_attr("worker", worker)
        chosen = {name: suggest(trial, name, row) for name, row in search.items()}
        exp_dir = folder / f"trial_{trial.number:04}"
        print(f"trial {trial.number}: {' '.join(words(chosen))}", flush=True)
        whole = (*command, "--exp-dir", str(exp_dir), *words(chosen))
        state, value, fault = run_trial(study, trial, whole, exp_dir, objective)
        study.tell(trial.number, value, state=getattr(optuna.trial.TrialState, state))
        print(f"trial {trial.number}: {state.lower()}, {objective} {value}{fault}", flush=True)


def suggest(trial: optuna.Trial, name: str, row: Flags) -> Any:
    """A value of the flag for the trial: that of its earlier launch, if it had one."""
    if "choices" in row:
        return trial.suggest_categorical(name, row["choices"])
    whole = isinstance(row["low"], int) and isinstance(row["high"], int)
    kind = trial.suggest_int if whole else trial.suggest_float
    return kind(name, row["low"], row["high"], log=row.get("log", False))


def run_trial(
    study: optuna.Study, trial: optuna.Trial, command: tuple[str, ...], exp_dir: Path, objective: str
) -> tuple[str, float | None, str]:
    """Run a pretraining to its end, or until it is pruned: how that ends, its figure, and what failed.

    One that has saved because of a signal ends this process with its status, and its trial stays under way.
    """
    process = subprocess.Popen([sys.executable, *command], preexec_fn=array.end_with_parent)
    try:
        reported = dict(study.trials[trial.number].intermediate_values)
        while True:
            ended = process.poll() is not None
            for step, value in figures(exp_dir, objective):
                if step not in reported:
                    reported[step] = value
                    trial.report(value, step)
            if ended:
                break
            if trial.should_prune():
                process.terminate()
                process.wait()
                return "PRUNED", None, ""
            time.sleep(POLL)
    finally:
        process.terminate()
        process.wait()
    if process.returncode in (AGAIN, INTERRUPTED, TERMINATED):
        sys.exit(process.returncode)
    if process.returncode:
        return "FAIL", None, f", exit status {process.returncode}"
    if not reported:
        missing = f": no {objective} in {exp_dir / 'metrics.jsonl'}; give probe-dir, or --objective"
        return "FAIL", None, missing
    return "COMPLETE", reported[max(reported)], ""


def figures(exp_dir: Path, objective: str) -> Iterator[tuple[int, float]]:
    """The steps at which metrics.jsonl has the figure, and what it was."""
    path = exp_dir / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            yield row["step"], float(row[objective])
        except (ValueError, KeyError):  # a line that is being written, or one without the figure
            continue


def report(study: optuna.Study, folder: Path, count: int) -> None:
    """Write the table and the plots of the trials so far, and print the best of them."""
    import matplotlib
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator
    from optuna.visualization import matplotlib as plots

    matplotlib.use("Agg")
    names = sorted({name for trial in study.trials for name in trial.params})
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["trial", "state", "value", *names])
    for trial in study.trials:
        shown = [trial.params.get(name, "") for name in names]
        rows.writerow([trial.number, trial.state.name.lower(), trial.value, *shown])
    atomic.write_text(folder / "trials.csv", text.getvalue())
    done = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    finished = sum(trial.state.is_finished() for trial in study.trials)
    print(f"{finished} of {count} trials finished, {len(done)} of them to their end; {folder / 'trials.csv'}")
    if not done:
        if finished >= count:
            raise UserError(f"no trial came to its end; {folder / 'logs'} says why")
        return
    best = study.best_trial
    print(f"best: trial {best.number}, {best.value:.4g}: {' '.join(words(best.params))}")
    evaluator = PedAnovaImportanceEvaluator()  # of what makes trials good; fANOVA, the default, of any change
    for name, draw in (
        ("importances", lambda: plots.plot_param_importances(study, evaluator=evaluator)),
        ("parallel", lambda: plots.plot_parallel_coordinate(study)),
    ):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                axes = draw()
        except (ValueError, RuntimeError) as error:  # too few trials, or all alike
            print(f"no {name}.png yet: {error}")
            continue
        figure = axes.get_figure(root=True)
        assert figure
        atomic.write_figure(folder / f"{name}.png", figure, crop="tight")


if __name__ == "__main__":
    run(SweepConfig, main)
