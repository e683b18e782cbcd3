"""Three views of a window of the unlabelled pool, and in each the same boxes around its ink.

Two views show squares of the window that hold one of its boxes, each at a scale and a place of its own, and
redrawn as if by another pen and scanner. The third is the second at half its size, where a box lies on
another level of the pyramid if it is large, and looks smaller in any case (SoCo, arXiv 2106.02637, section
3.2). Every box is carried along exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from cluster.batches import Key
from detection.data import KEEP, crop_boxes, resize
from schematics.draws import Use, draw
from schematics.ink import ink_boxes
from schematics.recipes import redrawn
from schematics.sheets import to_color
from schematics.store import WindowStore
from schematics.windows import Image, paper_color

BOXES = 32  # boxes of a window, at most: those that are likeliest a symbol's
OVERLAP = 0.5  # IoU of two of them, at most, as they are told apart
LEAST, SHARE, ASPECT = 8.0, 0.5, 3.0  # px of a side; share of a view; longer by shorter side, at most
JITTER = 0.1  # share of a box's side by which each of its sides is moved in each view, at most
FIELDS = ("large", "small", "boxes", "known")  # of Views that have one shape
PAIR = 2  # the number of the stream for what the views share


@dataclass(frozen=True)
class Views:
    """The views of a window. S is the side of a view, and C is 1 for a gray pool, else 3.

    large: uint8 [2, C, S, S]. small: uint8 [C, S / 2, S / 2], the second of them. boxes: float32 [3, K, 4],
    the same K boxes in the three views, xyxy in its px. known: bool [K], False for a place without a box.
    truth: for either large view all boxes [N, 4] that it shows. seeds: for either one, from which the RPN's
    anchors are drawn.
    """

    large: Tensor
    small: Tensor
    boxes: Tensor
    known: Tensor
    truth: list[Tensor]
    seeds: list[int]


def window_boxes(store: WindowStore, index: int, largest: float) -> NDArray[np.float32]:
    """The boxes [N, 4] of a window of the pool that are whole, and as large and long as symbols are.

    largest: of their sides, px.
    """
    window = store.window(index)
    boxes = ink_boxes(window, BOXES, OVERLAP, store.paper(index), store.tolerance(index))
    sides = boxes[:, 2:] - boxes[:, :2]
    # A box at the edge of the window may have been cut there.
    whole = (boxes[:, :2] > 1).all(1) & (boxes[:, 2:] < store.side - 1).all(1)
    alike = (sides.min(1) >= LEAST) & (sides.max(1) <= largest) & (sides.max(1) <= ASPECT * sides.min(1))
    return boxes[whole & alike]


class InkViews(Dataset):
    """Item (epoch, position, sample) -> the Views of window `sample`, a function of (seed, epoch, sample).

    size: side of a large view, px. scale: a view shows 1 / (1 + scale) to 1 + scale times its side of the
    window. count: boxes K that are compared. strength: factor on the changes of tone.
    """

    def __init__(
        self, store: WindowStore, size: int, seed: int, scale: float, count: int, strength: float
    ) -> None:
        self.store, self.size, self.seed = store, size, seed
        self.scale, self.count, self.strength = scale, count, strength

    def __len__(self) -> int:
        return len(self.store)

    def source(self, key: Key) -> str:
        """File and position of the window, for error messages."""
        return self.store.source(key[2])

    def __getitem__(self, key: Key) -> Views:
        epoch, _, sample = key
        rng = draw(Use.INK_VIEWS, self.seed, epoch, sample, PAIR)
        boxes = window_boxes(self.store, sample, SHARE * self.size)
        middle = np.full(2, self.store.side / 2)
        if len(boxes):
            middle = boxes[rng.integers(len(boxes))].reshape(2, 2).mean(0)
        window = self.store.window(sample)
        views = [
            self._view(window, boxes, middle, draw(Use.INK_VIEWS, self.seed, epoch, sample, view))
            for view in (0, 1)
        ]
        shown = np.all([(b >= 0).all(1) & (b <= self.size).all(1) for _, b in views], axis=0)
        chosen = rng.permutation(np.flatnonzero(shown))[: self.count]
        pictures = [to_color(picture, self.store.color_mode) for picture, _ in views]
        small, halves = resize(pictures[1], views[1][1], self.size // 2)
        compared = np.zeros((3, self.count, 4), np.float32)
        compared[:, :, 2:] = 1.0  # a place without a box has one of a pixel
        for view, found in enumerate((views[0][1], views[1][1], halves)):
            compared[view, : len(chosen)] = jittered(found[chosen], rng)
        none = np.zeros(len(boxes), np.int64)
        return Views(
            torch.stack([_tensor(picture) for picture in pictures]),
            _tensor(small),
            torch.from_numpy(compared),
            torch.arange(self.count) < len(chosen),
            [torch.from_numpy(crop_boxes(b, none, 0, 0, self.size, KEEP)[0]) for _, b in views],
            rng.integers(2**31, size=2).tolist(),
        )

    def _view(
        self,
        window: Image,
        boxes: NDArray[np.float32],
        middle: NDArray[np.float64],
        rng: np.random.Generator,
    ) -> tuple[Image, NDArray[np.float32]]:
        """A square of the window around a point, drawn at `size` px, and the boxes in its px."""
        zoom = float(np.exp(rng.uniform(-1, 1) * np.log1p(self.scale)))
        reach = min(self.store.side, round(self.size * zoom))
        corner = middle - rng.uniform(0.25, 0.75, 2) * reach
        x, y = np.clip(np.rint(corner), 0, self.store.side - reach).astype(int).tolist()
        image, moved = resize(window[y : y + reach, x : x + reach], boxes - (x, y, x, y), self.size)
        return redrawn(image, paper_color(image), rng, self.strength), moved.astype(np.float32)


def jittered(boxes: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """The boxes [N, 4] with each side moved by up to JITTER of the box's."""
    sides = boxes[:, 2:] - boxes[:, :2]
    return (boxes + rng.uniform(-JITTER, JITTER, boxes.shape) * np.tile(sides, 2)).astype(np.float32)


def collate(items: Sequence[Views]) -> list:
    """B samples -> the fields of Views, with B in front of each shape, and truth and seeds of 2 B views."""
    stacked = [torch.stack([getattr(item, name) for item in items]) for name in FIELDS]
    truth = [boxes for item in items for boxes in item.truth]
    return [*stacked, truth, [seed for item in items for seed in item.seeds]]


def epoch_order(seed: int, samples: int) -> Callable[[int], np.ndarray]:
    """A function from an epoch to the order of its samples: a permutation of the pool, int64 [samples]."""
    return lambda epoch: draw(Use.INK_ORDER, seed, epoch).permutation(samples)


def _tensor(image: Image) -> Tensor:
    """uint8 [S, S] or [S, S, 3] -> [C, S, S]."""
    return torch.from_numpy(np.ascontiguousarray(np.atleast_3d(image))).permute(2, 0, 1)
