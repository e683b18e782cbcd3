"""Who may import whom: the arrows of the house, read from the imports themselves.

The packages and methods are those of the one list in pyproject.toml, so a new method has its rule already.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import snapshot

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "schematics": {"schematics.formats"},
    "schematics.formats": {"schematics"},
    "cluster": set(),
    "pretraining": {"schematics", "cluster"},
    "detection": {"detection.labelling", "detection.metrics", "detection.report", "schematics", "cluster"},
    "detection.labelling": {"detection", "detection.metrics", "detection.report", "schematics", "cluster"},
    "detection.metrics": {"schematics"},
    "detection.report": {"detection.metrics", "schematics", "cluster"},
    "evaluate": {
        "detection",
        "detection.labelling",
        "detection.metrics",
        "detection.report",
        "pretraining",
        "schematics",
        "cluster",
    },
    "slurm": {"cluster"},
    **{method: {"pretraining", "schematics", "cluster"} for method in snapshot.methods()},
}
HOUSE = (*snapshot.packages(), *snapshot.SCRIPTS)


def files_of(*folders: str) -> list[Path]:
    """The Python files below these folders of the tree."""
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def module_of(file: Path) -> str:
    """The dotted name of a file; a package goes by its folder's."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def owner_of(module: str) -> str | None:
    """The innermost package, or the folder of scripts, that a module belongs to; None for other people's."""
    parts = module.split(".")
    above = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in above if name in HOUSE), None)


def exists(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def imports(file: Path) -> set[str]:
    """Dotted names of the modules that a file imports, also inside functions."""
    package = file.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            within = {f"{base}.{alias.name}" for alias in node.names}
            found |= {base} | {name for name in within if exists(name)}
    return found


def is_entry(file: Path) -> bool:
    """Whether a file has a command line: `if __name__ == "__main__"`."""
    conditions = (
        ast.unparse(node.test) for node in ast.parse(file.read_text()).body if isinstance(node, ast.If)
    )
    return "__name__ == '__main__'" in conditions


ENTRIES = [module_of(file) for file in files_of(*snapshot.sources()) if is_entry(file)]


def test_every_package_has_its_rule():
    assert sorted(MAY_IMPORT) == sorted(HOUSE)


def test_every_folder_of_code_is_in_the_list():
    """A package that the list lacks would be neither installed nor checked."""
    folders = {".".join(file.parent.relative_to(ROOT).parts) for file in files_of(*snapshot.sources())}
    assert folders == set(HOUSE)


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_package_imports_only_what_the_house_allows(package):
    files = [file for file in files_of(*package.split(".")[:1]) if owner_of(module_of(file)) == package]
    assert files, f"{package} holds no code"
    own = {package} - {*snapshot.SCRIPTS}  # scripts are run, and not imported by that name
    for file in files:
        owners = {owner_of(name) for name in imports(file)} - {None}
        forbidden = owners - MAY_IMPORT[package] - own
        assert not forbidden, f"{file.relative_to(ROOT)} imports {sorted(forbidden)}"


@pytest.mark.parametrize("entry", ENTRIES)
def test_nothing_imports_an_entry(entry):
    """What has a command line is run; what it shares with others stands in a module without one."""
    folder, _, name = entry.rpartition(".")
    importers = []
    for file in files_of(*snapshot.sources(), "benchmarks"):
        beside = (
            folder in snapshot.SCRIPTS and file.parent == ROOT / folder
        )  # a script knows it by its bare name
        if imports(file) & ({entry, name} if beside else {entry}):
            importers.append(str(file.relative_to(ROOT)))
    assert not importers


def test_no_test_file_imports_another():
    """What tests share is in conftest.py, or in a plain module beside it."""
    files = files_of("tests")
    names = {file.stem for file in files if file.stem.startswith("test_")}
    found = {file.stem: sorted(imports(file) & names) for file in files}
    assert not {name: others for name, others in found.items() if others}


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
    ours = {name for name in loaded if name.split(".")[0] in {folder.split(".")[0] for folder in HOUSE}}
    strays = {name for name in ours if not name.startswith(("schematics", "detection.metrics"))}
    assert strays == {"detection"} and "detection.metrics.matching" in ours
    assert not {name for name in loaded if name.split(".")[0] in ("torch", "torchvision", "timm")}


def test_a_whole_config_goes_no_further_than_an_entry():
    """Law: below an entry its named parts are handed on. A stage is the body of its entries."""
    bodies = {("pretraining.stage", "pretrain"), ("detection.stage", "finetune")}
    bodies.add(("pretraining.classifier_stage", "train_classifier"))
    bodies.add(("detection.pretrain_stage", "pretrain_detector"))
    takers = set()
    for file in files_of(*HOUSE):
        module = module_of(file)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                given = [*node.args.args, *node.args.kwonlyargs]
                if any(arg.annotation and ast.unparse(arg.annotation).endswith("Config") for arg in given):
                    takers.add((module, node.name))
    assert {("simclr.pretrain", "main"), ("detection.finetune", "main"), *bodies} < takers
    entries = {module_of(file) for file in files_of(*HOUSE) if "__main__" in file.read_text()}
    assert {(module, name) for module, name in takers if module not in entries or name != "main"} == bodies
