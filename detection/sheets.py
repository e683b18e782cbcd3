"""The sheets of a split as the detector sees them: decoded in memory, or in a store where they are too many.

Nothing here needs torch, which the processes that pack a store would have to import.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from cluster.rendezvous import place
from schematics.coco import LabelledSheet, Split
from schematics.progress import progress
from schematics.sheets import DataError, Sheet, read_sheet, to_color
from schematics.sheetstore import Facts, Plan, SheetStore, build, key_of
from schematics.windows import Color, Image, cut, paper_color
from schematics.workers import cores, in_order

CACHE = 1 << 30  # bytes of decoded sheets of a split that are kept in memory; what has more gets a store
CONTENT = "sheets 1"  # in the key of a store; to be raised when the same files give other sheets


class SheetReader:
    """The sheets of a split as uint8 [H, W] or [H, W, 3].

    Without a store, a decoded sheet is kept if it fits into what is left of `cache_bytes`, else it is decoded
    at each access. scale: 1 or less shrinks each sheet as it is read, and the labels in `split` with it.
    store: the folder that `pack_split` gave for the same split, color mode and scale.
    """

    def __init__(
        self,
        split: Split,
        color_mode: str,
        cache_bytes: int = CACHE,
        scale: float = 1.0,
        store: Path | None = None,
    ):
        self.sizes = [(sheet.width, sheet.height) for sheet in split.sheets]  # in the files
        self.split = replace(split, sheets=[scale_sheet(sheet, scale) for sheet in split.sheets])
        self.color_mode = color_mode
        self.free = cache_bytes
        self.cache: dict[int, tuple[Image, Color]] = {}
        self.store = SheetStore(store) if store else None

    def __len__(self) -> int:
        return len(self.split.sheets)

    def preload(self) -> SheetReader:
        """Decode every sheet now, in processes of their own where that is worth it, and return self.

        A damaged sheet then raises DataError before training begins, and workers that are forked later share
        the cached sheets. Rank 0 tells how far it is.
        """
        files = [sheet.file for sheet in self.split.sheets]
        shown = [(sheet.width, sheet.height) for sheet in self.split.sheets]
        sizes = dict(zip((file.name for file in files), zip(self.sizes, shown, strict=True), strict=True))
        pixels = [width * height * (3 if self.color_mode == "rgb" else 1) for width, height in self.sizes]
        workers = max(1, cores() // place().local_size)
        read = in_order(partial(_read, sizes, self.color_mode), files, pixels, workers)
        told = progress(files, f"reading {self.split.name}", shown=not place().rank)
        for index, (_, (image, paper)) in enumerate(zip(told, read, strict=True)):
            self._keep(index, image, paper)
        return self

    def __getitem__(self, index: int) -> tuple[Image, Color]:
        """The sheet's image and the color of its paper.

        Raises DataError if the file can't be read or the image has another size than its header says.
        """
        if self.store:
            return to_color(self.store.sheet(index), self.color_mode), self.paper(index)
        if index in self.cache:
            return self.cache[index]
        sheet = self.split.sheets[index]
        image = decode(sheet.file, self.sizes[index], self.color_mode, (sheet.width, sheet.height))
        return self._keep(index, image, paper_color(image))

    def _keep(self, index: int, image: Image, paper: Color) -> tuple[Image, Color]:
        if image.nbytes <= self.free:
            self.free -= image.nbytes
            self.cache[index] = image, paper
        return image, paper

    def window(self, index: int, x: int, y: int, side: int) -> Image:
        """The window of a sheet at (x, y), as `cut` makes it. Raises DataError as reading a sheet does."""
        if self.store:
            return to_color(self.store.cut(index, x, y, side), self.color_mode)
        image, paper = self[index]
        return cut(image, x, y, side, paper)

    def paper(self, index: int) -> Color:
        """The color of a sheet's paper. Raises DataError as reading the sheet does."""
        if not self.store:
            return self[index][1]
        # Stored sheets without color are gray whatever the mode.
        paper = self.store.sheets[index]["paper"]
        if self.color_mode == "gray":
            return paper
        return (paper,) * 3 if isinstance(paper, int) else tuple(paper)


def decoded_bytes(split: Split, color_mode: str, scale: float = 1.0) -> int:
    """Bytes that all sheets of a split take when decoded."""
    sizes = (scaled_size(sheet.width, sheet.height, scale) for sheet in split.sheets)
    return sum(width * height for width, height in sizes) * (3 if color_mode == "rgb" else 1)


def cached_bytes(split: Split, color_mode: str, scale: float = 1.0) -> int:
    """Bytes of memory that the sheets of a split keep: none if they get a store."""
    size = decoded_bytes(split, color_mode, scale)
    return size if size <= CACHE else 0


def pack_split(split: Split, color_mode: str, scale: float, folder: Path) -> Path:
    """The store of the split's sheets, a folder of `folder` that all who ask for the same sheets share.

    It is built unless it is there. Raises DataError if a sheet can't be read or has another size than its
    header says, or if the disk fails.
    """
    files = [sheet.file for sheet in split.sheets]
    sizes = {sheet.file.name: (sheet.width, sheet.height) for sheet in split.sheets}
    key = key_of(files, CONTENT, color_mode, scale)
    out = folder.absolute() / f"sheets-{key[:12]}"
    build(Plan(files, key, partial(_prepare, sizes, color_mode, scale), _refuse_skipped), out)
    return out


def _read(
    sizes: dict[str, tuple[tuple[int, int], tuple[int, int]]], color_mode: str, file: Sheet
) -> tuple[Image, Color]:
    """A sheet and the color of its paper. sizes: by name, that in the file and the one it is shrunk to."""
    image = decode(file, sizes[file.name][0], color_mode, sizes[file.name][1])
    return image, paper_color(image)


def _prepare(
    sizes: dict[str, tuple[int, int]], color_mode: str, scale: float, file: Sheet
) -> tuple[Image, Facts]:
    """A sheet as it is kept in a store, which is gray if it has no color, and the color of its paper."""
    image = decode(file, sizes[file.name], color_mode, scaled_size(*sizes[file.name], scale))
    if image.ndim == 3 and (image == image[..., :1]).all():
        image = np.ascontiguousarray(image[..., 0])
    return image, {"paper": paper_color(image)}


def _refuse_skipped(folder: Path, index: dict[str, Any], skipped: list[str]) -> dict[str, Any]:
    if skipped:
        raise DataError(skipped[0])
    return {"files": {}}


def decode(file: Sheet, size: tuple[int, int], color_mode: str, shown: tuple[int, int]) -> Image:
    """Read a sheet and shrink it from `size` (width, height) to `shown`.

    Raises DataError if it can't be read or does not have that size.
    """
    image = to_color(read_sheet(file), color_mode)
    width, height = size
    if image.shape[:2] != (height, width):
        raise DataError(
            f"{file.name}: {image.shape[1]} x {image.shape[0]} px, its header says {width} x {height}; "
            "export it again"
        )
    return shrink(image, *shown)


def scale_sheet(sheet: LabelledSheet, scale: float) -> LabelledSheet:
    """The sheet at `scale` times its size, rounded to whole pixels, with its boxes."""
    if scale == 1:
        return sheet
    width, height = scaled_size(sheet.width, sheet.height, scale)
    factors = np.array([width / sheet.width, height / sheet.height] * 2)
    return replace(sheet, width=width, height=height, boxes=sheet.boxes * factors)


def scaled_size(width: int, height: int, scale: float) -> tuple[int, int]:
    """Whole pixels, at least one a side."""
    return max(1, round(width * scale)), max(1, round(height * scale))


def shrink(image: Image, width: int, height: int) -> Image:
    """The image at that size, averaged over areas: thin lines get fainter but do not vanish."""
    if image.shape[:2] == (height, width):
        return image
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
