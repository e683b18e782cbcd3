"""Start real processes for tests: the ranks of one launch, or a command of python, each with a log file."""

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

# A server process imports the slow modules once, and the ranks are forked from it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch._dynamo", "torch.utils.tensorboard", "tyro", "detection.stage", "cluster.lifecycle"]
)


class Ranks:
    """Starts `size` processes that each call work(*args), with the environment variables of torchrun."""

    def __init__(
        self, work: Callable, *args: object, size: int = 1, logs: Path, env: dict[str, str] | None = None
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"rank_{rank}.log" for rank in range(size)]
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        self.processes: list[BaseProcess] = []
        for rank in range(size):
            launch = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            launch |= {"LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            target = (str(self.logs[rank]), (launch if size > 1 else {}) | (env or {}), work, args)
            self.processes.append(CONTEXT.Process(target=_child, args=target))
            self.processes[-1].start()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def signal(self, number: signal.Signals, *ranks: int) -> None:
        for rank in ranks or range(len(self.processes)):
            os.kill(self.processes[rank].pid or 0, number)

    def statuses(self, seconds: float = 60.0) -> list[int | None]:
        """Exit statuses, after a wait of at most `seconds` for all ranks; None for one that still runs."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def log(self, rank: int = 0) -> str:
        return self.logs[rank].read_text() if self.logs[rank].exists() else ""

    def errors(self) -> list[str]:
        """The lines of all ranks that start with "error:". Fails if there is a traceback."""
        text = "".join(self.log(rank) for rank in range(len(self.logs)))
        assert "Traceback" not in text, text
        return [line for line in text.splitlines() if line.startswith("error:")]


def _child(log: str, env: dict[str, str], work: Callable, args: tuple) -> None:
    for name in [*filter(lambda name: name.startswith(("SLURM_", "LINEWORK_")), os.environ)]:
        del os.environ[name]
    os.environ |= env
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    import torch

    torch.set_num_threads(1)
    work(*args)


def python(words: Sequence[str], folder: Path) -> None:
    """What `python FILE ...` or `python -m MODULE ...` does in the folder, as the work of a forked rank.

    The modules of the server are there already, which is most of the time that a short command takes.
    """
    os.chdir(folder)
    here = Path(__file__).parent
    ours = {str(here), str(here.parent / "slurm")}  # where pytest lets tests import from, and no user does
    rest = [place for place in sys.path if place not in ours]
    if words[0] == "-m":
        sys.argv, sys.path = list(words[1:]), [str(folder), *rest]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path = list(words), [str((folder / words[0]).parent), *rest]
        runpy.run_path(str(folder / words[0]), run_name="__main__")


def until(condition: Callable[[], object], seconds: float = 30.0, what: str = "condition") -> None:
    """Wait until the condition holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(status.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(status.parent.name))
    return found


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
