"""Intervals over sheets from one matching, against pycocotools run on each resample.

    python benchmarks/bootstrap.py [--sheets 440] [--boxes 20] [--detections 60] [--classes 31]

Prints the seconds of 500 resamples, and how many times as long 500 runs of pycocotools would take.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from coco_evaluation import random_sheets

from detection.metrics.bootstrap import average_precision, resample
from detection.metrics.engines import run_engine
from detection.metrics.matching import AREAS, match

RESAMPLES = 500


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("sheets", 440), ("boxes", 20), ("detections", 60), ("classes", 31)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    truth, found = random_sheets(options.sheets, options.boxes, options.detections, options.classes)
    matches = match(truth, found)
    began = time.perf_counter()
    average_precision(matches, resample(options.sheets, RESAMPLES))
    ours = time.perf_counter() - began
    began = time.perf_counter()
    run_engine("pycocotools", matches, AREAS[:1], [100])  # ours takes one limit, too
    once = time.perf_counter() - began
    alone = RESAMPLES * once
    print(f"{options.sheets} sheets, {len(found)} detections, {options.classes} classes")
    print(f"from one matching {ours:.1f} s, one by one {alone:.0f} s, x {alone / ours:.0f}")


if __name__ == "__main__":
    main()
