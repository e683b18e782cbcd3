"""Start the process group, choose the device of each rank, and provide the collectives that the stages need.

A single process starts no process group, and each collective then returns its input. `all_gather` sums
gradients over ranks; with DDP's mean over ranks this gives the gradient of one process with the whole batch.
The user chooses network interfaces by GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.errors import CRASH, GpuFault, UserError
from cluster.rendezvous import Place, leave, meet, part, place, tell_once

T = TypeVar("T")
_flags: Any = None  # a process group on the CPU, so that `agree` does not wait for the GPU


@dataclass(frozen=True)
class World:
    """Rank and device of this process. launcher: alone, torchrun or slurm."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    launcher: str = "alone"

    @property
    def main(self) -> bool:
        return self.rank == 0


def start(
    device: str = "auto",
    rendezvous: Path | None = None,
    timeout: float = 600.0,
    collective_timeout: float = 1800.0,
    deterministic: bool = False,
) -> World:
    """Join the other ranks that torchrun or srun has started. A process without a launcher is the only rank.

    device: auto, cpu, cuda or cuda:N. rendezvous: a folder that all nodes share (the exp-dir), required under
    srun. timeout: seconds to wait for every rank to join, and then for its first collective.
    collective_timeout: seconds after which a later one fails; longer than any wait that cluster.heartbeat
    allows, which names the rank that hangs. deterministic: see `choose_algorithms`.
    Raises UserError when tasks and GPUs do not match or a rank does not join, GpuFault for a broken GPU,
    SystemExit if the ranks have joined but do not reach each other.
    """
    global _flags
    choose_algorithms(deterministic)
    me = place()
    # The ranks meet first, so that what they all refuse next is printed once.
    store = meet(me, rendezvous, timeout) if me.size > 1 else None
    chosen = pick_device(device, me, torch.cuda.device_count(), os.environ)
    world = World(me.rank, me.size, me.local_rank, chosen, me.launcher)
    _try(chosen)
    if store is None:
        return world
    _refuse_shared_gpus(world, store)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    with _first_contact(backend, timeout):
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", store),
            rank=me.rank,
            world_size=me.size,
            timeout=timedelta(seconds=collective_timeout),
            device_id=chosen if chosen.type == "cuda" else None,
        )
        one = torch.ones((), device=chosen)
        dist.all_reduce(one)
        one.item()  # waits for a GPU
    with _first_contact("gloo", timeout):
        # Others may wait for hours while rank 0 works in on_main; cluster.heartbeat finds a rank that hangs.
        _flags = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        barrier()
    return world


@contextlib.contextmanager
def _first_contact(backend: str, seconds: float) -> Iterator[None]:
    """End this rank by one line if the first collective of a backend fails, or takes more than `seconds`."""
    cure = f"name the network interface that joins the nodes in {backend.upper()}_SOCKET_IFNAME"

    def ring() -> None:
        told = f"error: {socket.gethostname()}: no contact with all ranks by {backend} in {seconds:.0f} s"
        print(f"{told}: {cure}", file=sys.stderr, flush=True)
        os._exit(CRASH)

    alarm = threading.Timer(seconds, ring)
    alarm.daemon = True
    alarm.start()
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:160]
        tell_once(f"error: the ranks do not reach each other by {backend} ({reason}): {cure}")
        leave()
        raise SystemExit(CRASH) from None
    finally:
        alarm.cancel()


def choose_algorithms(deterministic: bool) -> None:
    """Whether torch may use deterministic algorithms only. Call it before the first computation on a GPU.

    An operation that has no deterministic form on a GPU then raises RuntimeError. torchvision's RoIAlign has
    one, which it compiles by Triton. On a CPU nothing changes.
    """
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads such memory


def lone_device(device: str) -> torch.device:
    """The device of a program that is one process, however many of it a launcher has started.

    device: auto, cpu, cuda or cuda:N. Raises UserError for a GPU that torch does not see, GpuFault for a
    broken one.
    """
    chosen = pick_device(device, Place(), torch.cuda.device_count(), os.environ)
    _try(chosen)
    return chosen


def stop() -> None:
    """Destroy the process group, if there is one. `entry.live` does it for a command that returns."""
    global _flags
    if dist.is_initialized():
        dist.destroy_process_group()
    _flags = None
    part()


def pick_device(device: str, me: Place, visible: int, env: Mapping[str, str]) -> torch.device:
    """The device of this rank. visible: number of GPUs that torch sees.

    With --gpus-per-task each task sees only its own GPU; otherwise every task of a node sees all its GPUs.
    Raises UserError on a mismatch, GpuFault when torch sees fewer GPUs than Slurm has given to this process.
    """
    named = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", device)
    if not named:
        raise UserError(f"--device {device}: give auto, cpu, cuda or cuda:N, with N from 0")
    own = gpus_of_process(env)
    if device == "cpu" or (device == "auto" and own == visible == 0):
        return torch.device("cpu")
    granted = int(env.get("SLURM_GPUS_ON_NODE") or 0) if me.launcher == "slurm" and own else 0
    if granted and granted != me.local_size:
        raise UserError(
            f"{me.local_size} tasks but {granted} GPUs on {socket.gethostname()}: ask sbatch for one a GPU "
            f"(--ntasks-per-node={granted}), or give --device cpu"
        )
    if visible < own:
        sees = f"torch {torch.__version__} sees {visible or 'none'}"
        raise GpuFault(_node(env), f"{own} GPUs granted but {sees}")
    if not visible:
        raise UserError(f"--device {device}: torch {torch.__version__} sees no GPU here; give --device cpu")
    if named[1]:
        if int(named[1]) >= visible:
            raise UserError(
                f"--device {device}: torch sees {visible} GPUs here, the last is cuda:{visible - 1}"
            )
        return torch.device("cuda", int(named[1]))
    if visible == 1:
        return torch.device("cuda", 0)  # its own with --gpus-per-task; _refuse_shared_gpus finds a shared one
    if me.local_rank >= visible or (me.launcher != "alone" and me.local_size != visible):
        raise UserError(
            f"{me.local_size} ranks but {visible} GPUs on {socket.gethostname()}: start one rank per GPU "
            "(srun --ntasks-per-node, torchrun --nproc-per-node), or give --device cpu"
        )
    return torch.device("cuda", me.local_rank)


def gpus_of_process(env: Mapping[str, str]) -> int:
    """How many GPUs torch must see in this process of a Slurm job; 0 without a job or a GPU in it.

    SLURM_GPUS_ON_NODE counts those of all tasks, also where --gpus-per-task hides the others'. Without a list
    of the own ones it is at least one. A process can use only the first of several MIG instances.
    """
    if not int(env.get("SLURM_GPUS_ON_NODE") or 0):
        return 0
    if "CUDA_VISIBLE_DEVICES" not in env:
        return 1
    usable = 0
    for name in env["CUDA_VISIBLE_DEVICES"].split(","):
        if name in ("", "-1", "NoDevFiles"):  # CUDA reads the list up to the first entry that is no GPU
            break
        usable += 1
        if name.startswith("MIG-"):
            break
    return usable


def _node(env: Mapping[str, str]) -> str:
    return env.get("SLURMD_NODENAME") or socket.gethostname()


def _try(device: torch.device) -> None:
    """Make a GPU the current one and compute on it. Raises GpuFault if that fails."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.set_device(device)
        torch.ones(8, device=device).sum().item()
    except RuntimeError as error:
        raise GpuFault(
            _node(os.environ), f"{device} does not compute ({str(error).splitlines()[0]})"
        ) from None


def gpu_id(uuid: str, env: Mapping[str, str]) -> str:
    """What tells a GPU from all others of its node: its uuid, or the name of the MIG instance.

    The instances of one GPU may report the uuid of that GPU.
    """
    first = env.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    return first if first.startswith("MIG-") else uuid


def _refuse_shared_gpus(world: World, store: dist.Store) -> None:
    if world.device.type != "cuda":
        return
    uuid = str(torch.cuda.get_device_properties(world.device).uuid)
    mine = f"{socket.gethostname()}/{gpu_id(uuid, os.environ)}"
    store.set(f"gpu-{world.rank}", mine)
    all_ranks = [store.get(f"gpu-{rank}").decode() for rank in range(world.size)]
    twins = [rank for rank in range(world.size) if all_ranks[rank] == mine]
    if len(twins) > 1:
        raise UserError(f"ranks {twins} share one GPU ({mine}): start one rank per GPU, or give --device cpu")


def per_rank(global_batch: int, world: World, flag: str = "--batch-size") -> int:
    """This rank's share of a global batch. Raises UserError if the number of ranks does not divide it."""
    if global_batch < 1 or global_batch % world.size:
        below = global_batch // world.size * world.size
        near = " or ".join(str(size) for size in (below, below + world.size) if size > 0) or world.size
        raise UserError(f"{flag} {global_batch} is not divisible by {world.size} ranks; give {near}")
    return global_batch // world.size


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, z)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # Every rank has the same gradient, so the sum over ranks is W times this rank's own.
        size = dist.get_world_size()
        return grads[0].chunk(size)[dist.get_rank()] * size


def all_gather(z: Tensor) -> Tensor:
    """Gather z [n, D] of each of W ranks into [W n, D], in rank order; n must be the same on every rank.

    Each rank must compute the same loss of all W n rows. The backward pass gives the sum of their gradients
    over ranks, so parameters get W times their share, and DDP's mean over ranks is exactly the gradient of
    one process with the whole batch.
    """
    if not dist.is_initialized():
        return z
    return _AllGather.apply(z.contiguous())


def agree(*flags: int) -> tuple[int, ...]:
    """The maximum of each flag over all ranks, by one small all-reduce on the CPU."""
    if not dist.is_initialized():
        return tuple(int(flag) for flag in flags)
    tensor = torch.tensor(flags, dtype=torch.int64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=_flags)
    return tuple(tensor.tolist())


def barrier() -> None:
    """Wait until every rank has reached this call."""
    agree(0)


def gather_objects(item: T) -> list[T]:
    """The items of all ranks, in rank order, on every rank. Items are picklable; their sizes may differ."""
    if not dist.is_initialized():
        return [item]
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item, group=_flags)
    return items


def on_main(work: Callable[[], T]) -> T:
    """Call `work` on rank 0 only and return its result on every rank.

    If it raises, rank 0 raises that exception, and the other ranks exit with status 0 and print nothing.
    """
    if not dist.is_initialized():
        return work()
    answer: list[Any] = [None]
    failure: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            answer = [work()]
        except BaseException as error:
            failure = error
    (failed,) = agree(failure is not None)
    if failure:
        raise failure
    if failed:
        raise SystemExit(0)
    dist.broadcast_object_list(answer, src=0, group=_flags)
    return answer[0]
