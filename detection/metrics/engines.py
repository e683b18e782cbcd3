"""Other programs for the same figures: pycocotools, the reference, and hotcoco (the extra "fast").

They get the boxes as `metrics.boxes` read them, and match and accumulate by themselves.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from detection.metrics.matching import Matches
from schematics.sheets import DataError

Engine = Literal["linework", "pycocotools", "hotcoco"]


def check_engine(engine: Engine) -> None:
    """Raise DataError that names the cure for an engine that is not installed."""
    if engine != "linework":
        coco_classes(engine)


def coco_classes(engine: Engine) -> tuple[Any, Any]:
    """COCO and COCOeval of an engine. Raises DataError that names the cure where it is not installed."""
    homes = {"pycocotools": ("pycocotools.coco", "pycocotools.cocoeval"), "hotcoco": ("hotcoco", "hotcoco")}
    try:
        coco, evaluation = (importlib.import_module(name) for name in homes[engine])
    except ImportError:
        raise DataError(f"{engine} is not installed: pip install 'linework[fast]'") from None
    return coco.COCO, evaluation.COCOeval


def run_engine(
    engine: Engine, matches: Matches, areas: Sequence[tuple[float, float]], limits: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Precision float64 [T, R, K, A, M] and recall float64 [T, K, A, M] of the boxes in `matches`.

    areas: A ranges in square pixels. limits: M numbers of detections of a class on a sheet, ascending.
    Raises DataError for an engine that is not installed.
    """
    coco, evaluation = coco_classes(engine)
    truth, found = to_coco(matches)
    with contextlib.redirect_stdout(io.StringIO()):
        gt, dt = coco(), coco()
        gt.dataset, dt.dataset = truth, {**truth, "annotations": found}
        gt.createIndex()
        dt.createIndex()
        evaluator = evaluation(gt, dt, "bbox")
        evaluator.params.maxDets = list(limits)
        evaluator.params.areaRng = [list(area) for area in areas]
        evaluator.params.areaRngLbl = [str(n) for n in range(len(areas))]
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator.eval["precision"], evaluator.eval["recall"]


def to_coco(matches: Matches) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The boxes of `matches` as a COCO object and COCO results, with ids from 1 in their order."""
    truth, found = matches.truth, matches.found
    annotations, results = (
        [
            {"id": n, "image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": 0}
            for n, (image, category, box, area) in enumerate(
                zip(
                    matches.image_ids[boxes.sheet].tolist(),
                    matches.category_ids[boxes.label].tolist(),
                    boxes.xywh.tolist(),
                    boxes.area.tolist(),
                    strict=True,
                ),
                start=1,
            )
        ]
        for boxes in (truth, found)
    )
    for row, crowd in zip(annotations, truth.crowd.tolist(), strict=True):
        row["iscrowd"] = int(crowd)
    for row, score in zip(results, found.score.tolist(), strict=True):
        row["score"] = score
    known = zip(matches.category_ids.tolist(), matches.names, strict=True)
    content = {
        "info": {},
        "images": [{"id": number} for number in matches.image_ids.tolist()],
        "categories": [{"id": number, "name": name} for number, name in known],
        "annotations": annotations,
    }
    return content, results
