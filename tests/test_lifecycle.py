"""A run survives signals, kills, a second run, a hung rank, a full disk and bad data."""

import ctypes
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import toy_stage
from processes import Ranks, alive, children, until

from cluster import atomic, checkpoint, heartbeat, owner
from cluster.errors import UserError
from cluster.guard import Guard
from cluster.owner import Owner
from cluster.signals import REQUEUE, STOP, Signals


class Stage:
    """The toy stage in one exp-dir, which can be started several times."""

    def __init__(self, tmp_path: Path, *flags: str) -> None:
        self.folder = tmp_path / "exp dir"
        self.logs = tmp_path / "logs"
        self.flags = flags
        self.starts = 0

    def start(self, *flags: str, size: int = 1, env: dict[str, str] | None = None) -> Ranks:
        self.starts += 1
        logs = self.logs / str(self.starts)
        flags = ("--exp-dir", str(self.folder), *self.flags, *flags)
        return Ranks(toy_stage.entry_point, *flags, size=size, logs=logs, env=env)

    def metrics(self) -> list[dict]:
        path = self.folder / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def losses(self) -> list[tuple[int, float]]:
        return [(line["step"], line["loss"]) for line in self.metrics()]

    def reach(self, step: int) -> None:
        until(lambda: (self.metrics() or [{"step": -1}])[-1]["step"] >= step, what=f"step {step}")

    def saved(self) -> list[int]:
        return [step for step, _ in checkpoint.listed(self.folder / "checkpoints")]

    def digest(self) -> str:
        """The hash of the final weights."""
        checkpoint.check_final(self.folder)
        return checkpoint.read(self.folder / "model.pt")["digest"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    stage = Stage(tmp_path_factory.mktemp("uninterrupted"))
    with stage.start("--checkpoint-every", "1000", size=2) as ranks:
        assert ranks.statuses() == [0, 0]
    return stage


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_signalled_run_equals_the_uninterrupted_one(workers, tmp_path, uninterrupted):
    stage = Stage(tmp_path, "--workers", str(workers))
    with stage.start(size=2) as ranks:
        stage.reach(12)
        until(stage.saved)
        ranks.signal(signal.SIGKILL, 0)
        assert ranks.statuses() == [-9, 70]  # the other notices at once
    kept = stage.saved()[0]
    with stage.start(size=2) as ranks:
        stage.reach(max(kept, 20))
        ranks.signal(signal.SIGUSR2, 1)
        assert ranks.statuses() == [75, 75]
        assert "taken over from" in ranks.log()
        assert f"going on from {checkpoint.step_path(stage.folder / 'checkpoints', kept)}" in ranks.log()
    signalled = stage.saved()[0]
    assert stage.metrics()[-1]["step"] == signalled - 1  # no step is lost
    newest = checkpoint.step_path(stage.folder / "checkpoints", signalled)
    newest.write_bytes(newest.read_bytes()[:-100])
    with stage.start(size=2) as ranks:
        assert ranks.statuses() == [0, 0]
        assert f"passed over: {newest}: truncated" in ranks.log()
    assert stage.losses() == uninterrupted.losses()
    assert [step for step, _ in stage.losses()] == list(range(40))
    assert stage.digest() == uninterrupted.digest()
    assert len(stage.saved()) <= 4  # three, and the truncated one unless it was written again


def test_a_finished_run_says_so_and_changes_nothing(uninterrupted):
    def times() -> dict[Path, int]:
        return {
            p: p.stat().st_mtime_ns
            for p in uninterrupted.folder.rglob("*")
            if p.suffix != ".lock" and p.is_file()
        }

    before = times()
    with uninterrupted.start() as ranks:
        assert ranks.statuses() == [0]
        assert ranks.log().splitlines() == [f"{uninterrupted.folder}: finished at step 40, nothing to do"]
    assert {path for path, when in times().items() if before.get(path) != when} <= {
        uninterrupted.folder / "heartbeat" / "rank_0"
    }
    assert not (uninterrupted.folder / "owner.json").exists()


@pytest.mark.parametrize(
    ("number", "status", "env"),
    [
        (signal.SIGUSR2, 75, {}),
        (signal.SIGTERM, 143, {}),
        (signal.SIGINT, 130, {}),
        (signal.SIGUSR1, 75, {"LINEWORK_REQUEUE_SIGNAL": "usr1"}),
    ],
)
def test_signal_to_every_process_saves_once_and_spares_the_workers(number, status, env, tmp_path):
    stage = Stage(tmp_path, "--steps", "100000", "--workers", "2", "--checkpoint-every", "1000")
    with stage.start(env=env) as ranks:
        stage.reach(3)
        pid = ranks.processes[0].pid
        everyone = [pid, *children(pid)]
        assert len(everyone) == 3
        for process in reversed(everyone):  # as Slurm does, the workers too
            os.kill(process, number)
        assert ranks.statuses() == [status]
        assert "Traceback" not in ranks.log() and "DataLoader" not in ranks.log()
        assert f"saved after {number.name}" in ranks.log()
        until(lambda: not any(map(alive, everyone)), 15, "the workers' end")
    assert stage.saved() == [stage.metrics()[-1]["step"] + 1, 0]  # and the one at the start
    assert not (stage.folder / "owner.json").exists()


def test_a_wrong_signal_name_is_one_line(tmp_path):
    with Stage(tmp_path).start(env={"LINEWORK_REQUEUE_SIGNAL": "USR9"}) as ranks:
        assert ranks.statuses() == [1]
        assert ranks.errors() == ["error: LINEWORK_REQUEUE_SIGNAL=USR9: no such signal; give USR2 or RTMIN"]


def signals_in_c_code() -> None:
    """Check that the flag is set while the main thread is in C code, which no Python handler interrupts."""
    flags = Signals()
    seen: list[float] = []

    def watch() -> None:
        os.kill(os.getpid(), signal.SIGUSR2)
        began = time.monotonic()
        until(lambda: flags.level == REQUEUE)
        seen.append(time.monotonic() - began)

    thread = threading.Thread(target=watch)
    thread.start()
    ctypes.CDLL(None).sleep(2)
    assert seen and seen[0] < 1.0
    thread.join()
    assert signal.sigpending() == set()
    os.kill(os.getpid(), signal.SIGTERM)
    until(lambda: flags.level == STOP)
    assert flags.name == "SIGTERM"
    os.kill(os.getpid(), signal.SIGUSR2)  # weaker: it does not undo the stop
    flags.close()
    assert flags.level == STOP
    os.kill(os.getpid(), signal.SIGUSR2)  # late: it does not kill a run that has ended well


def test_a_signal_is_seen_while_the_main_thread_is_in_a_collective(tmp_path):
    with Ranks(signals_in_c_code, logs=tmp_path) as ranks:
        assert ranks.statuses() == [0], ranks.log()


def test_a_second_run_is_turned_away_and_the_first_goes_on(tmp_path):
    stage = Stage(tmp_path, "--steps", "100000")
    with stage.start(size=2) as first:
        stage.reach(3)
        with stage.start() as second:
            assert second.statuses() == [1]
            (line,) = second.errors()
        assert f"in use by pid {first.processes[0].pid} on {os.uname().nodename}" in line
        stage.reach(stage.metrics()[-1]["step"] + 5)
        # A restart of its job, on a node that the controller sees, takes over from one that it does not see.
        held = json.loads((stage.folder / "owner.json").read_text())
        atomic.write_text(stage.folder / "owner.json", json.dumps(held | {"uuid": "another", "pid": 1}))
        saved = stage.saved()
        assert first.statuses() == [1, 0]
        (line,) = first.errors()
        assert "pid 1 on" in line and "has taken over" in line
        assert set(stage.saved()) <= set(saved)  # nothing written since
    assert json.loads((stage.folder / "owner.json").read_text())["uuid"] == "another"
    assert not list(stage.folder.rglob(".*tmp*"))


def claim(folder: Path, holder: dict | None, monkeypatch, **env: str) -> str:
    """Why a new run is refused a folder that `holder` owns; empty if it takes over."""
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    folder.mkdir(exist_ok=True)
    atomic.write_text(folder / "owner.json", json.dumps(holder))
    try:
        Owner(folder)
    except UserError as error:
        return str(error)
    return ""


def test_who_may_take_over_from_whom(tmp_path, monkeypatch):
    me = owner.describe_self()
    sleeper = subprocess.Popen(["sleep", "1000"])
    lives = me | {"pid": sleeper.pid, "pid_start": owner._start_time(sleeper.pid)}
    elsewhere = lives | {"host": "far", "boot": "x"}
    job = {"job": "12", "step": "0", "restart": 1}
    folder = tmp_path / "run"
    try:
        assert f"pid {sleeper.pid}" in claim(folder, lives, monkeypatch)
        assert (
            claim(folder, lives | {"pid_start": 1}, monkeypatch) == ""
        )  # its number has gone to another process
        assert claim(folder, lives | {"boot": "before"}, monkeypatch) == ""
        assert "sign of life" in claim(folder, lives | {"pids": "another container"}, monkeypatch)
        assert "on far" in claim(folder, elsewhere, monkeypatch)
        # The same job: a later life takes over at once, whatever still lives; an earlier one does not.
        life = {"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "1"}
        assert claim(folder, lives | job, monkeypatch, **life, SLURM_RESTART_COUNT="2") == ""
        assert "job 12 (restart 1)" in claim(
            folder, lives | job, monkeypatch, **life, SLURM_RESTART_COUNT="1"
        )
        assert claim(folder, lives | job, monkeypatch, SLURM_JOB_ID="13", SLURM_RESTART_COUNT="2") != ""
    finally:
        sleeper.kill()
        sleeper.wait()
    assert claim(folder, lives, monkeypatch) == ""
    assert "on far" in claim(folder, elsewhere, monkeypatch)
    atomic.write_text(folder / "owner.json", json.dumps(elsewhere))
    os.utime(folder / "owner.json", (1, time.time() - 100))  # no beat for long
    assert Owner(folder).predecessor.startswith("pid")
    assert claim(folder, None, monkeypatch) == ""  # a damaged file is nobody's


def test_a_stopped_rank_is_named_and_the_run_ended_in_time(tmp_path):
    stage = Stage(tmp_path, "--steps", "100000", "--step-timeout", "2", "--checkpoint-every", "1000")
    with stage.start(size=2) as ranks:
        stage.reach(5)
        ranks.signal(signal.SIGSTOP, 1)
        began = time.monotonic()
        ranks.processes[0].join(30)
        assert time.monotonic() - began < 2 + 2
        assert ranks.processes[0].exitcode == 70
        (line,) = ranks.errors()
    assert f"rank 1 (pid {ranks.processes[1].pid} on {os.uname().nodename}) shows no sign of life" in line
    assert "toy_stage.py" in line  # where rank 0 waits


def test_a_rank_that_lives_but_hangs_is_named_and_patience_is_kept(tmp_path):
    stage = Stage(tmp_path, "--step-timeout", "1.5", "--hang-at", "8", "--patience", "3")
    with stage.start(size=2) as ranks:
        assert ranks.statuses() == [70, 70]
        told = ranks.errors()
    assert stage.metrics()[-1]["step"] >= 7  # the nap of 3 s after step 2 was allowed
    assert any("toy_stage.py" in line and "sleep" not in line for line in told)
    assert all("no end of step 8 for" in line for line in told)


def test_a_crash_ends_at_once_with_its_workers_and_a_kill_leaves_no_orphans(tmp_path):
    stage = Stage(tmp_path, "--workers", "2", "--nap", "0.05", "--steps", "1000")
    with stage.start("--crash-at", "5") as ranks:
        until(lambda: "no line fits" in ranks.log())
        workers = children(ranks.processes[0].pid)
        began = time.monotonic()
        assert ranks.statuses(10) == [70]
        assert time.monotonic() - began < 3
        until(lambda: not any(map(alive, workers)), 15, "the workers' end")
    with stage.start() as ranks:
        until(lambda: len(children(ranks.processes[0].pid)) == 2, what="two workers")
        workers = children(ranks.processes[0].pid)
        ranks.signal(signal.SIGKILL)
        until(lambda: not any(map(alive, workers)), 15, "the workers' end")


def test_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path):
    stage = Stage(tmp_path, "--steps", "100000")
    with stage.start() as ranks:
        until(stage.saved)
        ranks.signal(signal.SIGTERM)
        assert ranks.statuses() == [143]
    saved = stage.saved()
    with stage.start("--ballast", "1000000", "--file-limit", "1000000", size=2) as ranks:
        assert ranks.statuses() == [1, 0]
        (line,) = ranks.errors()
    assert "the disk is full" in line and str(stage.folder / "checkpoints" / "step_") in line
    assert stage.saved() == saved
    assert checkpoint.load_newest(stage.folder / "checkpoints")[2] == []
    assert not list(stage.folder.rglob(".*tmp*"))


def test_guard_counts():
    guard = Guard()
    assert [guard.judge(ok) for ok in (True, False, False, True)] == ["ok", "skip", "skip", "ok"]
    assert [guard.judge(False) for _ in range(3)] == ["skip", "skip", "rollback"]
    guard.roll_back(7, 4)
    assert guard == Guard(
        skipped=0, rollbacks=1, offset=4
    )  # step 4 takes the data that would have been step 8's
    assert Guard(**json.loads(json.dumps(guard.state()))) == guard
    assert [guard.judge(False) for _ in range(3)] == ["skip", "skip", "stop"]


def test_bad_data_is_skipped_then_passed_over_then_ends_the_run(tmp_path):
    stage = Stage(tmp_path, "--poison", "10", "12")
    with stage.start(size=2) as ranks:  # two in a row are skipped
        assert ranks.statuses() == [0, 0]
    assert [line["position"] for line in stage.metrics()] == list(range(40))
    stage = Stage(tmp_path / "three", "--poison", "20", "23", "--checkpoint-every", "0")
    with stage.start(size=2) as ranks:  # three: back to a checkpoint, then the data after the bad ones
        assert ranks.statuses() == [0, 0]
        back = int(ranks.log().partition("going on from")[2].partition("step_")[2][:8])
    assert 15 < back <= 20
    positions = [line["position"] for line in stage.metrics()]
    assert positions == [*range(back), *range(23, 63 - back)]
    stage = Stage(tmp_path / "more", "--poison", "20", "30", "--checkpoint-every", "0")
    with stage.start(size=2) as ranks:
        assert ranks.statuses() == [1, 0]
        (line,) = ranks.errors()
    back = stage.saved()[0]
    assert 15 < back <= 20  # nothing was saved while steps were skipped
    assert f"step {back + 2}: the gradient was not finite 3 times in a row" in line
    assert "position 25" in line and f"step_{back:08}.pt" in line


def impatient_entry_point(*flags: str) -> None:
    heartbeat.ANSWER = 0.5
    toy_stage.entry_point(*flags)


@pytest.mark.parametrize(
    ("flags", "number", "status", "held"),
    [
        (("--hang-at", "0"), signal.SIGINT, 130, "before the end of the first step"),
        (("--hang-at", "0"), signal.SIGUSR2, 75, "before the end of the first step"),
        (("--stall-at", "0", "--workers", "1"), signal.SIGTERM, 143, "before the end of the first step"),
        (("--stall-at", "5", "--workers", "1"), signal.SIGTERM, 143, "waiting for data"),
        (("--stall-at", "5", "--workers", "0"), signal.SIGINT, 130, "waiting for data"),
    ],
)
def test_a_signal_is_answered_in_the_first_step_and_while_data_do_not_come(
    flags, number, status, held, tmp_path
):
    folder = tmp_path / "run"
    where = ("--exp-dir", str(folder), "--checkpoint-every", "1000")
    with Ranks(impatient_entry_point, *where, *flags, logs=tmp_path / "logs") as ranks:
        until(lambda: checkpoint.listed(folder / "checkpoints"))
        if "5" in flags:
            lines = folder / "metrics.jsonl"
            until(lambda: lines.exists() and lines.read_text().count("\n") == 5)
        time.sleep(0.3)
        ranks.signal(number)
        assert ranks.statuses(20) == [status], ranks.log()
        assert f"{number.name} {held}: ended without saving; the same command goes on" in ranks.log()
        assert checkpoint.load_newest(folder / "checkpoints")[1]["step"] == 0
