"""Every command of README.md and docs/ runs as it is written, from top to bottom of a page in one folder.

The words are those of the page; flags that make a training short are added behind them, and the libraries are
loaded once for all commands of python. What a page speaks of and leaves to its reader (DATA, SHEETS, POOL, an
earlier run, ...) lies there under its name.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import Ranks, python

from cluster.backbone import build_backbone
from schematics.labelling import Box, Labelled, lay_out
from schematics.sheets import find_sheets, sheet_size

ROOT = Path(__file__).parent.parent
RECORDS = {"results.md", "log.md"}  # what was run, at the commits that they name
PAGES = [ROOT / "README.md", *(page for page in sorted(ROOT.glob("docs/*.md")) if page.name not in RECORDS)]
COMMAND = re.compile(r"    (?:\$ )?(?P<words>(?:python|make|sbatch|bash|cp|pip|\.venv/bin/\w+) .*)")

# Commands that other tests run, and those that need what no test may have.
ELSEWHERE = {
    "make demo": "the stages are those of the pages",
    "make gpu": "test_gpu_acceptance.py",
    "make test": "this is part of it",
    "python slurm/sweep.py": "test_sweep.py",
    "python slurm/pipeline.py status": "test_pipeline.py, after the chain that is only printed here",
    "python tests/tools/round_trip.py": "an environment of its own, of a gigabyte",
    "python benchmarks/": "minutes on the data that they name",
    "python -m detection.doubt --folds": "test_doubt_command.py: trains detectors",
    "python -m detection.export": "test_export.py, with a detector that has learnt: else scores tie",
    "python -m detection.predict --checkpoint detector.onnx": "the same",
    "python -m detection.finetune --preset laptop --minutes 15": "test_fitting.py: a quarter of an hour",
    "python -m simclr.pretrain --data-dir SHEETS --compile": "test_compiling.py",
    "python -m pretraining.datasets": "test_small_images.py: needs the data set",
    "python -m simclr.pretrain --data-dir cifar/train": "the same",
    "python evaluate/coverage.py": "test_coverage.py: needs more sheets than lie here",
    "sbatch": "test_slurm_scripts.py and test_slurm_chain.py, on a real Slurm",
    "pip": "needs a package index",
    ".venv/bin/pip": "needs a package index",
}
PRETRAINING = (
    "--arch test_resnet.r160_in1k --steps 2 --batch-size 4 --image-size 32 --window 64 --projector 16 16"
)
INK = "--steps 2 --batch-size 2 --image-size 128 --fpn-channels 16"
FINETUNING = "--steps 2 --batch-size 2 --window 128 --fpn-channels 16"
STUDY = """
folder = "study"
data = "DATA"
[arms.random]
backbone = "none"
finetune = {arch = "test_resnet"}
[arms.pretrained]
backbone = "PRETRAIN/backbone.safetensors"
[[labels]]
share = 0.5
[finetune]
steps = 2
batch-size = 2
window = 128
fpn-channels = 16
workers = 0
device = "cpu"
norm = "group"
"""
SHORT = {  # makes a command short, or fits it to a detector of two steps, where it does not give that flag
    r"simclr.pretrain|vicreg.pretrain|slurm/pretrain.slurm": f"{PRETRAINING} --workers 0 --device cpu",
    r"detection.pretrain": f"{INK} --workers 0 --device cpu",
    r"detection.finetune|slurm/finetune.slurm": f"{FINETUNING} --workers 0 --device cpu",
    r"evaluate/(linear|knn|shots|embedding).py": "--workers 0",
    r"evaluate/shots.py": "--draws 1 --weight-decays 0.001",
    r"evaluate/classify.py": "--epochs 1 --image-size 32 --resamples 20 --workers 0 --device cpu",
    r"slurm/pipeline.py submit": "--dry-run",
    r"detection.predict": "--threshold 0.01",  # after two steps no score may reach the threshold of its class
}


def commands(page: Path) -> list[str]:
    """The commands in the indented blocks of a page, each once, without the comment behind them."""
    lines = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8")).splitlines()
    found = (COMMAND.fullmatch(line) for line in lines)
    return list(dict.fromkeys(re.split(r"\s{2,}#", match["words"])[0].strip() for match in found if match))


def shortened(command: str) -> list[str]:
    """The words of a command, without the brackets of flags that may be left out, and made short."""
    words = shlex.split(re.sub(r"(?<= )\[|\](?= |$)", "", command))
    for programs, flags in SHORT.items():
        if re.search(programs, command):
            for flag in re.findall(r"--\S+(?: [^-]\S*)*", flags):
                words += [] if flag.split()[0] in words else flag.split()
    return words


def fault(command: str, folder: Path) -> str:
    """What the command says if it fails, else ""."""
    words = shortened(command)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {"PATH": path, "LINEWORK_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    if words[0] == "python":
        with Ranks(python, words[1:], folder, logs=folder.parent / "logs", env=env) as ranks:
            (status,), said = ranks.statuses(300), ranks.log()
    else:
        quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        done = subprocess.run(words, cwd=folder, env=os.environ | env, text=True, **quiet)
        status, said = done.returncode, done.stdout
    return "" if status == 0 else f"{shlex.join(words)}: exit status {status}\n{said}"


@pytest.fixture(scope="module")
def desk(sheets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code, labelled sheets, a pool, a pretraining, a detector and its figures, under all names in use.

    ff_devices has a class, as the real one has eleven, of which test has no symbol.
    """
    folder = tmp_path_factory.mktemp("desk")
    for path in (*ROOT.glob("*/__init__.py"), *map(ROOT.joinpath, ("evaluate/_", "slurm/_", "benchmarks/_"))):
        (folder / path.parent.name).symlink_to(path.parent)
    for name in ("DATA", "LABELLED", "ff_devices"):
        shutil.copytree(sheets, folder / name, ignore=shutil.ignore_patterns("unlabeled"))
    annotations = folder / "ff_devices/test/_annotations.coco.json"
    document = json.loads(annotations.read_text())
    gone = document["annotations"][0]["category_id"]
    document["annotations"] = [row for row in document["annotations"] if row["category_id"] != gone]
    annotations.write_text(json.dumps(document))
    shutil.copytree(sheets / "train", folder / "photographed/train")
    for name in ("SHEETS", "POOL", "unlabeled", "SHEETS...", "SHEETS_FOLDERS_OR_PDFS..."):
        shutil.copytree(sheets / "unlabeled", folder / name)
    tensors = {f"module.encoder_q.{k}": v for k, v in build_backbone("test_resnet").state_dict().items()}
    torch.save({"arch": "test_resnet", "state_dict": tensors}, folder / "moco.pth.tar")
    for command in commands(ROOT / "README.md"):
        if re.search("vicreg.pretrain|detection.finetune|evaluate.py", command):
            assert not (said := fault(command, folder)), said
    for name in ("OTHER", "A", "B"):
        shutil.copytree(folder / "results", folder / name)
    shutil.copytree(folder / "checkpoints/vicreg", folder / "PRETRAIN")
    (folder / "STUDY.toml").write_text(STUDY)
    submit(folder / "LABELLED/train", folder / "EXPORTS/1", folder / "EXPORTS/1/export.json")
    submit(folder / "POOL", folder / "corrected", folder / "CORRECTED.json")
    return folder


def submit(sheets: Path, place: Path, export: Path) -> None:
    """Lay sheets out for Label Studio, a box on each, and export them as if it was submitted there."""
    drawn = [
        Labelled(sheet, "train", sheet_size(sheet), [Box("lamp", 9, 9, 30, 30)])
        for sheet in find_sheets(sheets)
    ]
    lay_out(place, ["label-studio"], drawn, {1: "lamp"})
    (place / "label-studio/images").rename(place / "images")
    tasks = json.loads((place / "label-studio/tasks.json").read_text())
    shutil.rmtree(place / "label-studio")
    export.write_text(json.dumps([{**task, "annotations": task["predictions"]} for task in tasks]))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_can_be_followed(page, desk, tmp_path):
    made = ("checkpoints", "results") if page.name == "README.md" else ()
    shutil.copytree(desk, tmp_path / "desk", symlinks=True, ignore=shutil.ignore_patterns(*made))
    for command in commands(page):
        if not command.startswith(tuple(ELSEWHERE)):
            assert not (said := fault(command, tmp_path / "desk")), said
