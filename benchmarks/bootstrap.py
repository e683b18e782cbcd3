"""Intervals over sheets from one matching, against pycocotools run on each resample.

    python benchmarks/bootstrap.py [--sheets 440] [--boxes 20] [--detections 60] [--classes 31]

Prints the time of 500 resamples beside that of 500 runs of pycocotools, of which one is made in each round.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from coco_evaluation import random_sheets
from race import ROUNDS, cpu_seconds, describe_machine, tell_ratio

from detection.metrics.bootstrap import average_precision
from detection.metrics.engines import run_engine
from detection.metrics.matching import AREAS, match
from schematics.resampling import resample

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
    ours = partial(average_precision, matches, resample(options.sheets, RESAMPLES))
    once = partial(run_engine, "pycocotools", matches, AREAS[:1], [100])  # ours takes one limit, too
    print(describe_machine("numpy", "pycocotools"))
    times = [(cpu_seconds(ours), RESAMPLES * cpu_seconds(once)) for _ in range(ROUNDS)]
    work = f"{RESAMPLES} resamples of {options.sheets} sheets, {len(found):,} detections"
    tell_ratio(f"{work}, {options.classes} classes", times, "pycocotools", None)


if __name__ == "__main__":
    main()
