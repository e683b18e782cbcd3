"""Pairs of views a second on one core: ours on uint8 with OpenCV against torchvision on PIL images.

    python benchmarks/views.py [--pairs 40] [--rounds 7]

The peer is the recipe as its authors' code has it, with torchvision.transforms on PIL images, bicubic, at 224
px. A gray window is turned to RGB first, as torchvision's loader does. ToTensor and Normalize are left out,
since we do them on the device. `drawing` has no published peer and is compared with VICReg's recipe.

The two run in turn, round after round, in one process with one thread, and CPU seconds are counted, so that
load from elsewhere falls on both. It takes half a minute on an x86-64 core. A line for each kind of window
and recipe gives the medians over the rounds and their ratio.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision import transforms as T

sys.path.insert(0, str(Path(__file__).parents[1]))
from schematics.drafting import draw_sheet
from schematics.recipes import RECIPES, two_views

SIZE, SIDE = 224, 512


class PilBlur:
    """Pillow's Gaussian blur, applied with probability p, with sigma U(0.1, 2) px."""

    def __init__(self, p: float):
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() >= self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def published(jitter: tuple[float, float, float, float], blur: Callable, solarize: float) -> T.Compose:
    """A published recipe. jitter: of brightness, contrast, saturation and hue. solarize: its probability."""
    return T.Compose(
        [
            T.RandomResizedCrop(SIZE, scale=(0.08, 1.0), interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(*jitter)], p=0.8),
            T.RandomGrayscale(p=0.2),
            blur,
            T.RandomSolarize(128, p=solarize),
        ]
    )


SIMCLR = published((0.8, 0.8, 0.8, 0.2), T.RandomApply([T.GaussianBlur(23, (0.1, 2.0))], p=0.5), 0.0)
VICREG = (
    published((0.4, 0.4, 0.2, 0.1), PilBlur(1.0), 0.0),
    published((0.4, 0.4, 0.2, 0.1), PilBlur(0.1), 0.2),
)
PEERS = {"simclr": (SIMCLR, SIMCLR), "vicreg": VICREG, "drawing": VICREG}


def pairs_per_second(make_pair: Callable[[int], object], pairs: int) -> float:
    begin = time.process_time()
    for sample in range(pairs):
        make_pair(sample)
    return pairs / (time.process_time() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=40, help="Pairs that we make a round (default 40).")
    parser.add_argument("--rounds", type=int, default=7, help="Rounds to take the median over (default 7).")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    gray = draw_sheet(0, 0, SIDE, SIDE, noise=0.3)[0]
    # The drawing in color has red, green and blue ink in the three thirds of the sheet.
    rgb = cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB)
    for k in range(3):
        part = rgb[:, k * SIDE // 3 : (k + 1) * SIDE // 3]
        part[..., k] = np.maximum(part[..., k], 180)
    print(f"one core, {SIDE}-px window, two views of {SIZE} px; median of {args.rounds} rounds")
    for name, window in (("gray", gray), ("rgb", rgb)):
        picture = Image.fromarray(window)
        for recipe in RECIPES:

            def ours(sample: int, window: np.ndarray = window, recipe: str = recipe) -> object:
                return two_views(window, recipe, SIZE, seed=0, epoch=0, sample=sample)

            def theirs(sample: int, picture: Image.Image = picture, recipe: str = recipe) -> object:
                image = picture.convert("RGB")
                return [np.asarray(transform(image)) for transform in PEERS[recipe]]

            ours(0), theirs(0)
            rounds = [
                (pairs_per_second(ours, args.pairs), pairs_per_second(theirs, max(4, args.pairs // 4)))
                for _ in range(args.rounds)
            ]
            a, b = (median(column) for column in zip(*rounds, strict=True))
            ratio = median(x / y for x, y in rounds)
            print(f"{name:5} {recipe:8} {a:6.0f} pairs/s, torchvision on PIL {b:5.0f}: ratio {ratio:.1f}")


if __name__ == "__main__":
    main()
