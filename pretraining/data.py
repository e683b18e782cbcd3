"""Pairs of views by (epoch, sample): the data position is the step number, and there is no sampler state."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from schematics.pack import WindowStore
from schematics.views import two_views

Key = tuple[int, int]  # epoch, sample


def batch_keys(
    seed: int, samples: int, batch_size: int, first: int, last: int, rank: int = 0, world: int = 1
) -> Iterator[list[Key]]:
    """The keys of one rank's share of the global batches of positions first to last - 1.

    An epoch is a permutation of all samples drawn from (seed, epoch), its incomplete last batch left out. The
    shares of the ranks, one after the other, are the global batch whatever the number of ranks.
    """
    per_epoch, share = samples // batch_size, batch_size // world
    epoch, order = -1, np.empty(0, np.int64)
    for position in range(first, last):
        if position // per_epoch != epoch:
            epoch = position // per_epoch
            order = np.random.Generator(np.random.Philox(key=(seed, epoch))).permutation(samples)
        start = position % per_epoch * batch_size + rank * share
        yield [(epoch, int(sample)) for sample in order[start : start + share]]


class Pairs(Dataset):
    """Item (epoch, sample) -> two views uint8 [3, S, S] and the sample's number."""

    def __init__(
        self, store: WindowStore, recipe: str, size: int, seed: int, strength: float, orientation: bool
    ) -> None:
        self.store, self.recipe, self.size, self.seed = store, recipe, size, seed
        self.strength, self.orientation = strength, orientation

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor, int]:
        epoch, sample = key
        views = two_views(
            self.store.window(sample), self.recipe, self.size, self.seed, epoch, sample,
            strength=self.strength, orientation=self.orientation,
        )  # fmt: skip
        view1, view2 = (torch.from_numpy(np.ascontiguousarray(view.transpose(2, 0, 1))) for view in views)
        return view1, view2, sample


def load(pairs: Pairs, keys: Iterator[list[Key]], workers: int, pin_memory: bool) -> DataLoader:
    """A loader over the batches named by `keys`, in their order whatever the number of workers."""
    return DataLoader(
        pairs,
        batch_sampler=keys,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        pin_memory=pin_memory,
    )
