"""Count what a person corrected: boxes added, removed, moved and renamed.

    python -m detection.corrections FOUND LABELS

FOUND is what `detection.predict` wrote, its predictions.json, or a labelled folder; LABELS is the labelled
folder that `schematics.convert` made of the corrected export. Sheets are matched by name, also by those that
Label Studio and Roboflow give them, and only sheets that are in both count.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tyro.conf import Positional

from cluster.config import Config, setting
from cluster.entry import run
from cluster.errors import UserError
from schematics.boxes import box_iou
from schematics.coco import find_splits, read_split
from schematics.uploads import before_upload, upload_form

KINDS = ("kept", "moved", "renamed", "removed", "added")


@dataclass(frozen=True, kw_only=True)
class CorrectionsConfig(Config):
    # The two to compare: what predict wrote, and the labels that were made of it.
    places: Positional[tuple[Path, ...]] = ()
    # Overlap (IoU) from which two boxes are the same symbol, moved or renamed.
    iou: float = setting(0.5, least=0.01, most=1)
    # Pixels that each side of a box may be off before it counts as moved. Tools round.
    tolerance: float = setting(1.0, least=0)
    # Print the counts as JSON and nothing else.
    json: bool = False


@dataclass(frozen=True)
class Marked:
    """A sheet's width and height, its boxes float64 [N, 4], xyxy in px, and the classes' names."""

    size: tuple[float, float]
    boxes: np.ndarray
    names: Sequence[str]


def main(config: CorrectionsConfig) -> None:
    if len(config.places) != 2:
        raise UserError("name two: python -m detection.corrections FOUND LABELS")
    before, after = (read_marked(place) for place in config.places)
    common = [name for name in before if name in after]
    if not common:
        raise UserError(f"{config.places[0]} and {config.places[1]}: no sheet in common, by name")
    counts: dict[str, Counter[str]] = {}
    for name in common:
        for kind, label in corrections(before[name], after[name], config.iou, config.tolerance):
            counts.setdefault(label, Counter())[kind] += 1
    total = sum(counts.values(), Counter[str]())
    changed = sum(count for kind, count in total.items() if kind != "kept")
    drawn = sum(len(after[name].names) for name in common)
    if config.json:
        facts = {"sheets": len(common), "boxes": drawn, "corrections": changed}
        by_class = {label: {kind: counts[label][kind] for kind in KINDS} for label in sorted(counts)}
        print(json.dumps({**facts, **{kind: total[kind] for kind in KINDS}, "classes": by_class}))
        return
    width = max(map(len, [*counts, "class"]))
    print(f"{'class':{width}}" + "".join(f"{kind:>9}" for kind in KINDS))
    for label, row in [*sorted(counts.items()), ("total", total)]:
        print(f"{label:{width}}" + "".join(f"{row[kind]:9}" for kind in KINDS))
    print(f"{len(common)} sheets: {changed} corrections; without proposals {drawn} boxes were to be drawn")
    for place, names in zip(config.places, (set(before) - set(after), set(after) - set(before)), strict=True):
        if names:
            print(f"in {place} only: {len(names)} sheets, such as {min(names)}")


def corrections(before: Marked, after: Marked, iou: float, tolerance: float) -> list[tuple[str, str]]:
    """One of KINDS, and the class that the box has now or had, for each box of either.

    Boxes of `after` are scaled to the size of `before`. Pairs of one class that hardly differ come first,
    then those of one class, then others, each by their overlap. One that is renamed may have moved, too.
    """
    boxes = after.boxes * np.tile(np.divide(before.size, after.size), 2)
    overlap = box_iou(before.boxes, boxes)
    apart = np.abs(before.boxes[:, None] - boxes[None]).max(axis=2, initial=0)
    same = np.array(before.names, object)[:, None] == np.array(after.names, object)[None]
    rank = np.where(same & (apart <= tolerance), 0, np.where(same, 1, 2))
    pairs = np.argwhere((overlap >= iou) | (rank == 0))
    rows, columns = pairs.T
    order = np.lexsort((columns, rows, -overlap[rows, columns], rank[rows, columns]))
    free, left, found = set(range(len(before.names))), set(range(len(boxes))), []
    for old, new in pairs[order].tolist():
        if old in free and new in left:
            free.remove(old)
            left.remove(new)
            found.append((("kept", "moved", "renamed")[rank[old, new]], after.names[new]))
    found += [("removed", before.names[old]) for old in sorted(free)]
    return found + [("added", after.names[new]) for new in sorted(left)]


def sheet_key(name: str) -> str:
    """What the names of a sheet have in common before and after it was in a tool.

    "plans/a b.pdf#page=2" and "1a2b3c4d-a_b_page_2.png" are a_b_page_2, and so is Roboflow's
    "a_b_page_2_png.rf.HASH.jpg".
    """
    last = name.replace("\\", "/").rpartition("/")[2]
    last = re.sub(r"\.\w+#page=(\d+)$", r"_page_\1.png", last)
    stem = re.sub(r"_[a-z]+\.rf\.\w+$", "", before_upload(last).rpartition(".")[0] or last)
    return upload_form(stem)


def read_marked(place: Path) -> dict[str, Marked]:
    """The sheets of predictions.json, of the folder that holds it, or of a labelled folder, by `sheet_key`.

    Raises UserError if two sheets have one key, and DataError if the folder can't be read.
    """
    file = place / "predictions.json" if place.is_dir() else place
    found = _predicted(file) if file.is_file() else _labelled(place)
    marked: dict[str, Marked] = {}
    for name, sheet in found:
        if marked.setdefault(sheet_key(name), sheet) is not sheet:
            raise UserError(
                f"{place}: two sheets are called {sheet_key(name)}; keep one, or rename it in both"
            )
    return marked


def _predicted(file: Path) -> list[tuple[str, Marked]]:
    try:
        document = json.loads(file.read_bytes())
        names = {row["id"]: row["name"] for row in document["categories"]}
        rows: dict[int, list[Mapping]] = {row["id"]: [] for row in document["images"]}
        for row in document["annotations"]:
            rows[row["image_id"]].append(row)
        sheets = []
        for image in document["images"]:
            own = rows[image["id"]]
            xywh = np.array([row["bbox"] for row in own], float).reshape(-1, 4)
            boxes = np.hstack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]])
            labels = [names[row["category_id"]] for row in own]
            size = (image["width"], image["height"])
            sheets.append((image.get("labelled_as", image["file_name"]), Marked(size, boxes, labels)))
        return sheets
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__} {error}"
        raise UserError(f"{file}: no predictions of detection.predict ({reason})") from None


def _labelled(folder: Path) -> list[tuple[str, Marked]]:
    sheets = []
    for split in map(read_split, find_splits(folder)):
        names = [category.name for category in split.categories]
        for sheet in split.sheets:
            labels = [names[label - 1] for label in sheet.labels]
            sheets.append((sheet.file.name, Marked((sheet.width, sheet.height), sheet.boxes, labels)))
    return sheets


if __name__ == "__main__":
    run(CorrectionsConfig, main)
