"""Work on many sheets in processes of their own: results come in the order of the jobs, in bounded memory."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, TypeVar, cast

import cv2

from schematics.sheets import DataError

Job = TypeVar("Job")
Result = TypeVar("Result")

WORTH = 64 << 20  # bytes of pixels; for less than this a worker takes longer to start than to work
ROOM = 256 << 20  # bytes of pixels that may be under way for each worker


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    work: Callable[[Job], Result], jobs: Sequence[Job], sizes: Sequence[int], workers: int | None = None
) -> Iterator[Result]:
    """Yield work(job) for each job, in order, whatever the number of workers.

    sizes: bytes of pixels of each job. So many jobs are begun and not yet yielded that they have at most ROOM
    bytes a worker, or one job of any size. workers: processes, by default one a core; there is none where the
    jobs are few or small. Raises what `work` raises, and DataError where a process was killed.
    """
    count = min(workers or cores(), len(jobs), sum(sizes) // WORTH)
    if count < 2:
        yield from map(work, jobs)
        return
    with _started(work, count) as idle:
        busy: dict[Connection, int] = {}
        done: dict[int, Result] = {}
        begun = under_way = 0
        for turn in range(len(jobs)):
            while turn not in done:
                while idle and begun < len(jobs):
                    if under_way and under_way + sizes[begun] > ROOM * count:
                        break
                    worker = idle.pop()
                    worker.send(jobs[begun])
                    busy[worker] = begun
                    under_way += sizes[begun]
                    begun += 1
                for worker in cast(list[Connection], wait(list(busy))):
                    number = busy.pop(worker)
                    done[number] = _received(worker, jobs[number])
                    idle.append(worker)
            yield done.pop(turn)
            under_way -= sizes[turn]


def _received(worker: Connection, job: object) -> Any:
    try:
        result, error, trace = worker.recv()
    except (EOFError, OSError):
        raise DataError(
            f"{getattr(job, 'name', job)}: the process that read it was killed; give it more memory, or "
            "fewer workers"
        ) from None
    if error is not None:
        raise error from RuntimeError(trace)
    return result


@contextlib.contextmanager
def _started(work: Callable, count: int) -> Iterator[list[Connection]]:
    """Yield a connection to each of `count` new processes; they end with the block, or with this process.

    They are started afresh: a fork of a process with threads may stop at a lock that one of them held, and
    what multiprocessing spawns imports the program of this process, torch and all.
    """
    connections, processes = [], []
    try:
        for _ in range(count):
            ours, theirs = Pipe()
            with theirs:
                code = f"import sys; sys.path[:] = {sys.path!r}; from schematics.workers import serve; serve"
                command = [sys.executable, "-c", f"{code}({theirs.fileno()})"]
                processes.append(subprocess.Popen(command, pass_fds=[theirs.fileno()]))
            ours.send(work)
            connections.append(ours)
        yield list(connections)
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.kill()  # what it works on is no longer wanted
            process.wait()


def serve(descriptor: int) -> None:
    """Work on the jobs that come through a connection, until its other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the process that started this one
    cv2.setNumThreads(1)
    connection = Connection(descriptor)
    with contextlib.suppress(EOFError, OSError):
        work = connection.recv()
        while True:
            job = connection.recv()
            answer: tuple[Any, Exception | None, str]
            try:
                answer = work(job), None, ""
            except Exception as error:
                answer = None, error, traceback.format_exc()
            connection.send(answer)
