"""Boxes through Label Studio's SDK and through Datumaro, which CVAT imports and exports with, and back.

    python tests/tools/round_trip.py WORK [--freeze]

Both need another OpenCV than ours, so WORK, a new folder, gets a virtual environment (1 GB). It prints a line
for each way. --freeze keeps what Datumaro wrote, without the sheets, in tests/cases/datumaro, for
tests/test_labelling_tools.py.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np

from schematics.coco import find_splits, read_split
from schematics.convert import convert
from schematics.labelling import Box, Labelled, lay_out
from schematics.sheets import Sheet

VERSIONS = ("label-studio-sdk==2.1.2", "datumaro==0.5.0")
NAMES = ("valve, gate", "pump/left", "Öl – 3 µm", 'a "b" & <c>', "NO")
SIZES = {"plan.png": (1234, 777), "ä 2.jpg": (640, 481), "bare.png": (50, 40)}
Boxes = dict[str, list[tuple]]  # sheet -> class, x0, y0, x1, y1 of each box


def laid_out(folder: Path) -> Path:
    """Three sheets with boxes drawn at random, for each tool."""
    rng, sheets = np.random.default_rng(0), []
    folder.mkdir()
    for name, (width, height) in SIZES.items():
        cv2.imwrite(str(folder / name), np.full((height, width), 255, np.uint8))
        rows = [(*(rng.random(2) * [width, height] * 0.9), *(rng.random(2) * 40 + 3)) for _ in range(10)]
        boxes = [Box(NAMES[k % 5], *row) for k, row in enumerate(rows if name != "bare.png" else ())]
        sheets.append(Labelled(Sheet(folder / name), "train", (width, height), boxes))
    lay_out(folder, ["label-studio", "cvat", "coco"], sheets, dict(enumerate(NAMES, start=1)))
    return folder


def read(folder: Path, work: Path) -> Boxes:
    """The boxes of an export; one in COCO is read as it is."""
    if "coco" in folder.name.rpartition(" to ")[2].lower():
        places = [folder] if (folder / "result.json").exists() else find_splits(folder)
    else:
        convert(folder, work / "read" / folder.name)
        places = find_splits(work / "read" / folder.name)
    found: Boxes = {}
    for split in map(read_split, places):
        for sheet in split.sheets:
            names = [split.categories[label - 1].name for label in sheet.labels]
            rows = [(name, *box) for name, box in zip(names, sheet.boxes.tolist(), strict=True)]
            found[sheet.path.name] = sorted(rows)
    return found


def main(work: Path, freeze: bool) -> None:
    work.mkdir(parents=True)
    python = work / "venv/bin/python"
    subprocess.run([sys.executable, "-m", "venv", work / "venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *VERSIONS], check=True)
    laid, exports = laid_out(work / "laid"), work / "exports"
    exports.mkdir()
    subprocess.run([python, Path(__file__).with_name("export.py"), laid, exports], check=True)
    want = read(laid / "coco", work)
    for folder in sorted(exports.glob("* to *")):
        found = read(folder, work)
        assert set(found) == set(want), f"{folder.name}: sheets {sorted(found)}"
        assert [[row[0] for row in found[name]] for name in want] == [
            [row[0] for row in rows] for rows in want.values()
        ], f"{folder.name}: other classes"
        off = max(
            abs(a - b)
            for name, rows in want.items()
            for one, other in zip(found[name], rows, strict=True)
            for a, b in zip(one[1:], other[1:], strict=True)
        )
        print(f"{folder.name}: {sum(map(len, found.values()))} boxes, at most {off:.4f} px off")
    if freeze:
        case = Path(__file__).parent.parent / "cases/datumaro"
        for folder in exports.glob("datumaro: cvat to *"):
            kept = case / folder.name.rpartition(" ")[2]
            shutil.copytree(folder, kept, ignore=shutil.ignore_patterns("*.png", "*.jpg"))
        (case / "given.json").write_text(json.dumps(want, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--freeze" in sys.argv)
