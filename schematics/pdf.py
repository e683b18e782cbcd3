"""Read PDF pages in a process of their own, so that one that takes for ever or crashes PDFium costs one page.

Content streams are programs: a file of a few kilobytes can draw for hours and fill any memory, and code in C
can be stopped only together with its process. The process is started at the first PDF and used for all that
follow. It ends by itself when this one does.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np

SECONDS = 60  # of CPU time that a page may take; an A0 sheet of a plant takes 1 to 2
MEMORY = 8 << 30  # bytes of address space of the process; a bitmap of 400 megapixels takes 1.6 GB
PADDING = b"\0 \t\r\n\x1a\xff"  # with which disks, tapes and transfers fill a block behind the end of a file
ASK = "import sys; sys.path[:] = {path!r}; from schematics.pdf import serve; serve()"


class Refused(ValueError):
    """The reason why a page is not read, and the cure."""


_lock = threading.Lock()
_reader: subprocess.Popen[bytes] | None = None


def page_count(path: Path) -> int:
    """The number of pages. Raises ValueError if it is no PDF, OSError if it can't be read."""
    return _ask("count", path)[0]["pages"]


def page_size(path: Path, page: int, dpi: int, most: int) -> tuple[int, int]:
    """Width and height in px of a page, counted from 1. Raises Refused above `most` pixels."""
    return tuple(_ask("size", path, page, dpi, most)[0]["size"])


def render(path: Path, page: int, dpi: int, most: int) -> np.ndarray:
    """A page as uint8 RGB [H, W, 3]. Raises Refused as `page_size` does, and after SECONDS."""
    about, image = _ask("render", path, page, dpi, most)
    return image.reshape(about["shape"])


def _ask(*question: Any) -> tuple[dict[str, Any], np.ndarray]:
    """What the process answers: a dict, and the bytes that follow it, uint8 [N]."""
    global _reader
    open(question[1], "rb").close()  # raises for a file that is absent or can't be read
    with _lock:
        if _reader is None or _reader.poll() is not None:
            command = [sys.executable, "-c", ASK.format(path=sys.path)]
            _reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        reader = _reader
        assert reader.stdin and reader.stdout
        try:
            reader.stdin.write(json.dumps((SECONDS, *question), default=os.fspath).encode() + b"\n")
            reader.stdin.flush()
            about = json.loads(reader.stdout.readline() or b"null")
            data = np.empty(about["bytes"] if about else 0, np.uint8)
            complete = about and reader.stdout.readinto(data) == len(data)  # type: ignore[attr-defined]
        except OSError:  # it has ended before the question was written
            complete = False
        except BaseException:  # Ctrl-C: the rest of this answer must not be taken for the next one
            _forget(reader)
            raise
        if complete:
            if "error" in about:
                raise (Refused if about["refused"] else ValueError)(about["error"])
            return about, data
        status = _forget(reader)
    if status == -signal.SIGPROF:
        raise Refused(f"takes more than {SECONDS} s; export it again, or as an image")
    raise Refused(f"ended PDFium with status {status}; export it again, or as an image")


def _forget(reader: subprocess.Popen[bytes]) -> int:
    """End the process if it has not ended, and return its status."""
    global _reader
    _reader = None
    for pipe in (reader.stdin, reader.stdout):
        with contextlib.suppress(OSError):
            pipe.close()  # type: ignore[union-attr]
    with contextlib.suppress(subprocess.TimeoutExpired):
        return reader.wait(10)
    reader.kill()
    return reader.wait()


def _after_fork() -> None:
    """A forked process starts a reader of its own: two askers would take each other's answers."""
    global _reader, _lock
    _inherited.append(_reader)  # kept, since to forget it would be to wait for another process's child
    _reader, _lock = None, threading.Lock()


_inherited: list[Any] = []
os.register_at_fork(after_in_child=_after_fork)


def serve() -> None:
    """Answer questions on standard input until it is closed. Runs in the process that `_ask` starts."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # meant for the process that asks, which ends this one
    with contextlib.suppress(ValueError, OSError):  # the limit that is there is lower
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin.buffer:
        seconds, *question = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal, SIGPROF, ends the process
        data = memoryview(b"")
        try:
            about, data = _answer(*question)
        except Exception as error:  # on broken bytes PDFium's binding may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            about = {"error": reason, "refused": isinstance(error, Refused)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps({**about, "bytes": data.nbytes}).encode() + b"\n")
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


def _answer(what: str, path: str, page: int = 1, dpi: int = 72, most: int = 0) -> tuple[dict, memoryview]:
    import pypdfium2

    data = Path(os.fsencode(path).decode(errors="surrogateescape")).read_bytes().rstrip(PADDING)
    # PDFium repairs a cut file as well as it can, with blank pages. The end mark of a whole file is among its
    # last 1024 bytes.
    if what == "render" and b"%%EOF" not in data[-1024:]:
        raise Refused("truncated; copy or export it again")
    with pypdfium2.PdfDocument(data) as document:
        if what == "count":
            return {"pages": len(document)}, memoryview(b"")
        if page > len(document):
            raise Refused(f"has {len(document)} pages, not {page}")
        scale = user_unit(data, len(document)) * dpi / 72
        width, height = (math.ceil(side * scale) for side in document.get_page_size(page - 1))
        if width * height > most:
            raise Refused(f"{width} x {height} px at {dpi} dpi; give a smaller --dpi")
        if what == "size":
            return {"size": (width, height)}, memoryview(b"")
        bitmap = document[page - 1].render(scale=scale, rev_byteorder=True)
        image = np.ascontiguousarray(bitmap.to_numpy()[..., :3])
        return {"shape": image.shape}, image.data.cast("B")


def user_unit(data: bytes, pages: int) -> float:
    """The UserUnit of all pages, in 1/72 inch (ISO 32000-1, 7.7.3.3), which PDFium doesn't read; mostly 1.

    Raises Refused where pages differ in it: which is whose is known to the page tree alone.
    """
    parts = [data]
    for found in re.finditer(rb"/ObjStm\b.{0,500}?stream\r?\n", data, re.DOTALL):
        with contextlib.suppress(zlib.error):  # another filter, or encrypted
            parts.append(zlib.decompressobj().decompress(memoryview(data)[found.end() :], 1 << 24))
    units = [unit for part in parts for unit in re.findall(rb"/UserUnit\s*([0-9.]+)", part)]
    if not units:
        return 1.0
    if len(set(units)) > 1 or len(units) < pages or not float(units[0]) > 0:
        raise Refused("its pages have different units (UserUnit); print it to a new PDF")
    return float(units[0])
