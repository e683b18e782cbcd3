"""A method is two files and a name in a list: Barlow Twins by README's recipe, from drawings to COCO figures.

It is added to a copy of the tree, where the snapshot, the scripts and the import law must find it.
"""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from slurm_cluster import clean_environment

from cluster.backbone import read_backbone

ROOT = Path(__file__).parent.parent
LOSS = '''\
"""The loss of Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def barlow_twins(z1: Tensor, z2: Tensor, redundancy: float = 0.005) -> tuple[Tensor, dict[str, Tensor]]:
    """Equation (1) of the paper: z1, z2 [N, D] -> the loss [] in float32, and its two terms."""
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = (F.batch_norm(z.float(), None, None, training=True) for z in (z1, z2))
        correlation = z1.T @ z2 / len(z1)  # [D, D], equation (2)
        invariance = (1 - correlation.diagonal()).square().sum()
        overlap = correlation.square().sum() - correlation.diagonal().square().sum()
        loss = invariance + redundancy * overlap
    return loss, {"invariance": invariance.detach(), "redundancy": overlap.detach()}
'''
PRETRAIN = '''\
"""Pretrain a backbone on unlabelled drawings by Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230)."""

from dataclasses import dataclass
from functools import partial

from barlow.loss import barlow_twins
from cluster.config import setting
from cluster.entry import run
from pretraining.config import PretrainConfig
from pretraining.stage import Method, pretrain


@dataclass(frozen=True, kw_only=True)
class BarlowConfig(PretrainConfig):
    # Widths of the projector's layers.
    projector: tuple[int, ...] = setting((8192, 8192, 8192), least=1)
    # Weight of the redundancy term, lambda of the paper.
    redundancy: float = setting(0.005, least=0)


def base_lr(batch_size: int, epochs: float) -> float:
    return 0.2


def main(config: BarlowConfig) -> None:
    loss = partial(barlow_twins, redundancy=config.redundancy)
    pretrain(config, Method(name="barlow", loss=loss, joint=False, last_norm=False, base_lr=base_lr))


if __name__ == "__main__":
    run(BarlowConfig, main)
'''
PRETRAIN_FLAGS = (
    "--arch test_resnet --projector 32 16 --window 128 --image-size 64 --batch-size 4 --workers 0"
)
FINETUNE_FLAGS = "--window 128 --fpn-channels 32 --batch-size 2 --workers 0"


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of this tree: the files that git knows of, or would take up."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    answer = subprocess.run(listed, check=True, capture_output=True, text=True)
    for name in filter(None, answer.stdout.split("\0")):
        if (ROOT / name).is_file():  # and was not removed since
            copy = tmp_path / "tree" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((ROOT / name).read_bytes())
    return tmp_path / "tree"


def add(tree: Path, method: str, loss: str, pretrain: str) -> None:
    """The three places that README's recipe names."""
    (tree / method).mkdir()
    (tree / method / "loss.py").write_text(loss)
    (tree / method / "pretrain.py").write_text(pretrain)
    listed = (tree / "pyproject.toml").read_text()
    assert listed.count('    "vicreg",\n') == 1
    listed = listed.replace('    "vicreg",\n', f'    "vicreg",\n    "{method}",\n')
    (tree / "pyproject.toml").write_text(listed)


def call(tree: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """Runs a command in the copy of the tree, and with its code only."""
    environment = clean_environment() | {"LINEWORK_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    argv = [str(word) for word in command]
    return subprocess.run(argv, cwd=tree, env=environment, capture_output=True, text=True)


def test_two_files_and_a_name_in_the_list_make_a_method(tree, sheets, tmp_path):
    add(tree, "barlow", LOSS, PRETRAIN)
    run = tmp_path / "run"
    data = ["--run-dir", run, "--unlabeled", sheets / "unlabeled", "--data-dir", sheets]
    flags = [f"--pretrain={PRETRAIN_FLAGS} --steps 2", f"--finetune={FINETUNE_FLAGS} --steps 2"]
    done = call(
        tree, sys.executable, "slurm/pipeline.py", "submit", "--local", "--method", "barlow", *data, *flags
    )
    assert done.returncode == 0, done.stdout + done.stderr
    coco = json.loads((run / "evaluate" / "metrics.json").read_text())["coco"]
    assert 0 <= coco["AP"] <= coco["AP50"] <= 1
    _, meta = read_backbone(run / "pretrain" / "backbone.safetensors")
    assert (meta["method"], meta["arch"]) == ("barlow", "test_resnet")
    first = json.loads((run / "pretrain" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"loss", "invariance", "redundancy"} <= set(first)
    config = json.loads((run / "pretrain" / "config.json").read_text())
    assert config["redundancy"] == 0.005


def test_scripts_and_the_import_law_know_an_added_method(tree):
    add(tree, "barlow", LOSS, PRETRAIN)
    unknown = call(tree, "bash", "slurm/pretrain.slurm", "byol")
    assert unknown.stderr == "error: unknown method 'byol': give barlow, simclr or vicreg\n"
    arrows = "tests/test_import_law.py::test_package_imports_only_what_the_house_allows[barlow]"
    law = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", arrows]
    assert "1 passed" in call(tree, *law).stdout
    with open(tree / "barlow" / "loss.py", "a") as file:
        file.write("import vicreg.loss\n")
    assert "barlow/loss.py imports ['vicreg']" in call(tree, *law).stdout


def test_the_program_in_readmes_recipe_is_an_entry(tree):
    """Word for word: its flags and their help are those that it writes."""
    section = (ROOT / "README.md").read_text().partition("## Adding a method\n")[2].partition("\n## ")[0]
    (program,) = re.findall(r"(?:^(?: {4}.*)?\n)*^ {4}.*\n", section, re.MULTILINE)
    loss = "def my_loss(z1, z2, weight): return weight * (z1 - z2).square().mean(), {}\n"
    add(tree, "mymethod", loss, textwrap.dedent(program))
    done = call(tree, sys.executable, "-m", "mymethod.pretrain", "--help")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.replace("│", " ").split())
    assert "--weight FLOAT Weight of the second term" in said
