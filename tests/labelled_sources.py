"""Folders of other tools' labels, and what they become."""

import os
from pathlib import Path

import cv2
import numpy as np

from schematics.coco import read_split
from schematics.convert import convert


def sheet(path: Path, size: tuple[int, int] = (100, 80)) -> None:
    """A sheet of noise, another one for each path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(list(os.fsencode(path))).integers(0, 255, size[::-1], np.uint8)
    path.write_bytes(cv2.imencode(".png", noise)[1].tobytes())


def text(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def converted(src: Path, out: Path, **flags) -> dict[str, dict[str, list[tuple]]]:
    """Split -> sheet -> its boxes, as class, x0, y0, x1, y1."""
    convert(src, out, **flags)
    return boxes_of(out)


def boxes_of(out: Path) -> dict[str, dict[str, list[tuple]]]:
    splits = {folder.name: read_split(folder) for folder in sorted(path for path in out.iterdir())}
    return {
        name: {
            sheet.file_name: [
                (split.categories[label - 1].name, *np.round(box, 6))
                for label, box in zip(sheet.labels, sheet.boxes, strict=True)
            ]
            for sheet in split.sheets
        }
        for name, split in splits.items()
    }
