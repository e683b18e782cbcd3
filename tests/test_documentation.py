"""Every command of README.md and docs/ runs as it is written.

The words of a command are those of the page. What it takes (DATA, SHEETS, POOL, ...) is small here, and flags
that make a training short are added behind it. A page is followed from top to bottom in one folder, as a
reader would.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:\$ )?(?P<words>(?:python|make|sbatch|bash|pip|tensorboard|docker)\b.*)")

# What other tests or the CI run, or what a reader is told of past runs, with the reason.
ELSEWHERE = {
    "make demo": "its four stages, with the same flags but fewer steps, are test_demo",
    "make test": "this is part of it",
    "make chaos": "half an hour of faults; tests/test_chaos.py runs its parts",
    "sbatch": "test_slurm_chain.py and test_slurm_scripts.py submit these files to a real Slurm",
    "pip install": "needs a package index",
}
RECORDS = {"log.md", "results.md"}  # what was run, at the commits that are named there

SMALL_PRETRAINING = {
    "--arch": "test_resnet.r160_in1k",
    "--steps": "2",
    "--batch-size": "4",
    "--image-size": "32",
    "--window": "64",
    "--projector": "16 16",
    "--workers": "0",
    "--device": "cpu",
}
SMALL_FINETUNING = {
    "--steps": "2",
    "--batch-size": "2",
    "--window": "128",
    "--fpn-channels": "16",
    "--workers": "0",
    "--device": "cpu",
}
# What a page speaks of and leaves to its reader, as a copy of what is there by then.
COPIES = {"OTHER": "results", "PRETRAIN": "checkpoints/vicreg"}
SMALL = {
    "simclr.pretrain": SMALL_PRETRAINING,
    "vicreg.pretrain": SMALL_PRETRAINING,
    "slurm/pretrain.slurm": SMALL_PRETRAINING,
    "detection.finetune": SMALL_FINETUNING,
    "slurm/pipeline.py submit": {"--dry-run": ""},
}


def commands(page: Path) -> list[str]:
    """The commands in the indented blocks of a page, a comment behind two spaces left out."""
    lines = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8")).splitlines()
    indented = (re.match(r"    (?=\S)" + COMMAND.pattern, line) for line in lines)
    return [re.split(r"\s{2,}#", found["words"])[0].strip() for found in indented if found]


def shortened(command: str) -> str:
    """The command with those flags of SMALL behind it that it doesn't give itself."""
    for start, flags in SMALL.items():
        if start in command:
            command += "".join(f" {flag} {value}" for flag, value in flags.items() if flag not in command)
    return command


@pytest.fixture(scope="module")
def desk(sheets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the pages presume it: the code, labelled sheets and a pool, under all names in use."""
    folder = tmp_path_factory.mktemp("desk")
    for name in ("evaluate", "slurm", "benchmarks", "tests"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("DATA", "LABELLED", "ff_devices"):
        shutil.copytree(sheets, folder / name)
        shutil.rmtree(folder / name / "unlabeled")
    for name in ("SHEETS", "POOL", "unlabeled"):
        shutil.copytree(sheets / "unlabeled", folder / name)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_can_be_followed(page, desk, tmp_path):
    shutil.copytree(desk, tmp_path / "desk", symlinks=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if page.name in RECORDS:
        return
    for command in commands(page):
        if any(command.startswith(start) for start in ELSEWHERE):
            continue
        words = shlex.split(shortened(command))
        done = subprocess.run(
            words, cwd=tmp_path / "desk", env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, f"{page.name}: {shlex.join(words)}\n{done.stdout}\n{done.stderr}"
