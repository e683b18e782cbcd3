"""The .slurm files and slurm/launch.sh: the same file under bash and sbatch, flags passed through, crashes.

What they start here is a small program in the place of Python, which LINEWORK_PYTHON names: it tells how it
was called, and ends as the test wants. test_slurm_chain.py runs the stages themselves.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from slurm_jobs import program

ROOT = Path(__file__).parent.parent
SCRIPTS = ("pretrain", "finetune", "evaluate")
RECORDER = """\
import json, os, sys
sys.stdout.write(json.dumps({"argv": sys.argv[1:], "rank": os.environ.get("SLURM_PROCID"),
    "node": os.environ.get("SLURMD_NODENAME"), "path": os.environ["PYTHONPATH"]}) + "\\n")
"""
# Appends a line to `launches` beside itself on rank 0, then does what the test adds.
CRASHING = """\
import os, pathlib, signal, sys, time
here, rank = pathlib.Path(__file__).parent, os.environ["SLURM_PROCID"]
if rank == "0":
    with open(here / "launches", "a") as file:
        file.write("launch\\n")
launch = len((here / "launches").read_text().split()) if rank == "0" else 0
"""


def launches(folder: Path) -> int:
    return len((folder / "launches").read_text().split())


def ended(slurm: Cluster, job: str) -> tuple[str, str]:
    """(state, exit code) of a job at its end."""
    return slurm.wait(job), slurm.show(job)["ExitCode"].split(":")[0]


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_names_no_site(name):
    text = (ROOT / "slurm" / f"{name}.slurm").read_text()
    directives = re.findall(r"^#SBATCH (.*)$", text, re.M)
    assert "--requeue" in directives and "--open-mode=append" in directives
    assert not [line for line in directives if re.search(r"partition|account|qos|reservation|/|\bB:", line)]
    assert not re.search(r"(?<![\w.$}\"|])/(home|scratch|data|mnt|opt|work|gpfs)\b", text)


@pytest.mark.parametrize("name", SCRIPTS)
def test_flags_pass_through_bash_untouched(name, tmp_path):
    flags = ["--data-dir", "a b", "--note=it's", "*", "$HOME", "", "--steps", "3"]
    command = ["bash", str(ROOT / "slurm" / f"{name}.slurm"), *flags]
    done = subprocess.run(
        command, cwd=tmp_path, env=program(tmp_path, RECORDER), capture_output=True, check=True
    )
    told = json.loads(done.stdout)
    assert told["argv"][-len(flags) :] == flags
    assert told["path"] == str(ROOT)
    started = {
        "pretrain": ["-m", "vicreg.pretrain"],
        "finetune": ["-m", "detection.finetune"],
        "evaluate": [str(ROOT / "evaluate" / "evaluate.py")],
    }[name]
    assert told["argv"][: -len(flags)] == started


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["simclr", "--steps", "3"], 0, "simclr.pretrain"),
        (["vicreg"], 0, "vicreg.pretrain"),
        (["byol", "--steps", "3"], 2, "error: unknown method 'byol': give simclr or vicreg"),
    ],
)
def test_first_word_of_pretrain_is_the_method(words, code, expected, tmp_path):
    command = ["bash", str(ROOT / "slurm" / "pretrain.slurm"), *words]
    done = subprocess.run(command, env=program(tmp_path, RECORDER), capture_output=True, text=True)
    assert done.returncode == code
    assert expected in done.stdout + done.stderr
    assert len((done.stdout + done.stderr).splitlines()) == 1


def test_missing_python_is_one_line(tmp_path):
    command = ["bash", str(ROOT / "slurm" / "finetune.slurm")]
    environment = {"LINEWORK_PYTHON": "/nowhere/python", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        1,
        "error: LINEWORK_PYTHON=/nowhere/python is not an executable\n",
    )


def test_a_rank_on_each_node_from_a_folder_with_a_hostile_name(slurm, tmp_path):
    """sbatch runs a copy of the script: it finds its code by the job's record, in any current folder."""
    code = tmp_path / "it's 100 % code"
    for name in ("slurm", "simclr"):
        shutil.copytree(ROOT / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
    log, flags = tmp_path / "log", ["--data-dir", "a b", "--exp-dir", str(tmp_path)]
    environment = program(tmp_path, RECORDER)
    job = slurm.sbatch(
        "-N2", "-o", log, code / "slurm" / "pretrain.slurm", "simclr", *flags, cwd=Path("/"), env=environment
    )
    assert ended(slurm, job) == ("COMPLETED", "0")
    told = [json.loads(line) for line in log.read_text().splitlines()]
    assert {(rank["rank"], rank["node"]) for rank in told} == {("0", "node1"), ("1", "node2")}
    assert all(rank["argv"] == ["-m", "simclr.pretrain", *flags] for rank in told)
    assert all(rank["path"] == str(code) for rank in told)


def test_evaluate_is_one_process_in_any_allocation(slurm, tmp_path):
    log = tmp_path / "log"
    script, environment = ROOT / "slurm" / "evaluate.slurm", program(tmp_path, RECORDER)
    job = slurm.sbatch("-N2", "--ntasks-per-node=2", "-o", log, script, env=environment)
    assert ended(slurm, job) == ("COMPLETED", "0")
    assert len([line for line in log.read_text().splitlines() if line.startswith("{")]) == 1


def test_job_submitted_without_an_environment_runs(slurm, tmp_path):
    """--export=NONE reaches srun as well, which then starts tasks without a PATH, unless told otherwise."""
    log, python = tmp_path / "log", program(tmp_path, RECORDER)["LINEWORK_PYTHON"]
    flags = [f"--export=NONE,LINEWORK_PYTHON={python}", f"--chdir={ROOT}"]
    job = slurm.sbatch(*flags, "-o", log, ROOT / "slurm" / "finetune.slurm")
    assert ended(slurm, job) == ("COMPLETED", "0"), log.read_text()


def test_crashes_are_started_again_while_checkpoints_move(slurm, tmp_path):
    crash = CRASHING + (
        "if rank == '0' and launch < 4:\n"
        "    (here / 'checkpoints').mkdir(exist_ok=True)\n"
        "    (here / 'checkpoints' / f'step_{launch:08d}.pt').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    log = tmp_path / "log"
    job = slurm.sbatch(
        "-o", log, ROOT / "slurm" / "finetune.slurm", f"--exp-dir={tmp_path}", env=program(tmp_path, crash)
    )
    assert ended(slurm, job) == ("COMPLETED", "0"), log.read_text()
    assert launches(tmp_path) == 4
    assert f"starting again from {tmp_path}/checkpoints/step_00000003.pt" in log.read_text()


def test_progress_below_a_damaged_checkpoint_counts(slurm, tmp_path):
    crash = CRASHING + (
        "if rank == '0' and launch < 4:\n"
        "    (here / 'checkpoints' / f'step_{launch:08d}.pt').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_00000099.pt").touch()  # passed over by every launch
    log = tmp_path / "log"
    job = slurm.sbatch(
        "-o", log, ROOT / "slurm" / "finetune.slurm", "--exp-dir", tmp_path, env=program(tmp_path, crash)
    )
    assert ended(slurm, job) == ("COMPLETED", "0"), log.read_text()
    assert f"starting again from {tmp_path}/checkpoints/step_00000003.pt" in log.read_text()


def test_crash_without_a_new_checkpoint_gets_one_more_try(slurm, tmp_path):
    log, crash = tmp_path / "log", CRASHING + "os.kill(os.getpid(), signal.SIGKILL)\n"
    job = slurm.sbatch(
        "-o", log, ROOT / "slurm" / "finetune.slurm", "--exp-dir", tmp_path, env=program(tmp_path, crash)
    )
    assert ended(slurm, job) == ("FAILED", "137")
    assert launches(tmp_path) == 2
    assert "crashed twice without a new checkpoint (exit code 137): giving up" in log.read_text()


@pytest.mark.parametrize("code", [1, 2, 75])
def test_error_of_one_rank_ends_the_job_with_its_exit_code(code, slurm, tmp_path):
    """srun itself ends with 143 here: the other rank's, ended by --kill-on-bad-exit."""
    failing = CRASHING + f"if rank == '0': sys.exit({code})\ntime.sleep(60)\n"
    script, environment = ROOT / "slurm" / "pretrain.slurm", program(tmp_path, failing)
    job = slurm.sbatch("-N2", "-o", tmp_path / "log", script, "--exp-dir", tmp_path, env=environment)
    assert ended(slurm, job) == ("FAILED", str(code))
    assert launches(tmp_path) == 1


def test_signal_that_comes_before_its_handler_waits(slurm, tmp_path):
    """By default USR2 kills; here it stays pending until the program asks."""
    early = CRASHING + (
        "end = time.monotonic() + 30\n"
        "while signal.SIGUSR2 not in signal.sigpending() and time.monotonic() < end:\n"
        "    time.sleep(0.01)\n"
        "print('pending', signal.SIGUSR2 in signal.sigpending(), flush=True)\n"
    )
    log = tmp_path / "log"
    job = slurm.sbatch("-o", log, ROOT / "slurm" / "pretrain.slurm", env=program(tmp_path, early))
    slurm.wait_for(lambda: (tmp_path / "launches").exists())
    slurm.run("scancel", "--signal=USR2", job)
    assert ended(slurm, job) == ("COMPLETED", "0"), log.read_text()
    assert log.read_text() == "pending True\n"


def test_cancelled_job_is_not_started_again(slurm, tmp_path):
    waiting = CRASHING + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)\n"
    job = slurm.sbatch(
        "-o", tmp_path / "log", ROOT / "slurm" / "pretrain.slurm", env=program(tmp_path, waiting)
    )
    slurm.wait_for(lambda: (tmp_path / "launches").exists())
    slurm.run("scancel", job)
    assert slurm.wait(job) == "CANCELLED"
    slurm.wait_for(slurm.idle)
    assert launches(tmp_path) == 1
