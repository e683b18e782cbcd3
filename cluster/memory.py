"""How much memory this rank may use, and how much it has used."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cluster import distributed
from cluster.distributed import World
from cluster.rendezvous import place

# A training step takes about this many times what autograd keeps, at its peak: measured in seven settings of
# detection on a CPU (docs/results.md).
PEAK = 1.3
SHARE = 0.85  # of the free memory that what is fitted to it may fill
ROOT = Path("/")


def free_memory(device: torch.device, local_size: int, env: Mapping[str, str] = os.environ) -> int:
    """Bytes that this rank may still take: of its GPU, or else its share of the node's main memory.

    Main memory is the least of what the kernel calls available, what the limits of the control groups
    (versions 1 and 2) and of the process (ulimit -v) leave, and what Slurm grants a node.
    local_size: number of ranks on this node.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_main_memory(ROOT, env)) // local_size


def least_free(world: World) -> int:
    """Bytes that every rank may still take: the least that `free_memory` finds on one. Call it on all."""
    return -distributed.agree(-free_memory(world.device, place().local_size))[0]


def peak_memory(device: torch.device) -> str:
    """The most memory that this process has had, as text such as "3.2 GB of memory"."""
    if device.type == "cuda":
        return f"{tell_bytes(torch.cuda.max_memory_allocated(device))} of GPU memory"
    return f"{tell_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)} of memory"


def tell_bytes(number: float) -> str:
    """An amount of memory for a reader: 3.2 GB, and below 0.1 GB as 45 MB."""
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.0f} MB"


def saved_bytes(forward: Callable[[], Any], model: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of `forward()`, besides the weights of `model`."""
    sizes = {tensor.untyped_storage().data_ptr(): 0 for tensor in [*model.parameters(), *model.buffers()]}
    kept = list[Tensor]()  # so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes.setdefault(storage.data_ptr(), storage.nbytes())
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(sizes.values())


def _main_memory(root: Path, env: Mapping[str, str]) -> Iterator[int]:
    """The bytes that each limit leaves; `root` holds proc/ and sys/."""
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            files = "memory.max", "memory.current", "inactive_file "
            yield from _left(root / "sys/fs/cgroup", path, *files)
        elif "memory" in controllers.split(","):
            files = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "
            yield from _left(root / "sys/fs/cgroup/memory", path, *files)
    granted = env.get("SLURM_MEM_PER_NODE", "")  # MB
    if granted.isdigit() and int(granted):  # 0 stands for all that the node has
        yield int(granted) << 20
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        yield max(0, limit - used)


def _left(mount: Path, path: str, limit: str, usage: str, pages: str) -> Iterator[int]:
    """What the limits of a control group and of those above it leave.

    pages: begins the line of memory.stat with the bytes of files that the kernel drops when memory is short;
    they count as free. In a container only the mount itself may exist, which then is the group.
    """
    folder = mount / path.lstrip("/")
    for group in [folder, *folder.parents]:
        if not group.is_relative_to(mount):
            return
        top, used = ("".join(_lines(group / name)) for name in (limit, usage))
        if top.isdigit() and used.isdigit():
            cached = [line.split()[1] for line in _lines(group / "memory.stat") if line.startswith(pages)]
            yield max(0, int(top) - max(0, int(used) - sum(map(int, cached))))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
