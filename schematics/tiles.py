"""A sheet as compressed tiles, so that a window of it is read without the rest.

A tile of one color is kept as that color. Any other is compressed by LZ4, which loses nothing, or kept as it
is where LZ4 does not halve it, as on photographs, since it is read faster then. docs/log.md compares codecs.

The bytes of a packed sheet are a table and then the tiles, row by row. The table has a little-endian uint32 a
tile, where its bytes end, counted from the end of the table; and then 8 bytes a tile, the first of their
sha256. Which kind a tile is shows in the number of its bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import lz4.block
import numpy as np

from schematics.sheets import DataError
from schematics.windows import Color, Image, cut

SIDE = 256  # px
DIGEST = 8  # bytes


def pack(image: Image) -> tuple[bytes, str]:
    """The bytes of a sheet uint8 [H, W] or [H, W, 3], and the sha256 of its table, which vouches for all."""
    tiles = [_pack_tile(np.ascontiguousarray(image[rows, columns])) for rows, columns in _grid(image.shape)]
    ends = np.cumsum([len(tile) for tile in tiles]).astype("<u4")
    table = ends.tobytes() + b"".join(_digest(tile) for tile in tiles)
    return b"".join([table, *tiles]), hashlib.sha256(table).hexdigest()


def _grid(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """The rows and columns of each tile of a sheet of that shape."""
    for top in range(0, shape[0], SIDE):
        for left in range(0, shape[1], SIDE):
            yield slice(top, top + SIDE), slice(left, left + SIDE)


def _pack_tile(tile: Image) -> bytes:
    if (tile == tile[0, 0]).all():
        return tile[0, 0].tobytes()
    packed = lz4.block.compress(tile, store_size=False)
    return packed if 2 * len(packed) <= tile.nbytes else tile.tobytes()


def _digest(tile: bytes | memoryview) -> bytes:
    return hashlib.sha256(tile).digest()[:DIGEST]


class PackedSheet:
    """A sheet of `shape` in the bytes that `pack` gave. Each tile is checked when it is first read.

    told: what the sheet is and how to get it back, for the DataError that a damaged one raises.
    """

    def __init__(self, data: memoryview, shape: tuple[int, ...], sha256: str, told: str) -> None:
        self.shape, self.told = shape, told
        self.across = -(-shape[1] // SIDE)  # tiles
        tiles = self.across * -(-shape[0] // SIDE)
        begin = tiles * (4 + DIGEST)
        if hashlib.sha256(data[:begin]).hexdigest() != sha256:
            raise DataError(told)
        self.ends = np.frombuffer(data, "<u4", tiles)
        self.digests, self.data = data[4 * tiles : begin], data[begin:]
        self.checked = bytearray(tiles)

    def cut(self, x: int, y: int, side: int, paper: Color) -> Image:
        """The window [side, side] or [side, side, 3] at (x, y), as `windows.cut` makes it of the sheet."""
        height, width = self.shape[:2]
        x0, y0 = max(0, min(x, width)), max(0, min(y, height))
        inside = self.region(x0, y0, max(x0, min(width, x + side)), max(y0, min(height, y + side)))
        return inside if inside.shape[:2] == (side, side) else cut(inside, x - x0, y - y0, side, paper)

    def region(self, x0: int, y0: int, x1: int, y1: int) -> Image:
        """The pixels from (x0, y0) to (x1, y1), which must lie on the sheet, as an array of its own."""
        out = np.empty((y1 - y0, x1 - x0, *self.shape[2:]), np.uint8)
        for top in range(y0 // SIDE * SIDE, y1, SIDE):
            for left in range(x0 // SIDE * SIDE, x1, SIDE):
                a, b = max(top, y0), min(top + SIDE, y1)
                c, d = max(left, x0), min(left + SIDE, x1)
                tile = self._tile(top, left)
                if tile.ndim == len(self.shape):
                    tile = tile[a - top : b - top, c - left : d - left]
                out[a - y0 : b - y0, c - x0 : d - x0] = tile
        return out

    def whole(self) -> Image:
        """All of the sheet."""
        return self.region(0, 0, self.shape[1], self.shape[0])

    def verify(self) -> None:
        """Raise DataError if a byte of any tile has changed."""
        for number in range(len(self.ends)):
            self._bytes(number)

    def _bytes(self, number: int) -> memoryview:
        data = self.data[int(self.ends[number - 1]) if number else 0 : int(self.ends[number])]
        if not self.checked[number]:
            if _digest(data) != self.digests[number * DIGEST : (number + 1) * DIGEST]:
                raise DataError(self.told)
            self.checked[number] = 1
        return data

    def _tile(self, top: int, left: int) -> np.ndarray:
        """The tile [h, w] or [h, w, 3] whose upper left corner this is; only its color, if it has one."""
        data = self._bytes(top // SIDE * self.across + left // SIDE)
        height, width = min(SIDE, self.shape[0] - top), min(SIDE, self.shape[1] - left)
        channels = self.shape[2:]
        size = height * width * (channels[0] if channels else 1)
        if len(data) == size:
            return np.frombuffer(data, np.uint8).reshape(height, width, *channels)
        if len(data) <= 3:
            return np.frombuffer(data, np.uint8).reshape(channels)
        tile = lz4.block.decompress(data, uncompressed_size=size)
        return np.frombuffer(tile, np.uint8).reshape(height, width, *channels)
