"""Are planted faults found? Precision and recall of `python -m detection.doubt` on labels made wrong.

    python benchmarks/planted_faults.py --data-dir ci2n_circuits --checkpoint RUN/model.pt --out OUT

Makes OUT/data/SPLIT, the split with --faults labels dropped, renamed, moved or doubled (--kinds), as many of
each, drawn by --seed; lets the detector, which must not be trained on that split, doubt its labels; and
prints how many of the first 50, 100 and 300 doubts point to a planted fault (precision), and to how many of
the faults (recall). The labels of the split count as right but for these, so what was wrong before is held
against it.

A renamed label gets the class of another one, drawn from all, so frequent classes more often. A moved one
goes by 0.3 to 0.6 of its longer side in any direction, and a doubled one gets a copy whose place and sides
are off by up to a tenth. A doubt points to a fault if it is about that label, or about the other one of a
doubled pair, whatever its kind, or if it misses a label whose IoU with the right box is 0.3 or more.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from schematics.boxes import box_iou
from schematics.coco import Split, find_split, read_split, to_coco, write_split
from schematics.draws import Use, draw

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("dropped", "renamed", "moved", "doubled")
FIRST = (50, 100, 300)


@dataclass(frozen=True)
class Fault:
    """A label that was made wrong."""

    kind: str
    sheet: str
    annotation: int  # id
    copy: int  # id of its double, else 0
    box: tuple[float, ...]  # the right one: x y width height, px


def plant(
    split: Split, count: int, seed: int, kinds: Sequence[str] = KINDS
) -> tuple[list[dict], list[Fault]]:
    """The annotations of the split with `count` faults, and the faults.

    The kinds come in turn. Raises ValueError for more faults than labels.
    """
    document = to_coco(split)
    rows = {row["id"]: row for row in document["annotations"]}
    sheets = {image["id"]: image for image in document["images"]}
    usable = [number for number, row in rows.items() if not row["iscrowd"]]
    if count > len(usable):
        raise ValueError(f"{count} faults, but {len(usable)} labels")
    chosen = draw(Use.PLANTED_FAULTS, seed).permutation(usable)[:count].tolist()
    classes = [rows[number]["category_id"] for number in usable]
    faults, free = [], max(rows) + 1
    for place, number in enumerate(chosen):
        kind, row = kinds[place % len(kinds)], rows[number]
        rng = draw(Use.PLANTED_FAULTS, seed, sample=place + 1)
        sheet = sheets[row["image_id"]]
        x, y, width, height = row["bbox"]
        copy = 0
        if kind == "dropped":
            del rows[number]
        elif kind == "renamed":
            others = [category for category in classes if category != row["category_id"]]
            rows[number] = {**row, "category_id": others[int(rng.integers(len(others)))]}
        elif kind == "moved":
            far, angle = rng.uniform(0.3, 0.6) * max(width, height), rng.uniform(0, 2 * np.pi)
            moved = [x + far * np.cos(angle), y + far * np.sin(angle), width, height]
            rows[number] = {**row, "bbox": _kept_on(moved, sheet)}
        else:
            dx, dy, dw, dh = rng.uniform(-0.1, 0.1, 4) * [width, height, width, height]
            copy, free = free, free + 1
            rows[copy] = {
                **row,
                "id": copy,
                "bbox": _kept_on([x + dx, y + dy, width + dw, height + dh], sheet),
            }
        faults.append(Fault(kind, sheet["file_name"], number, copy, (x, y, width, height)))
    return list(rows.values()), faults


def _kept_on(box: Sequence[float], sheet: dict) -> list[float]:
    """The box pushed back onto the sheet where it has left it."""
    x, y, width, height = box
    width, height = min(width, sheet["width"]), min(height, sheet["height"])
    return [
        min(max(0.0, x), sheet["width"] - width),
        min(max(0.0, y), sheet["height"] - height),
        width,
        height,
    ]


def write_data(split: Split, annotations: list[dict], folder: Path) -> None:
    """The split with other annotations; images are links."""
    write_split(folder, to_coco(split)["images"], split.categories, annotations)
    for sheet in split.sheets:
        link = folder / sheet.file_name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(sheet.path.resolve())


def pointed_at(doubts: Sequence[dict], faults: Sequence[Fault]) -> list[int]:
    """For each doubt, the index of the fault that it points to, or -1."""
    of_label = {(f.sheet, n): i for i, f in enumerate(faults) for n in (f.annotation, f.copy) if n}
    found = []
    for doubt in doubts:
        fault = of_label.get((doubt["sheet"], doubt["annotation_id"]), -1)
        if doubt["kind"] == "missing":
            here = [i for i, f in enumerate(faults) if f.sheet == doubt["sheet"]]
            iou = box_iou(_corners([doubt["suggested_box"]]), _corners([faults[i].box for i in here]))[0]
            fault = here[int(iou.argmax())] if len(here) and iou.max() >= 0.3 else -1
        found.append(fault)
    return found


def _corners(boxes: Sequence[Sequence[float]]) -> np.ndarray:
    xywh = np.array(boxes, np.float64).reshape(-1, 4)
    return np.hstack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]])


def table(doubts: Sequence[dict], faults: Sequence[Fault]) -> str:
    """Precision and recall of the first doubts, and the faults of each kind that they point to."""
    found = pointed_at(doubts, faults)
    planted = Counter(fault.kind for fault in faults)
    kinds = [kind for kind in KINDS if planted[kind]]
    lines = [
        f"{'first':>6} {'precision':>10} {'recall':>7}  " + "  ".join(f"{k} of {planted[k]}" for k in kinds)
    ]
    for first in FIRST:
        hits = found[:first]
        distinct = set(hits) - {-1}
        hit = Counter(faults[i].kind for i in distinct)
        right, recall = sum(i >= 0 for i in hits) / first, len(distinct) / len(faults)
        lines.append(
            f"{first:6} {right:10.2f} {recall:7.3f}  "
            + "  ".join(f"{hit[k]:{len(f'{k} of {planted[k]}')}}" for k in kinds)
        )
    right, all_of = Counter(), Counter()
    for doubt, fault in zip(doubts[:100], found[:100], strict=True):
        all_of[doubt["kind"]] += 1
        right[doubt["kind"]] += fault >= 0
    told = ", ".join(f"{kind} {right[kind]} of {number}" for kind, number in all_of.items())
    return "\n".join([*lines, f"of the first 100 doubts, right by the kind that is named: {told}"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    clean = read_split(find_split(args.data_dir, args.split))
    planted, faults = plant(clean, args.faults, args.seed, args.kinds)
    place = args.out / "data" / clean.name
    write_data(clean, planted, place)
    (args.out / "faults.json").write_text(json.dumps([fault.__dict__ for fault in faults], indent=1))
    command = [
        "-m",
        "detection.doubt",
        "--checkpoint",
        str(args.checkpoint),
        "--out",
        str(args.out / "doubts"),
    ]
    command += ["--top", "1000", "--device", args.device, str(place)]
    subprocess.run([sys.executable, *command], check=True)
    doubts = json.loads((args.out / "doubts" / "doubts.json").read_text())["doubts"]
    print(table(doubts, faults))
