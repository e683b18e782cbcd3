"""Flags of our commands in a TOML file, where each is a key: steps = 500, flip = true, projector = [8, 8]."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from cluster.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Flags = dict[str, Any]  # flags of a command by name, without the dashes in front
PATHS = ("data-dir", "init", "store-dir", "probe-dir")  # flags of training that name a file or a folder


def words(flags: Flags, home: Path = Path()) -> tuple[str, ...]:
    """Flags as words of a command line that may run in another folder: paths become absolute.

    home: the folder that relative paths begin from, by default the current one. true and false stand for
    --flag and --no-flag, a list for several values.
    """
    found: list[str] = []
    for name, value in flags.items():
        if isinstance(value, bool):
            found.append(f"--{name}" if value else f"--no-{name}")
        else:
            values = map(str, value if isinstance(value, list) else [value])
            found += [f"--{name}", *(str((home / v).absolute()) if name in PATHS else v for v in values)]
    return tuple(found)


def read_toml(path: Path) -> Flags:
    """The tables of a TOML file. Raises UserError if it can't be read."""
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as TOML ({' '.join(str(error).split())})") from None
