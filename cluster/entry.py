"""A command's life: flags in, one line for a mistake, an exit status that a script can rely on.

    if __name__ == "__main__":
        run(MyConfig, main)

Nothing here needs torch, and `live` needs no package at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from cluster import rendezvous
from cluster.config import flag, rules
from cluster.errors import CRASH, FAILED, INTERRUPTED, USAGE

Config = TypeVar("Config")


def run(config_class: type[Config], main: Callable[[Config], Any]) -> None:
    """Parse sys.argv into `config_class` and call `main` with it: the body of every entry point."""
    live(lambda: main(parse(config_class, sys.argv[1:])))


def live(work: Callable[[], Any]) -> None:
    """Do the work of a command and end with the status that says how it went.

    An exception that carries `exit_status` (UserError, DataError) is one line, told by one rank, and that
    status; Ctrl-C is 130; anything else is a bug: a traceback and 70. A process that fails ends at once,
    without waiting for a DataLoader worker or another rank.
    """
    try:
        work()
    except SystemExit as stop:
        if not isinstance(stop.code, int):  # None, or a text that the interpreter prints
            raise
        end(stop.code)
    except KeyboardInterrupt:
        end(INTERRUPTED)
    except BaseException as error:
        status = getattr(error, "exit_status", None)
        if status is None:
            traceback.print_exc()
            end(CRASH)
        said = str(error)
        if "Original Traceback" in said:  # out of a DataLoader's worker: the last line is the error's own
            said = said.strip().splitlines()[-1].partition(": ")[2]
        told = rendezvous.tell_once(f"error: {' '.join(said.split())}")
        end(status if told else 0)  # of several ranks only the one that tells has a status other than 0


def end(status: int) -> NoReturn:
    """Leave now if something could keep the interpreter from leaving: a worker, a process group."""
    rendezvous.leave(after_mistake=status == FAILED)
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
    """Turn flags into a `config_class`; a mistake is one line on stderr that names the flag, and exit 2.

    Raises UserError for a number that its field does not allow.
    """
    import tyro  # here, so that reading a config file does not need it

    older = {rule.also: flag(name) for name, rule in rules(config_class).items() if rule.also}
    args = [_respell(arg, older) for arg in args]
    flags = {flag(field.name): field for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
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
            return tyro.cli(config_class, args=args, prog=_program())
    except SystemExit as stop:
        if not stop.code:
            raise
        _refuse(_first_paragraph(box.getvalue()))


def _respell(arg: str, older: dict[str, str]) -> str:
    """An older spelling of a flag as the one of its field."""
    name, equals, value = arg.partition("=")
    return older.get(name, name) + equals + value


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
    if not rendezvous.place().rank:  # all ranks have the same command line
        print(f"error: {reason}", file=sys.stderr)
    sys.exit(USAGE)
