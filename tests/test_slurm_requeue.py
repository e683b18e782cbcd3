"""What ends a job on a real Slurm, and how it goes on: time limits, preemption, a full disk, lost nodes.

test_slurm_chain.py has USR2, scancel and a second job; tests/faults/chaos.py strikes harder and longer.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from slurm_jobs import errors, steps

from cluster.errors import GONE

ROOT = Path(__file__).parent.parent
PRETRAIN = (
    "--arch resnet18 --projector 16 16 --window 96 --image-size 32 --batch-size 4 --workers 0 --log-every 1"
)
ENVIRONMENT = {"LINEWORK_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
# fsync takes a minute once the file beside this one is there: a disk that has become slow.
SLOW_DISK = """\
import os, pathlib, time
fast = os.fsync
def fsync(descriptor):
    time.sleep(60 if pathlib.Path(__file__).with_name("slow-now").exists() else 0)
    fast(descriptor)
os.fsync = fsync
"""


class Job:
    """A pretraining that lasts for ever, as a job."""

    def __init__(
        self,
        slurm: Cluster,
        sheets: Path,
        folder: Path,
        *sbatch: str,
        flags: str,
        env: dict | None = None,
        exp_dir: Path | None = None,
    ) -> None:
        self.slurm = slurm
        folder.mkdir(exist_ok=True)
        self.exp_dir = exp_dir or folder / "exp"
        self.log = folder / "log"
        words = f"--steps 100000 {PRETRAIN} {flags}".split()
        data = ["--data-dir", sheets / "unlabeled", "--exp-dir", self.exp_dir]
        script = [ROOT / "slurm" / "pretrain.slurm", "simclr", *words, *data]
        self.id = slurm.sbatch(*sbatch, "-o", self.log, *script, cwd=ROOT, env=ENVIRONMENT | (env or {}))

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def resumed(self) -> list[int]:
        """The step that each later life went on from."""
        return [int(step) for step in re.findall(r"^going on from .*/step_(\d+)\.pt$", self.text(), re.M)]

    def saved(self) -> dict[int, float]:
        """Step of each checkpoint, and when it was written."""
        found = self.exp_dir.glob("checkpoints/step_*.pt")
        return {int(path.stem.removeprefix("step_")): path.stat().st_mtime for path in found}

    def reach(self, step: int) -> None:
        self.slurm.wait_for(lambda: len(steps(self.exp_dir)) >= step, what=self.text)

    def next_life(self, lives: int = 1) -> int:
        """The step from which the run has gone on, when it has done some steps of that life."""
        self.slurm.wait_for(lambda: len(self.resumed()) >= lives, 180, self.text)
        self.reach(self.resumed()[-1] + 2)
        assert steps(self.exp_dir) == list(range(len(steps(self.exp_dir))))
        return self.resumed()[-1]


@pytest.fixture(scope="module")
def limited(sheets, tmp_path_factory) -> Iterator[tuple[Cluster, Path]]:
    """A chain whose jobs have a time limit of a minute, on a Slurm of its own, beside the other tests.

    slurmctld looks at limits every 30 s only. The program in Python's place lets pretraining go on for ever
    in its first three lives, then for three steps; in the place of the other stages it keeps what it finds of
    final.json.
    """
    folder = tmp_path_factory.mktemp("limited")
    (folder / "program").write_text(
        f"#!/bin/bash\npython={sys.executable}\ncd {folder}\n"
        + """\
case $* in
  *simclr*)
    steps=100000
    if [ "${SLURM_RESTART_COUNT:-0}" -ge 3 ]; then
      newest=$(find run/pretrain/checkpoints -name 'step_*.pt' | sort | tail -n 1)
      newest=$(basename "$newest" | tr -dc 0-9)
      steps=$((10#$newest + 3))
    fi
    cd - >/dev/null
    exec nice "$python" "$@" --steps "$steps" ;;
  *finetune*) cp run/pretrain/final.json seen ;;
esac
"""
    )
    (folder / "program").chmod(0o755)
    slurm = Cluster()
    data = ["--unlabeled", sheets / "unlabeled", "--data-dir", sheets, "--run-dir", folder / "run"]
    flags = ["--method=simclr", f"--pretrain={PRETRAIN}", "--sbatch=-N2 --time=1 --signal=USR2@30"]
    slurm.run(
        sys.executable,
        ROOT / "slurm" / "pipeline.py",
        "submit",
        *data,
        *flags,
        env={"LINEWORK_PYTHON": str(folder / "program"), "OMP_NUM_THREADS": "1"},
    )
    yield slurm, folder
    slurm.stop()


@pytest.mark.usefixtures("limited")
def test_preemption_loses_nothing_or_with_too_short_a_grace_the_interval(slurm, sheets, tmp_path):
    """One job is warned by USR2 10 s before the end; another has 5 s, and a disk that needs a minute."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK)
    warned = Job(slurm, sheets, tmp_path / "warned", "-plowgrace", "-wnode1", "-c4", flags="")
    slow = Job(
        slurm,
        sheets,
        tmp_path / "slow",
        "-plow",
        "-wnode2",
        "-c4",
        flags="--checkpoint-every 2",
        env={"PYTHONPATH": str(tmp_path)},
    )
    warned.reach(5)
    slurm.wait_for(lambda: len(slow.saved()) > 2, what=slow.text)
    (tmp_path / "slow-now").touch()
    began = time.time()
    high = slurm.sbatch("-phigh", "-N2", "-c6", "-o", "/dev/null", "--wrap", "true")
    slurm.wait(high, "COMPLETED")
    (tmp_path / "slow-now").unlink()

    lost = steps(warned.exp_dir)[-1] + 1
    assert warned.next_life() == lost == max(step for step in warned.saved() if step <= lost)
    assert "saved after SIGUSR2" in warned.text()
    newest = slow.next_life()
    assert "saved after SIGTERM" not in slow.text()
    assert "passed over" not in slow.text()
    assert slow.saved().get(newest, began) > began - 2 - 1  # the interval, and the write that was under way
    assert {slurm.show(job.id)["Restarts"] for job in (warned, slow)} == {"1"}


def test_full_disk_is_one_line_and_the_last_checkpoint_stays(slurm, sheets, tmp_path):
    """45 MB of weights, then 90 MB with momentum: a third checkpoint finds no room."""
    exp_dir = tmp_path / "disk" / "exp"
    disk = slurm.small_disk(1, tmp_path / "disk", "200m")
    job = Job(slurm, sheets, tmp_path / "job", "-wnode1", flags="--checkpoint-every 0", exp_dir=exp_dir)
    assert slurm.wait(job.id) == "FAILED", job.text()
    (line,) = errors(job.log)
    assert "the disk is full (No space left on device)" in line and f"{exp_dir}/checkpoints/step_" in line
    assert "Traceback" not in job.text()
    folder = disk / "exp" / "checkpoints"
    kept = sorted(path.name for path in folder.iterdir())
    assert len(kept) == 4 and kept[:2] == ["step_00000000.pt", "step_00000000.pt.sha256"], kept
    assert kept[3] == f"{kept[2]}.sha256"
    subprocess.run(["sha256sum", "-c", "--quiet", *kept[1::2]], cwd=folder, check=True)


def test_a_run_whose_folder_is_removed_ends_and_is_not_started_again(slurm, sheets, tmp_path):
    """test_slurm_scripts.py has what a later life does where the folder is gone."""
    job = Job(slurm, sheets, tmp_path / "job", flags="--checkpoint-every 1")
    job.reach(3)
    job.exp_dir.rename(tmp_path / "elsewhere")
    assert slurm.wait(job.id) == "FAILED", job.text()
    told = errors(job.log)
    assert len(told) == 1 and GONE in min(told), job.text()
    assert "Traceback" not in job.text() and "starting again" not in job.text()
    assert slurm.show(job.id)["Restarts"] == "0" and not job.exp_dir.exists()


def test_stopped_rank_is_named_in_time_and_the_job_goes_on(slurm, sheets, tmp_path):
    job = Job(slurm, sheets, tmp_path / "job", "-N2", flags="--step-timeout 4 --checkpoint-every 1")
    slurm.wait_for(lambda: len(job.saved()) > 1, what=job.text)
    os.kill(slurm.ranks(job.id)[1], signal.SIGSTOP)
    began = time.monotonic()
    slurm.wait_for(lambda: len(errors(job.log)) > 0, timeout=4 + 2 + 2)  # the time-out, and two beats of 1 s
    seconds = time.monotonic() - began
    (line,) = errors(job.log)
    assert re.search(r"rank 1 \(pid \d+ on node2\) shows no sign of life", line), (line, seconds)
    job.next_life()  # in the same allocation, as srun has ended the stopped rank
    assert slurm.show(job.id)["Restarts"] == "0"


def test_cut_node_is_overtaken_by_the_next_life_of_its_job(slurm, sheets, tmp_path):
    """Both lives run at once; the one that the controller does not see finds out and writes no more."""
    job = Job(slurm, sheets, tmp_path / "job", flags="--checkpoint-every 1")
    slurm.wait_for(lambda: len(job.saved()) > 1, what=job.text)
    node, old = int(slurm.show(job.id)["BatchHost"][-1]), slurm.ranks(job.id)[0]
    slurm.cable(node, "down")
    try:
        slurm.wait(job.id, "PENDING")
        assert Path(f"/proc/{old}").exists()
        start = job.next_life()
        slurm.wait_for(lambda: not Path(f"/proc/{old}").exists())
        (line,) = errors(job.log)
        assert f"job {job.id} (restart 1)" in line and "has taken over; this run" in line
        job.reach(start + 20)
        job.next_life()
    finally:
        slurm.cable(node, "up")


def test_time_limit_three_times_over(limited):
    """One job id, one continuous metrics.jsonl, and the next stage starts only after `final`."""
    slurm, folder = limited
    run_dir = folder / "run"
    jobs = json.loads((run_dir / "pipeline.json").read_text())["jobs"]
    log = run_dir / "logs" / f"pretrain-{jobs['pretrain']}.log"
    assert slurm.wait(jobs["evaluate"], timeout=300) == "COMPLETED", log.read_text()
    final = run_dir / "pretrain" / "final.json"
    assert steps(run_dir / "pretrain") == list(range(json.loads(final.read_text())["step"]))
    assert (folder / "seen").read_bytes() == final.read_bytes()
    lives = int(slurm.show(jobs["pretrain"])["Restarts"])
    assert lives >= 3 and slurm.show(jobs["pretrain"])["TimeLimit"] == "00:01:00"
    text = log.read_text()
    saved = re.findall(r"^step (\d+): saved after SIGUSR2", text, re.M)
    assert len(saved) == lives and "TIME LIMIT" not in text
    assert saved == re.findall(r"^going on from .*/step_0*(\d+)\.pt$", text, re.M)
