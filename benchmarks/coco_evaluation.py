"""COCO figures by `detection.metrics.coco.measure` against hotcoco alone and faster-coco-eval.

    python benchmarks/coco_evaluation.py [--sheets 1000 5000] [--rounds 5]

For each number of sheets, with 100 detections and 30 boxes each, in 30 classes, all three begin at the same
COCO object and list of results in memory. Ours gives more: the figures at a fitted limit, of fitted sizes and
of each class, and the matches. The rows "with intervals" are of the whole that a report needs: the figures,
500 resamples of the sheets, kinds of errors and their costs, confusions, curves, thresholds and counts. No
peer has that. Peaks of memory are of processes of their own and hold the input, whose own is printed beside.
All run on one thread; faster-coco-eval without printing and in the faster of its two modes.

Of the whole, three quarters are the intervals: 500 resamples at 10 thresholds are some 400 million precisions
at 500,000 detections, at about 2 ns for each of the sum, quotient and maximum that numpy makes of them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from race import ROUNDS, cpu_seconds, describe_machine, race

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from detection.metrics.analysis import analyse
from detection.metrics.coco import measure

GOALS = {"hotcoco": 0.5, "faster-coco-eval": 3.0}  # ratios
MEGABYTES = {1000: 300, 5000: 600}
SECONDS = {5000: 3.0}


def random_sheets(
    sheets: int, boxes: int = 30, detections: int = 100, classes: int = 30
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Truth, and detections of which half are moved truth and half lie anywhere."""
    rng = np.random.default_rng(0)
    truth: dict[str, Any] = {
        "info": {},
        "images": [{"id": n, "width": 3000, "height": 2000} for n in range(1, sheets + 1)],
        "categories": [{"id": n, "name": f"class {n}"} for n in range(1, classes + 1)],
        "annotations": [],
    }
    rows, found = truth["annotations"], []
    for image in range(1, sheets + 1):
        places = np.hstack([rng.uniform(0, 1900, (boxes, 2)), rng.uniform(15, 80, (boxes, 2))])
        labels = rng.integers(1, classes + 1, boxes)
        for bbox, label in zip(places.tolist(), labels.tolist(), strict=True):
            row = {"id": len(rows) + 1, "image_id": image, "category_id": label, "bbox": bbox}
            rows.append({**row, "area": bbox[2] * bbox[3], "iscrowd": 0})
        picked = rng.integers(0, boxes, detections)
        moved = places[picked] + rng.normal(0, 2, (detections, 4)) * (rng.random((detections, 1)) < 0.5)
        moved[::2, :2] = rng.uniform(0, 1900, (len(moved[::2]), 2))
        made = zip(moved.tolist(), labels[picked].tolist(), rng.random(detections).tolist(), strict=True)
        found += [{"image_id": image, "category_id": k, "bbox": b, "score": s} for b, k, s in made]
    return truth, found


def ours(truth: dict[str, Any], found: list[dict[str, Any]]) -> list[float]:
    return list(measure(truth, found)[0].coco)


def with_intervals(truth: dict[str, Any], found: list[dict[str, Any]]) -> list[float]:
    figures, matches = measure(truth, found)
    analyse(matches)
    return list(figures.coco)


def hotcoco_alone(truth: dict[str, Any], found: list[dict[str, Any]]) -> list[float]:
    import hotcoco

    with contextlib.redirect_stdout(io.StringIO()):
        gt = hotcoco.COCO(truth)
        evaluator = hotcoco.COCOeval(gt, gt.loadRes(found), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return list(evaluator.stats)


def faster_coco_eval(
    truth: dict[str, Any], found: list[dict[str, Any]], separate: bool = False
) -> list[float]:
    from faster_coco_eval import COCO, COCOeval_faster

    def silent(*_: object) -> None: ...

    gt = COCO(truth, print_function=silent)
    evaluator = COCOeval_faster(gt, gt.loadRes(found), "bbox", print_function=silent, separate_eval=separate)
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    return list(evaluator.stats)


WORKS: dict[str, Callable[[dict[str, Any], list[dict[str, Any]]], list[float] | None]] = {
    "ours": ours,
    "ours with intervals": with_intervals,
    "hotcoco": hotcoco_alone,
    "faster-coco-eval": faster_coco_eval,
    "the input": lambda truth, found: None,
}


def peak_megabytes(work: str, sheets: int) -> float:
    """The peak of a process that makes the input and does one work."""
    code = [sys.executable, __file__, "--peak", work, "--sheets", str(sheets)]
    return float(subprocess.run(code, stdout=subprocess.PIPE, check=True, text=True).stdout)


def tell_limit(what: str, value: float, unit: str, limit: float | None) -> None:
    held = "" if limit is None else f" (goal {limit:g} {unit}{'' if value < limit else ', missed'})"
    print(f"{what}: {value:.3g} {unit}{held}", flush=True)


def compare(sheets: int, rounds: int) -> None:
    """All rows of one number of sheets."""
    truth, found = random_sheets(sheets)
    title = f"{sheets:,} sheets, {len(found):,} detections"
    mine = ours(truth, found)
    same = all(WORKS[peer](truth, found) == mine for peer in GOALS)
    print(f"{title}: the 12 figures equal both peers' to the last bit: {same}")
    modes = [partial(faster_coco_eval, truth, found, separate) for separate in (False, True)]
    peers = {"hotcoco": partial(hotcoco_alone, truth, found), "faster-coco-eval": min(modes, key=cpu_seconds)}
    for peer, work in peers.items():
        race(f"{title}, figures", partial(ours, truth, found), work, peer, GOALS[peer], rounds)
    for name in ("ours", "ours with intervals"):
        seconds = median(cpu_seconds(partial(WORKS[name], truth, found)) for _ in range(rounds))
        tell_limit(f"{title}, {name}", seconds, "s", SECONDS.get(sheets))
    for name in WORKS:
        limit = MEGABYTES.get(sheets) if name.startswith("ours") else None
        tell_limit(f"{title}, peak memory, {name}", peak_megabytes(name, sheets), "MB", limit)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sheets", type=int, nargs="+", default=[1000, 5000])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--peak", choices=WORKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = "1"  # of hotcoco, which is imported where it runs
    if options.peak:
        WORKS[options.peak](*random_sheets(options.sheets[0]))
        status = Path("/proc/self/status").read_text()
        print(int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6)
        return
    print(describe_machine("numpy", "pycocotools", "hotcoco", "faster-coco-eval"))
    for sheets in options.sheets:
        compare(sheets, options.rounds)


if __name__ == "__main__":
    main()
