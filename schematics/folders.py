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
from typing import TextIO

from schematics.sheets import DataError

LOCK = "lock"  # the file in a resumable folder that its process holds
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
def resumable_folder(out: Path, key: str) -> Iterator[Path]:
    """Yield the folder beside `out` for work of this key, with all that a killed process has left there.

    Only one process has it at a time: others that ask for it wait, and find it empty once it was renamed to
    `out`. It is removed at the end unless it was renamed, but kept where the block is interrupted or the file
    system fails, so that the next process goes on. Where the file system has no locks it is an
    `unfinished_folder`. Raises OSError where no folder can be made.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = _resumable(out, key)
    lock = _claim(folder)
    if lock is None:
        with unfinished_folder(out) as private:
            yield private
        return
    with lock:
        try:
            yield folder
        except (OSError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            _remove(folder, lock)
            raise
        _remove(folder, lock)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(out / LOCK)


def _resumable(out: Path, key: str) -> Path:
    return out.with_name(f".{out.name}.{key[:16]}.tmp")


def _claim(folder: Path) -> TextIO | None:
    """Wait for the lock in a folder and hold it; None where the file system has no locks."""
    while True:
        folder.mkdir(exist_ok=True)
        try:
            lock = open(folder / LOCK, "a")  # noqa: SIM115 held by the caller
        except FileNotFoundError:
            continue  # its process has just moved the folder away
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            lock.close()
            return None
        if _holds(folder, lock):
            return lock
        lock.close()


def _holds(folder: Path, lock: TextIO) -> bool:
    """Whether an open lock is still that of the folder, which another process may have moved or removed."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / LOCK))
    except FileNotFoundError:
        return False


def _remove(folder: Path, lock: TextIO) -> None:
    """Remove a folder whose lock is held, unless it was moved: at once, for the next may ask for it."""
    if _holds(folder, lock):
        away = folder.with_name(f"{folder.name[:-4]}.{uuid.uuid4().hex[:8]}.tmp")
        os.rename(folder, away)
        shutil.rmtree(away, ignore_errors=True)


def remove_stale(out: Path, key: str = "") -> None:
    """Remove the unfinished folders beside `out` in which nothing has changed for a day.

    key: of a `resumable_folder` that is kept.
    """
    for folder in set(out.parent.glob(f".{glob.escape(out.name)}.*.tmp")) - {_resumable(out, key)}:
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
