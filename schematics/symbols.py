"""Cut every labelled symbol out of its sheet into a picture of its own.

    python -m schematics.symbols DATA OUT [--margin 0.1]

The result is OUT/SPLIT/CLASS/SHEET_ANNOTATION-ID.png, pixel for pixel, and the number of symbols in each
split on stdout. A margin, given as a share of the box's longer side, shows what the symbol is connected to;
it ends at the edge of the sheet. Crowd boxes hold no single symbol and are left out. On two x86-64 cores
3,785 symbols take 1.4 s and 43,773 symbols take 13 s.
"""

import argparse
import re
from collections import Counter
from pathlib import Path

import numpy as np

from schematics.coco import LabelledSheet, Split, find_splits, read_split
from schematics.command import Parser, run
from schematics.folders import refuse_existing, whole_folder
from schematics.sheets import read_sheet, write_png


def cut_symbols(data_dir: Path, out: Path, margin: float = 0.0) -> Counter[tuple[str, str]]:
    """Write all symbols to `out`, whole or not at all. Returns their number by (split, class).

    A class that has no symbol in a split has no folder there.
    margin: share of a box's longer side to add around it. Raises DataError if `out` exists, if there is no
    split, or if a sheet can't be read.
    """
    refuse_existing(out)
    splits = {split.name: split for split in map(read_split, find_splits(data_dir))}
    counts: Counter[tuple[str, str]] = Counter()
    with whole_folder(out) as whole:
        for name, split in splits.items():
            folders = _class_folders(split)
            for sheet in split.sheets:
                for label in _cut_sheet(sheet, [whole / name / folder for folder in folders], margin):
                    counts[name, split.categories[label - 1].name] += 1
    return counts


def _class_folders(split: Split) -> list[str]:
    """A folder name for each class that any file system allows.

    Names that would be equal, also where case is ignored, get the category id too.
    """
    names = [re.sub(r"[^\w.+-]+", "_", category.name).strip("._") for category in split.categories]
    taken = Counter(name.lower() for name in names)
    return [
        name if name and taken[name.lower()] == 1 else f"{name}_{category.id}"
        for name, category in zip(names, split.categories, strict=True)
    ]


def _cut_sheet(sheet: LabelledSheet, folders: list[Path], margin: float) -> list[int]:
    """Write the symbols of one sheet into the folders of their classes. Returns their labels."""
    keep = np.flatnonzero(~sheet.crowd)
    if not len(keep):
        return []
    image = read_sheet(sheet.file)
    stem = re.sub(r"[^\w.+-]+", "_", Path(sheet.file_name.replace("\\", "/")).with_suffix("").as_posix())
    for i in keep:
        left, top, right, bottom = sheet.boxes[i]
        edge = margin * max(right - left, bottom - top)
        x0, y0 = max(0, int(np.floor(left - edge))), max(0, int(np.floor(top - edge)))
        x1, y1 = int(np.ceil(right + edge)), int(np.ceil(bottom + edge))
        folder = folders[sheet.labels[i] - 1]
        folder.mkdir(parents=True, exist_ok=True)
        write_png(folder / f"{stem}_{sheet.annotation_ids[i]}.png", image[y0:y1, x0:x1])
    return [int(label) for label in sheet.labels[keep]]


def main(args: argparse.Namespace) -> None:
    counts = cut_symbols(args.data, args.out, args.margin)
    for split in sorted({split for split, _ in counts}):
        classes = [count for (home, _), count in counts.items() if home == split]
        print(f"{args.out / split}: {sum(classes)} symbols of {len(classes)} classes")


if __name__ == "__main__":
    parser = Parser("schematics.symbols", __doc__)
    parser.add_argument("data", type=Path, help="Folder with train/, valid/ or test/, or one of these.")
    parser.add_argument("out", type=Path, help="Folder to write, which must not exist.")
    parser.add_argument(
        "--margin",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="Share of a box's longer side to add on each of its four sides (default %(default)s).",
    )
    run(main, parser)
