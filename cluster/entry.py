"""Run a command: parse its flags, print an error as one line, exit with a status that a script can rely on.

    if __name__ == "__main__":
        run(MyConfig, main)

Nothing here imports torch, and `live` needs no third-party package.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import os
import select
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from cluster import rendezvous
from cluster.config import flag, rules
from cluster.errors import CRASH, FAILED, INTERRUPTED, UNREAD, USAGE, UserError, failing_disk

ConfigType = TypeVar("ConfigType")


def run(config_class: type[ConfigType], main: Callable[[ConfigType], Any]) -> None:
    """Parse sys.argv into `config_class` and call `main` with it. Every entry point calls this."""
    live(lambda: main(parse(config_class, sys.argv[1:])))


def live(work: Callable[[], Any]) -> None:
    """Call `work` and exit with the status that says how it ended.

    An exception that carries `exit_status` (UserError, DataError) is printed as one line by one rank, and
    gives that status; so does one that shows that a disk fails, with status 1. Ctrl-C gives 130. Any other
    exception is a bug: its traceback is printed, and the status is 70. Where the reader of standard output
    has left, as with `... | head`, nothing is said, and the status is 141. A process that fails does not wait
    for DataLoader workers; `rendezvous.leave` says how long it waits for other ranks. Where `work` returns,
    the process group is closed, however early that is.
    """
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal can't show must not end the run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        work()
        sys.stdout.flush()  # here, where a reader that has left is no traceback
        if distributed := sys.modules.get("cluster.distributed"):
            # The threads of a group that is open when the interpreter ends may abort it. After an error it is
            # left open, and `end` skips that: to close it NCCL would wait for ranks that may never answer.
            distributed.stop()
    except SystemExit as stop:
        if not isinstance(stop.code, int):  # None, or a text: the interpreter handles both
            raise
        if stop.code == 0:  # perhaps because rank 0 has found an error and waits for the others to leave
            rendezvous.leave()
        end(stop.code)
    except KeyboardInterrupt:
        end(INTERRUPTED)
    except BaseException as error:
        if isinstance(error, BrokenPipeError) and _unread():
            rendezvous.leave()
            end(UNREAD)
        status, said = getattr(error, "exit_status", None), str(error)
        if status is None and (line := failing_disk(error)):
            status, said = FAILED, line
        if status is None:
            with contextlib.suppress(OSError):  # standard error may be a pipe whose reader has left
                traceback.print_exc()
            end(CRASH)
        if "Original Traceback" in said:  # raised in a DataLoader worker: the last line is the error itself
            said = said.strip().splitlines()[-1].partition(": ")[2]
        told = rendezvous.tell_once(f"error: {' '.join(said.split())}")
        rendezvous.leave()
        end(status if told else 0)  # only the rank that has printed the error has a status other than 0


def _unread() -> bool:
    """Whether standard output is a pipe whose reader has left."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def end(status: int) -> NoReturn:
    """Exit, at once if a DataLoader worker or a process group could keep the interpreter from exiting."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:  # what is left would be a traceback when the interpreter ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            status = status or UNREAD
        except OSError:
            pass
    multiprocessing = sys.modules.get("multiprocessing")
    distributed = sys.modules.get("torch.distributed")
    if (multiprocessing and multiprocessing.active_children()) or (
        distributed and distributed.is_available() and distributed.is_initialized()
    ):
        os._exit(status)  # DataLoader workers exit when their parent is gone; Slurm ends the other ranks
    sys.exit(status)


def parse(config_class: type[ConfigType], args: Sequence[str]) -> ConfigType:
    """Parse flags into a `config_class`.

    A wrong flag gives one line on stderr that names it, and status 2; a number outside the bounds of its
    field gives such a line and status 1.
    """
    import tyro  # imported here, so that reading a config file does not need tyro

    older = {rule.also: flag(name) for name, rule in rules(config_class).items() if rule.also}
    args = [_respell(arg, older) for arg in args]
    flags = {flag(field.name): field for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    given = [arg.partition("=")[0].replace("_", "-") for arg in args if arg.startswith("--")]
    if not {"--help", "-h"} & {*given, *args}:
        for name in given:
            if name not in flags and "--" + name.removeprefix("--no-") not in flags:
                _refuse(f"unknown flag {name}{_nearest(name, [*flags, *older])}")
        missing = [
            name
            for name, field in flags.items()
            if name not in given and _required(config_class, field, given)
        ]
        if missing:
            _refuse(f"{_listed(missing)} required{_example(args, missing)}")
    args += _preset(config_class, args, given)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(config_class, args=args, prog=_program())
    except UserError as error:
        _refuse(str(error), FAILED)
    except SystemExit as stop:
        if not stop.code:
            raise
        _refuse(_first_paragraph(box.getvalue()))


def _preset(config_class: type, args: Sequence[str], given: Sequence[str]) -> list[str]:
    """The flags of the preset that --preset names, without those that are given: explicit flags win.

    A length that is given, by --epochs, --steps or --minutes, takes the place of the preset's.
    """
    values = dict(itertools.pairwise(args)) | dict(arg.split("=", 1) for arg in args if "=" in arg)
    lengths = {"--epochs", "--steps", "--minutes"}
    taken = {*given} | (lengths if lengths & {*given} else set())
    flags = list[str]()
    for name, value in getattr(config_class, "presets", {}).get(values.get("--preset"), {}).items():
        if flag(name) not in taken:
            flags += [flag(name), *map(str, value if isinstance(value, tuple) else [value])]
    return flags


def _respell(arg: str, older: dict[str, str]) -> str:
    """Replace an older spelling of a flag by the current one."""
    name, equals, value = arg.partition("=")
    return older.get(name, name) + equals + value


def _required(config_class: type, field: dataclasses.Field, given: Sequence[str]) -> bool:
    if field.default is field.default_factory is dataclasses.MISSING:
        return True
    rule = rules(config_class).get(field.name)
    if rule is None or rule.unless in given:
        return False
    return rule.exists and not os.path.exists(str(field.default))


def _listed(names: list[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last} are" if others else f"{last} is"


def _example(args: Sequence[str], missing: list[str]) -> str:
    """The command as it was given, with the missing flags as the entry's docstring has them."""
    lines = (line.split() for line in (sys.modules["__main__"].__doc__ or "").splitlines())
    words = next((line for line in lines if set(missing) <= {*line}), [])
    if not words:
        return "; --help says what each is"
    values = [part for name in missing for part in (name, words[words.index(name) + 1])]
    return f", as in: {shlex.join([*_program().split(), *args, *values])}"


def _program() -> str:
    """How to start this program: slurm/launch.sh names the .slurm file that it was started by."""
    if "LINEWORK_COMMAND" in os.environ:
        return os.environ["LINEWORK_COMMAND"]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else f"python {sys.argv[0]}"


def _nearest(name: str, flags: list[str]) -> str:
    near = difflib.get_close_matches(name, flags, n=1)
    return f"; the nearest is {near[0]}" if near else "; --help lists the flags"


def _first_paragraph(box: str) -> str:
    """The first paragraph inside the frame of tyro's message, up to a horizontal rule or an empty line."""
    lines = [line.strip(" │╭╮╰╯") for line in box.splitlines()]
    text: list[str] = []
    for line in lines:
        if line.startswith("─") or not line:
            if text:
                break
            continue
        text.append(line)
    return " ".join(text) or "the command line could not be read; --help lists the flags"


def _refuse(reason: str, status: int = USAGE) -> NoReturn:
    """Exit with one line. All ranks have the same command line: only rank 0 prints it and has the status."""
    if rendezvous.place().rank:
        sys.exit(0)
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(status)
