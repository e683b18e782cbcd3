"""Read labelled sheets in COCO form, repair what can be repaired, and write such sheets.

A raw Roboflow export is read as it comes. What is wrong with it is repaired or dropped, but never silently:
each split carries its findings, and `python -m schematics.check` prints them. docs/data-format.md lists them.
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from schematics.folders import refuse_existing
from schematics.repair import Row, SheetFile, Tally, class_names, clean_rows, renumber, usable_images
from schematics.sheets import DataError

ANNOTATIONS = "_annotations.coco.json"
SPLITS = {"train": ("train",), "valid": ("valid", "val", "validation"), "test": ("test",)}


@dataclass(frozen=True)
class Category:
    """A class under its id in the annotation file."""

    id: int
    name: str


@dataclass
class LabelledSheet:
    """One sheet and its boxes.

    file_name is what the annotation file says, path is where the image file really lies.
    """

    image_id: int
    file_name: str
    path: Path
    width: int
    height: int
    boxes: np.ndarray  # float64 [N, 4], x0 y0 x1 y1 in pixels of the sheet
    labels: np.ndarray  # int64 [N], 1..K; label k is categories[k - 1] of the split
    crowd: np.ndarray  # bool [N]
    area: np.ndarray  # float64 [N], px²; that of a mask may be less than its box's
    annotation_ids: np.ndarray  # int64 [N], unique in the split and never 0
    # float64 [N, 4], COCO's x y width height. They are kept beside `boxes` because x1 - x0 may differ from
    # the width in the last bit.
    xywh: np.ndarray | None = None


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a split at one place. The kind of a fatal one names the cure too."""

    kind: str
    where: str  # the sheet's file name, or the annotation file
    count: int
    action: str  # "repaired", "dropped", "kept" (it is usable but worth a look) or "fatal"


@dataclass
class Split:
    folder: Path
    categories: list[Category]
    sheets: list[LabelledSheet]
    findings: list[Finding]


def read_split(folder: Path) -> Split:
    """Read and repair one split: a folder with sheets and their COCO annotation file.

    Splits that lie side by side number their classes alike, over the union of those that they list. Of the
    sheets only headers are read, no pixels. Raises DataError if the split can't be used.
    """
    split = inspect_split(folder)
    for finding in split.findings:
        if finding.action == "fatal":
            raise DataError(f"{split.folder / finding.where}: {finding.kind}")
    return split


def inspect_split(folder: Path) -> Split:
    """Like `read_split`, but fatal findings are left in the list of findings.

    Raises DataError if there is no annotation file that can be read.
    """
    folder = Path(folder)
    file = annotation_file(folder)
    if file is None:
        raise DataError(f"{folder}: no {ANNOTATIONS}; {_cure(folder)}")
    documents = {folder.name: _load(file), **dict(_siblings(folder))}
    own = documents[folder.name]
    tally: Tally = Counter()
    names = class_names(documents, file.name, tally)
    files = usable_images(folder, own["images"], file.name, tally)
    rows = list(clean_rows(own["annotations"], files, names, file.name, tally))
    renumber(rows, file.name, tally)
    rows_of = defaultdict(list)
    for row in rows:
        rows_of[row.sheet.id].append(row)
    label_of = {number: label for label, number in enumerate(names, start=1)}
    usable = {sheet.id: sheet for sheet in files.values() if sheet}
    sheets = [_labelled(sheet, rows_of[number], label_of) for number, sheet in usable.items()]
    for sheet in sheets:
        if not len(sheet.boxes):
            tally["sheet without boxes", sheet.file_name, "kept"] += 1
    if not rows:
        tally["no usable box on any usable sheet; see the other findings", file.name, "fatal"] += 1
    findings = [Finding(kind, where, count, action) for (kind, where, action), count in tally.items()]
    return Split(folder, [Category(number, name) for number, name in names.items()], sheets, findings)


def losses(split: Split) -> str:
    """One line on what reading the split left out or changed, or "" where it did neither.

    "train: 6 boxes and 1 sheet dropped, 2 sheets repaired; see python -m schematics.check DATA/train"
    """
    counts: Counter[tuple[str, str]] = Counter()
    for finding in split.findings:
        thing = {"box": "box", "image": "sheet", "labelled": "sheet"}.get(finding.kind.split()[0])
        if thing and finding.action in ("dropped", "repaired"):
            counts[finding.action, thing] += finding.count
    parts = []
    for action in ("dropped", "repaired"):
        boxes, sheets = counts[action, "box"], counts[action, "sheet"]
        things = [f"{boxes} box{'es' * (boxes != 1)}"] * (boxes > 0)
        things += [f"{sheets} sheet{'s' * (sheets != 1)}"] * (sheets > 0)
        if things:
            parts.append(f"{' and '.join(things)} {action}")
    if not parts:
        return ""
    return f"{split.folder.name}: {', '.join(parts)}; see python -m schematics.check {split.folder}"


def _labelled(sheet: SheetFile, rows: Sequence[Row], label_of: dict[int, int]) -> LabelledSheet:
    xywh = np.array([row.bbox for row in rows], np.float64).reshape(-1, 4)
    corners = np.minimum(xywh[:, :2] + xywh[:, 2:], [sheet.width, sheet.height])
    return LabelledSheet(
        image_id=sheet.id,
        file_name=sheet.name,
        path=sheet.path,
        width=sheet.width,
        height=sheet.height,
        boxes=np.hstack([xywh[:, :2], corners]),
        labels=np.array([label_of[row.category_id] for row in rows], np.int64),
        crowd=np.array([row.crowd for row in rows], bool),
        area=np.array([row.area for row in rows], np.float64),
        annotation_ids=np.array([row.id for row in rows], np.int64),
        xywh=xywh,
    )


def find_split(data_dir: Path, split: str) -> Path:
    """The folder of the split "train", "valid" or "test" in `data_dir`; valid may also be val or validation.

    Raises DataError if there is none.
    """
    data_dir = Path(data_dir)
    names = next((names for names in SPLITS.values() if split in names), (split,))
    for name in names:
        if annotation_file(data_dir / name):
            return data_dir / name
    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: no such folder")
    wanted = " or ".join(f"{name}/{ANNOTATIONS}" for name in names)
    raise DataError(f"{data_dir}: no {wanted}; {_cure(data_dir)}")


def find_splits(data_dir: Path) -> list[Path]:
    """All split folders in `data_dir`, or `data_dir` itself if it is one.

    Raises DataError if there is none, or if a folder named like a split has no annotations.
    """
    data_dir = Path(data_dir)
    if data_dir.is_dir() and annotation_file(data_dir):
        return [data_dir]
    there = [split for split, names in SPLITS.items() if any((data_dir / name).is_dir() for name in names)]
    return [find_split(data_dir, split) for split in there or ["train"]]


def annotation_file(folder: Path) -> Path | None:
    """_annotations.coco.json, annotations.json or the only json file in `folder`, or None.

    Raises DataError if there are several json files of other names.
    """
    for name in (ANNOTATIONS, "annotations.json"):
        if (folder / name).is_file():
            return folder / name
    others = [path for path in sorted(folder.glob("*.json")) if not path.name.startswith(".")]
    if len(others) > 1:
        raise DataError(f"{folder}: {len(others)} json files; name the right one {ANNOTATIONS}")
    return others[0] if others else None


def to_coco(split: Split) -> dict[str, Any]:
    """The split as COCO ground truth for pycocotools: complete rows under the original ids."""
    images, annotations = [], []
    for sheet in split.sheets:
        images.append(
            {"id": sheet.image_id, "file_name": sheet.file_name, "width": sheet.width, "height": sheet.height}
        )
        xywh = sheet.xywh
        if xywh is None:
            xywh = np.hstack([sheet.boxes[:, :2], sheet.boxes[:, 2:] - sheet.boxes[:, :2]])
        for i, bbox in enumerate(xywh.tolist()):
            annotations.append(
                {
                    "id": int(sheet.annotation_ids[i]),
                    "image_id": sheet.image_id,
                    "category_id": split.categories[sheet.labels[i] - 1].id,
                    "bbox": bbox,
                    "area": float(sheet.area[i]),
                    "iscrowd": int(sheet.crowd[i]),
                }
            )
    return _document(images, split.categories, annotations)


def write_split(
    folder: Path, images: Sequence[dict], categories: Sequence[Category], annotations: Sequence[dict]
) -> Path:
    """Write `folder`/_annotations.coco.json, whole or not at all, and return its path.

    `images`: {"id", "file_name" (relative to `folder`), "width", "height"}; `annotations`: {"image_id",
    "category_id", "bbox": [x, y, width, height] in pixels} and, where known, "id", "area", "iscrowd", which
    default to 1, 2, ..., the box's area and 0. The image files are left to the caller.
    Raises DataError if the file exists.
    """
    path = Path(folder) / ANNOTATIONS
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, annotation in enumerate(annotations, start=1):
        width, height = annotation["bbox"][2:]
        rows.append({"id": number, "area": width * height, "iscrowd": 0, **annotation})
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(_document(images, categories, rows), ensure_ascii=False), encoding="utf-8")
    os.replace(partial, path)
    return path


def _document(
    images: Sequence[dict], categories: Sequence[Category], annotations: Sequence[dict]
) -> dict[str, Any]:
    return {
        "info": {"description": "written by linework"},
        "licenses": [],
        "categories": [{"id": c.id, "name": c.name, "supercategory": "none"} for c in categories],
        "images": list(images),
        "annotations": list(annotations),
    }


def _cure(folder: Path) -> str:
    """What to do about a folder without COCO annotations, for the end of an error's line."""
    if next(folder.rglob("*.xml"), None):
        return f"it looks like Pascal VOC: python -m schematics.convert {folder} OUT"
    if next(folder.rglob("data.yaml"), None) or next(folder.rglob("labels"), None):
        return f"it looks like YOLO: python -m schematics.convert {folder} OUT"
    return f"put the sheets of each split and their COCO annotations there, as {ANNOTATIONS}"


def _load(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file}: not valid JSON ({error}); export it again") from None
    for key in ("images", "annotations", "categories"):
        rows = document.get(key) if isinstance(document, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DataError(f'{file}: not COCO annotations, no list "{key}" of objects; export it as COCO')
    return document


def _siblings(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and annotations of the splits beside `folder`, if `folder` is named like a split.

    A broken annotation file is passed over here: the error comes when its own split is read.
    """
    splits = [name for names in SPLITS.values() for name in names]
    if folder.resolve().name not in splits:
        return
    for name in splits:
        beside = folder.resolve().parent / name
        try:
            if name != folder.resolve().name and (file := annotation_file(beside)):
                yield name, _load(file)
        except DataError:
            continue
