"""The code as it is on disk: which folders it has, and a copy of it that later edits don't reach."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

from cluster.errors import UserError

SCRIPTS = ("evaluate", "slurm")  # folders of scripts, which belong to the code but are no packages
HOME = Path(__file__).resolve().parent.parent  # the code that this file is part of


def packages(home: Path = HOME) -> list[str]:
    """The names of all packages, from the one list of them: `packages = [...]` in pyproject.toml.

    tomllib comes with Python 3.11 only, so this looks for that one assignment; it may go over several lines.
    Raises UserError when there is no such list, or when a package of it has no folder.
    """
    path = home / "pyproject.toml"
    try:
        found = re.search(r"^packages\s*=\s*(\[[^]]*\])", path.read_text("utf-8"), re.MULTILINE)
        names = [str(name) for name in ast.literal_eval(found[1])] if found else []
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: its list of packages cannot be read ({error}); mend it") from None
    if not names:
        raise UserError(f'{path}: has no list of packages; write packages = ["...", "..."] in it')
    for name in names:
        if not home.joinpath(*name.split(".")).is_dir():
            raise UserError(f"{path}: lists the package {name}, which has no folder; mend the list")
    return names


def methods() -> list[str]:
    """The methods of pretraining: the packages that hold a loss.py and a pretrain.py."""
    needed = ("loss.py", "pretrain.py")
    return [name for name in packages() if all((HOME / name / file).exists() for file in needed)]


def sources() -> list[str]:
    """What the jobs need of the code: the folders of the packages and scripts, and the list of packages."""
    folders = dict.fromkeys(name.split(".")[0] for name in packages())
    return [*folders, *SCRIPTS, "pyproject.toml"]


def snapshot(run_dir: Path) -> Path:
    """Copy the code as it is on disk to RUN_DIR/code, so that later edits don't reach queued jobs."""
    code, fresh = run_dir / "code", run_dir / ".code-new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for name in sources():
        if (HOME / name).is_dir():
            shutil.copytree(HOME / name, fresh / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(HOME / name, fresh / name)
    shutil.rmtree(code, ignore_errors=True)
    fresh.rename(code)
    return code
