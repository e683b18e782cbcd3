"""A stage's configuration: one frozen dataclass -> command line -> config.json beside the run.

The comment above, or the docstring below, a field is the help text of its flag.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from cluster import atomic
from cluster.errors import UserError
from cluster.rendezvous import place

__all__ = ["UserError", "changed", "parse", "refuse_changes", "refuse_outside", "run", "save"]

Config = TypeVar("Config")
LARGEST_SEED = 2**63 - 1
USAGE = 2  # exit status of a wrong command line
CRASH = 70  # of what nobody expected: worth starting again from the last checkpoint, unlike an exit 1


def run(
    config_class: type[Config],
    main: Callable[[Config], Any],
    expected: tuple[type[Exception], ...] = (),
) -> None:
    """Parse sys.argv into `config_class` and call `main` with it: the body of every entry point.

    A wrong flag is one line and exit 2. UserError, or one of the classes in `expected`, out of `main` is
    one line and exit 1; anything else is a traceback and exit 70. A process that fails ends at once, without
    waiting for a DataLoader worker or another rank.
    """
    config = parse(config_class, sys.argv[1:])
    known: tuple[type[Exception], ...] = (UserError, *expected)
    try:
        main(config)
    except known as error:
        if place().rank:  # all ranks may say the same: rank 0 says it, and its end ends the others
            time.sleep(3)
        said = str(error)
        if "Original Traceback" in said:  # out of a DataLoader's worker: the last line is the error's own
            said = said.strip().splitlines()[-1].partition(": ")[2]
        print(f"error: {' '.join(said.split())}", file=sys.stderr)
        end(1)
    except SystemExit as stop:
        if not isinstance(stop.code, int):  # None, or a text that the interpreter prints
            raise
        end(stop.code)
    except KeyboardInterrupt:
        end(130)
    except BaseException:
        traceback.print_exc()
        end(CRASH)


def end(status: int) -> NoReturn:
    """Leave now if something could keep the interpreter from leaving: a worker, a process group."""
    sys.stdout.flush()
    sys.stderr.flush()
    multiprocessing = sys.modules.get("multiprocessing")
    distributed = sys.modules.get("torch.distributed")
    if (multiprocessing and multiprocessing.active_children()) or (
        distributed and distributed.is_available() and distributed.is_initialized()
    ):
        os._exit(status)  # orphaned DataLoader workers notice and leave; Slurm ends the other ranks
    sys.exit(status)


def parse(config_class: type[Config], args: Sequence[str]) -> Config:
    """Turn flags into a `config_class`; a mistake is one line on stderr that names the flag, and exit 2."""
    import tyro  # here, so that reading a config file does not need it

    flags = {_flag(field.name): field for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    given = [arg.partition("=")[0].replace("_", "-") for arg in args if arg.startswith("--")]
    if not {"--help", "-h"} & {*given, *args}:
        for name in given:
            if name not in flags and "--" + name.removeprefix("--no-") not in flags:
                _refuse(f"unknown flag {name}{_nearest(name, list(flags))}")
        for name, field in flags.items():
            if field.default is field.default_factory is dataclasses.MISSING and name not in given:
                _refuse(f"{name} is required")
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(config_class, args=list(args), prog=_program())
    except SystemExit as stop:
        if not stop.code:
            raise
        _refuse(_first_paragraph(box.getvalue()))


def save(config: Any, path: Path) -> None:
    """Write a dataclass as JSON (paths as text); whole or not at all."""
    atomic.write_text(path, json.dumps(_plain(config), indent=2) + "\n")


def changed(config: Any, path: Path) -> dict[str, tuple[Any, Any]]:
    """Flags whose value differs from the one saved in `path`: {"--epochs": (old, new)}.

    A flag that the file does not know is compared with its default. Raises UserError when the file is
    not a saved config.
    """
    try:
        old = json.loads(path.read_text())
        known = {field.name: old.get(field.name, _default(field)) for field in dataclasses.fields(config)}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a saved config ({error}); remove it") from None
    new = _plain(config)
    return {_flag(name): (value, new[name]) for name, value in known.items() if value != new[name]}


def refuse_changes(config: Any, exp_dir: Path, free: set[str]) -> None:
    """Raise UserError where this command is another run than the one in `exp_dir`.

    free: flags that may differ.
    """
    path = exp_dir / "config.json"
    changes = changed(config, path) if path.exists() else {}
    for flag, (old, new) in changes.items():
        if flag not in free:
            raise UserError(f"{flag} {new}: the run in {exp_dir} has {old}; give that, or another --exp-dir")


def refuse_outside(config: Any, limits: Mapping[str, tuple[float, ...]]) -> None:
    """Raise UserError for a field whose value lies under the first of its limits, or above the second.

    Of a tuple each value is looked at. None is allowed; infinity and what is not a number are not.
    """
    for name, (least, *most) in limits.items():
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else () if value is None else (value,):
            flag = f"--{name.replace('_', '-')} {number}"
            if not least <= number < math.inf:
                raise UserError(f"{flag}: give {least} or more")
            if most and number > most[0]:
                raise UserError(f"{flag}: give {most[0]} or less")


def _plain(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def _default(field: dataclasses.Field) -> Any:
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    return None if value is dataclasses.MISSING else json.loads(json.dumps(value, default=str))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _program() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else f"python {sys.argv[0]}"


def _nearest(name: str, flags: list[str]) -> str:
    near = difflib.get_close_matches(name, flags, n=1)
    return f"; the nearest is {near[0]}" if near else "; --help lists them"


def _first_paragraph(box: str) -> str:
    """The sentence inside tyro's frame: its lines up to the first rule or list of details."""
    lines = [line.strip(" │╭╮╰╯") for line in box.splitlines()]
    text: list[str] = []
    for line in lines:
        if line.startswith("─") or not line:
            if text:
                break
            continue
        text.append(line)
    return " ".join(text) or "the command line could not be read; --help lists the flags"


def _refuse(reason: str) -> NoReturn:
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(USAGE)
