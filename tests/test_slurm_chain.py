"""The stages themselves on a real two-node Slurm, and by bash: one rank a node, ResNet-18, a few steps."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_cluster import Cluster, clean_environment
from slurm_jobs import errors, steps

ROOT = Path(__file__).parent.parent
# Small enough for two cores; no worker processes, as each would import torch again.
PRETRAIN = (
    "--arch resnet18 --projector 32 16 --window 128 --image-size 64 --batch-size 4 --workers 0 --log-every 1"
)
FINETUNE = "--window 128 --fpn-channels 32 --batch-size 2 --workers 0 --log-every 1"
ENVIRONMENT = {"LINEWORK_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


def submit(sheets: Path, run_dir: Path, *flags: str) -> list[str]:
    """The command that submits a whole small chain."""
    data = ["--unlabeled", sheets / "unlabeled", "--data-dir", sheets, "--run-dir", run_dir]
    stages = [
        f"--pretrain={PRETRAIN} --steps 3 --device cpu",
        f"--finetune={FINETUNE} --steps 2 --device cpu",
    ]
    stages += ["--evaluate=--device cpu"]  # torch sees none of the GPUs that this Slurm declares
    command = [sys.executable, ROOT / "slurm" / "pipeline.py", "submit", *data, *stages, *flags]
    return [str(word) for word in command]


def pretrain(slurm: Cluster, sheets: Path, exp_dir: Path, log: Path, *sbatch: str, flags: str = "") -> str:
    """Submits one pretraining; returns its job id."""
    words = ["--data-dir", sheets / "unlabeled", "--exp-dir", exp_dir, *shlex.split(f"{PRETRAIN} {flags}")]
    return slurm.sbatch(
        *sbatch,
        "-c2",
        "-o",
        log,
        ROOT / "slurm" / "pretrain.slurm",
        "simclr",
        *words,
        cwd=ROOT,
        env=ENVIRONMENT,
    )


def check_results(run_dir: Path) -> None:
    """What a chain of 3 and 2 steps leaves."""
    assert steps(run_dir / "pretrain") == [0, 1, 2]
    assert steps(run_dir / "finetune") == [0, 1]
    for stage, product in (("pretrain", "backbone.safetensors"), ("finetune", "model.pt")):
        assert product in json.loads((run_dir / stage / "final.json").read_text())["files"]
    coco = json.loads((run_dir / "evaluate" / "metrics.json").read_text())["coco"]
    assert 0 <= coco["AP"] <= coco["AP50"] <= 1


@pytest.fixture(scope="module")
def chain(site, sheets, tmp_path_factory) -> Path:
    """The run-dir of a chain that went over both nodes."""
    run_dir = tmp_path_factory.mktemp("chain") / "run"
    shape = "--nodes 2 --ntasks-per-node 1 --gpus-per-node 2 -c2"
    site.run(*submit(sheets, run_dir, "--method=simclr", "--sbatch", shape), env=ENVIRONMENT)
    jobs = json.loads((run_dir / "pipeline.json").read_text())["jobs"]
    logs = "".join(path.read_text() for path in (run_dir / "logs").iterdir())
    assert site.wait(jobs["evaluate"], timeout=180) == "COMPLETED", logs
    return run_dir


def test_chain_runs_over_both_nodes(chain, slurm):
    check_results(chain)
    log = next((chain / "logs").glob("pretrain-*")).read_text()
    assert "batch 4 = 2 x 2" in log
    said = slurm.run(sys.executable, ROOT / "slurm" / "pipeline.py", "status", "--run-dir", chain)
    assert [line.split()[2:4] for line in said.splitlines()[1:]] == [
        ["finished", "3"],
        ["finished", "2"],
        ["finished", "-"],
    ]
    assert "loss" in said and "AP" in said


def test_a_gpu_that_torch_does_not_see_is_a_fault_of_the_node(chain, slurm, sheets, tmp_path):
    """Without --device cpu, for the stage of one process as for the others; no node is left to go on at."""
    log, model = tmp_path / "log", chain / "finetune" / "model.pt"
    words = ["--checkpoint", model, "--data-dir", sheets, "--out", tmp_path]
    script = [ROOT / "slurm" / "evaluate.slurm", *words]
    job = slurm.sbatch("-N2", "--gpus-per-node=2", "-o", log, *script, cwd=ROOT, env=ENVIRONMENT)
    assert slurm.wait(job) == "FAILED", log.read_text()
    assert slurm.show(job)["ExitCode"] == "70:0"
    (said,) = errors(log)
    assert "error: GPU fault on node1: 2 GPUs granted but torch" in said and "sees none" in said


def test_finished_stage_says_so_and_exits_0(chain, slurm, sheets, tmp_path):
    """The same command again, on one node; nothing is written anew."""
    before = (chain / "pretrain" / "final.json").read_bytes()
    job = pretrain(slurm, sheets, chain / "pretrain", tmp_path / "log", flags="--steps 3")
    assert slurm.wait(job) == "COMPLETED"
    assert "finished at step 3, nothing to do" in (tmp_path / "log").read_text()
    assert (chain / "pretrain" / "final.json").read_bytes() == before


def test_the_same_files_run_by_bash_on_eight_images(sheets, tmp_path):
    command = submit(sheets, tmp_path / "run", "--method=vicreg", "--local")
    environment = clean_environment() | ENVIRONMENT
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    check_results(tmp_path / "run")


def test_owned_exp_dir_then_requeue_then_cancel(slurm, sheets, tmp_path):
    """A running job keeps a second one out; USR2 requeues it under its id; scancel ends it, saved."""
    exp_dir, log = tmp_path / "exp", tmp_path / "log"
    job = pretrain(slurm, sheets, exp_dir, log, "-N1", flags="--steps 100000")
    slurm.wait_for(lambda: len(steps(exp_dir)) > 3, what=log.read_text)

    second = pretrain(slurm, sheets, exp_dir, tmp_path / "second", "-N1", flags="--steps 100000")
    assert slurm.wait(second) == "FAILED"
    (refusal,) = errors(tmp_path / "second")
    assert f"{exp_dir}: in use by job {job}" in refusal

    slurm.run("scancel", "--signal=USR2", job)
    slurm.wait(job, "PENDING")
    saved = max(int(path.stem.removeprefix("step_")) for path in (exp_dir / "checkpoints").glob("step_*.pt"))
    assert steps(exp_dir) == list(range(saved))
    slurm.wait(job, "RUNNING")
    slurm.wait_for(lambda: len(steps(exp_dir)) > saved + 2, what=log.read_text)
    assert (slurm.show(job)["Restarts"], steps(exp_dir)[: saved + 2]) == ("1", list(range(saved + 2)))
    assert f"from {exp_dir}/checkpoints/step_{saved:08d}.pt" in log.read_text()

    slurm.run("scancel", job)
    assert slurm.wait(job) == "CANCELLED"
    slurm.wait_for(slurm.idle)
    assert (exp_dir / "checkpoints" / f"step_{len(steps(exp_dir)):08d}.pt").exists()


def test_bad_shapes_are_one_line_before_any_training(slurm, sheets, tmp_path):
    """Tasks that don't match the GPUs, a batch that the ranks don't divide."""
    logs = {name: tmp_path / name for name in ("tasks", "batch")}
    tasks = pretrain(
        slurm, sheets, tmp_path / "exp-tasks", logs["tasks"], "--gpus-per-node=2", flags="--steps 3"
    )
    batch = pretrain(
        slurm, sheets, tmp_path / "exp-batch", logs["batch"], "-N2", flags="--steps 3 --batch-size 5"
    )
    assert (slurm.wait(tasks), slurm.wait(batch)) == ("FAILED", "FAILED")
    assert [slurm.show(job)["ExitCode"] for job in (tasks, batch)] == ["1:0", "1:0"]
    (said,) = errors(logs["tasks"])
    assert "1 tasks but 2 GPUs on" in said and "--ntasks-per-node=2" in said
    (said,) = errors(logs["batch"])
    assert said == "error: --batch-size 5 is not divisible by 2 ranks; give 4 or 6"
    assert not steps(tmp_path / "exp-tasks") and not steps(tmp_path / "exp-batch")
