"""Find the rank of this process (torchrun, srun or alone), and connect all ranks through a store."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import atomic
from cluster.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

ORDINARY_STEPS = 0xFFFFFFF0  # step ids above it: the batch script, the shell of salloc, the extern step
LINGER = 3.0  # seconds that a rank waits for others to find the error that it has found

_met: tuple[Place, Store] | None = None  # kept alive, since rank 0 serves the store


@dataclass(frozen=True)
class Place:
    """The rank of this process among all processes of the same launch."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = "alone"  # or torchrun, slurm


def place(env: Mapping[str, str] = os.environ) -> Place:
    """By the launcher's variables. A plain `python` in a batch script, under salloc or in a pty is alone."""
    if "RANK" in env and "WORLD_SIZE" in env and "LOCAL_RANK" in env:
        return Place(
            int(env["RANK"]),
            int(env["WORLD_SIZE"]),
            int(env["LOCAL_RANK"]),
            int(env.get("LOCAL_WORLD_SIZE", 1)),
            "torchrun",
        )
    step = env.get("SLURM_STEP_ID", "")
    ordinary = step.isdigit() and int(step) < ORDINARY_STEPS and "SLURM_PTY_PORT" not in env
    if ordinary and "SLURM_PROCID" in env:
        size = int(env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"])
        counts = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or str(size)
        local_size = _expand(counts)[int(env.get("SLURM_NODEID", 0))]
        return Place(int(env["SLURM_PROCID"]), size, int(env["SLURM_LOCALID"]), local_size, "slurm")
    return Place()


def _expand(counts: str) -> list[int]:
    """Expand Slurm's task counts: '2(x3),1' -> [2, 2, 2, 1]."""
    numbers = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        numbers += [int(count)] * int(times or 1)
    return numbers


def meet(me: Place, folder: Path | None, timeout: float) -> Store:
    """A store that all ranks have joined. folder: on a file system that all nodes share, required under srun.

    Raises UserError, which names the ranks that did not join within `timeout` seconds.
    """
    global _met
    if me.launcher == "torchrun":
        from torch.distributed import rendezvous

        store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=timeout))))
        _wait_for_all(store, me, timeout)
    elif folder is None:
        raise UserError(f"{me.size} ranks under srun need a shared folder to meet in: give --exp-dir")
    else:
        store = _meet_in(folder, me, timeout)
    _met = me, store
    return store


def part() -> None:
    """Release the store."""
    global _met
    _met = None


def tell_once(line: str) -> bool:
    """Print `line` on standard error on only one of the ranks that pass the same line. True on that rank.

    All ranks can find the same error in the same input. Rank 0 then prints it. The other ranks wait LINGER
    seconds for that; if rank 0 has not found the error by then, the first of them prints it.
    """
    if _met and _met[0].rank:
        _wait(lambda: _count(f"told {line}", 0) > 0)
    if _count(f"told {line}") > 1:
        return False
    print(line, file=sys.stderr, flush=True)
    return True


def leave() -> None:
    """Count this rank as ended, after an error. Rank 0, which serves the store, first waits for the others.

    They ask the store whether their error has been printed. Rank 0 waits at most LINGER seconds for them.
    A rank that ends for another reason does not come here: the host of rank 0 may no longer answer.
    """
    _count("left")
    if _met and _met[0].rank == 0:
        size = _met[0].size
        _wait(lambda: _count("left", 0) >= size)


def _wait(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds, at most LINGER seconds."""
    deadline = time.monotonic() + LINGER
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


def _count(key: str, more: int = 1) -> int:
    """Add to a counter that all ranks share and return it; 1 on a single rank, or if rank 0 does not answer.

    The store has no time-out of its own for this, so a thread asks it: rank 0 may be stopped or cut off.
    """
    answers = [1]

    def ask(store: Store) -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(store.add(key, more))

    if _met:
        asking = threading.Thread(target=ask, args=(_met[1],), daemon=True)
        asking.start()
        asking.join(LINGER)
    return answers[-1]


def _meet_in(folder: Path, me: Place, timeout: float) -> Store:
    from torch.distributed import TCPStore

    note = folder / f".rendezvous-{_launch_key(os.environ)}"
    if me.rank == 0:
        atomic.make_folder(folder)
        door = _listen(me)
        host, port = door.getsockname()[:2]
        serve = partial(TCPStore, host, port, me.size, True, timedelta(seconds=timeout), False)
        listening = door.detach()
        try:
            store = serve(master_listen_fd=listening)
        except NotImplementedError:  # torch 2.6 takes an open socket in its older store alone
            store = serve(master_listen_fd=listening, use_libuv=False)
        token = uuid.uuid4().hex
        store.set("token", token)
        atomic.write_text(note, json.dumps({"hosts": [host], "port": port, "token": token}))
    else:
        store = _join(note, me, timeout)
    try:
        _wait_for_all(store, me, timeout)
    finally:
        if me.rank == 0:
            note.unlink(missing_ok=True)
    return store


def _launch_key(env: Mapping[str, str]) -> str:
    """Equal on all ranks of a launch, different for other launches, so that no old address file is read."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "SLURM_SRUN_COMM_PORT")
    return "-".join(env.get(name, "0") for name in names)


def _listen(me: Place) -> socket.socket:
    """A socket that listens on one address of this node, by which the nodes of the other ranks reach it.

    With all ranks on this node that is the loopback. torch would listen on every address of the node.
    """
    addresses = ["127.0.0.1"] if me.local_size == me.size else _my_addresses()
    for address in addresses:
        with contextlib.suppress(OSError):  # a name may lead to an address that is not of this node
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            door = socket.socket(family, socket.SOCK_STREAM)
            try:
                # With port 0 the kernel picks a free port. A port computed from the job id may be in use.
                door.bind((address, 0))
                door.listen(socket.SOMAXCONN)
                return door
            except OSError:
                door.close()
    raise UserError(f"{socket.gethostname()}: can listen on none of its addresses, {addresses}")


def _my_addresses() -> list[str]:
    """Addresses by which other nodes may reach this one, the most likely first; the loopback's come last."""
    found = []
    with contextlib.suppress(OSError):
        # Slurm's own way from this node to srun's. Connecting a datagram socket sends nothing.
        srun = os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "10.255.255.255")
        with socket.socket(socket.AF_INET6 if ":" in srun else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((srun, 9))
            found.append(probe.getsockname()[0])
    for name in (os.environ.get("SLURMD_NODENAME"), socket.gethostname()):
        with contextlib.suppress(OSError):
            found += [str(answer[4][0]) for answer in socket.getaddrinfo(name, 0) if name]
    return sorted(dict.fromkeys(found), key=lambda address: address.startswith("127.") or address == "::1")


def _join(note: Path, me: Place, timeout: float) -> TCPStore:
    from torch.distributed import TCPStore

    deadline = time.monotonic() + timeout
    seen = "rank 0 has not written its address"
    while time.monotonic() < deadline:
        try:
            content = json.loads(note.read_text())
        except (OSError, ValueError):
            content = {"hosts": []}
        for host in content["hosts"]:
            with contextlib.suppress(OSError):
                # Try the address first: a store needs a minute to give up on a name that does not resolve.
                socket.create_connection((host, content["port"]), timeout=3).close()
                left = timedelta(seconds=max(1.0, deadline - time.monotonic()))
                store = TCPStore(host, content["port"], me.size, False, left, wait_for_workers=False)
                if store.get("token").decode() == content["token"]:
                    return store
            seen = f"rank 0 does not answer at {host}:{content['port']}"
        time.sleep(0.1)
    raise UserError(
        f"rank {me.rank} on {socket.gethostname()} did not reach rank 0 in {timeout:.0f} s ({seen}): "
        f"is {note.parent} on a file system that all nodes share, and can the nodes reach each other?"
    )


def _wait_for_all(store: Store, me: Place, timeout: float) -> None:
    """Wait for every rank to join. It can take long: to import torch from a cold disk takes 20 s or more."""
    from torch.distributed import DistNetworkError, DistStoreError

    store.set(f"here-{me.rank}", socket.gethostname())
    missing = list(range(me.size))
    deadline = time.monotonic() + timeout
    while missing and (left := deadline - time.monotonic()) > 0:
        try:
            store.wait([f"here-{missing[0]}"], timedelta(seconds=max(0.1, min(5.0, left))))
            missing.pop(0)
        except DistNetworkError:
            raise UserError(f"rank {me.rank}: rank 0 left before all {me.size} ranks had come") from None
        except DistStoreError:
            continue  # only this wait has timed out
    if missing:
        gone = [rank for rank in missing if not store.check([f"here-{rank}"])]
        raise UserError(f"rank {', '.join(map(str, gone))} of {me.size} did not come within {timeout:.0f} s")
