"""Draw circuits whose symbols are known: for the demo, for tests and for trying things out.

    python -m schematics.synthetic --out DIR [--sheets N] [--seed S] [--size W H] [--noise X] [--unlabeled M]

The result is DIR/train with N sheets, DIR/valid and DIR/test with N/5 sheets each but at least 4, all three
with _annotations.coco.json, and DIR/unlabeled with M sheets, 2N if M is not given. DIR appears whole or not
at all. On two x86-64 cores the default of 272 sheets of 512 x 512 px takes 3 s.

A sheet is a function of the seed and of its index, and the indices of two splits never meet. So asking for
more sheets leaves those of a smaller set as they were.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from schematics.circuit import CLASSES
from schematics.coco import Category, write_split
from schematics.command import Parser, run
from schematics.drafting import draw_sheet
from schematics.folders import whole_folder
from schematics.sheets import DataError, write_png

SPLITS = ("train", "valid", "test", "unlabeled")
SPLIT_STRIDE = 1_000_000  # the first index of a split is this times its place in SPLITS
MARKER = ".synthetic"  # a file in a finished folder, with the arguments it was drawn with
SMALLEST_SHEET = 256  # px, a side


def write_sheets(
    out: Path,
    sheets: int,
    seed: int,
    size: tuple[int, int] = (512, 512),
    noise: float = 0.0,
    unlabeled: int = 0,
) -> dict[str, int]:
    """Draw all splits into `out`, whole or not at all. Returns the number of sheets in each.

    size: width and height of a sheet, px. A folder that was drawn with the same arguments is left as it is.
    Raises DataError if `out` holds anything else, or if an argument is out of range.
    """
    in_range = {
        f"--sheets {sheets}: give 1 or more": sheets > 0,
        f"--unlabeled {unlabeled}: give 0 or more": unlabeled >= 0,
        f"--seed {seed}: give 0 or more": seed >= 0,
        f"--noise {noise}: give a number from 0 to 1": 0 <= noise <= 1,
        f"--size {size[0]} {size[1]}: give sides of {SMALLEST_SHEET} px or more": min(size) >= SMALLEST_SHEET,
    }
    for complaint in [complaint for complaint, fine in in_range.items() if not fine]:
        raise DataError(complaint)
    out = Path(out).absolute()
    counts = dict(zip(SPLITS, (sheets, max(4, sheets // 5), max(4, sheets // 5), unlabeled), strict=True))
    made_with = {"seed": seed, "size": list(size), "noise": noise, "sheets": counts}
    if out.exists() and (out.is_file() or any(out.iterdir())):
        if (out / MARKER).is_file() and json.loads((out / MARKER).read_text()) == made_with:
            return counts
        raise DataError(f"{out}: holds something else already; choose another --out")
    with whole_folder(out) as folder:
        for k, (split, count) in enumerate(counts.items()):
            _write_split(folder / split, range(k * SPLIT_STRIDE, k * SPLIT_STRIDE + count), seed, size, noise)
        (folder / MARKER).write_text(json.dumps(made_with))
    return counts


def _write_split(folder: Path, indices: range, seed: int, size: tuple[int, int], noise: float) -> None:
    """Draw the sheets of these indices into a new folder, with annotations unless it is "unlabeled"."""
    folder.mkdir()
    images, annotations = [], []
    for image_id, index in enumerate(indices, 1):
        image, boxes, labels = draw_sheet(seed, index, *size, noise)
        name = f"{folder.name}_{image_id:05}.png"
        write_png(folder / name, image)
        images.append({"id": image_id, "file_name": name, "width": size[0], "height": size[1]})
        for (x0, y0, x1, y1), label in zip(boxes.tolist(), labels.tolist(), strict=True):
            box = [x0, y0, x1 - x0, y1 - y0]
            annotations.append({"image_id": image_id, "category_id": label, "bbox": box})
    if folder.name != "unlabeled":
        write_split(folder, images, [Category(k, name) for k, name in enumerate(CLASSES, 1)], annotations)


def main(args: argparse.Namespace) -> None:
    unlabeled = 2 * args.sheets if args.unlabeled is None else args.unlabeled
    counts = write_sheets(args.out, args.sheets, args.seed, tuple(args.size), args.noise, unlabeled)
    print(f"{args.out}: " + ", ".join(f"{count} {split}" for split, count in counts.items()) + " sheets")


if __name__ == "__main__":
    parser = Parser("schematics.synthetic", __doc__)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="Folder to write: a new one, or one drawn with the same flags.",
    )
    parser.add_argument(
        "--sheets", type=int, default=80, help="Number of labelled sheets in train (default %(default)s)."
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="Number from which all sheets are drawn (default %(default)s)."
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(512, 512),
        metavar=("W", "H"),
        help=f"Width and height of a sheet in pixels, each at least {SMALLEST_SHEET} (default 512 512).",
    )
    parser.add_argument(
        "--noise",
        type=float,
        default=0.0,
        help="From 0, a clean print, to 1, a bad scan (default %(default)s).",
    )
    parser.add_argument(
        "--unlabeled", type=int, help="Number of sheets without labels (default: twice --sheets)."
    )
    run(main, parser)
