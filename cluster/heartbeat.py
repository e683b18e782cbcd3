"""End a run whose step hangs, and name the rank at fault. This module does not import torch.

On every rank a thread rewrites EXP_DIR/heartbeat/rank_N at each beat. A rank that is stopped or cut off from
the file system no longer writes. A rank whose main thread hangs still writes, but its step number does not
grow. A step boundary is the point between two steps where all ranks agree to continue. A rank that has not
passed one for `step_timeout` seconds compares the files of all ranks over two beats, prints which ranks do
not write or are behind, and ends itself. A stopped rank cannot end itself: `srun --kill-on-bad-exit=1` does
that.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from cluster.errors import CRASH

T = TypeVar("T")
ANSWER = 15.0  # seconds from a signal to the end of a rank that waits
BEAT = 5.0  # seconds from one beat to the next, or a quarter of step_timeout if that is less


class Heartbeat:
    """Writes the beats of this rank and watches those of the others.

    step_timeout: seconds allowed from one step boundary to the next. first: seconds allowed until the first
    boundary, if that is more: data is indexed and models are compiled then. alongside: called at every beat,
    for Owner.beat. asked: whether a signal has asked this rank to end. leave: ends the process, without a
    boundary.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        size: int,
        step_timeout: float,
        first: float = 3600.0,
        alongside: Callable[[], None] = lambda: None,
        asked: Callable[[], bool] = lambda: False,
        leave: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder
        self.rank = rank
        self.size = size
        self.step_timeout = step_timeout
        self.interval = min(BEAT, step_timeout / 4)
        self.alongside, self.asked, self.leave = alongside, asked, leave
        self.idle = True  # whether a rank that ends now loses no step in progress that it could save
        self.step = 0
        self.waiting = False  # whether this rank waits for the others at the boundary before `step`
        self._last = time.monotonic()  # time of the last boundary
        self._allowed = max(first, step_timeout)  # seconds from that boundary to the next
        self._extra = 0.0  # seconds that `allow` adds to it
        self._closed = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        for target in (self._beat, self._watch):
            threading.Thread(target=target, name=target.__name__, daemon=True).start()

    def arrived(self, step: int) -> None:
        """This rank has done `step` steps and now waits for the others."""
        self.step, self.waiting = step, True

    def left(self) -> None:
        """All ranks have done these steps."""
        self.waiting = self.idle = False
        self._last, self._allowed = time.monotonic(), self.step_timeout

    def waits(self, items: Iterable[T], waited: Callable[[float], None]) -> Iterator[T]:
        """The items; while one is awaited, this rank counts as idle. waited: called with those seconds."""
        iterator = iter(items)
        while True:
            before, self.idle, began = self.idle, True, time.monotonic()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.idle = before
            waited(time.monotonic() - began)
            yield item

    @contextlib.contextmanager
    def allow(self, seconds: float) -> Iterator[None]:
        """Give this rank `seconds` more; when the context ends, the time to the next boundary starts anew."""
        self._extra += seconds
        try:
            yield
        finally:
            self._last = time.monotonic()
            self._extra -= seconds

    def close(self) -> None:
        self._closed.set()

    def silent(self) -> list[str]:
        """Describe the ranks at fault: those that do not write, or else those that are behind the others.

        Takes two beats, to see which ranks write.
        """
        before = self._texts()
        time.sleep(2 * self.interval)
        after = self._texts()
        if quiet := [rank for rank in after if after[rank] == before[rank]]:
            return [f"rank {rank}{_on(after[rank])} shows no sign of life" for rank in quiet]
        done = {rank: _progress(text) for rank, text in after.items()}
        behind = [rank for rank in done if done[rank] < max(done.values())]
        return [
            f"rank {rank}{_on(after[rank])} is running but behind, in step {done[rank][0]}" for rank in behind
        ]

    def _texts(self) -> dict[int, str]:
        texts = dict.fromkeys(range(self.size), "")
        for rank in texts:
            with contextlib.suppress(OSError):
                texts[rank] = (self.folder / f"rank_{rank}").read_text()
        return texts

    def _beat(self) -> None:
        """Write a beat at each interval. A hanging file system blocks this thread, so `_watch` decides."""
        count = 0
        while not self._closed.is_set():
            count += 1
            text = f"{self.step} {int(self.waiting)} {count} {os.getpid()} {socket.gethostname()}"
            with contextlib.suppress(OSError):
                (self.folder / f"rank_{self.rank}").write_text(text)
            self.alongside()
            self._closed.wait(self.interval)

    def _watch(self) -> None:
        looked = answered = time.monotonic()  # answered: when no signal asked, or the main thread was busy
        while not self._closed.wait(min(1.0, self.interval)):
            now = time.monotonic()
            if not (self.asked() and self.idle):
                answered = now
            elif now - answered >= ANSWER:
                return self.leave()
            if now - looked > 3 * self.interval:  # this process was stopped, as by `scontrol suspend`
                self._last += now - looked
            looked, waited = now, now - self._last
            if waited >= self._allowed + self._extra:
                self._end(waited)

    def _end(self, waited: float) -> None:
        blame = [f"the file system of {self.folder} does not answer"]

        def look() -> None:
            blame[:] = self.silent() or ["all ranks run and none is behind; compare where each one is"]

        looking = threading.Thread(target=look, daemon=True)
        looking.start()
        looking.join(2 * self.interval + BEAT)
        print(
            f"error: rank {self.rank} on {socket.gethostname()}: no end of step {self.step} for {waited:.0f}"
            f" s: {'; '.join(blame)}; this rank is at {_where_main_thread_is()}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(CRASH)


def _progress(text: str) -> tuple[int, int]:
    """(steps done, 1 if the rank waits for the others) from the text of a beat."""
    words = text.split()
    return (int(words[0]), int(words[1])) if len(words) == 5 else (0, 0)


def _on(text: str) -> str:
    words = text.split()
    return f" (pid {words[3]} on {words[4]})" if len(words) == 5 else ""


def _where_main_thread_is() -> str:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    calls = traceback.extract_stack(frame)[-6:] if frame else []
    return " < ".join(f"{Path(c.filename).name}:{c.lineno} {c.name}" for c in reversed(calls))
