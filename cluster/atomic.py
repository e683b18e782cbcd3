"""Write files so that each one is either complete or absent. This module does not import torch.

A file with its hash beside it is written in this order:
  1. write the bytes to a temporary file in the same folder, hash them on the way, fsync
  2. write the new hash to NAME.sha256, above the hash of the file that is still there; fsync, rename
  3. rename the temporary file to NAME, fsync the folder
  4. remove the old hash from NAME.sha256
A process that is killed before step 3 leaves the old file, whose hash is still listed. A process that is
killed after step 3 leaves the new file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from cluster.errors import GONE, UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class HashingFile:
    """A write-only file that hashes the bytes written to it and keeps the first OSError of a write."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw = raw
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self.raw.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self.sha256.update(data)
        return len(data)

    def flush(self) -> None:
        self.raw.flush()


def replace(
    path: Path,
    write: Callable[[HashingFile], object],
    hashed: bool = False,
    allowed: Callable[[], None] = lambda: None,
) -> str:
    """Let `write` fill a temporary file, then rename it to `path`. Returns the sha256 in hex.

    hashed: write PATH.sha256 as well, in the format of `sha256sum -c`.
    allowed: called when the bytes are on disk and nothing has been renamed; it raises to cancel the write.
    Raises UserError when the disk is full or the write fails. No temporary file is left, and `path` is
    unchanged unless the error came after the rename.
    """
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "xb") as raw:
            file = HashingFile(raw)
            try:
                write(file)
            except Exception:
                if file.error:  # torch replaces "No space left on device" by "unexpected pos"
                    raise file.error from None
                raise
            raw.flush()
            os.fsync(raw.fileno())
        digest = file.sha256.hexdigest()
        allowed()
        if hashed:
            _list_hashes(path, [digest, *(known_hashes(path) if path.exists() else [])])
        os.replace(temporary, path)
        sync_folder(path.parent)
        if hashed and len(known_hashes(path)) > 1:
            _list_hashes(path, [digest])
        return digest
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        if error.errno in FULL:
            reason = (
                f"the disk is full ({reason}); what was there before is intact, make room and run it again"
            )
        elif not path.parent.exists():
            reason = GONE
        else:
            reason += "; make the folder writable and run it again"
        raise UserError(f"{path}: not written, {reason}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Let an OSError, which after a write names no file, name one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_figure(path: Path, figure: Figure, crop: Literal["tight"] | None = None) -> None:
    """`replace` for a PNG of a figure. crop: "tight" fits it to what is drawn, where no layout does."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130, bbox_inches=crop)
    replace(path, lambda file: file.write(data.getvalue()))


def write_text(path: Path, text: str) -> None:
    """`replace` for a short text. File names in the text keep their bytes even if those are not UTF-8."""
    replace(path, lambda file: file.write(_bytes(text)))


def _bytes(text: str) -> bytes:
    try:
        return text.encode(errors="surrogateescape")
    except UnicodeEncodeError:  # half of a surrogate pair, as JSON may have in a class name
        return text.encode(errors="backslashreplace")


def sidecar(path: Path) -> Path:
    """The path of the file that lists the hashes of `path`."""
    return path.with_name(path.name + ".sha256")


def known_hashes(path: Path) -> list[str]:
    """The hashes that PATH.sha256 lists for PATH, in hex; empty if there is no such file."""
    try:
        lines = sidecar(path).read_text(errors="replace").splitlines()
    except OSError:
        return []
    return [line.split()[0] for line in lines if line.split()]


def verify(path: Path) -> None:
    """Raise UserError unless PATH exists and has a hash that PATH.sha256 lists."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    hashes = known_hashes(path)
    if not hashes:
        raise UserError(
            f"{path}: no {path.name}.sha256 beside it, so it can't be verified; copy both files, or vouch "
            f"for it by `sha256sum {path.name} > {path.name}.sha256` in its folder"
        )
    if file_hash(path) not in hashes:
        raise UserError(f"{path}: truncated or damaged, its sha256 is not the one written beside it")


def file_hash(path: Path) -> str:
    """sha256 of a file, in hex."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            sha256.update(block)
    return sha256.hexdigest()


def make_folder(folder: Path) -> None:
    """Make a folder and its parents. Raises UserError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: can't be made a folder, {os.strerror(error.errno or 0)}") from None


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that renames in it survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove what a killed process left in a folder: temporary files, and each .sha256 without its file."""
    for temporary in folder.glob(".*.tmp-*"):
        temporary.unlink(missing_ok=True)
    for listed in folder.glob("*.sha256"):
        if not listed.with_name(listed.name.removesuffix(".sha256")).exists():
            listed.unlink(missing_ok=True)


def _list_hashes(path: Path, hashes: list[str]) -> None:
    write_text(sidecar(path), "".join(f"{digest}  {path.name}\n" for digest in dict.fromkeys(hashes)))
