"""The frame of the package's own commands: an error is one line, and scripts can trust the exit status."""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from schematics.sheets import DataError

# The statuses with which a command ends. cluster/errors.py has the same ones for the stages of training.
DONE = 0
FAILED = DataError.exit_status  # bad input or a file system that refuses, told in one line
USAGE = 2  # flags that don't parse
INTERRUPTED = 130  # ended by Ctrl-C


class Parser(argparse.ArgumentParser):
    """The flags of `python -m MODULE`, described by the first line of the module's docstring.

    A wrong flag is one line on stderr without the usage block.
    """

    def __init__(self, module: str, docstring: str | None) -> None:
        super().__init__(prog=f"python -m {module}", description=(docstring or "").partition("\n")[0])

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"error: {message} (see {self.prog} --help)\n")


def run(
    main: Callable[[argparse.Namespace], None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Parse the flags, call `main` with them and end the process with one of the statuses above.

    An error that carries `exit_status`, as DataError does, and a failed file operation become one line on
    stderr. Any other exception is a bug and ends as a traceback.
    """
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal can't show must not end the command
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    args = parser.parse_args(argv)
    status = DONE
    try:
        main(args)
        sys.stdout.flush()
    except BrokenPipeError:  # `... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        status = INTERRUPTED
    except Exception as error:
        if not isinstance(error, OSError) and not hasattr(error, "exit_status"):
            raise
        print(f"error: {error}", file=sys.stderr)
        status = getattr(error, "exit_status", FAILED)
    raise SystemExit(status)
