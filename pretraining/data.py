"""Make the samples of pretraining: two views of one window of the pool."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cluster.batches import Key
from schematics.draws import Use, draw
from schematics.recipes import SHARE, two_views
from schematics.store import WindowStore


def epoch_order(seed: int, samples: int) -> Callable[[int], np.ndarray]:
    """A function from an epoch to the order of its samples: a permutation of the pool, int64 [samples]."""
    return lambda epoch: draw(Use.PRETRAINING_ORDER, seed, epoch).permutation(samples)


def describe_views(recipe: str, size: int, extent: int) -> str:
    """What the views show, as a line for the log. extent: side in px of the sheet."""
    if recipe != "drawing":
        return f"views by the recipe {recipe}: 8 to 100 % of the window, drawn at {size} px"
    shown = f"{round(SHARE[0] * extent)} to {extent} px of the sheet"
    return f"views by the recipe drawing: each shows {shown}, drawn at {size} px"


class Pairs(Dataset):
    """Item (epoch, position, sample) -> two views of window `sample`, uint8 [3, S, S] each.

    Each window occurs once an epoch, so its views are a function of (seed, epoch, sample) alone. extent: see
    `two_views`.
    """

    def __init__(
        self,
        store: WindowStore,
        recipe: str,
        size: int,
        extent: int,
        seed: int,
        strength: float,
        orientation: bool,
    ) -> None:
        self.store, self.recipe, self.size, self.extent, self.seed = store, recipe, size, extent, seed
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
            extent=self.extent,
            tolerance=self.store.tolerance(sample),
        )
        view1, view2 = (torch.from_numpy(np.ascontiguousarray(view.transpose(2, 0, 1))) for view in views)
        return view1, view2

    def source(self, key: Key) -> str:
        """File and position of the window, for error messages: "file.png @x,y"."""
        return self.store.source(key[2])
