"""Measure how long `detection.find` takes on one large sheet, with its feature map made and kept.

    python benchmarks/find_large.py [--width 7000] [--height 5000] [--arch resnet18]

The sheet is drawn, the network has random weights. Prints wall and CPU seconds of the map, then of the search
for one example of 36 px with that map read from disk.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from detection.labelling.chance import standardise
from detection.labelling.correlation import whitening
from detection.labelling.example import SCALES, example_from
from detection.labelling.maps import look_at, open_eye, open_network
from detection.labelling.search import search_sheet, templates_of, to_detections
from schematics.drafting import draw_sheet


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=7000)
    parser.add_argument("--height", type=int, default=5000)
    parser.add_argument("--arch", default="resnet18")
    options = parser.parse_args()
    tiles = [draw_sheet(0, n, 500, 500)[0] for n in range(10)]
    rows, columns = -(-options.height // 500), -(-options.width // 500)
    grid = [np.hstack([tiles[(3 * y + x) % 10] for x in range(columns)]) for y in range(rows)]
    sheet = np.ascontiguousarray(np.vstack(grid)[: options.height, : options.width])
    x, y = draw_sheet(0, 0, 500, 500)[1][0, :2].astype(int)
    eye = open_eye(open_network(Path("none"), options.arch))
    example = example_from(sheet, (x, y, x + 36, y + 36))
    with tempfile.TemporaryDirectory() as folder:
        for said in ("map made", "map kept"):
            began = time.perf_counter(), time.process_time()
            seen = look_at(eye, sheet, 1.0, Path(folder))
            if said == "map kept":
                white = whitening([seen.features])
                templates = templates_of(eye, [example], SCALES, False, 1.0, white)
                places = [search_sheet(seen, templates, 1.0, white)]
                found = to_detections(standardise(places, len(templates)), [sheet.shape[::-1]])
                said = f"{len(templates)} templates, {len(found[0])} places, {said}"
            wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
            print(
                f"{options.width} x {options.height} px, {said}: {wall:.0f} s, {cpu:.0f} s of CPU,"
                f" {torch.get_num_threads()} threads",
                flush=True,
            )


if __name__ == "__main__":
    main()
