"""Ranks: who there is, and the few collectives that the stages need.

A process alone starts no process group and every function here is then the identity. Law 3: `all_gather` sums
gradients over ranks, which with DDP's mean over ranks is the gradient of one process with the whole batch.
Interfaces are the user's to choose: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.errors import UserError
from cluster.rendezvous import Place, meet, part, place

T = TypeVar("T")
_flags: Any = None  # a process group on the CPU, so that agreeing does not wait for the GPU


@dataclass(frozen=True)
class World:
    """This process among the ranks. launcher: alone, torchrun or slurm."""

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
) -> World:
    """Join the other ranks of torchrun or srun, or be alone.

    device: auto, cpu, cuda or cuda:N. rendezvous: a folder that all nodes share (the exp-dir), needed under
    srun. timeout: seconds to wait for every rank to come. collective_timeout: seconds after which a
    collective gives up; longer than the watchdog's step_timeout, which knows the names of the silent ranks.
    Raises UserError when tasks and GPUs do not match or a rank does not come.
    """
    global _flags
    me = place()
    chosen = pick_device(device, me, torch.cuda.device_count(), os.environ)
    world = World(me.rank, me.size, me.local_rank, chosen, me.launcher)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if me.size == 1:
        return world
    store = meet(me, rendezvous, timeout)
    _refuse_shared_gpus(world, store)
    limit = timedelta(seconds=collective_timeout)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", store),
        rank=me.rank,
        world_size=me.size,
        timeout=limit,
        device_id=chosen if chosen.type == "cuda" else None,
    )
    # Rank 0 may work for hours in on_main while the others wait; who hangs is the watchdog's to find.
    _flags = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    return world


def stop() -> None:
    """Leave the process group, if there is one."""
    global _flags
    if dist.is_initialized():
        dist.destroy_process_group()
    _flags = None
    part()


def pick_device(device: str, me: Place, visible: int, env: Mapping[str, str]) -> torch.device:
    """The device of this rank; `visible` GPUs are seen by torch. Raises UserError on a mismatch.

    Under --gpus-per-task each task sees one GPU, its own; otherwise all tasks of a node see all of them.
    """
    if device == "cpu":
        return torch.device("cpu")
    granted = int(env.get("SLURM_GPUS_ON_NODE") or 0) if me.launcher == "slurm" else 0
    if granted and granted != me.local_size:
        raise UserError(
            f"{me.local_size} tasks but {granted} GPUs on {socket.gethostname()}: ask sbatch for one a GPU "
            f"(--ntasks-per-node={granted}), or give --device cpu"
        )
    if device == "auto" and not visible:
        if granted:
            raise UserError(
                f"{granted} GPUs granted on {socket.gethostname()} but torch {torch.__version__} sees none: "
                "check the driver (nvidia-smi), or give --device cpu"
            )
        return torch.device("cpu")
    if not visible:
        raise UserError(f"--device {device}: torch {torch.__version__} sees no GPU here; give --device cpu")
    if ":" in device:
        return torch.device(device)
    if visible == 1:
        return torch.device("cuda", 0)  # its own under --gpus-per-task; a shared one is found when ranks meet
    if me.local_rank >= visible or (me.launcher != "alone" and me.local_size != visible):
        raise UserError(
            f"{me.local_size} ranks but {visible} GPUs on {socket.gethostname()}: start one rank per GPU "
            "(srun --ntasks-per-node, torchrun --nproc-per-node), or give --device cpu"
        )
    return torch.device("cuda", me.local_rank)


def _refuse_shared_gpus(world: World, store: dist.Store) -> None:
    if world.device.type != "cuda":
        return
    mine = f"{socket.gethostname()}/{torch.cuda.get_device_properties(world.device).uuid}"
    store.set(f"gpu-{world.rank}", mine)
    all_ranks = [store.get(f"gpu-{rank}").decode() for rank in range(world.size)]
    twins = [rank for rank in range(world.size) if all_ranks[rank] == mine]
    if len(twins) > 1:
        raise UserError(f"ranks {twins} share one GPU ({mine}): start one rank per GPU, or give --device cpu")


def per_rank(global_batch: int, world: World, flag: str = "--batch-size") -> int:
    """This rank's part of a global batch (law 2). Raises UserError when the ranks do not divide it."""
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
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad)  # gloo has no reduce_scatter: every rank sums everything and takes its part
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def all_gather(z: Tensor) -> Tensor:
    """[n, D] of this rank -> [W n, D] of all ranks, in the order of ranks; n is the same on each.

    The backward pass sums the gradient over ranks. When each rank computes the same loss of all W n rows, its
    parameters get W times their share of the gradient, and DDP's mean over ranks makes that exact (law 3).
    """
    if not dist.is_initialized():
        return z
    return _AllGather.apply(z.contiguous())


def agree(*flags: int) -> tuple[int, ...]:
    """The largest of each flag over the ranks: one small all_reduce on the CPU."""
    if not dist.is_initialized():
        return tuple(int(flag) for flag in flags)
    tensor = torch.tensor(flags, dtype=torch.int64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=_flags)
    return tuple(tensor.tolist())


def barrier() -> None:
    """Until every rank has come here."""
    agree(0)


def gather_objects(item: T) -> list[T]:
    """Every rank's item, on every rank, in the order of ranks; sizes may differ. Items are picklable."""
    if not dist.is_initialized():
        return [item]
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item, group=_flags)
    return items


def on_main(work: Callable[[], T]) -> T:
    """Rank 0 does the work, every rank gets its result.

    When it raises, rank 0 raises that and tells the reader; the others leave quietly, with exit 0.
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
