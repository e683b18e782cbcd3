"""Small COCO annotation files for the tests of schematics.coco, to be spoiled by them."""

import json
from pathlib import Path

import cv2
import numpy as np


def box(number: int, image: int = 1, category: int = 1, bbox=(10, 10, 20, 30), **rest) -> dict:
    """A row of annotations; bbox is x, y, width, height in px."""
    return {"id": number, "image_id": image, "category_id": category, "bbox": list(bbox), **rest}


def document(**changes) -> dict:
    """Two sheets of 100 x 80 px, two classes, three boxes, nothing wrong."""
    annotations = [box(1), box(2, category=2, bbox=(50, 5, 8, 9)), box(3, image=2)]
    images = [{"id": n, "file_name": f"{n}.png", "width": 100, "height": 80} for n in (1, 2)]
    categories = [
        {"id": n, "name": name, "supercategory": "devices"} for n, name in ((1, "valve"), (2, "pump"))
    ]
    rows = [{"area": a["bbox"][2] * a["bbox"][3], "iscrowd": 0, **a} for a in annotations]
    return {"images": images, "categories": categories, "annotations": rows, **changes}


def write(folder: Path, content: dict, sheets: int = 2) -> Path:
    """Write the annotations and blank sheets 1.png, 2.png, ... into the folder; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_annotations.coco.json").write_text(json.dumps(content))
    for number in range(1, sheets + 1):
        cv2.imwrite(str(folder / f"{number}.png"), np.full((80, 100), 255, np.uint8))
    return folder
