"""Pairs of views on one core: ours against albumentations and against the published PIL code.

    python benchmarks/views.py [--sheets FOLDER] [--rounds 7]

The work is equal on both sides of a line: one window of 512 px, gray or in color, into two views of 224 px,
antialiased unless the line says otherwise.

- memory: the window is an array. albumentations is given the interpolation that averages over the pixels it
  leaves out (INTER_AREA) and ours antialiases as always; then both interpolate bicubically alone. The goal
  of 3 is missed with antialiasing, at about 2: resizing is 60 % of a gray pair and 46 % of one in color. It
  is already OpenCV's bicubic with AVX-512 (IPP), twice as fast as INTER_AREA, and any other way to resize
  gives other views. Of a pair in color the turn of the hue is 16 %, blur 11 %, contrast 7 %.
- files: a sheet is read, the same window cut out and made into views. albumentations has its sheet from
  cv2.imread; ours, `read_sheet`, also proves that the file is whole and finds out whether it has color. A
  PNG is decoded by kornia-rs (the extra "fast"; without it the ratio is 1). A JPEG is decoded by
  libjpeg-turbo on both sides, which alone is 71 % of ours and 72 % of the peer's time, and the goal of 1.3
  is missed by 0.1 to 0.2: views made in no time at all would give 1.3.
- packed store: ours reads windows of a store that was loaded as a run does it (a pool of up to 1 GiB is
  decoded at its start) and, for `drawing`, from its tiles, as of a larger pool. The official code of SimCLR
  and VICReg (torchvision transforms on PIL images, bicubic with antialiasing) reads the same windows as
  files, one a window, as ImageFolder does. `drawing` has no published peer and is compared with VICReg's
  recipe. In color the goals are missed, with 8 to 11 for simclr and vicreg, and 7 to 8 for `drawing`:
  resizing alone takes half of simclr's time, so that all else in no time would give 18 of the goal of 20. Of
  `drawing` in color resizing is 35 %, the turn of crops 20 %, JPEG 13 %, tones 11 %; tiles, which are
  unpacked by LZ4, add up to 2 ms.

The peers' best flags: a gray window stays in one channel through albumentations, blur kernels are short (3.5
sigma, not the 23 px published), and PIL blurs by Pillow, which is faster than torchvision. ToTensor and
Normalize are left out on both sides, as we do them on the device. --sheets: of drawings, the files of which
race; without it sheets of 1,600 x 1,200 px are drawn.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import warnings
from itertools import count
from pathlib import Path
from typing import Any

import albumentations as A
import cv2
import numpy as np
import torch
from PIL import Image, ImageFilter
from race import describe_machine, race
from torchvision import transforms as T

sys.path.insert(0, str(Path(__file__).parents[1]))
from schematics import photo
from schematics.drafting import draw_sheet
from schematics.pixels import resize
from schematics.recipes import two_views
from schematics.sheets import Sheet, read_sheet, write_png
from schematics.store import WindowStore, build_store
from schematics.windows import cut

PACKAGES = ("opencv-python-headless", "kornia-rs", "albumentations", "torchvision", "pillow")
SIZE, SIDE = 224, 512
JITTER = {"simclr": (0.8, 0.8, 0.8, 0.2), "vicreg": (0.4, 0.4, 0.2, 0.1)}
BLUR = {"simclr": (0.5, 0.5), "vicreg": (1.0, 0.1)}  # probability in each view
SOLARIZE = {"simclr": (0.0, 0.0), "vicreg": (0.0, 0.2)}
MEMORY = {True: 3.0, False: 1.3}  # goals by antialiasing
FILES = {"PNG": 1.5, "JPEG": 1.3}
STORE = {"simclr": 20.0, "vicreg": 12.0, "drawing": 8.0}


# --- the peers -------------------------------------------------------------------------------------------


def albumentations_views(recipe: str, interpolation: int) -> list[A.Compose]:
    """The transforms of a published recipe's two views."""
    views = []
    for blur, solarize in zip(BLUR[recipe], SOLARIZE[recipe], strict=True):
        brightness, contrast, saturation, hue = JITTER[recipe]
        steps: list[Any] = [
            A.RandomResizedCrop((SIZE, SIZE), scale=(0.08, 1.0), interpolation=interpolation),
            A.HorizontalFlip(p=0.5),
            A.ColorJitter(*((1 - x, 1 + x) for x in (brightness, contrast, saturation)), (-hue, hue), p=0.8),
            A.ToGray(p=0.2),
            A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=blur),
            A.Solarize(threshold_range=(0.5, 0.5), p=solarize),
        ]
        views.append(A.Compose([step for step in steps if step.p > 0]))
    return views


class PilBlur:
    """Pillow's Gaussian blur, applied with probability p, with sigma U(0.1, 2) px.

    VICReg's code has it. torchvision's, which many take for SimCLR, is ten times slower.
    """

    def __init__(self, p: float):
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() >= self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def official_views(recipe: str) -> list[T.Compose]:
    """The transforms of a recipe's two views in its authors' code: on PIL images, bicubic, antialiased."""
    views = []
    for blur, solarize in zip(BLUR[recipe], SOLARIZE[recipe], strict=True):
        steps = [
            T.RandomResizedCrop(SIZE, scale=(0.08, 1.0), interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(*JITTER[recipe])], p=0.8),
            T.RandomGrayscale(p=0.2),
            PilBlur(blur),
            T.RandomSolarize(128, p=solarize),
        ]
        views.append(T.Compose(steps))
    return views


# --- the works -------------------------------------------------------------------------------------------


def drawn(width: int, height: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A drawing as it is scanned, gray and in color: with red, green and blue ink in thirds of the sheet."""
    gray = draw_sheet(0, seed, width, height, noise=0.3)[0]
    rgb = cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB)
    for k in range(3):
        part = rgb[:, k * width // 3 : (k + 1) * width // 3]
        part[..., k] = np.maximum(part[..., k], 180)
    return {"gray": gray, "color": rgb}


def augmented(window: np.ndarray, views: list[A.Compose]) -> list[np.ndarray]:
    return [view(image=window)["image"] for view in views]


def memory(rounds: int, pairs: int) -> None:
    """From a window in memory, with antialiasing and without."""
    ours_plain = lambda image, size: cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)  # noqa: E731
    for antialias, told in ((True, "antialiased"), (False, "bicubic without antialiasing")):
        photo.resize = resize if antialias else ours_plain
        for color, window in drawn(SIDE, SIDE).items():
            for recipe in ("simclr", "vicreg"):
                peer = albumentations_views(recipe, cv2.INTER_AREA if antialias else cv2.INTER_CUBIC)
                numbers = count()

                def ours(window: Any = window, recipe: str = recipe, numbers: Any = numbers) -> None:
                    two_views(window, recipe, SIZE, 0, 0, next(numbers), color_mode=mode(window))

                def theirs(window: Any = window, peer: list = peer) -> None:
                    augmented(window, peer)

                work = f"memory, {told}, {color}, {recipe}"
                race(work, ours, theirs, "albumentations", MEMORY[antialias], rounds, pairs)
    photo.resize = resize


def mode(window: np.ndarray) -> str:
    return "gray" if window.ndim == 2 else "rgb"


def files(folder: Path, rounds: int) -> None:
    """From files of sheets: read, cut out a window, make its views; each pair from a file read anew."""
    for kind, suffix in (("PNG", "png"), ("JPEG", "jpg")):
        paths = sorted(path for path in folder.rglob(f"*.{suffix}") if path.is_file())
        for recipe in ("simclr", "vicreg"):
            peer = albumentations_views(recipe, cv2.INTER_AREA)

            def ours(paths: list[Path] = paths, recipe: str = recipe) -> None:
                for number, path in enumerate(paths):
                    sheet = read_sheet(Sheet(path))
                    window = cut(sheet, *middle(sheet), SIDE)
                    two_views(window, recipe, SIZE, 0, 0, number, color_mode=mode(window))

            def theirs(paths: list[Path] = paths, peer: list = peer) -> None:
                for path in paths:
                    image = imread(path)
                    augmented(cut(image, *middle(image), SIDE), peer)

            name = f"{len(paths)} {kind} files, antialiased, {recipe}"
            race(name, ours, theirs, "albumentations on cv2.imread", FILES[kind], rounds)


def imread(path: Path) -> np.ndarray:
    """A sheet by cv2.imread at its best: a JPEG in RGB at once, and a gray PNG in one channel."""
    if path.suffix == ".jpg":
        return cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    return image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def middle(sheet: np.ndarray) -> tuple[int, int]:
    return (sheet.shape[1] - SIDE) // 2, (sheet.shape[0] - SIDE) // 2


def store(folder: Path, rounds: int, pairs: int) -> None:
    """From windows of a packed store, against the official code that reads them as files."""
    for color in ("gray", "color"):
        pool = folder / color
        pool.mkdir()
        for n in range(4):
            write_png(pool / f"{n}.png", drawn(1600, 1200, n)[color])
        windows = build_store(pool, folder / f"store-{color}", SIDE)
        names = [folder / color / f"window-{n}.png" for n in range(len(windows))]
        for n, name in enumerate(names):
            write_png(name, windows.window(n))
        kept = WindowStore(windows.folder).preload()
        for recipe in ("simclr", "vicreg", "drawing"):
            peer = official_views("vicreg" if recipe == "drawing" else recipe)
            turns = count()

            def theirs(names: list = names, peer: list = peer, turns: Any = turns) -> None:
                with Image.open(names[next(turns) % len(names)]) as picture:
                    image = picture.convert("RGB")
                for view in peer:
                    np.asarray(view(image))

            official = "official PIL code from files" + (", vicreg" if recipe == "drawing" else "")
            works = [("store", kept, STORE[recipe])]
            if recipe == "drawing":
                works.append(("store, from tiles", windows, None))
            for told, source, goal in works:
                numbers = count()

                def ours(source: WindowStore = source, recipe: str = recipe, numbers: Any = numbers) -> None:
                    pair_of(source, recipe, next(numbers) % len(source))

                race(f"{told}, antialiased, {color}, {recipe}", ours, theirs, official, goal, rounds, pairs)


def pair_of(windows: WindowStore, recipe: str, n: int) -> None:
    """The views of window n, as pretraining makes them."""
    shared = {"tolerance": windows.tolerance(n), "paper": windows.paper(n), "color_mode": windows.color_mode}
    two_views(windows.window(n), recipe, SIZE, 0, 0, n, **shared)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sheets", type=Path, help="Folder of png and jpg sheets for the lines of files.")
    parser.add_argument("--pairs", type=int, default=100, help="Pairs of views a round (default 100).")
    parser.add_argument("--rounds", type=int, default=7, help="Rounds to take the median over (default 7).")
    parser.add_argument("--only", choices=("memory", "files", "store"), help="The only lines to run.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    warnings.filterwarnings("ignore", message="The image is already gray")
    print(describe_machine(*PACKAGES), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if args.only in (None, "memory"):
            memory(args.rounds, args.pairs)
        if args.only in (None, "files"):
            sheets = args.sheets
            if sheets is None:
                sheets = Path(folder)
                for n in range(3):
                    picture = drawn(1600, 1200, n)
                    write_png(sheets / f"{n}.png", picture["gray"])
                    flags = [cv2.IMWRITE_JPEG_QUALITY, 90]
                    cv2.imwrite(str(sheets / f"{n}.jpg"), picture["color"][..., ::-1], flags)
            files(sheets, args.rounds)
        if args.only in (None, "store"):
            store(Path(folder), args.rounds, args.pairs)


if __name__ == "__main__":
    main()
