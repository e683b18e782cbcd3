"""How image files are built: the pages of a TIFF, and whether a file reaches its end. No pixel is decoded."""

import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

MAX_PAGES = 10_000  # of a TIFF


def tiff_pages(file: BinaryIO) -> list[tuple[int, bool]]:
    """Where each page of a TIFF is described, and whether it is a reduced copy of another, for viewers.

    Pillow reads all pages before the one asked for, with all their tags. Raises ValueError for a file that
    ends between two pages or has more than MAX_PAGES.
    """
    file.seek(0)
    head = file.read(16)
    order = "<" if head[:2] == b"II" else ">"
    big = struct.unpack_from(order + "H", head, 2)[0] == 43  # BigTIFF, with offsets of 64 bits
    number, offset, tag = (order + kind for kind in (("Q", "Q", "HHQI4x") if big else ("H", "I", "HHII")))

    def read(kind: str) -> int:
        return struct.unpack(kind, file.read(struct.calcsize(kind)))[0]

    pages: dict[int, bool] = {}
    file.seek(8 if big else 4)
    try:
        while (start := read(offset)) and start not in pages:
            file.seek(start)
            tags = file.read(min(read(number), 65535) * struct.calcsize(tag))
            # NewSubfileType, whose bit 0 says reduced copy, comes first. A short of big-endian files fills
            # the upper half of the field.
            first, kind, _, value = next(struct.iter_unpack(tag, tags), (0, 0, 0, 0))
            pages[start] = first == 254 and bool((value >> 16 if order == ">" and kind == 3 else value) & 1)
            if len(pages) > MAX_PAGES:
                raise ValueError(f"more than {MAX_PAGES} pages; split it")
    except struct.error:
        raise ValueError("it ends between two pages") from None
    return list(pages.items())


def begin_with(file: Any, page: int) -> None:
    """Let the header of a TIFF in memory point to a page, counted from 1, so that Pillow opens it first."""
    pages = tiff_pages(file)
    if page > len(pages):
        raise ValueError(f"has {len(pages)} pages, not {page}")
    file.seek(0)
    head = file.read(4)
    field = ("<" if head[:2] == b"II" else ">") + ("Q" if 43 in head[2:] else "I")
    file.seek(8 if field[1] == "Q" else 4)
    file.write(struct.pack(field, pages[page - 1][0]))
    file.seek(0)


def looks_truncated(path: Path) -> bool:
    """Whether the end of a jpg, png or webp file is missing, by a few of its bytes and without decoding.

    False does not prove that the file is whole. `read_sheet` looks at every byte.
    """
    with open(path, "rb") as file:
        head = file.read(12)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 12))
        tail = file.read()
    if head[:2] == b"\xff\xd8":
        # A second picture or padding may follow the end mark, so without one at the end look for it inside.
        return not tail.endswith(b"\xff\xd9") and jpeg_scans(path.read_bytes()) is None
    if head[:4] == b"\x89PNG":
        return tail[4:8] != b"IEND" and not _png_is_whole(path.read_bytes())
    return (head[:4] == b"RIFF" and not _webp_is_whole(head, size)) or size == 0


def is_whole(data: bytes, picture: Image.Image) -> bool:
    """Whether the file, no JPEG (see `jpeg_scans`), reaches the end that its own format marks.

    Decoders don't tell: they fill up what is missing, or stop without a word.
    """
    if picture.format == "PNG":
        return _png_is_whole(data)
    if picture.format == "WEBP":
        return _webp_is_whole(data[:12], len(data))
    if picture.format == "TIFF":
        tags = getattr(picture, "tag_v2", {})
        starts, sizes = tags.get(273) or tags.get(324, ()), tags.get(279) or tags.get(325, ())
        return all(start + size <= len(data) for start, size in zip(starts, sizes, strict=False))
    return True  # of a BMP, for which Pillow raises if rows are missing


# A marker in a JPEG is FF and another byte, unless that is 00 (FF is pixel data), D0 to D7 (a restart) or FF
# (a fill byte).
JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


def jpeg_scans(data: bytes) -> int | None:
    """The number of scans of a JPEG up to its end mark; None if its segments don't lead to one.

    That of a thumbnail, inside a segment, doesn't count.
    """
    position, scans = 2, 0
    while found := JPEG_MARKER.search(data, position):
        position = found.end()
        marker = data[position - 1]
        if marker == 0xD9:
            return scans
        scans += marker == 0xDA
        if marker not in (0x01, 0xD8):  # all markers but these two and the end mark are followed by a length
            position += int.from_bytes(data[position : position + 2], "big")
    return None


def _png_is_whole(data: bytes) -> bool:
    """Whether the chunks lead to IEND, and those that carry the picture have the right checksums."""
    view, position = memoryview(data), 8
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            return False
        if kind[:1].isupper():
            (checksum,) = struct.unpack_from(">I", data, end - 4)
            if zlib.crc32(view[position + 4 : end - 4]) != checksum:
                return False
        if kind == b"IEND":
            return True
        position = end
    return False


def _webp_is_whole(head: bytes, size: int) -> bool:
    """Whether a file of `size` bytes is as long as its header says."""
    return size >= 8 + int.from_bytes(head[4:8], "little")
