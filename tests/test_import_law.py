"""Who may import whom: the arrows of the house, read from the imports themselves."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"schematics", "cluster", "pretraining", "simclr", "vicreg", "detection", "evaluate", "slurm"}
MAY_IMPORT = {
    "schematics": set(),
    "cluster": set(),
    "pretraining": {"schematics", "cluster"},
    "detection": {"schematics", "cluster"},
    "simclr": {"pretraining", "schematics", "cluster"},
    "vicreg": {"pretraining", "schematics", "cluster"},
    "evaluate": {"detection", "pretraining", "schematics", "cluster"},
    "slurm": {"cluster"},
}


def imports(file: Path) -> set[str]:
    """Top-level names a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0] if node.level == 0 else file.parent.name)
    return names


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_folder_imports_only_what_the_house_allows(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"{folder}/ holds no code"
    own = {folder} - {"evaluate", "slurm"}  # folders of scripts, not packages
    for file in files:
        forbidden = imports(file) & OURS - MAY_IMPORT[folder] - own
        assert not forbidden, f"{file.relative_to(ROOT)} imports {sorted(forbidden)}"


def test_hugging_face_evaluate_is_not_shadowed():
    """Neither evaluate/ nor slurm/ is importable from an installed Linework."""
    code = "import importlib.util as u; print([n for n in ('evaluate', 'slurm') if u.find_spec(n)])"
    found = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd="/", capture_output=True, text=True, check=True
    ).stdout
    assert found.strip() == "[]"


def test_no_file_is_a_drawer():
    drawers = {"utils", "util", "misc", "helpers", "common", "manager", "registry", "factory", "callbacks"}
    assert not [file for file in ROOT.rglob("*.py") if file.stem in drawers and ".venv" not in file.parts]


def test_metrics_need_no_torch_and_of_ours_only_schematics():
    """Read from a fresh interpreter that has imported every module of detection.metrics."""
    code = (
        "import importlib, pkgutil, sys, detection.metrics as room\n"
        "names = [module.name for module in pkgutil.iter_modules(room.__path__)]\n"
        "assert len(names) > 1, names\n"
        "for name in names: importlib.import_module(f'detection.metrics.{name}')\n"
        "print(*sorted(sys.modules))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    ours = {name for name in loaded if name.split(".")[0] in OURS}
    strays = {name for name in ours if not name.startswith(("schematics", "detection.metrics"))}
    assert strays == {"detection"} and "detection.metrics.matching" in ours
    assert not {name for name in loaded if name.split(".")[0] in ("torch", "torchvision", "timm")}
