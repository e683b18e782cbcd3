"""hotcoco against pycocotools inside `detection.metrics.coco.measure`, in turn in one process.

    python benchmarks/coco_engines.py [--sheets 1000] [--boxes 30] [--detections 100] [--classes 30]

Prints the seconds of the whole of `measure`, with repairs, sorting and reading the matches, and those of the
engine's run alone; and whether the figures are equal to the last bit.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, get_args

import numpy as np

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from detection.metrics.coco import measure
from detection.metrics.matching import AREAS, Engine, prepare, repair, run_engine

ENGINES = get_args(Engine)


def random_sheets(sheets: int, boxes: int, detections: int, classes: int) -> tuple[dict, list[dict]]:
    """Truth, and detections of which half are moved truth and half lie anywhere."""
    rng = np.random.default_rng(0)
    truth: dict[str, Any] = {
        "images": [{"id": n, "width": 3000, "height": 2000} for n in range(1, sheets + 1)],
        "categories": [{"id": n, "name": f"class {n}"} for n in range(1, classes + 1)],
        "annotations": [],
    }
    found = []
    for image in range(1, sheets + 1):
        places = np.hstack([rng.uniform(0, 1900, (boxes, 2)), rng.uniform(15, 80, (boxes, 2))])
        labels = rng.integers(1, classes + 1, boxes)
        for bbox, label in zip(places.tolist(), labels.tolist(), strict=True):
            truth["annotations"].append({"image_id": image, "category_id": label, "bbox": bbox})
        picked = rng.integers(0, boxes, detections)
        moved = places[picked] + rng.normal(0, 2, (detections, 4)) * (rng.random((detections, 1)) < 0.5)
        moved[::2, :2] = rng.uniform(0, 1900, (len(moved[::2]), 2))
        rows = zip(moved.tolist(), labels[picked].tolist(), rng.random(detections).tolist(), strict=True)
        found += [{"image_id": image, "category_id": k, "bbox": b, "score": s} for b, k, s in rows]
    return truth, found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("sheets", 1000),
        ("boxes", 30),
        ("detections", 100),
        ("classes", 30),
        ("rounds", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    truth, found = random_sheets(options.sheets, options.boxes, options.detections, options.classes)
    repaired = repair(truth)
    prepared = prepare(repaired, found)
    whole: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    own: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    figures = {}
    for _ in range(options.rounds):
        for engine in ENGINES:
            began = time.perf_counter()
            figures[engine], _ = measure(truth, found, engine=engine)
            whole[engine].append(time.perf_counter() - began)
            began = time.perf_counter()
            run_engine(repaired, prepared, AREAS, engine=engine)
            own[engine].append(time.perf_counter() - began)
    slow, fast = ENGINES
    print(
        f"{options.sheets} sheets, {len(truth['annotations'])} boxes, {len(found)} detections, "
        f"{options.classes} classes"
    )
    for title, seconds in (("measure", whole), ("the engine's run alone", own)):
        ratio = median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))
        print(
            f"{title}: {slow} {median(seconds[slow]):.2f} s, "
            f"{fast} {median(seconds[fast]):.2f} s, x {ratio:.1f}"
        )
    print(f"figures equal to the last bit: {figures[slow] == figures[fast]}")


if __name__ == "__main__":
    main()
