"""Bounds within which a reader of small files must stay, whatever they hold."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


@contextmanager
def bounded(seconds: int = 10, memory: int = 2 << 30) -> Iterator[None]:
    """Let what runs inside fail after so much CPU time, and with MemoryError above so much more memory.

    memory: bytes of address space beyond what is taken now. It has room for the stacks and arenas of threads.
    """
    page = resource.getpagesize()
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * page
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = taken + memory
    resource.setrlimit(
        resource.RLIMIT_AS, (min(most, hard) if hard != resource.RLIM_INFINITY else most, hard)
    )
    before = signal.signal(signal.SIGPROF, _too_long)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _too_long(number: int, frame: FrameType | None) -> None:
    raise AssertionError("takes too long")  # and no TimeoutError, which is an OSError and might be handled
