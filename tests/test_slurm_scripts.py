"""The .slurm files and slurm/launch.sh: the same file under bash and sbatch, flags passed through, crashes.

What they start here is a small program in the place of Python, which LINEWORK_PYTHON names: it tells how it
was called, and ends as the test wants. test_slurm_chain.py runs the stages themselves.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_cluster import Cluster, clean_environment
from slurm_jobs import errors, program

from cluster.distributed import gpus_of_process, pick_device
from cluster.errors import GpuFault
from cluster.rendezvous import Place, place

ROOT = Path(__file__).parent.parent
SCRIPTS = ("pretrain", "pretrain-detector", "finetune", "evaluate")
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


def launches(folder: Path, task: str = "") -> int:
    return len((folder / f"launches{task}").read_text().split())


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
        "pretrain-detector": ["-m", "detection.pretrain"],
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


@pytest.mark.parametrize("named", [True, False])
def test_a_python_without_torch_is_one_line(named, tmp_path):
    """A virtual environment of its own in place of the code's, or the system's by the name python3."""
    bare = tmp_path / ("python3.11" if named else "python3")
    bare.write_text(f'#!/bin/bash\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    code = tmp_path / "code"
    shutil.copytree(ROOT / "slurm", code / "slurm")
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"} | ({"LINEWORK_PYTHON": str(bare)} if named else {})
    command = ["bash", str(code / "slurm" / "finetune.slurm"), "--data-dir", "x"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    said = f"error: {bare} has no torch: name a Python that has it in LINEWORK_PYTHON\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_missing_flags_are_told_with_the_name_of_the_slurm_file(tmp_path):
    command = ["bash", str(ROOT / "slurm" / "pretrain.slurm")]
    environment = clean_environment() | {"LINEWORK_PYTHON": sys.executable}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "--data-dir" in done.stderr and "bash slurm/pretrain.slurm vicreg" in done.stderr


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


ENVIRONMENT = """\
import json, os, pathlib
rank = "rank_" + os.environ["SLURM_PROCID"]
pathlib.Path(__file__).with_name(rank).write_text(json.dumps(dict(os.environ)))
"""


@pytest.mark.parametrize(
    ("stage", "shape", "devices"),
    [
        ("finetune", ["-N2", "--ntasks-per-node=2", "--gpus-per-node=2"], ["cuda:0", "cuda:1"] * 2),
        ("finetune", ["-N2", "--ntasks-per-node=2", "--gpus-per-task=1"], ["cuda:0"] * 4),
        ("finetune", ["-N1", "--ntasks-per-node=2", "--gres=gpu:2"], ["cuda:0", "cuda:1"]),
        ("evaluate", ["-N2", "--ntasks-per-node=2", "--gpus-per-node=2"], ["cuda:0"]),
        ("evaluate", ["-N1", "--ntasks=2", "--gpus-per-task=1"], ["cuda:0"]),
    ],
)
def test_devices_of_ranks_that_slurm_has_given_gpus(stage, shape, devices, slurm, tmp_path):
    """By the environment that Slurm makes, without --device, and with as many GPUs seen as it lists."""
    log, script = tmp_path / "log", ROOT / "slurm" / f"{stage}.slurm"
    job = slurm.sbatch(*shape, "-o", log, script, cwd=tmp_path, env=program(tmp_path, ENVIRONMENT))
    assert ended(slurm, job) == ("COMPLETED", "0"), log.read_text()
    chosen = []
    for path in sorted(tmp_path.glob("rank_*")):
        env = json.loads(path.read_text())
        me = (
            place(env) if stage == "finetune" else Place()
        )  # evaluate is one process, as distributed.lone_device
        seen = len(env["CUDA_VISIBLE_DEVICES"].split(","))
        assert gpus_of_process(env) == seen
        chosen.append(str(pick_device("auto", me, seen, env)))
        with pytest.raises(GpuFault, match=f"GPU fault on {env['SLURMD_NODENAME']}: {seen} GPUs granted but"):
            pick_device("auto", me, seen - 1, env)
        assert str(pick_device("cpu", me, 0, env)) == "cpu"
    assert chosen == devices


def test_evaluate_is_one_process_in_any_allocation(slurm, tmp_path):
    log = tmp_path / "log"
    script, environment = ROOT / "slurm" / "evaluate.slurm", program(tmp_path, RECORDER)
    job = slurm.sbatch("-N2", "--ntasks-per-node=2", "-o", log, script, env=environment)
    assert ended(slurm, job) == ("COMPLETED", "0")
    assert len([line for line in log.read_text().splitlines() if line.startswith("{")]) == 1


def test_job_submitted_without_an_environment_runs(slurm, tmp_path):
    """--export=NONE reaches srun as well, which then starts tasks without a PATH, unless told otherwise."""
    log, python = tmp_path / "log", program(tmp_path, RECORDER)["LINEWORK_PYTHON"]
    flags = [f"--export=NONE,LINEWORK_PYTHON={python}", f"--chdir={tmp_path}"]
    job = slurm.sbatch(*flags, "-o", log, ROOT / "slurm" / "finetune.slurm")
    assert ended(slurm, job) == ("COMPLETED", "0"), log.read_text()


def test_code_that_was_moved_while_the_job_waited_is_one_line(slurm, tmp_path):
    code, log = tmp_path / "code", tmp_path / "log"
    shutil.copytree(ROOT / "slurm", code / "slurm")
    job = slurm.sbatch("--hold", "-o", log, code / "slurm" / "finetune.slurm", cwd=tmp_path)
    code.rename(tmp_path / "moved")
    slurm.run("scontrol", "release", job)
    assert ended(slurm, job) == ("FAILED", "1")
    assert log.read_text() == (
        f"error: no code in {code}: it was moved or removed since this job was submitted; submit again\n"
    )


def test_a_task_of_an_array_requeues_itself_alone(slurm, tmp_path):
    """The last task of an array has the number of the array: both for `scontrol show` and for `requeue`."""
    text = CRASHING.replace('"launches"', '("launches" + os.environ["SLURM_ARRAY_TASK_ID"])') + (
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from cluster.lifecycle import requeue\n"
        "task, restart = os.environ['SLURM_ARRAY_TASK_ID'], os.environ.get('SLURM_RESTART_COUNT')\n"
        "if task == '1' and not restart:\n"
        "    requeue()\n"
        "    time.sleep(60)\n"
        "while task == '0' and not (here / 'last').exists():\n"
        "    time.sleep(0.05)\n"
        "(here / ('last' if task == '1' else 'first')).touch()\n"
    )
    environment = program(tmp_path, text)
    python = Path(environment["LINEWORK_PYTHON"])
    python.write_text(python.read_text().replace(" -S", "", 1))  # cluster.lifecycle imports torch
    code = tmp_path / "code"
    shutil.copytree(ROOT / "slurm", code / "slurm")  # found by the job's record alone
    script = [code / "slurm" / "finetune.slurm", "--exp-dir", tmp_path]
    job = slurm.sbatch("--array=0-1", "-o", tmp_path / "log-%a", *script, cwd=tmp_path, env=environment)
    slurm.wait_for(lambda: (tmp_path / "first").exists(), 60, lambda: (tmp_path / "log-1").read_text())
    slurm.wait_for(slurm.idle)
    shown = slurm.run("scontrol", "-o", "show", "job", job).splitlines()
    restarts = {line.split("ArrayTaskId=")[1][0]: line.split("Restarts=")[1][0] for line in shown}
    assert restarts == {"0": "0", "1": "1"}
    assert (launches(tmp_path, "0"), launches(tmp_path, "1")) == (1, 2)


@pytest.mark.parametrize("restart", [True, False])
def test_a_run_whose_folder_was_removed_does_not_begin_anew(restart, slurm, tmp_path):
    """Neither in a later life of its job, nor after a crash in the same one."""
    exp_dir, log = tmp_path / "exp", tmp_path / "log"
    text = CRASHING + (
        "(here / 'exp').rename(here / 'elsewhere')\n"
        + ("time.sleep(60)\n" if restart else "os.kill(os.getpid(), signal.SIGKILL)\n")
    )
    script = [ROOT / "slurm" / "finetune.slurm", "--exp-dir", exp_dir]
    job = slurm.sbatch("-o", log, *script, cwd=tmp_path, env=program(tmp_path, text))
    slurm.wait_for(lambda: (tmp_path / "elsewhere").exists())
    if restart:
        slurm.run("scontrol", "requeue", job)
    slurm.wait_for(lambda: "error: " in log.read_text())
    assert ended(slurm, job) == ("FAILED", "1")
    assert launches(tmp_path) == 1 and not exp_dir.exists()
    (line,) = errors(log)
    assert line.startswith(f"error: {exp_dir}/checkpoints is gone from node")


def test_where_too_few_nodes_are_left_a_lost_gpu_ends_the_job(slurm, tmp_path):
    """So it does in a job that takes no other node."""
    fault = (
        "sys.stderr.write(f\"error: GPU fault on {os.environ['SLURMD_NODENAME']}: gone\\n\"); sys.exit(70)\n"
    )
    log, script = tmp_path / "log", [ROOT / "slurm" / "finetune.slurm", "--exp-dir", tmp_path]
    job = slurm.sbatch(
        "-N2", "--gpus-per-node=1", "-o", log, *script, env=program(tmp_path, CRASHING + fault)
    )
    assert ended(slurm, job) == ("FAILED", "70")
    assert "too few nodes are left: giving up" in log.read_text()


def test_a_node_whose_gpu_is_lost_is_left(slurm, tmp_path):
    """Both ranks of a node find it; the job goes on without that node, under its own number."""
    text = CRASHING + (
        "if 'SLURM_RESTART_COUNT' not in os.environ:\n"
        f"    sys.path.insert(0, {str(ROOT)!r})\n"
        "    from cluster.entry import live\n"
        "    from cluster.errors import GpuFault\n"
        "    def fail():\n"
        "        raise GpuFault(os.environ['SLURMD_NODENAME'], 'cuda:0 does not compute')\n"
        "    live(fail)\n"
        "print('went on at', os.environ['SLURMD_NODENAME'], flush=True)\n"
    )
    log = tmp_path / "log"
    shape = ["--gpus-per-node=2", "--ntasks-per-node=2"]
    script = [ROOT / "slurm" / "finetune.slurm", "--exp-dir", tmp_path]
    job = slurm.sbatch(*shape, "-o", log, *script, env=program(tmp_path, text))
    assert slurm.wait(job) == "COMPLETED", log.read_text()
    left = slurm.show(job)["ExcNodeList"]
    assert f"error: GPU fault on {left}: cuda:0 does not compute" in log.read_text()
    assert (
        f"launch: GPUs failed on {left}: this job is requeued and goes on without {left}\n" in log.read_text()
    )
    (other,) = {"node1", "node2"} - {left}
    assert log.read_text().count(f"went on at {other}") == 2


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
    script = ROOT / "slurm" / "pretrain.slurm"
    job = slurm.sbatch("-o", log, script, cwd=tmp_path, env=program(tmp_path, early))
    slurm.wait_for(lambda: (tmp_path / "launches").exists())
    slurm.run("scancel", "--signal=USR2", job)
    assert ended(slurm, job) == ("COMPLETED", "0"), log.read_text()
    assert log.read_text() == "pending True\n"


def test_cancelled_job_is_not_started_again(slurm, tmp_path):
    waiting = CRASHING + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)\n"
    script = ROOT / "slurm" / "pretrain.slurm"
    job = slurm.sbatch("-o", tmp_path / "log", script, cwd=tmp_path, env=program(tmp_path, waiting))
    slurm.wait_for(lambda: (tmp_path / "launches").exists())
    slurm.run("scancel", job)
    assert slurm.wait(job) == "CANCELLED"
    slurm.wait_for(slurm.idle)
    assert launches(tmp_path) == 1
