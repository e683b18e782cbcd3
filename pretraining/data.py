"""Pairs of views by their key: a sample is a window of the pool, seen twice."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cluster.batches import Key
from schematics.draws import Use, draw
from schematics.recipes import two_views
from schematics.store import WindowStore


def epoch_order(seed: int, samples: int) -> Callable[[int], np.ndarray]:
    """The permutation int64 [samples] in which an epoch goes through the pool."""
    return lambda epoch: draw(Use.PRETRAINING_ORDER, seed, epoch).permutation(samples)


class Pairs(Dataset):
    """Item (epoch, position, sample) -> two views of window `sample`, uint8 [3, S, S] each.

    A window comes once an epoch, so its views are a function of (seed, epoch, sample).
    """

    def __init__(
        self, store: WindowStore, recipe: str, size: int, seed: int, strength: float, orientation: bool
    ) -> None:
        self.store, self.recipe, self.size, self.seed = store, recipe, size, seed
        self.strength, self.orientation = strength, orientation

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor]:
        epoch, _, sample = key
        views = two_views(
            self.store.window(sample),
            self.recipe,
            self.size,
            self.seed,
            epoch,
            sample,
            strength=self.strength,
            orientation=self.orientation,
        )
        view1, view2 = (torch.from_numpy(np.ascontiguousarray(view.transpose(2, 0, 1))) for view in views)
        return view1, view2

    def source(self, key: Key) -> str:
        """The window in words: "file.png @x,y"."""
        return self.store.source(key[2])
