"""A hung step is ended, and the silent rank is named. No torch here.

Every rank keeps EXP_DIR/heartbeat/rank_N, rewritten by a thread. A rank that is stopped, or cut from the
file system, writes no more; one whose main thread hangs writes on but does not come to the next step. A rank
that has seen no step boundary for `step_timeout` seconds looks at the others for two beats, ends itself and
says who was silent. A stopped rank can't end itself: `srun --kill-on-bad-exit=1` does that.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from cluster.errors import CRASH

BEAT = 5.0  # seconds, or a quarter of the time-out


class Heartbeat:
    """Beats of this rank, and its watch over the others.

    first: seconds allowed until the first step boundary, in which data is indexed and models are compiled.
    alongside: called at every beat (the owner's).
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        size: int,
        step_timeout: float,
        first: float = 3600.0,
        alongside: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder
        self.rank = rank
        self.size = size
        self.step_timeout = step_timeout
        self.interval = min(BEAT, step_timeout / 4)
        self.alongside = alongside
        self.step = 0
        self.waiting = False  # at the boundary before `step`, for the other ranks
        self._last = time.monotonic()  # the last boundary
        self._allowed = max(first, step_timeout)  # seconds from there to the next
        self._extra = 0.0  # and some more
        self._closed = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        for target in (self._beat, self._watch):
            threading.Thread(target=target, name=target.__name__, daemon=True).start()

    def arrived(self, step: int) -> None:
        """This rank has done `step` steps; the others may not have."""
        self.step, self.waiting = step, True

    def left(self) -> None:
        """All ranks have done them."""
        self.waiting = False
        self._last, self._allowed = time.monotonic(), self.step_timeout

    @contextlib.contextmanager
    def allow(self, seconds: float) -> Iterator[None]:
        """Allow `seconds` more, on this rank; afterwards the time to the next boundary counts anew."""
        self._extra += seconds
        try:
            yield
        finally:
            self._last = time.monotonic()
            self._extra -= seconds

    def close(self) -> None:
        self._closed.set()

    def silent(self) -> list[str]:
        """The ranks to blame, in words: those without a sign of life, else those behind the others.

        Takes two beats, to see who writes.
        """
        before = self._texts()
        time.sleep(2 * self.interval)
        after = self._texts()
        if quiet := [rank for rank in after if after[rank] == before[rank]]:
            return [f"rank {rank}{_on(after[rank])} shows no sign of life" for rank in quiet]
        done = {rank: _progress(text) for rank, text in after.items()}
        behind = [rank for rank in done if done[rank] < max(done.values())]
        return [
            f"rank {rank}{_on(after[rank])} lives but is behind, in step {done[rank][0]}" for rank in behind
        ]

    def _texts(self) -> dict[int, str]:
        texts = dict.fromkeys(range(self.size), "")
        for rank in texts:
            with contextlib.suppress(OSError):
                texts[rank] = (self.folder / f"rank_{rank}").read_text()
        return texts

    def _beat(self) -> None:
        """May hang with the file system, so it decides nothing."""
        count = 0
        while not self._closed.is_set():
            count += 1
            text = f"{self.step} {int(self.waiting)} {count} {os.getpid()} {socket.gethostname()}"
            with contextlib.suppress(OSError):
                (self.folder / f"rank_{self.rank}").write_text(text)
            self.alongside()
            self._closed.wait(self.interval)

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._closed.wait(min(1.0, self.interval)):
            now = time.monotonic()
            if now - looked > 3 * self.interval:  # this rank was stopped, by `scontrol suspend` for one
                self._last += now - looked
            looked, waited = now, now - self._last
            if waited >= self._allowed + self._extra:
                self._end(waited)

    def _end(self, waited: float) -> None:
        blame = [f"the file system of {self.folder} does not answer"]

        def look() -> None:
            blame[:] = self.silent() or ["every rank lives, compare where each one is"]

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
    """(steps done, waiting for the others) of a beat."""
    words = text.split()
    return (int(words[0]), int(words[1])) if len(words) == 5 else (0, 0)


def _on(text: str) -> str:
    words = text.split()
    return f" (pid {words[3]} on {words[4]})" if len(words) == 5 else ""


def _where_main_thread_is() -> str:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    calls = traceback.extract_stack(frame)[-6:] if frame else []
    return " < ".join(f"{Path(c.filename).name}:{c.lineno} {c.name}" for c in reversed(calls))
