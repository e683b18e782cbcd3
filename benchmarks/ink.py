"""What is taken for ink: the share of windows and of views' middles that touch a labelled symbol.

    python benchmarks/ink.py SPLIT ... [--side 256] [--rounds 3]

SPLIT is a folder of labelled sheets. Windows are chosen on each sheet by the one color of its paper, as it
was once, and as schematics.windows chooses them, which tells shadows and squared paper from ink. A drawing
view is cut around a random pixel of its window's ink: the share of that ink which lies in a symbol's box is
the share of views with a symbol in their middle. A box around the middles of others, such as a table's or a
lane's, is no symbol. The last column is the CPU time of choosing windows against that by one color, the
median over the rounds.

Then come the CPU times of a pair of views from an uneven window, against the same window taken as even.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from schematics.coco import read_split
from schematics.recipes import two_views
from schematics.sheets import read_sheet
from schematics.windows import cut, ink_mask, ink_windows, paper_color, uneven_paper

MIN_INK = 0.002  # of a window, as in schematics.store


def symbols(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """Bool [height, width]: where the boxes [N, 4] are that hold the middle of no other."""
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    mask = np.zeros((height, width), bool)
    for box in boxes:
        inside = ((middles > box[:2]) & (middles < box[2:])).all(axis=1)
        if inside.sum() == 1:
            x0, y0, x1, y1 = (int(np.floor(v)) for v in box)
            mask[y0 : y1 + 1, x0 : x1 + 1] = True
    return mask


def touch(corners: np.ndarray, side: int, ink: np.ndarray, symbol: np.ndarray) -> tuple[list, list]:
    """Of each window: whether it touches a symbol, and the share of its ink that is in one."""
    windows = [np.s_[y : y + side, x : x + side] for x, y in corners.tolist()]
    return [symbol[w].any() for w in windows], [(ink & symbol)[w].sum() / ink[w].sum() for w in windows]


def cpu(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("splits", type=Path, nargs="+", help="Folders of labelled sheets.")
    parser.add_argument("--side", type=int, default=256, help="Side of a window, px (default 256).")
    parser.add_argument("--rounds", type=int, default=3, help="Rounds of timing (default 3).")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    side, stride = args.side, args.side // 2
    uneven_windows: list[tuple[np.ndarray, float]] = []
    for folder in args.splits:
        sheets, uneven = read_split(folder).sheets, 0
        results: dict[str, tuple[list, list, list]] = {"one color": ([], [], []), "nearby": ([], [], [])}
        ratios, same = [], 0
        for sheet in sheets:
            image = read_sheet(sheet.path)
            symbol = symbols(sheet.boxes, sheet.width, sheet.height)

            def by_color(image: np.ndarray = image) -> np.ndarray:
                return ink_windows(image, side, stride, MIN_INK, paper_color(image))

            def nearby(image: np.ndarray = image) -> np.ndarray:
                paper = paper_color(image)
                return ink_windows(image, side, stride, MIN_INK, paper, uneven_paper(image, paper))

            ratios.append(median(cpu(nearby) / cpu(by_color) for _ in range(args.rounds)))
            corners = {"one color": by_color(), "nearby": nearby()}
            same += np.array_equal(*corners.values())
            paper = uneven_paper(image)
            uneven += paper is not None
            inks = {"one color": ink_mask(image)}
            inks["nearby"] = inks["one color"]
            if paper:
                everywhere = paper.paper(0, sheet.height, sheet.width)
                inks["nearby"] = ink_mask(image, everywhere, paper.tolerance)
            for name, ink in inks.items():
                for column, new in zip(
                    results[name], ([ink.mean()], *touch(corners[name], side, ink, symbol)), strict=True
                ):
                    column += new
            if paper and len(corners["nearby"]):
                x, y = corners["nearby"][len(corners["nearby"]) // 2].tolist()
                uneven_windows.append((cut(image, x, y, side), paper.tolerance))
        print(f"{folder}: {len(sheets)} sheets, {uneven} of them uneven; windows are the same on {same}")
        for name, columns in results.items():
            ink, window, middle = (100 * float(np.mean(column)) for column in columns)
            print(
                f"  {name:9} {ink:5.1f} % ink, {len(columns[1])} windows, {window:5.1f} % touch a symbol,"
                f" {middle:5.1f} % of the views' middles do"
            )
        print(f"  time of choosing windows: ratio {median(ratios):.2f}")

    def views(with_tolerance: bool) -> None:
        for sample, (window, tolerance) in enumerate(uneven_windows[:32]):
            two_views(window, "drawing", 224, 0, 0, sample, tolerance=tolerance if with_tolerance else None)

    if uneven_windows:
        views(True)
        ratio = median(cpu(lambda: views(True)) / cpu(lambda: views(False)) for _ in range(4 * args.rounds))
        print(f"a pair of views from an uneven window of {side} px: ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
