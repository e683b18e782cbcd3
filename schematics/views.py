"""Draw a picture of the views that pretraining would see of your sheets.

    python -m schematics.views SHEETS OUT.png [--most 3] [--side 512] [--size 224] [--pairs 4] [--seed 0]

The picture shows a window of each of the first sheets beside pairs of its views, a row for each recipe:
`drawing`, `simclr` and `vicreg`, which docs/views.md explains. On two x86-64 cores the default of 3 sheets
and 4 pairs takes 0.5 s.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np

from schematics.command import Parser, run
from schematics.pixels import resize
from schematics.recipes import RECIPES, two_views
from schematics.sheets import DataError, find_sheets, read_sheet, to_color, write_png
from schematics.windows import Image, cut, ink_windows


def contact_sheet(windows: list[Image], size: int, pairs: int, seed: int) -> Image:
    """An RGB picture with a row a window and recipe: the window itself, then `pairs` pairs of views."""
    rows = []
    for sample, window in enumerate(windows):
        for recipe in RECIPES:
            cells = [to_color(resize(window, size), "rgb")]
            for epoch in range(pairs):
                cells += two_views(window, recipe, size, seed, epoch, sample)
            rows.append(
                cv2.copyMakeBorder(np.hstack(cells), 0, 2, 0, 0, cv2.BORDER_CONSTANT, value=(255, 80, 0))
            )
    return np.vstack(rows)


def main(args: argparse.Namespace) -> None:
    windows = []
    for sheet in find_sheets(args.sheets)[: args.most]:
        image = read_sheet(sheet)
        corners = ink_windows(image, args.side, max(1, args.side // 2), 0.002)
        if len(corners):
            x, y = corners[len(corners) // 2].tolist()
            windows.append(cut(image, x, y, args.side))
    if not windows:
        raise DataError(f"{args.sheets}: blank paper; give drawings with lines")
    write_png(args.out, contact_sheet(windows, args.size, args.pairs, args.seed))
    print(f"{args.out}: from top to bottom of each group {', '.join(RECIPES)}; the window is on the left")


if __name__ == "__main__":
    parser = Parser("schematics.views", __doc__)
    parser.add_argument("sheets", type=Path, help="A sheet, or a folder of sheets.")
    parser.add_argument("out", type=Path, help="PNG file to write; an old one is replaced.")
    parser.add_argument(
        "--most", type=int, default=3, help="Largest number of sheets to show (default %(default)s)."
    )
    parser.add_argument(
        "--side", type=int, default=512, help="Side of a window in pixels (default %(default)s)."
    )
    parser.add_argument(
        "--size", type=int, default=224, help="Side of a view in pixels (default %(default)s)."
    )
    parser.add_argument(
        "--pairs",
        type=int,
        default=4,
        help="Number of pairs of views to show a recipe (default %(default)s).",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="Number from which the views are drawn (default %(default)s)."
    )
    run(main, parser)
