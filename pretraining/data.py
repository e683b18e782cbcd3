"""Make the samples of pretraining: two views of one window of the pool."""

from collections.abc import Callable, Collection

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from cluster.batches import Key
from schematics.draws import Use, draw
from schematics.places import across
from schematics.recipes import SHARE, placed_views
from schematics.store import WindowStore


def epoch_order(seed: int, samples: int) -> Callable[[int], np.ndarray]:
    """A function from an epoch to the order of its samples: a permutation of the pool, int64 [samples]."""
    return lambda epoch: draw(Use.PRETRAINING_ORDER, seed, epoch).permutation(samples)


def describe_views(recipe: str, size: int, extent: int, without: Collection[str]) -> str:
    """What the views show, as a line for the log. extent: side in px of the sheet. without: see `Pairs`."""
    name = f"{recipe} without {', '.join(without)}" if without else recipe
    if recipe == "drawing":
        least = "" if "crop" in without else f"{round(SHARE[0] * extent)} to "
        shown = f"each shows {least}{extent} px of the sheet"
    else:
        shown = "the whole window" if "crop" in without else "8 to 100 % of the window"
    return f"views by the recipe {name}: {shown}, drawn at {size} px"


def spread(pool: int, count: int) -> list[int]:
    """At most so many windows of the pool, evenly spread over it and always the same."""
    count = min(count, pool)
    return [i * pool // count for i in range(count)]


class Pairs(Dataset):
    """Item (epoch, position, sample) -> two views of window `sample`, uint8 [C, S, S] each.

    C is 1 in a gray store, whose views become three equal channels where they are normalised: on the device,
    after a third of the copying. Else it is 3. Each window occurs once an epoch, so its views are a function
    of (seed, epoch, sample) alone. extent, without: see `placed_views`. across: whether an item ends with
    what carries a place of the first view into the second, float32 [2, 3] (see `schematics.places`).
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
        without: Collection[str] = (),
        across: bool = False,
    ) -> None:
        self.store, self.recipe, self.size, self.extent, self.seed = store, recipe, size, extent, seed
        self.strength, self.orientation, self.without, self.across = strength, orientation, without, across

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, key: Key) -> tuple[Tensor, ...]:
        epoch, _, sample = key
        (first, place1), (second, place2) = placed_views(
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
            paper=self.store.paper(sample),
            color_mode=self.store.color_mode,
            without=self.without,
        )
        views = [torch.from_numpy(np.atleast_3d(view)).permute(2, 0, 1) for view in (first, second)]
        places = [torch.from_numpy(across(place1, place2))] if self.across else []
        return (*views, *places)

    def source(self, key: Key) -> str:
        """File and position of the window, for error messages: "file.png @x,y"."""
        return self.store.source(key[2])


def collate(items: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The items of a batch, a tensor each: views uint8 [n, C, S, S], and `across` [n, 2, 3] if they have it.

    Views lie in memory as channels_last, as they did, so that pixels are copied in one piece and once.
    """
    upright = [(*(view.permute(1, 2, 0) for view in item[:2]), *item[2:]) for item in items]
    view1, view2, *rest = default_collate(upright)
    return (view1.permute(0, 3, 1, 2), view2.permute(0, 3, 1, 2), *rest)
