"""A hung step is ended, and the silent rank is named. No torch here.

Every rank keeps EXP_DIR/heartbeat/rank_N: "count step place host", rewritten by a thread. A rank that is stopped, or
cut from the file system, no longer writes; one whose main thread hangs writes on, but does not come to the next
step. When a rank has seen no step boundary for `step_timeout` seconds it ends itself and says who was silent. A
stopped rank can't end itself: `srun --kill-on-bad-exit=1` does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HUNG = 1  # exit status of a rank that ends itself


class Heartbeat:
    """Beats of this rank, and its watch over the others. Nothing is ended before the first boundary + `first`.

    alongside: called with every beat (the owner file's).
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
        self.interval = min(5.0, step_timeout / 4)
        self.alongside = alongside
        self.step = 0
        self.place = "starting"
        self._deadline = time.monotonic() + max(first, step_timeout)
        self._patience = 0.0
        self._seen: dict[int, tuple[str, float]] = {}  # rank -> its last text, when it last changed
        self._closed = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        for target in (self._beat, self._watch):
            threading.Thread(target=target, name=target.__name__, daemon=True).start()

    def arrived(self, step: int) -> None:
        """At the boundary before step `step`; the other ranks may not be."""
        self.step, self.place = step, "boundary"

    def left(self) -> None:
        """All ranks were at the boundary."""
        self.place = "step"
        self._deadline = time.monotonic() + self.step_timeout + self._patience

    @contextlib.contextmanager
    def patience(self, seconds: float) -> Iterator[None]:
        """Expect no step boundary for `seconds` more: validation, compilation, a large save."""
        before, self._patience = self._patience, self._patience + seconds
        self._deadline += seconds
        try:
            yield
        finally:
            self._patience = before
            self._deadline = max(time.monotonic() + self.step_timeout + before, self._deadline - seconds)

    def close(self) -> None:
        self._closed.set()

    def silent(self) -> list[str]:
        """The ranks to blame, for a reader: first those without a sign of life, else those behind the others."""
        now = time.monotonic()
        last = {rank: text.split() + ["?"] * 4 for rank, (text, _) in self._seen.items()}
        quiet = [rank for rank, (_, changed) in self._seen.items() if now - changed > 2.5 * self.interval]
        if quiet:
            return [
                f"rank {rank} on {last[rank][3]} (no sign of life for {now - self._seen[rank][1]:.0f} s)"
                for rank in sorted(quiet)
            ]
        key = {rank: (int(words[1]) if words[1].isdigit() else 0, words[2] == "boundary") for rank, words in last.items()}
        if not key or min(key.values()) == max(key.values()):
            return []
        return [
            f"rank {rank} on {last[rank][3]} (alive, but still in step {key[rank][0]})"
            for rank in sorted(key)
            if key[rank] == min(key.values())
        ]

    def _beat(self) -> None:
        """Writes and reads; may hang with the file system, so it decides nothing."""
        count = 0
        while not self._closed.is_set():
            count += 1
            with contextlib.suppress(OSError):
                self._file(self.rank).write_text(f"{count} {self.step} {self.place} {socket.gethostname()}")
            for rank in range(self.size):
                text = "never seen 0 ?"
                with contextlib.suppress(OSError):
                    text = self._file(rank).read_text() or text
                if self._seen.get(rank, ("", 0.0))[0] != text:
                    self._seen[rank] = (text, time.monotonic())
            self.alongside()
            self._closed.wait(self.interval)

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.interval)):
            if time.monotonic() < self._deadline:
                continue
            who = ", ".join(self.silent()) or "no rank in particular; where this one stands is below"
            print(
                f"error: rank {self.rank} on {socket.gethostname()}: no step boundary for {self.step_timeout:.0f} s "
                f"in step {self.step}; to blame: {who}",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(all_threads=True)
            os._exit(HUNG)

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank_{rank}"
