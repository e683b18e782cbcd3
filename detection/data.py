"""Training windows with their boxes, cut from labelled sheets at native resolution, as at inference.

A sample is a tile of a sheet that is moved and augmented at random. All random draws for it are a function of
(seed, epoch, position, tile), and the samples of a step are a function of (seed, step). So there is no state
in a sampler or a worker, and a resumed run sees the very data that an uninterrupted run would see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cluster.batches import Key
from detection.model import as_tensor
from detection.paste import Symbols, paste
from detection.sheets import SheetReader
from schematics.draws import Use, draw
from schematics.recipes import scan_noise
from schematics.windows import tile_sheet

MULTIPLE = 64  # a window's side is a multiple of this, the stride of the feature pyramid's last level
KEEP = 0.6  # share of a symbol's area that must lie in a window for the symbol to be one of its targets


@dataclass(frozen=True)
class Augment:
    """How training windows are augmented. With all fields zero or False a window is its tile, unchanged.

    A window keeps its native scale with probability 1/2, and likewise its tones. Inference sees lines that
    were never resampled, so half of the training windows show such lines too.
    """

    shift: bool = False  # move the window by up to half the stride of the tiles, in x and in y
    scale: float = 0.0  # factor on the size, log-uniform in [1 / (1 + scale), 1 + scale]
    photometric: float = 0.0  # strength of the changes in brightness, contrast, blur and noise, 0 to 1
    flip: bool = False  # mirror left-right and up-down, each with probability 1/2
    rot90: bool = False  # rotate by a random number of quarter turns
    paste: int = 0  # symbols of other sheets that are laid on the window, at most; their number is uniform


class TrainingWindows(Dataset):
    """Item (epoch, position, tile) -> (window uint8 [3, side, side], target, seed).

    The target holds boxes float32 [N, 4], xyxy in pixels of the window, and labels int64 [N]. The detector
    draws its choice of anchors and proposals from the seed.

    A symbol that the window's edge cuts is a target, with its box clipped at that edge, if at least KEEP of
    its area is inside. With less it is background, because at inference another window sees it whole. Crowd
    boxes are not targets.

    negatives: an epoch has at most this many times as many windows without a symbol as windows with one.
    repeat: threshold t of repeat-factor sampling (arXiv 1908.03195, section 3). A window is seen
    max(1, sqrt(t / f)) times an epoch, where f is the share of tiles that show its rarest class; 0 is off.
    """

    def __init__(
        self,
        reader: SheetReader,
        side: int,
        overlap: int,
        seed: int,
        augment: Augment,
        negatives: float = 0.5,
        repeat: float = 0.0,
    ):
        self.reader, self.side, self.seed, self.augment = reader, side, seed, augment
        tiles: list[tuple[int, int, int]] = []
        tile_labels: list[np.ndarray] = []
        for n, sheet in enumerate(reader.split.sheets):
            for x, y, _, _ in tile_sheet(sheet.width, sheet.height, side, overlap).tolist():
                known = ~sheet.crowd
                _, labels = crop_boxes(sheet.boxes[known], sheet.labels[known], x, y, side, KEEP)
                tiles.append((n, x, y))
                tile_labels.append(labels)
        self.tiles = np.array(tiles, np.int64).reshape(-1, 3)  # sheet, x, y
        self.stride = side - overlap
        self.weights = _weights(tile_labels, negatives, repeat)
        self.symbols = Symbols(reader, side) if augment.paste else None

    def __len__(self) -> int:
        """Number of samples in an epoch: the sum of the tiles' weights, at least 1."""
        return max(1, round(float(self.weights.sum())))

    def order(self, epoch: int, at_least: int = 1) -> np.ndarray:
        """Indices of the tiles of one epoch, int64 [max(len(self), at_least)], in random order.

        Each tile occurs in proportion to its weight. Systematic sampling rounds the fractions: one random
        offset, then even steps through the cumulative weights.
        """
        rng = draw(Use.DETECTION_ORDER, self.seed, epoch)
        count = max(len(self), at_least)
        ends = np.cumsum(self.weights) * (count / self.weights.sum())
        picked = np.searchsorted(ends, np.arange(count) + rng.random(), side="right")
        return rng.permutation(np.minimum(picked, len(ends) - 1))

    def source(self, key: Key) -> str:
        """File name of the sheet that a sample is cut from."""
        return self.reader.split.sheets[self.tiles[key[2]][0]].file_name

    def __getitem__(self, key: Key) -> tuple[Tensor, dict[str, Tensor], int]:
        epoch, position, tile = key
        rng = draw(Use.DETECTION_WINDOW, self.seed, epoch, position, tile)
        sheet_index, x, y = self.tiles[tile].tolist()
        sheet = self.reader.split.sheets[sheet_index]

        exponent = rng.uniform(-1, 1) * (rng.random() < 0.5)
        scale = float(np.exp(exponent * np.log1p(self.augment.scale)))
        reach = round(self.side / scale)  # side, in pixels of the sheet, of the square that the window shows
        if self.augment.shift:
            x = shift(rng, x, self.side, reach, self.stride, sheet.width)
            y = shift(rng, y, self.side, reach, self.stride, sheet.height)
        known = ~sheet.crowd
        window = self.reader.window(sheet_index, x, y, reach)
        boxes, labels = crop_boxes(sheet.boxes[known], sheet.labels[known], x, y, reach, KEEP)
        if self.symbols:  # some can be pasted
            window, pasted, of = self._paste(window, sheet_index, (x, y), key)
            boxes, labels = np.concatenate([boxes, pasted]), np.concatenate([labels, of])
        window, boxes = resize(window, boxes, self.side)
        window, boxes = turn(window, boxes, rng, self.augment.flip, self.augment.rot90)
        window = photometric(window, rng, self.augment.photometric)
        target = {"boxes": torch.from_numpy(boxes.astype(np.float32)), "labels": torch.from_numpy(labels)}
        return as_tensor(window), target, int(rng.integers(2**31))

    def _paste(
        self, window: np.ndarray, sheet_index: int, corner: tuple[int, int], key: Key
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lay symbols over the window that begins at `corner` (x, y) of a sheet; see `paste`."""
        assert self.symbols
        rng = draw(Use.PASTE, self.seed, *key)
        symbols = [self.symbols.draw(rng) for _ in range(int(rng.integers(self.augment.paste + 1)))]
        sheet, (x, y), reach = self.reader.split.sheets[sheet_index], corner, window.shape[0]
        shown, _ = crop_boxes(sheet.boxes, sheet.labels, x, y, reach, 0.0)
        beside = [(sheet.width - x, 0, reach, reach), (0, sheet.height - y, reach, reach)]  # beyond the sheet
        return paste(window, self.reader.paper(sheet_index), [*shown, *beside], symbols, rng)


def steps_per_epoch(windows: TrainingWindows, batch_size: int) -> int:
    """Number of full batches in an epoch. A set smaller than a batch fills one by repeating windows."""
    return max(1, len(windows) // batch_size)


def collate(items: Sequence[tuple[Tensor, dict[str, Tensor], int]]) -> tuple[Tensor, list, list[int]]:
    """B samples -> windows uint8 [B, 3, side, side], a list of B targets, a list of B seeds."""
    images, targets, seeds = zip(*items, strict=True)
    return torch.stack(images), list(targets), list(seeds)


def crop_boxes(
    boxes: np.ndarray, labels: np.ndarray, x: int, y: int, side: int, keep: float
) -> tuple[np.ndarray, np.ndarray]:
    """The boxes and labels that a window shows, out of the boxes [N, 4] and labels [N] of its sheet.

    The window's upper left corner is at (x, y). The boxes are clipped at its edges and given in its pixels.
    A box is left out if less than `keep` of its area is inside, or if that part is under 1 px wide or high.
    """
    inside = np.clip(boxes - (x, y, x, y), 0, side)
    extent = inside[:, 2:] - inside[:, :2]
    kept = (extent.prod(1) >= keep * (boxes[:, 2:] - boxes[:, :2]).prod(1)) & (extent >= 1).all(1)
    return inside[kept], labels[kept]


def resize(window: np.ndarray, boxes: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale a square window and its boxes [N, 4] to `side` pixels.

    Shrinking averages over areas, so that thin lines get fainter but do not vanish. Enlarging is bilinear.
    """
    reach = window.shape[0]
    if reach == side:
        return window, boxes
    how = cv2.INTER_AREA if side < reach else cv2.INTER_LINEAR
    return cv2.resize(window, (side, side), interpolation=how), boxes * (side / reach)


def turn(
    window: np.ndarray, boxes: np.ndarray, rng: np.random.Generator, flip: bool, rot90: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Mirror a square window (`flip`) and rotate it by quarter turns (`rot90`) at random, with its boxes.

    Both are optional because some classes differ by orientation alone.
    """
    side = window.shape[0]
    mirror_x, mirror_y, turns = rng.random() < 0.5, rng.random() < 0.5, int(rng.integers(4))
    if flip and mirror_x:
        window, boxes = (
            window[:, ::-1],
            np.array([side, 0, side, 0]) + boxes[:, [2, 1, 0, 3]] * (-1, 1, -1, 1),
        )
    if flip and mirror_y:
        window, boxes = window[::-1], np.array([0, side, 0, side]) + boxes[:, [0, 3, 2, 1]] * (1, -1, 1, -1)
    for _ in range(turns if rot90 else 0):  # a quarter turn counter-clockwise moves (x, y) to (y, side - x)
        window, boxes = (
            np.rot90(window),
            np.array([0, side, 0, side]) + boxes[:, [1, 2, 3, 0]] * (1, -1, 1, -1),
        )
    return window, boxes


def photometric(window: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Change contrast, brightness, blur and noise with probability 1/2, as if another scanner had been used.

    strength: 0 (no change) to 1. Hue is not shifted, because color carries meaning on a drawing.
    """
    contrast, brightness = 1 + strength * rng.uniform(-0.5, 0.5), strength * rng.uniform(-50, 50)
    blur, noise = rng.random() < 0.3 * strength, rng.random() < 0.5 * strength
    if not strength or rng.random() < 0.5:
        return window
    if blur:
        window = cv2.GaussianBlur(window, (0, 0), float(rng.uniform(0.3, 0.8)))
    levels = (np.arange(256, dtype=np.float32) - 128) * contrast + 128 + brightness
    window = cv2.LUT(window, np.clip(levels, 0, 255).astype(np.uint8))
    if noise:  # of its own in each channel
        flat = window.reshape(len(window), -1)
        window = scan_noise(flat, 8 * strength, rng).reshape(window.shape)
    return window


def shift(rng: np.random.Generator, start: int, side: int, reach: int, stride: int, length: int) -> int:
    """Where, along one axis, a window begins that shows `reach` pixels of a sheet `length` pixels long.

    It has the middle of its tile, which is `side` pixels from `start` on, is moved at random by up to half a
    stride, and is kept on the sheet.
    """
    middle = start + side / 2 + rng.uniform(-0.5, 0.5) * stride
    return int(np.clip(round(middle - reach / 2), 0, max(0, length - reach)))


def _weights(tile_labels: Sequence[np.ndarray], negatives: float, repeat: float) -> np.ndarray:
    """Weight of each tile: how often it is seen in an epoch, on average. See `TrainingWindows`."""
    positive = np.array([len(labels) > 0 for labels in tile_labels])
    weights = np.ones(len(tile_labels))
    if repeat > 0 and positive.any():
        classes = [set(labels.tolist()) for labels in tile_labels]
        share = {k: sum(k in c for c in classes) / len(classes) for k in set().union(*classes)}
        for n, present in enumerate(classes):
            weights[n] = max([1.0, *((repeat / share[k]) ** 0.5 for k in present)])
    if positive.any() and not positive.all():
        weights[~positive] = min(1.0, negatives * weights[positive].sum() / (~positive).sum())
    return weights
