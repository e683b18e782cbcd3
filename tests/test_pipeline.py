"""slurm/pipeline.py: what is submitted, from which code, what status says, how a chain goes on.

On the real Slurm, with a small program in the place of Python (see slurm_jobs.py) that does what the
stages leave behind. test_slurm_chain.py runs the stages themselves.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import stages
from slurm_cluster import Cluster, clean_environment
from slurm_jobs import program

from cluster import entry, snapshot
from cluster.errors import UserError
from detection.config import FinetuneConfig

ROOT = Path(__file__).parent.parent
STAGE = """\
import json, os, pathlib, sys
import cluster
from cluster import checkpoint
def value(flag):
    return pathlib.Path(sys.argv[sys.argv.index(flag) + 1])
names = {"detection.finetune": "finetune", "detection.pretrain": "pretrain-detector"}
name = "evaluate" if sys.argv[1] != "-m" else names.get(sys.argv[2], "pretrain")
out = value("--out" if name == "evaluate" else "--exp-dir")
if "--fail" in sys.argv and not pathlib.Path("../mended").exists():
    sys.exit("error: the pool is empty: give --data-dir a folder with drawings")
print(name, getattr(cluster, "EDITED", "as submitted"), os.environ.get("SLURM_NTASKS_PER_NODE"), flush=True)
out.mkdir(parents=True, exist_ok=True)
if name == "evaluate":
    (out / "metrics.json").write_text(json.dumps({"coco": {"AP": 0.5, "AP50": 0.75}}))
else:
    products = {"pretrain": "backbone.safetensors", "pretrain-detector": "pretrained.safetensors"}
    product = products.get(name, "model.pt")
    assert name == "pretrain" or value("--backbone").exists()
    (out / product).write_text("weights")
    lines = ['{"step": 0, "loss": 2.5, "valid_AP": 0.1}', '{"step": 9, "loss": 1.5}', '{"st']
    (out / "metrics.jsonl").write_text("\\n".join(lines))
    checkpoint.sign_final(out, 10, [product])
"""


@pytest.fixture
def work(tmp_path) -> Path:
    """A folder with a pool, labelled sheets and the program that takes Python's place."""
    for name in ("pool", "sheets"):
        (tmp_path / name).mkdir()
    program(tmp_path, STAGE)
    return tmp_path


def pipeline(
    work: Path, *arguments: object, slurm: Cluster | None = None, home: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Runs `pipeline.py` on the run-dir work/run, on Slurm's login node or on a machine without Slurm."""
    action, *rest = arguments
    data = ["--unlabeled", work / "pool", "--data-dir", work / "sheets"] if action == "submit" else []
    command = [
        sys.executable,
        home / "slurm" / "pipeline.py",
        action,
        "--run-dir",
        work / "run",
        *data,
        *rest,  # of two --run-dir the last counts
    ]
    environment = {"LINEWORK_PYTHON": str(work / "program")}
    if slurm:
        return slurm.call(*command, env=environment)
    elsewhere = clean_environment() | environment | {"PATH": str(no_slurm(work))}
    return subprocess.run([str(word) for word in command], env=elsewhere, capture_output=True, text=True)


def no_slurm(work: Path) -> Path:
    """A folder of programs without Slurm's."""
    folder = work / "bin"
    if not folder.exists():
        folder.mkdir()
        for name in ("bash", "env", "dirname", "sed", "git"):
            (folder / name).symlink_to(str(shutil.which(name)))
    return folder


def jobs(work: Path) -> dict[str, str]:
    return json.loads((work / "run" / "pipeline.json").read_text())["jobs"]


def told(work: Path, slurm: Cluster | None = None) -> dict[str, dict]:
    """`status --json`, by stage."""
    done = pipeline(work, "status", "--json", slurm=slurm)
    assert done.returncode == 0, done.stderr
    return {line["stage"]: line for line in json.loads(done.stdout)["stages"]}


def one_line_of_error(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["submit", "--steps", "3"], 2, "--steps"),
        (["submit", "--method", "byol"], 2, "'byol'"),
        (["submit", "--unlabeled", "/nowhere"], 1, "--unlabeled /nowhere: no such folder"),
        (["submit", "--local", "--pretrain", "--note 'a"], 1, "No closing quotation"),
        (["submit"], 1, "--local runs the chain here"),
        (["doctor", "--nodes", "all"], 1, "sinfo not found"),
        (["status"], 1, "no chain was submitted"),
        (["cancel"], 1, "no chain was submitted"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(arguments, code, expected, work):
    if arguments[1:2] == ["--unlabeled"]:
        arguments = [*arguments, "--local"]
    assert expected in one_line_of_error(pipeline(work, *arguments), code)
    assert not (work / "run").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "cannot be read"),
        ('packages = ["one", two]', "cannot be read"),
        ('[tool.setuptools]\nname = "one"', "has no list of packages"),
        ("packages = []", "has no list of packages"),
        ('packages = ["one", "three"]', "lists the package three, which has no folder"),
    ],
)
def test_a_list_of_packages_that_is_no_list_is_one_line(text, expected, tmp_path):
    (tmp_path / "one").mkdir()
    path = tmp_path / "pyproject.toml"
    if text:
        path.write_text(text)
    with pytest.raises(UserError, match=expected) as refusal:
        snapshot.packages(tmp_path)
    assert str(refusal.value).startswith(f"{path}: ") and "\n" not in str(refusal.value)


def test_the_list_of_packages_may_be_written_in_any_way(tmp_path):
    (tmp_path / "one" / "inner").mkdir(parents=True)
    for text in (
        "packages=['one', 'one.inner']",
        '  [t]\npackages = [\n  "one", # first\n  "one.inner",\n]\nx = []',
    ):
        (tmp_path / "pyproject.toml").write_text(text)
        assert snapshot.packages(tmp_path) == ["one", "one.inner"]


def test_pipeline_runs_without_any_package(work):
    """Also on a login node whose Python has none; here -S leaves them out."""
    data = ["--unlabeled", work / "pool", "--data-dir", work / "sheets", "--run-dir", work / "run"]
    command = [sys.executable, "-S", ROOT / "slurm" / "pipeline.py", "submit", *data, "--dry-run"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout.count("sbatch --parsable")) == (0, "", 3)


def test_few_labels_is_a_recipe_over_which_flags_win(work):
    """What is printed with it is what the same flags give without it, and it is recorded as these."""

    def finetuning(*flags):
        done = pipeline(work, "submit", "--dry-run", "--local", *flags)
        assert done.returncode == 0, done.stderr
        (line,) = [line for line in done.stdout.splitlines() if "finetune.slurm" in line]
        return line

    assert finetuning("--few-labels") == finetuning("--finetune", "--paste 4")
    assert finetuning("--few-labels", "--finetune", "--paste 0").endswith("--paste 4 --paste 0")
    words = shlex.split(finetuning("--few-labels", "--finetune", "--paste 0"))
    flags = words[words.index("--data-dir") :]
    assert entry.parse(FinetuneConfig, flags).paste == 0


def test_the_detector_is_pretrained_between_where_that_is_asked_for(work):
    """With empty flags too; what it leaves is what finetuning begins with."""
    lines = {}
    for flags in ([], ["--pretrain-detector", ""], ["--pretrain-detector", "--steps 3 --fpn-channels 128"]):
        done = pipeline(work, "submit", "--dry-run", "--local", *flags)
        assert done.returncode == 0, done.stderr
        scripts = [line.split("/code/slurm/")[1] for line in done.stdout.splitlines() if "bash" in line]
        lines[" ".join(flags)] = dict(line.split(".slurm ", 1) for line in scripts)
    without, plain, flagged = lines.values()
    assert list(without) == ["pretrain", "finetune", "evaluate"]
    assert list(plain) == list(flagged) == ["pretrain", "pretrain-detector", "finetune", "evaluate"]
    run = work / "run"
    begins = f"--unlabeled {work / 'pool'} --backbone {run}/pretrain/backbone.safetensors"
    assert plain["pretrain-detector"] == f"{begins} --exp-dir {run}/pretrain-detector"
    assert flagged["pretrain-detector"].endswith(" --steps 3 --fpn-channels 128")
    assert f"--backbone {run}/pretrain/backbone.safetensors" in without["finetune"]
    assert f"--backbone {run}/pretrain-detector/pretrained.safetensors" in plain["finetune"]


def test_a_chain_keeps_the_stages_that_it_has(work):
    assert pipeline(work, "submit", "--local", "--pretrain-detector", "--steps 3").returncode == 0
    assert [line["finished"] for line in told(work).values()] == [True] * 4
    error = one_line_of_error(pipeline(work, "submit", "--local"))
    assert 'was submitted with other stages; give --pretrain-detector "--steps 3"' in error


def test_dry_run_is_what_submit_submits(slurm, work):
    """The printed script, run by bash, leaves the same jobs as `submit` does."""
    flags = ["--pretrain=--steps 3 --note 'it is * 100 %'", "--sbatch", "--hold", "--sbatch-finetune", "-N2"]
    printed = pipeline(work, "submit", *flags, "--dry-run", slurm=slurm)
    assert printed.returncode == 0, printed.stderr
    assert not (work / "run").exists()

    def queue() -> list[str]:
        """Command, folder, name, nodes and dependency of each job, without its id."""
        lines = slurm.run("squeue", "-hSi", "-o", "%i|%o|%Z|%j|%D|%E").splitlines()
        ids = [line.split("|")[0] for line in lines]
        parts = [line.split("|", 1)[1] for line in lines]
        return [part.replace(f"afterok:{ids[n - 1]}", "afterok:BEFORE") for n, part in enumerate(parts)]

    assert pipeline(work, "submit", *flags, slurm=slurm).returncode == 0
    submitted = queue()
    slurm.settle()
    slurm.run("bash", "-c", printed.stdout)
    assert queue() == submitted
    assert len(submitted) == 3 and "afterok:BEFORE" in submitted[2]


def test_local_chain_stops_at_the_first_failure_and_goes_on_there(work):
    flags = ["--local", "--finetune", "--fail"]
    stopped = pipeline(work, "submit", *flags)
    assert "error: finetune ended with exit code 1" in stopped.stderr
    assert [(line["finished"], line["state"]) for line in told(work).values()] == [
        (True, "UNKNOWN"),
        (False, "UNKNOWN"),
        (False, "UNKNOWN"),
    ]
    (work / "run" / "mended").touch()
    assert pipeline(work, "submit", *flags).returncode == 0
    assert all(line["finished"] for line in told(work).values())
    again = pipeline(work, "submit", *flags)
    assert (again.returncode, again.stdout) == (
        0,
        "pretrain: finished\nfinetune: finished\nevaluate: finished\n",
    )


def test_a_finished_stage_is_not_skipped_with_other_flags(work):
    assert pipeline(work, "submit", "--local", "--finetune", "--epochs 2").returncode == 0
    error = one_line_of_error(pipeline(work, "submit", "--local", "--finetune", "--epochs 4"))
    assert '--finetune "--epochs 4": finetune is finished, made with "--epochs 2"' in error
    again = pipeline(work, "submit", "--local", "--finetune", "--epochs 2", "--evaluate", "--split test")
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("pretrain: finished\nfinetune: finished\nevaluate: bash ")
    assert "--split test" in again.stdout


def test_an_evaluation_that_fails_leaves_no_older_figures(work):
    assert pipeline(work, "submit", "--local").returncode == 0
    failing = ("submit", "--local", "--evaluate", "--fail")
    for _ in range(2):
        assert "error: evaluate ended with exit code 1" in pipeline(work, *failing).stderr
    assert not told(work)["evaluate"]["finished"]


def test_a_chain_goes_on_in_a_folder_that_was_moved(work):
    assert pipeline(work, "submit", "--local").returncode == 0
    (work / "run").rename(work / "moved")
    (work / "run").symlink_to(work / "moved")
    done = pipeline(work, "submit", "--local")
    assert (done.returncode, done.stdout.count("finished")) == (0, 3), done.stderr


def test_chain_waits_in_order_and_status_shows_its_figures(slurm, work):
    done = pipeline(work, "submit", "--method", "simclr", slurm=slurm)
    assert done.returncode == 0, done.stderr
    assert slurm.wait(jobs(work)["evaluate"]) == "COMPLETED"
    lines = told(work, slurm)
    assert [line["state"] for line in lines.values()] == ["COMPLETED"] * 3
    assert all(line["finished"] for line in lines.values())
    assert (lines["pretrain"]["step"], lines["pretrain"]["figures"]) == (10, {"loss": 1.5, "valid_AP": 0.1})
    assert lines["evaluate"]["figures"] == {"AP": 0.5, "AP50": 0.75}
    without_slurm = told(work)
    assert [line["finished"] for line in without_slurm.values()] == [True] * 3
    record = json.loads((work / "run" / "pipeline.json").read_text())
    assert (record["method"], len(record["commit"].removesuffix("+changes"))) == ("simclr", 40)


def test_a_chain_of_four_runs_on_slurm(slurm, work):
    done = pipeline(work, "submit", "--pretrain-detector", "", slurm=slurm)
    assert done.returncode == 0, done.stderr
    assert slurm.wait(jobs(work)["evaluate"]) == "COMPLETED"
    lines = told(work, slurm)
    assert list(lines) == ["pretrain", "pretrain-detector", "finetune", "evaluate"]
    assert all(line["finished"] and line["state"] == "COMPLETED" for line in lines.values())


def test_damaged_result_of_a_finished_stage_is_told(work):
    assert pipeline(work, "submit", "--local").returncode == 0
    (work / "run" / "pretrain" / "backbone.safetensors").write_text("other weights")
    assert "changed since" in one_line_of_error(pipeline(work, "submit", "--local"))
    assert "changed since" in told(work)["pretrain"]["error"]


def test_failed_parent_is_explained_with_commands_that_clear_it(slurm, work):
    """Without --kill-on-invalid-dep the children wait for ever; `status` says so, and the way out."""
    submit = ["--pretrain", "--fail", "--sbatch", "--kill-on-invalid-dep=no"]
    assert pipeline(work, "submit", *submit, slurm=slurm).returncode == 0
    assert slurm.wait(jobs(work)["pretrain"]) == "FAILED"
    slurm.wait_for(lambda: slurm.show(jobs(work)["finetune"])["Reason"] == "DependencyNeverSatisfied")
    said = pipeline(work, "status", slurm=slurm).stdout
    assert f"pretrain: job {jobs(work)['pretrain']} FAILED; error: the pool is empty: give --data-dir" in said
    assert f"finetune: job {jobs(work)['finetune']} waits for ever, as pretrain did not succeed" in said
    refusal = one_line_of_error(pipeline(work, "submit", *submit, slurm=slurm))
    assert f"finetune (job {jobs(work)['finetune']} PENDING)" in refusal

    commands = dict(line.split(" with:  ") for line in said.splitlines() if " with:  " in line)
    clear, go_on = (
        commands[name].replace("python ", f"{shlex.quote(sys.executable)} ", 1)
        for name in ("clear it", "go on")
    )
    slurm.run("bash", "-c", clear)
    assert slurm.wait(jobs(work)["evaluate"]) == "CANCELLED"
    (work / "run" / "mended").touch()
    slurm.run("bash", "-c", go_on, env={"LINEWORK_PYTHON": str(work / "program")})
    assert slurm.wait(jobs(work)["evaluate"]) == "COMPLETED"
    assert "go on" not in pipeline(work, "status", slurm=slurm).stdout


def test_children_of_a_failed_parent_are_cancelled(slurm, work):
    assert pipeline(work, "submit", "--pretrain", "--fail", slurm=slurm).returncode == 0
    assert slurm.wait(jobs(work)["evaluate"]) == "CANCELLED"
    said = pipeline(work, "status", slurm=slurm).stdout
    assert f"finetune: job {jobs(work)['finetune']} was cancelled, as pretrain did not succeed" in said
    assert "clear it" not in said


def test_refused_job_takes_the_chain_back(slurm, work):
    done = pipeline(work, "submit", "--sbatch-evaluate", "--partition nowhere", slurm=slurm)
    assert "sbatch refused evaluate" in done.stderr and "nvalid partition" in done.stderr
    assert done.stderr.count("\n") == 1 and done.returncode == 1
    assert slurm.run("squeue", "-h") == ""


def test_cancel_ends_the_chain_and_no_stranger(slurm, work):
    stranger = slurm.sbatch("--hold", "--wrap", "true")
    assert pipeline(work, "submit", "--sbatch", "--hold", slurm=slurm).returncode == 0
    record = json.loads((work / "run" / "pipeline.json").read_text())
    recorded = record["jobs"] | {"pretrain": stranger}  # its number was given to another job since
    (work / "run" / "pipeline.json").write_text(json.dumps(record | {"jobs": recorded}))
    assert told(work, slurm)["pretrain"]["state"] == "FORGOTTEN"
    assert pipeline(work, "cancel", slurm=slurm).returncode == 0
    assert {slurm.state(recorded[name]) for name in ("finetune", "evaluate")} == {"CANCELLED"}
    assert slurm.state(stranger) == "PENDING"


def test_source_edited_while_queued_does_not_reach_the_job(slurm, work):
    home = work / "home"
    for name in (*snapshot.packages(), *snapshot.SCRIPTS):
        if "." not in name:
            shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", home)
    done = pipeline(work, "submit", "--sbatch", "--hold", slurm=slurm, home=home)
    assert done.returncode == 0, done.stderr
    (home / "cluster" / "__init__.py").write_text("EDITED = 'edited while queued'\n")
    (home / "slurm" / "launch.sh").write_text("exit 1\n")
    slurm.run("scontrol", "release", *jobs(work).values())
    assert slurm.wait(jobs(work)["evaluate"]) == "COMPLETED"
    log = work / "run" / "logs" / f"finetune-{jobs(work)['finetune']}.log"
    assert log.read_text().startswith("finetune as submitted")


def test_submission_from_inside_a_job_inherits_nothing_of_it(slurm, work):
    data = ["--unlabeled", work / "pool", "--data-dir", work / "sheets", "--run-dir", work / "run"]
    command = [sys.executable, ROOT / "slurm" / "pipeline.py", "submit", *data]
    script = work / "outer"
    script.write_text(f"#!/bin/bash\nsrun --ntasks=1 --nodes=1 {shlex.join(map(str, command))}\n")
    shape = ["-N2", "--ntasks-per-node=2", "--cpus-per-task=2"]
    environment = {"LINEWORK_PYTHON": str(work / "program")}
    outer = slurm.sbatch(*shape, "-o", work / "outer.log", script, env=environment)
    assert slurm.wait(outer) == "COMPLETED", (work / "outer.log").read_text()
    assert slurm.wait(jobs(work)["evaluate"]) == "COMPLETED"
    log = work / "run" / "logs" / f"finetune-{jobs(work)['finetune']}.log"
    assert log.read_text() == "finetune as submitted None\n"


def test_doctor_checks_nodes_alone_and_together(slurm, tmp_path):
    command = [sys.executable, ROOT / "slurm" / "pipeline.py", "doctor", "--nodes", "node[1-2]", "--json"]
    out = slurm.run(*command, "--run-dir", tmp_path, env={"LINEWORK_PYTHON": sys.executable})
    reports = [json.loads(line) for line in out.splitlines()]
    assert [report["node"] for report in reports] == ["node1", "node2"]
    assert all("over 2 ranks on cpu" in report["all_reduce"] and not report["problems"] for report in reports)
    assert all(
        report["write_mb_s"] > 0 and {"torch", "torchvision"} <= set(report["versions"]) for report in reports
    )


def test_doctor_names_unfit_nodes_for_exclude(slurm, tmp_path):
    slurm.run("scontrol", "update", "nodename=node2", "state=drain", "reason=fan")
    try:
        command = [sys.executable, ROOT / "slurm" / "pipeline.py", "doctor", "--nodes", "all"]
        done = slurm.call(*command, "--run-dir", tmp_path, env={"LINEWORK_PYTHON": sys.executable})
    finally:
        slurm.run("scontrol", "update", "nodename=node2", "state=resume")
    assert done.returncode == 1
    assert done.stderr == "error: 1 of 2 nodes unfit; give sbatch --exclude=node2\n"
    assert "node1: " in done.stdout and "MB/s" in done.stdout
    assert "problem: Slurm says drained (fan)" in done.stdout
    assert os.listdir(tmp_path) == []


def test_damaged_files_of_a_stage_leave_the_other_stages_shown(work):
    assert pipeline(work, "submit", "--local").returncode == 0
    metrics = work / "run" / "evaluate" / "metrics.json"
    for text in ("", "[1]", '{"coco": {"AP": "high"}}', '{"settings": 1}'):
        metrics.write_text(text)
        lines = told(work)
        assert lines["evaluate"]["error"] == f"error: {metrics}: holds no figures; remove it and submit again"
        assert [line["finished"] for line in lines.values()] == [True, True, False]
        assert lines["pretrain"]["figures"] == {"loss": 1.5, "valid_AP": 0.1}
        assert "holds no figures" in pipeline(work, "status").stdout
    final = work / "run" / "pretrain" / "final.json"
    for text in ("", "[]", '{"files": {}}'):
        final.write_text(text)
        lines = told(work)
        assert lines["pretrain"]["error"].startswith(f"error: {final}: unreadable (")
        assert [line["finished"] for line in lines.values()] == [False, True, False]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"jobs": [1, 2]}',
        '{"method": "vicreg", "command": "x", "flags": {}, "jobs": {"a": 1}}',
    ],
)
def test_a_record_of_another_shape_is_one_line(text, work):
    (work / "run").mkdir()
    (work / "run" / "pipeline.json").write_text(text)
    for words in (["status"], ["cancel"], ["submit", "--local"]):
        assert f"{work}/run/pipeline.json: unreadable (" in one_line_of_error(pipeline(work, *words))


def test_a_run_dir_that_is_a_file_is_one_line(work):
    (work / "run").write_text("")
    for words in (["status"], ["submit", "--local"]):
        assert f"{work}/run" in one_line_of_error(pipeline(work, *words))


def test_a_second_submit_by_another_name_is_kept_out(slurm, work):
    """At the same time, and afterwards while jobs wait."""
    (work / "run").mkdir()
    (work / "other").symlink_to(work / "run")
    with stages.locked(work / "run"):
        for name in ("run", "other"):
            error = one_line_of_error(pipeline(work, "submit", "--run-dir", work / name, slurm=slurm))
            assert f"{work}/run: another submit is at work there" in error
    assert pipeline(work, "submit", "--sbatch", "--hold", slurm=slurm).returncode == 0
    again = pipeline(work, "submit", "--run-dir", work / "other", slurm=slurm)
    assert f"{work}/run has jobs alive" in one_line_of_error(again)
    relative = Path(os.path.relpath(work / "other"))
    assert "has jobs alive" in one_line_of_error(pipeline(work, "submit", "--run-dir", relative, slurm=slurm))
    assert slurm.run("squeue", "-h").count("\n") == 3


def test_two_submits_in_the_same_second_leave_one_chain(slurm, work):
    data = ["--unlabeled", work / "pool", "--data-dir", work / "sheets", "--run-dir", work / "run"]
    command = [sys.executable, ROOT / "slurm" / "pipeline.py", "submit", *data, "--sbatch", "--hold"]
    environment = slurm.env | {"LINEWORK_PYTHON": str(work / "program")}
    both = [
        subprocess.Popen(slurm.command(*command), env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], said
    assert slurm.run("squeue", "-h").count("\n") == 3


@pytest.mark.parametrize(
    ("flags", "warned"),
    [
        ("--time 2", True),
        ("-t1:30", True),
        ("--time=3", False),
        ("--time=3 --signal=USR2@300", True),
        ("--time=0:90 --signal=USR2@60", False),
        ("--time=1-0", False),
        ("", False),
    ],
)
def test_a_time_shorter_than_the_lead_of_the_signal_is_said(flags, warned, capsys):
    stages.warn_of_short_time(stages.Stage("pretrain", Path(), [], shlex.split(flags)))
    assert ("warning: pretrain: a --time of" in capsys.readouterr().err) == warned


def test_a_python_of_the_stages_without_torch_is_refused_at_submission(work, monkeypatch):
    bare = work / "python3"
    bare.write_text(f'#!/bin/bash\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setenv("LINEWORK_PYTHON", str(bare))
    with pytest.raises(UserError, match="python3 has no torch: name a Python that has it in LINEWORK_PYTHON"):
        stages.refuse_without_torch()


def test_missing_flags_of_submit_are_told_with_a_command_that_works():
    done = subprocess.run(
        [sys.executable, "slurm/pipeline.py", "submit"], cwd=ROOT, capture_output=True, text=True
    )
    error = one_line_of_error(done, 2)
    assert "python pipeline.py submit --run-dir RUN --unlabeled SHEETS --data-dir DATA" in error
