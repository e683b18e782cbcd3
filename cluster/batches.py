"""Batches that depend only on the step number, so that no sampler or worker has a state to save.

A key (epoch, position, sample) holds all that a data set needs to make a sample: the epoch, the position in
the order of that epoch, and the index of the sample. Keys are a function of the step alone, so a run can
resume at any step.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

from cluster.distributed import World, agree, per_rank
from cluster.errors import UserError
from cluster.rendezvous import place

Key = tuple[int, int, int]  # epoch, position in the epoch, sample
SHARED = "/dev/shm"  # where torch keeps the tensors that a worker passes on
# By default, on each rank. Each makes 450 pairs of views a second or more, and a GPU takes up to 3,000.
MOST_WORKERS = 16
PAGE = 4096  # bytes: what a tensor there takes is a multiple of it


class Samples(Protocol):
    """A data set whose items are a function of their key alone."""

    def __getitem__(self, key: Key) -> Any: ...

    def source(self, key: Key) -> str:
        """Where the sample comes from, for error messages."""
        ...


@dataclass(frozen=True)
class Batches:
    """The batches of this rank: its share of each global batch of `batch_size` samples, over all epochs.

    order: maps an epoch to the order of its samples; the first per_epoch * batch_size of them are used.
    workers: number of DataLoader workers, by default as many as the CPUs are for and as shared memory holds;
    it does not change the samples.
    """

    samples: Samples
    order: Callable[[int], np.ndarray]
    per_epoch: int  # steps
    batch_size: int
    world: World
    workers: int | None = 0
    collate: Callable[[list], Any] | None = None

    def keys(self, first: int, last: int) -> Iterator[list[Key]]:
        """The keys of this rank's share of batches `first` to `last` - 1.

        The shares of all ranks, in rank order, form the same global batch for any number of ranks.
        """
        share, epoch, order = per_rank(self.batch_size, self.world), -1, np.empty(0, np.int64)
        for batch in range(first, last):
            if batch // self.per_epoch != epoch:
                epoch = batch // self.per_epoch
                order = self.order(epoch)
            start = batch % self.per_epoch * self.batch_size + self.world.rank * share
            yield [(epoch, place, int(order[place])) for place in range(start, start + share)]

    def between(self, first: int, last: int, offset: int = 0) -> Generator[tuple[int, Any]]:
        """Yield (step, this rank's batch on its device) for steps `first` to `last` - 1.

        offset: step s takes the data of batch s + offset. Raises UserError if the batches that the workers of
        this node prepare do not fit into shared memory.
        """
        workers = self._measure(first + offset) if self.workers != 0 and first < last else 0
        loader: DataLoader = DataLoader(
            self.samples,  # type: ignore[arg-type]
            batch_sampler=self.keys(first + offset, last + offset),
            num_workers=workers,
            # Forked workers share the memory of the data set; other start methods would copy it.
            multiprocessing_context="fork" if workers else None,
            worker_init_fn=_leave_threads_to_the_others,
            collate_fn=self.collate,
            pin_memory=self.world.device.type == "cuda",
        )
        for step, batch in zip(itertools.count(first), loader, strict=False):
            yield step, to_device(batch, self.world.device)

    def _measure(self, batch: int) -> int:
        """The number of workers, for whose batches there is room in shared memory.

        They keep 2 batches each there, and the one in use. A worker that finds no room loses its batch, and
        the run would wait for it. Raises UserError if there is no room for the number that was asked for, or
        for two.
        """
        keys = next(self.keys(batch, batch + 1))
        sample = (self.collate or default_collate)([self.samples[keys[0]]])
        size = sum(-(-tensor.nbytes // PAGE) * PAGE for tensor in tensors(sample)) * len(keys)
        batch_bytes = size * place().local_size
        try:
            room = os.statvfs(SHARED).f_bavail * os.statvfs(SHARED).f_frsize
        except OSError:  # no such file system here: torch uses another
            room = 1 << 62
        workers = self.workers
        if workers is None:
            workers = default_workers(self.world.device)
            workers = max(min(2, workers), min(workers, (room // max(1, batch_bytes) - 1) // 2))
        need = (2 * workers + 1) * batch_bytes
        # All ranks look before the first worker starts, and all of them end or none.
        lacking, shortest = agree(need if need > room else 0, -room)
        if lacking:
            raise UserError(
                f"{SHARED} has {-shortest / 1e6:.0f} MB of room, and {workers} workers need "
                f"{lacking / 1e6:.0f} MB for their batches: give --workers 0, or more room (docker run "
                f"--shm-size={lacking // 10**6 + 64}m)"
            )
        return workers

    def sources(self, batch: int) -> list[str]:
        """The sources of the samples in this rank's share of batch number `batch`, each named once."""
        (keys,) = self.keys(batch, batch + 1)
        return list(dict.fromkeys(self.samples.source(key) for key in keys))


def default_workers(device: torch.device, env: Mapping[str, str] = os.environ) -> int:
    """The number of workers for the CPUs that this rank may use, at least 1 and at most MOST_WORKERS.

    One CPU is left for the process that feeds a GPU. Where the CPU itself trains, 2 workers are far ahead of
    it, and more would be in its way.
    """
    if device.type != "cuda":
        return 2
    cpus, here = len(os.sched_getaffinity(0)), place(env)
    told = env.get("SLURM_CPUS_PER_TASK", "")
    cpus = min(cpus, int(told)) if told.isdigit() else cpus
    # srun counts the CPUs of each rank; elsewhere the ranks of this node share those of one task.
    if here.launcher != "slurm" or not told.isdigit():
        cpus //= here.local_size
    return max(1, min(MOST_WORKERS, cpus - 1))


def tensors(batch: Any) -> Iterator[torch.Tensor]:
    """Every tensor of a batch, including those inside lists, tuples and dicts."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, (dict, list, tuple)):
        for item in batch.values() if isinstance(batch, dict) else batch:
            yield from tensors(item)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor on `device`, including those inside lists, tuples and dicts."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: to_device(item, device) for name, item in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(item, device) for item in batch)
    return batch


def _leave_threads_to_the_others(_: int) -> None:
    """Turn off OpenCV's threads in a DataLoader worker: they would compete with other workers for the cores.

    The number is 0, since 1 would make OpenCV stop the threads of its parent, which a forked process lacks.
    """
    cv2.setNumThreads(0)
