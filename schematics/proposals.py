"""Show how many labelled symbols the boxes around connected ink find, without any label or network.

    python -m schematics.proposals DATA [--split valid] [--most 2000] [--out PICTURE.png]

A symbol is found if a box of its sheet overlaps it by an IoU of 0.3, 0.5 or 0.7. Crowd boxes are left out.
The picture shows sheets with each symbol's best box in blue, and the symbol itself in green if that has an
IoU of 0.5, else in red. On circuits of some 500 px a sheet takes half a second of one x86-64 core; results
are in docs/results.md.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from schematics.boxes import box_iou
from schematics.coco import LabelledSheet, find_split, read_split
from schematics.command import Parser, run
from schematics.ink import MOST, ink_boxes
from schematics.progress import progress
from schematics.sheets import DataError, read_sheet, to_color, write_png
from schematics.windows import Image

REACHED = (0.3, 0.5, 0.7)  # IoU from which a symbol counts as found
FOUND, MISSED, BEST = (0, 150, 60), (220, 40, 40), (60, 90, 230)  # RGB
DRAWN, SIDE = 6, 640  # sheets in the picture, and the side of each, px


def picture(sheet: LabelledSheet, proposals: NDArray[np.float32]) -> Image:
    """RGB [SIDE, SIDE, 3]: the sheet with its symbols, and the best box for each."""
    image = to_color(read_sheet(sheet.file), "rgb")
    factor = SIDE / max(image.shape[:2])
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=how)
    truth = sheet.boxes[~sheet.crowd]
    iou = box_iou(truth, proposals)
    best = iou.argmax(1) if len(proposals) else np.empty(0, int)
    for n, box in enumerate(best.tolist()):
        corners = np.rint(factor * proposals[box]).astype(int).tolist()
        cv2.rectangle(image, corners[:2], corners[2:], BEST, 1)
        corners = np.rint(factor * truth[n]).astype(int).tolist()
        cv2.rectangle(image, corners[:2], corners[2:], FOUND if iou[n, box] >= 0.5 else MISSED, 2)
    beyond = (0, SIDE - image.shape[0], 0, SIDE - image.shape[1])
    return cv2.copyMakeBorder(image, *beyond, cv2.BORDER_CONSTANT, value=(200, 200, 200))


def mosaic(sheets: Sequence[LabelledSheet], proposals: Sequence[NDArray[np.float32]]) -> Image:
    """Pictures of DRAWN sheets, evenly spread over those given, in two rows."""
    chosen = np.unique(np.linspace(0, len(sheets) - 1, DRAWN).astype(int)).tolist()
    cells = [picture(sheets[n], proposals[n]) for n in chosen]
    cells += [np.full_like(cells[0], 200)] * (-len(cells) % 3)
    return np.vstack([np.hstack(cells[n : n + 3]) for n in range(0, len(cells), 3)])


def main(args: argparse.Namespace) -> None:
    if args.most < 1:
        raise DataError(f"--most {args.most}: give 1 or more")
    if args.out and not args.out.parent.is_dir():
        raise DataError(f"--out {args.out}: there is no folder {args.out.parent}")
    split = read_split(find_split(args.data, args.split))
    best, proposals, seconds = [], [], 0.0
    cv2.setNumThreads(1)  # so that CPU time is that of one core
    for sheet in progress(split.sheets, "proposals"):
        image = read_sheet(sheet.file)
        begun = time.process_time()
        proposals.append(ink_boxes(image, args.most))
        seconds += time.process_time() - begun
        iou = box_iou(sheet.boxes[~sheet.crowd], proposals[-1])
        best += iou.max(1, initial=0).tolist()
    numbers = [len(boxes) for boxes in proposals]
    found = "  ".join(f"{100 * np.mean(np.array(best) >= least):.1f} % at {least}" for least in REACHED)
    count = len(split.sheets)
    print(f"{args.data} {split.name}: {len(best)} symbols on {count} sheets")
    print(f"recall by IoU: {found}")
    print(f"{np.mean(numbers):.0f} boxes a sheet, {max(numbers)} at most; {seconds / count:.2f} s a sheet")
    if args.out:
        write_png(args.out, mosaic(split.sheets, proposals))
        print(f"{args.out}: {min(DRAWN, count)} sheets")


if __name__ == "__main__":
    parser = Parser("schematics.proposals", __doc__)
    parser.add_argument("data", type=Path, help="Folder with train/, valid/ or test/.")
    parser.add_argument("--split", choices=("train", "valid", "test"), default="valid")
    parser.add_argument(
        "--most", type=int, default=MOST, help="Boxes of a sheet, at most (default %(default)s)."
    )
    parser.add_argument("--out", type=Path, metavar="PICTURE.png", help="Picture of six sheets to write.")
    run(main, parser)
