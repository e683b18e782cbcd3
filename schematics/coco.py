"""Labelled sheets in COCO form: read, repair, write."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schematics.sheets import DataError

ANNOTATIONS = "_annotations.coco.json"


@dataclass(frozen=True)
class Category:
    """A class under its id in the annotation file."""

    id: int
    name: str


def write_split(
    folder: Path, images: Sequence[dict], categories: Sequence[Category], annotations: Sequence[dict]
) -> Path:
    """Write `folder`/_annotations.coco.json, whole or not at all, and return its path.

    `images`: {"id", "file_name" (relative to `folder`), "width", "height"}; `annotations`: {"image_id",
    "category_id", "bbox": [x, y, width, height] in pixels} and, where known, "id", "area", "iscrowd", which
    default to 1, 2, ..., the box's area and 0. The caller puts the images beside it.
    Raises DataError if the file exists.
    """
    path = Path(folder) / ANNOTATIONS
    if path.exists():
        raise DataError(f"{path}: exists already; choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, annotation in enumerate(annotations, start=1):
        width, height = annotation["bbox"][2:]
        rows.append({"id": number, "area": width * height, "iscrowd": 0, **annotation})
    text = json.dumps(_document(images, categories, rows), ensure_ascii=False)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return path


def _document(
    images: Sequence[dict], categories: Sequence[Category], annotations: Sequence[dict]
) -> dict[str, Any]:
    return {
        "info": {"description": "written by linework"},
        "licenses": [],
        "categories": [{"id": c.id, "name": c.name, "supercategory": "none"} for c in categories],
        "images": list(images),
        "annotations": list(annotations),
    }
