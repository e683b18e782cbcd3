"""Make the samples of pretraining: two views of one window of the pool."""

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
    """A function from an epoch to the order of its samples: a permutation of the pool, int64 [samples]."""
    return lambda epoch: draw(Use.PRETRAINING_ORDER, seed, epoch).permutation(samples)


class Pairs(Dataset):
    """Item (epoch, position, sample) -> two views of window `sample`, uint8 [3, S, S] each.

    Each window occurs once an epoch, so its views are a function of (seed, epoch, sample) alone.
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
        """File and position of the window, for error messages: "file.png @x,y"."""
        return self.store.source(key[2])
