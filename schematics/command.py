"""The frame of the package's own commands: errors in one line, exit codes that scripts can trust."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from schematics.sheets import DataError


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line, without the usage block; exit code 2 as always."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def run(
    main: Callable[[argparse.Namespace], int | None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Parse the flags, call `main` with them and exit with its code (None is 0).

    DataError and failed file operations become one line and code 1, flags that don't parse code 2.
    """
    args = parser.parse_args(argv)
    try:
        code = main(args) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # `... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        code = 130
    raise SystemExit(code)
