"""Batches by the number of the step: there is no sampler and no worker with a state to lose (law 1).

A key (epoch, position, sample) says all that a data set needs to make a sample: the epoch, the place in that
epoch, and what lies there. Keys are a function of the step alone, so a run goes on anywhere in the data.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader

from cluster.distributed import World, per_rank

Key = tuple[int, int, int]  # epoch, position in the epoch, sample


class Samples(Protocol):
    """A data set whose item is a function of its key."""

    def __getitem__(self, key: Key) -> Any: ...

    def source(self, key: Key) -> str:
        """Where the sample is from, for the reader of an error."""
        ...


@dataclass(frozen=True)
class Batches:
    """The batches of this rank: its share of a global batch of `batch_size`, epoch after epoch.

    order: the samples of an epoch in the order in which they are seen; of these the first per_epoch *
    batch_size are taken. workers: processes that make samples, none of which changes what is made.
    """

    samples: Samples
    order: Callable[[int], np.ndarray]
    per_epoch: int  # steps
    batch_size: int
    world: World
    workers: int = 0
    collate: Callable[[list], Any] | None = None

    def keys(self, first: int, last: int) -> Iterator[list[Key]]:
        """The keys of this rank's share of batches first to last - 1.

        The shares of the ranks, one after the other, are the global batch whatever the number of ranks.
        """
        share, epoch, order = per_rank(self.batch_size, self.world), -1, np.empty(0, np.int64)
        for batch in range(first, last):
            if batch // self.per_epoch != epoch:
                epoch = batch // self.per_epoch
                order = self.order(epoch)
            start = batch % self.per_epoch * self.batch_size + self.world.rank * share
            yield [(epoch, place, int(order[place])) for place in range(start, start + share)]

    def between(self, first: int, last: int, offset: int = 0) -> Iterator[tuple[int, Any]]:
        """(step, its batch on this rank's device) for steps first to last - 1.

        offset: step s takes the data of batch s + offset.
        """
        loader: DataLoader = DataLoader(
            self.samples,  # type: ignore[arg-type]
            batch_sampler=self.keys(first + offset, last + offset),
            num_workers=self.workers,
            # Forked workers share what the data set holds in memory, they do not copy it.
            multiprocessing_context="fork" if self.workers else None,
            worker_init_fn=_leave_threads_to_the_others,
            collate_fn=self.collate,
            pin_memory=self.world.device.type == "cuda",
        )
        for step, batch in zip(itertools.count(first), loader, strict=False):
            yield step, to_device(batch, self.world.device)

    def sources(self, batch: int) -> list[str]:
        """What batch number `batch` was made of, each once."""
        (keys,) = self.keys(batch, batch + 1)
        return list(dict.fromkeys(self.samples.source(key) for key in keys))


def to_device(batch: Any, device: torch.device) -> Any:
    """Every tensor of a batch, in lists, tuples and dicts too, on `device`."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: to_device(item, device) for name, item in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(item, device) for item in batch)
    return batch


def _leave_threads_to_the_others(_: int) -> None:
    """A worker is one thread: the processes are the parallelism, OpenCV's own would fight them for the cores.

    0 and not 1: OpenCV would stop the threads of its parent for 1, which a forked process does not have.
    """
    cv2.setNumThreads(0)
