"""Many runs, here and as an array of a real Slurm: done ones are skipped, killed ones go on, failures told.

The runs are small programs in place of our commands.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm_cluster import Cluster, clean_environment

from cluster.array import Run, run_here
from cluster.errors import UserError

ROOT = Path(__file__).parent.parent
# Appends its argument to a file; with "slow" it then waits to be killed, but only the first time.
SAY = """import signal, sys, time
file, word = sys.argv[1:]
first = not open(file, "a+").seek(0) and word not in open(file).read()
def leave(*_):
    print("told to end", file=open(file, "a"), flush=True)
    sys.exit(143)
waits = word == "slow" and first
if waits:
    signal.signal(signal.SIGTERM, leave)
print(word, file=open(file, "a"), flush=True)
if waits:
    time.sleep(100)
sys.exit("error: no pool; give one" if word == "bad" else 0)
"""
LAUNCH = """import json, pathlib, sys
from cluster.array import Run, run_here, submit
folder, how = pathlib.Path(sys.argv[1]), sys.argv[3:]
runs = [Run(name, tuple(map(tuple, chain)), tuple(after)) for name, chain, after in json.loads(sys.argv[2])]
if how:
    print(json.dumps(submit(runs, folder, json.loads(how[0]))))
else:
    run_here(runs, folder, 2)
"""


@pytest.fixture
def said(tmp_path) -> Path:
    return tmp_path / "said"


def say(said: Path, name: str, *words: str, after: tuple[str, ...] = ()) -> Run:
    return Run(name, tuple(("-c", SAY, str(said), word) for word in words), after)


def launch(folder: Path, runs: list[Run], *how: str) -> list[str]:
    """The command that launches the runs."""
    told = json.dumps([(run.name, run.commands, run.after) for run in runs])
    return [sys.executable, "-c", LAUNCH, str(folder), told, *how]


def lines(said: Path) -> list[str]:
    return said.read_text().split("\n")[:-1] if said.exists() else []


def test_a_chain_runs_in_its_order_after_what_it_needs_and_once(said, tmp_path, capfd):
    runs = [say(said, "second", "c", "d", after=("first",)), say(said, "first", "a", "b")]
    run_here(runs, tmp_path / "all", 2)
    assert lines(said) == ["a", "b", "c", "d"]
    run_here(runs, tmp_path / "all", 2)
    assert lines(said) == ["a", "b", "c", "d"] and "2 of 2 runs are done, 0 to go" in capfd.readouterr().out
    # With other commands it is another run.
    run_here([say(said, "first", "a", "e"), runs[0]], tmp_path / "all", 2)
    assert lines(said)[4:] == ["a", "e"]


def test_a_run_that_fails_is_named_with_its_error_and_stops_only_what_needs_it(said, tmp_path):
    runs = [
        say(said, "wrong", "bad", "never"),
        say(said, "child", "no", after=("wrong",)),
        say(said, "well", "x"),
    ]
    with pytest.raises(UserError) as error:
        run_here(runs, tmp_path / "all", 1)
    log = tmp_path / "all" / "logs" / "wrong.log"
    assert str(error.value) == (
        f"2 of 3 runs are not done (wrong: exit status 1, error: no pool; give one, see {log}; "
        "child: needs wrong); the same command goes on"
    )
    assert lines(said) == ["bad", "x"]


def test_after_kill_9_the_commands_are_told_to_end_and_the_next_launch_goes_on(said, tmp_path):
    runs = [say(said, "quick", "quick"), say(said, "long", "slow", "after")]
    first = subprocess.Popen(launch(tmp_path / "all", runs), env={**os.environ, "PYTHONPATH": str(ROOT)})
    done = tmp_path / "all" / "done" / "quick.json"
    until = time.monotonic() + 60
    while not (done.exists() and "slow" in lines(said)):
        assert time.monotonic() < until
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    written = done.stat().st_mtime_ns
    run_here(runs, tmp_path / "all", 2)
    assert sorted(lines(said)) == ["after", "quick", "slow", "slow", "told to end"]
    assert lines(said).index("told to end") < len(lines(said)) - 2
    assert done.stat().st_mtime_ns == written


def test_runs_from_a_copy_of_the_code_and_from_a_folder_of_any_name(tmp_path):
    folder = tmp_path / "it's a study 100%"
    where = "import cluster, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(cluster.__file__)"
    run_here([Run("one", (("-c", where, str(tmp_path / "found")),))], folder, 1)
    assert (tmp_path / "found").read_text() == str(folder / "code" / "cluster" / "__init__.py")


def test_an_array_of_slurm_runs_them_with_their_order_and_takes_none_twice(slurm: Cluster, said, tmp_path):
    runs = [
        *(say(said, name, name) for name in ("one", "two")),
        say(said, "last", "last", after=("one", "two")),
        say(said, "wrong", "bad"),
        say(said, "child", "no", after=("wrong",)),
    ]
    command = launch(tmp_path / "all", runs, '{"at-once": 2, "time": 5}')
    environment = {"PYTHONPATH": str(ROOT)}
    jobs = json.loads(slurm.run(*command, cwd=tmp_path, env=environment))
    arrays = {name: job.partition("_")[0] for name, job in jobs.items()}
    assert arrays["one"] == arrays["two"] == arrays["wrong"] and len({*arrays.values()}) == 3
    slurm.wait_for(slurm.idle, 90, lambda: slurm.run("squeue"))
    logs = "".join(path.read_text() for path in (tmp_path / "all" / "jobs").glob("*.out"))
    assert sorted(lines(said)) == ["bad", "last", "one", "two"], logs
    assert lines(said).index("last") > max(lines(said).index(name) for name in ("one", "two"))
    assert "error: wrong: exit status 1, error: no pool; give one" in logs and "Traceback" not in logs
    assert sorted(path.stem for path in (tmp_path / "all" / "done").iterdir()) == ["last", "one", "two"]
    later = launch(tmp_path / "all", runs, '{"begin": "now+1hour"}')
    jobs = json.loads(slurm.run(*later, cwd=tmp_path, env=environment))
    assert sorted(jobs) == ["child", "wrong"]  # the others are done
    assert json.loads(slurm.run(*later, cwd=tmp_path, env=environment)) == jobs  # and these are queued


def test_without_slurm_an_array_is_refused_in_a_line(said, tmp_path):
    command = launch(tmp_path / "all", [say(said, "one", "one")], "{}")
    environment = {**clean_environment(), "PATH": "/nowhere", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert 'UserError: Slurm took no array (Could not detect "srun"' in done.stderr
    assert "--local N runs the same here" in done.stderr
