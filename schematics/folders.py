"""Folders that are there whole or not at all: built beside their place and moved into it by one rename."""

import contextlib
import fcntl
import glob
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from schematics.sheets import DataError

STALE = 24 * 3600.0  # seconds without a change after which an unfinished folder is that of a killed process


def refuse_existing(path: Path) -> None:
    """Raise DataError where a command that writes a new file or folder would meet an old one."""
    if path.exists():
        raise DataError(f"{path}: exists already; choose another folder")


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `out` where the block ends without an error.

    After an error, `out` is as it was before and nothing else is left. Raises DataError if `out` has come to
    exist in the meantime and is not empty.
    """
    with unfinished_folder(out) as folder:
        yield folder
        try:
            os.rename(folder, out)
        except OSError:
            refuse_existing(out)
            raise


@contextlib.contextmanager
def unfinished_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out`, so on its file system; removed at the end unless it was renamed.

    The parents of `out` are made where they are missing. Permissions are those of a plain mkdir.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def turn_to_build(out: Path) -> Iterator[None]:
    """Wait until no other process is building `out`, and keep others waiting until the block has ended.

    The lock is an empty file beside `out`, which stays. Where the file system has no locks nobody waits.
    Raises DataError where no file can be made there.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = open(out.with_name(f".{out.name}.lock"), "a")  # noqa: SIM115 closed below
    except OSError as error:
        raise DataError(f"{out.parent}: {error.strerror}; choose another folder") from error
    with lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def remove_stale(out: Path) -> None:
    """Remove the unfinished folders beside `out` in which nothing has changed for a day."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # its process has just finished
            newest = max(path.stat().st_mtime for path in [folder, *folder.glob("*")])
            if time.time() - newest > STALE:
                shutil.rmtree(folder, ignore_errors=True)


def sync(path: Path) -> None:
    """Return once the contents of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
