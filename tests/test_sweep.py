"""A sweep runs its trials, ends bad ones early, and goes on after a kill with the trial that was under way.

The trials are a small program in place of a pretraining; one test runs the command itself.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sweep

from cluster.errors import UserError

ROOT = Path(__file__).parent.parent
SEARCH = {"x": {"low": 0.0, "high": 1.0}, "kind": {"choices": ["good", "bad"]}}
# Writes a figure that rises to 1 - |x - 0.3|, less where kind is bad; with "slow" it waits once to be killed.
TRIAL = """import json, pathlib, signal, sys, time
given = dict(zip(sys.argv[2::2], sys.argv[3::2]))
folder = pathlib.Path(given["--exp-dir"])
first = not folder.exists()
folder.mkdir(exist_ok=True)
(folder / "launches").open("a").write(json.dumps(given) + "\\n")
if sys.argv[1] == "fail":
    sys.exit("error: no pool; give one")
if sys.argv[1] == "saved" and first:
    sys.exit(75)
with (folder / "metrics.jsonl").open("a") as lines:
    for step in range(4):
        value = (1 - abs(float(given["--x"]) - 0.3) - (given["--kind"] == "bad")) * (step + 1) / 4
        row = {"step": step, "loss": 1.0} | ({"knn": value} if step % 2 else {})
        print(json.dumps(row), file=lines, flush=True)
        if sys.argv[1] == "slow" and first:
            time.sleep(100)
        if sys.argv[1] == "prunable":
            time.sleep(0.2)
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(sweep, "POLL", 0.05)


def work(folder: Path, share: int, how: str = "fast", worker: int = 0, objective: str = "knn"):
    study = sweep.open_study(folder, minimize=False, prune=True, seed=worker)
    sweep.work(study, folder, worker, share, SEARCH, ("-c", TRIAL, how), objective)
    return study


def test_each_worker_has_its_share_of_one_search_and_the_report_names_the_best(tmp_path, capsys):
    work(tmp_path, 4)
    study = work(tmp_path, 3, worker=1)
    assert [trial.user_attrs["worker"] for trial in study.trials] == [0] * 4 + [1] * 3
    work(tmp_path, 4)
    assert len(study.trials) == 7  # each has had its share
    capsys.readouterr()
    sweep.report(study, tmp_path, 7)
    said, best = (
        capsys.readouterr().out,
        max(trial.value for trial in study.trials if trial.value is not None),
    )
    assert (
        "7 of 7 trials finished" in said and f"best: trial {study.best_trial.number}, {best:.4g}: --" in said
    )
    assert (tmp_path / "trials.csv").read_text().startswith("trial,state,value,kind,x\n0,complete,")
    for name in ("importances.png", "parallel.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_a_trial_below_the_median_is_ended_early(tmp_path):
    study = sweep.open_study(tmp_path, minimize=False, prune=True, seed=0)
    for _ in range(sweep.FIRST):
        study.enqueue_trial({"x": 0.3, "kind": "good"})
    study.enqueue_trial({"x": 0.9, "kind": "bad"})
    study = work(tmp_path, sweep.FIRST + 1, "prunable")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * sweep.FIRST + ["PRUNED"]


def test_after_kill_9_the_trial_under_way_goes_on_with_its_flags_in_its_folder(tmp_path):
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'slurm')!r}, {str(ROOT / 'tests')!r}]\n"
        f"import pathlib, test_sweep; test_sweep.work(pathlib.Path({str(tmp_path)!r}), 1, 'slow')"
    )
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    metrics, until = tmp_path / "trial_0000" / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text()):
        assert time.monotonic() < until
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    study = work(tmp_path, 1, "slow")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"]
    launches = (tmp_path / "trial_0000" / "launches").read_text().splitlines()
    assert len(launches) == 2 and launches[0] == launches[1]


def test_a_trial_that_a_signal_has_ended_stays_under_way_and_goes_on(tmp_path):
    with pytest.raises(SystemExit) as ended:
        work(tmp_path, 1, "saved")
    assert ended.value.code == 75
    study = work(tmp_path, 1, "saved")
    first, second = map(json.loads, (tmp_path / "trial_0000" / "launches").read_text().splitlines())
    assert first == second and [trial.state.name for trial in study.trials] == ["COMPLETE"]


def test_what_fails_or_has_no_figure_is_a_failed_trial_and_none_at_all_an_error(tmp_path, capfd):
    study = work(tmp_path, 1, "fail")
    study = work(tmp_path, 1, worker=1, objective="accuracy")
    said = capfd.readouterr().out
    assert "trial 0: fail, knn None, exit status 1" in said
    assert (
        f"no accuracy in {tmp_path / 'trial_0001' / 'metrics.jsonl'}; give probe-dir, or --objective" in said
    )
    with pytest.raises(UserError, match=r"no trial came to its end; .*logs says why"):
        sweep.report(study, tmp_path, 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[flag]\nsteps = 1", r"unknown table flag; give \[flags\] and \[search\]"),
        ("[flags]\nsteps = 1", r"\[search\] is required"),
        ("[search]\nx = {low = 1}", r"search.x: give \{choices = \[...\]\} or \{low = ..., high = ...\}"),
    ],
)
def test_a_wrong_space_is_refused_in_one_line(tmp_path, text, said):
    (tmp_path / "space.toml").write_text(text)
    with pytest.raises(UserError, match=said):
        sweep.read_space(tmp_path / "space.toml")


def real_sweep(sheets: Path, folder: Path, **flags) -> list:
    """The command of a sweep of one real pretraining, and in the folder its space."""
    flags = {"data-dir": "unlabeled", "arch": "test_resnet", "image-size": 32, "window": 64, **flags}
    flags |= {"projector": [16, 16], "batch-size": 4, "workers": 0, "device": "cpu", "log-every": 1}
    lines = ["[flags]", *(f"{name} = {json.dumps(value)}" for name, value in flags.items())]
    (folder / "space.toml").write_text(
        "\n".join([*lines, "[search]", "temperature = {choices = [0.1, 0.2]}"])
    )
    (folder / "unlabeled").symlink_to(sheets / "unlabeled")
    command = [sys.executable, ROOT / "slurm" / "sweep.py", "--space", "space.toml", "--count", "1"]
    return [*command, "--exp-dir", "out", "--objective", "loss", "--minimize"]


def test_the_command_runs_real_pretrainings_by_a_path_from_here(sheets, tmp_path):
    command = [*real_sweep(sheets, tmp_path, steps=2), "--local", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + (tmp_path / "out/logs/worker_0.log").read_text()
    assert "1 of 1 trials finished, 1 of them to their end" in done.stdout
    assert (tmp_path / "out" / "trial_0000" / "backbone.safetensors").exists()


def test_on_slurm_a_worker_that_is_preempted_goes_on_with_its_trial(slurm, sheets, tmp_path):
    """The array's task is told of its preemption as Slurm tells it, saves, is requeued and begins again."""
    command = real_sweep(sheets, tmp_path, steps=600)
    environment = {"OMP_NUM_THREADS": "1"}
    told = slurm.run(*command, cwd=tmp_path, env=environment)
    job = told.partition("worker_0: job ")[2].split()[0]
    trial, log = tmp_path / "out" / "trial_0000", tmp_path / "out" / "logs" / "worker_0.log"

    def steps() -> list[int]:
        path = trial / "metrics.jsonl"
        rows = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(row)["step"] for row in rows]

    def said() -> str:
        return f"{told}\n{slurm.run('squeue')}\n{log.read_text() if log.exists() else ''}"

    slurm.wait_for(lambda: len(steps()) > 20, 120, said)
    slurm.run("scancel", "--signal=USR2", job)
    slurm.wait_for(lambda: slurm.show(job).get("Restarts") == "1", 60, said)
    slurm.wait_for(lambda: (trial / "backbone.safetensors").exists() and slurm.idle(), 240, said)
    (saved,) = re.findall(rf"^going on from {trial}/checkpoints/step_(\d+)\.pt$", log.read_text(), re.M)
    assert 20 < int(saved) < 600 and steps() == [*range(600)]
    assert "1 of 1 trials finished, 1 of them" in slurm.run(*command, cwd=tmp_path, env=environment)
