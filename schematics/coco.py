"""Read labelled sheets in COCO form, repair what can be repaired, and write such sheets.

A raw Roboflow export is read as it comes. What is wrong with it is repaired or dropped, but never silently:
each split carries its findings, and `python -m schematics.check` prints them. docs/data-format.md lists them.
"""

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from schematics.folders import refuse_existing
from schematics.repair import Row, clean_rows, match_classes, renumber
from schematics.rows import Tally
from schematics.sheet_files import SheetFile, usable_images
from schematics.sheets import DataError, Sheet

ANNOTATIONS = "_annotations.coco.json"
SPLITS = {
    "train": ("train", "training"),
    "valid": ("valid", "val", "validation"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True)
class Category:
    """A class under its id in the annotation file, or under one that is free there if it isn't listed."""

    id: int
    name: str


@dataclass
class LabelledSheet:
    """One sheet and its boxes.

    file_name is what the annotation file says, path is where the image file really lies, and page is set
    where the name ends in "#page=N".
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
    page: int | None = None

    @property
    def file(self) -> Sheet:
        """What `read_sheet` decodes."""
        return Sheet(self.path, self.page)


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a split at one place. The kind of a fatal one names the cure too."""

    kind: str
    where: str  # the sheet's file name, or the annotation file
    count: int
    action: str  # "repaired", "dropped", "kept" (it is usable but worth a look) or "fatal"


@dataclass
class Split:
    """One split. Label k is categories[k - 1], and the names are the same for all splits of a data set."""

    folder: Path  # with the sheets
    categories: list[Category]
    sheets: list[LabelledSheet]
    findings: list[Finding]
    annotations: Path | None = None  # an annotation file that lies elsewhere than in the folder

    @property
    def name(self) -> str:
        """ "train", "valid" or "test", or the folder's name where that is none of these splits."""
        return _name(self.annotations or self.folder)

    def place(self, finding: Finding) -> Path:
        """The path of what a finding is about."""
        elsewhere = self.annotations
        return elsewhere if elsewhere and finding.where == elsewhere.name else self.folder / finding.where


def read_split(place: Path) -> Split:
    """Read and repair one split: a folder with sheets and their COCO annotation file, or such a file.

    The sheets of a file, such as annotations/instances_train2017.json, are those of the folder beside it that
    has its name (train2017/, images/train2017/) or is called images/.

    Splits that lie side by side have the same classes, matched by name, over the union of those that they
    list. Of the sheets only headers are read, but for those whose size was changed since they were labelled.
    Raises DataError if the split can't be used.
    """
    split = inspect_split(place)
    for finding in split.findings:
        if finding.action == "fatal":
            raise DataError(f"{split.place(finding)}: {finding.kind}")
    return split


def inspect_split(place: Path) -> Split:
    """Like `read_split`, but fatal findings are left in the list of findings.

    Raises DataError if there is no annotation file that can be read.
    """
    place = Path(place)
    file = annotation_file(place) if place.is_dir() else place
    if file is None or not file.exists():
        raise DataError(f"{place}: no {ANNOTATIONS}; {_cure(place)}")
    top, folders = _folders(place)
    own, tally = _load(file), Counter[tuple[str, str, str]]()
    classes, labels = match_classes(_beside(place, top, own), _name(place), file.name, tally)
    files = usable_images(folders, top, own, file.name, tally)
    rows = list(clean_rows(own["annotations"], files, labels, file.name, tally))
    renumber(rows, file.name, tally)
    rows_of = defaultdict(list)
    for row in rows:
        rows_of[row.sheet.id].append(row)
    usable = {sheet.id: sheet for sheet in files.values() if sheet}
    sheets = [_labelled(sheet, rows_of[number]) for number, sheet in usable.items()]
    for sheet in sheets:
        if not len(sheet.boxes):
            tally["sheet without boxes", sheet.file_name, "kept"] += 1
    if not rows:
        tally[f"no usable box on any usable sheet{_reasons(tally)}", file.name, "fatal"] += 1
    findings = [Finding(kind, where, count, action) for (kind, where, action), count in tally.items()]
    categories = [Category(number, name) for number, name in classes]
    return Split(folders[0], categories, sheets, findings, None if place.is_dir() else place)


def _reasons(tally: Tally) -> str:
    """Why nothing is left, for the end of a line: what was dropped most often, each with an example."""
    counts, example = Counter[str](), dict[str, str]()
    for (kind, where, action), count in tally.items():
        if action == "dropped" and kind.split()[0] in ("box", "image") and "dropped" not in kind:
            counts[kind] += count
            example.setdefault(kind, where)
    reasons = [f"{count} x {kind} ({example[kind]})" for kind, count in counts.most_common(3)]
    return f": dropped {', '.join(reasons)}" if reasons else ": none is listed; label some symbols"


def losses(split: Split) -> str:
    """One line on what reading the split left out or changed, or "" where it did neither.

    "train: 6 boxes and 1 sheet dropped, 2 sheets repaired; see python -m schematics.check DATA/train"
    """
    counts: Counter[tuple[str, str]] = Counter()
    for finding in split.findings:
        thing = {"box": "box", "image": "sheet"}.get(finding.kind.split()[0])
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
    place = split.annotations or split.folder
    return f"{split.name}: {', '.join(parts)}; see python -m schematics.check {place}"


def _labelled(sheet: SheetFile, rows: Sequence[Row]) -> LabelledSheet:
    xywh = np.array([row.bbox for row in rows], np.float64).reshape(-1, 4)
    corners = np.minimum(xywh[:, :2] + xywh[:, 2:], [sheet.width, sheet.height])
    return LabelledSheet(
        image_id=sheet.id,
        file_name=sheet.name,
        path=sheet.file.path,
        width=sheet.width,
        height=sheet.height,
        boxes=np.hstack([xywh[:, :2], corners]),
        labels=np.array([row.label for row in rows], np.int64),
        crowd=np.array([row.crowd for row in rows], bool),
        area=np.array([row.area for row in rows], np.float64),
        annotation_ids=np.array([row.id for row in rows], np.int64),
        xywh=xywh,
        page=sheet.file.page,
    )


def split_of(name: str) -> str | None:
    """ "train", "valid" or "test" for a name that tools give such a split, as "val", "Train", "train2017"."""
    plain = re.sub(r"[-_ ]?(19|20)\d\d$", "", name.lower())
    return next((split for split, names in SPLITS.items() if plain in names), None)


def find_split(data_dir: Path, split: str) -> Path:
    """Where the split "train", "valid" or "test" of `data_dir` is, for `read_split`: a folder or a json file.

    The folder may have any name that `split_of` knows, and without annotations in it there may be
    annotations/instances_NAME.json. Raises DataError if there is none.
    """
    data_dir, split = Path(data_dir), split_of(split) or split
    if place := _named(data_dir, split):
        return place
    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: no such folder")
    cure = _cure(data_dir)
    if _named(data_dir, "train") or _lone(data_dir):
        share = "--test" if split == "test" else "--valid"
        cure = f"draw it from what is there: python -m schematics.convert {data_dir} OUT {share} 0.2"
    wanted = " or ".join(f"{name}/{ANNOTATIONS}" for name in SPLITS.get(split, (split,)))
    raise DataError(f"{data_dir}: no {wanted}; {cure}")


def find_splits(data_dir: Path) -> list[Path]:
    """All splits in `data_dir`, or `data_dir` itself if it is one.

    Raises DataError if there is none, or if a folder named like a split has no annotations.
    """
    data_dir = Path(data_dir)
    if data_dir.is_file():
        return [data_dir]
    there = [split for split in SPLITS if _files(data_dir, split) or _split_folders(data_dir, split)]
    inside = any(file.parent == data_dir for split in there for file in _files(data_dir, split))
    lone = None if inside or not data_dir.is_dir() else _lone(data_dir)
    if lone and (lone == data_dir or not there):
        return [lone]
    return [find_split(data_dir, split) for split in there or ["train"]]


def _lone(data_dir: Path) -> Path | None:
    """`data_dir` if it is a split itself, or its one annotations/instances_NAME.json, or None."""
    if annotation_file(data_dir):
        return data_dir
    files = sorted(data_dir.glob("annotations/instances_*.json"))
    return files[0] if len(files) == 1 else None


def _named(data_dir: Path, split: str) -> Path | None:
    """The folder or else the annotation file of a split in `data_dir`, or None."""
    folders = (folder for folder in _split_folders(data_dir, split) if annotation_file(folder))
    return next(folders, next(iter(_files(data_dir, split)), None))


def _split_folders(data_dir: Path, split: str) -> list[Path]:
    """The folders that are named like a split, the usual names first."""
    usual = SPLITS.get(split, (split,))
    folders = [
        path for path in data_dir.glob("*") if (split_of(path.name) or path.name) == split and path.is_dir()
    ]
    return sorted(
        folders, key=lambda path: (usual.index(path.name) if path.name in usual else len(usual), path)
    )


def _files(data_dir: Path, split: str) -> list[Path]:
    """The annotation files that are named like a split, such as annotations/instances_train2017.json."""
    files = [*sorted(data_dir.glob("annotations/*.json")), *sorted(data_dir.glob("*.json"))]
    return [file for file in files if _name(file) == split]


def _name(place: Path) -> str:
    """The name of the split that a folder or an annotation file is, as "train"."""
    name = Path(os.path.abspath(place)).name
    if place.suffix.lower() == ".json" and not place.is_dir():
        name = place.stem.removeprefix("instances_")
    return split_of(name) or name


def _folders(place: Path) -> tuple[Path, list[Path]]:
    """The folder of the data set that a split belongs to, and where to look for the split's sheets."""
    if place.is_dir():
        home = Path(os.path.abspath(place))
        return home.parent if split_of(home.name) else home, [place, place / "images"]
    top = place.parent.parent if place.parent.name == "annotations" else place.parent
    subset = place.stem.removeprefix("instances_")
    folders = (top / subset, top / "images" / subset, top / "images", top)
    return top, [folder for folder in folders if folder.is_dir()]


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
        return f"it looks like CVAT or Pascal VOC: python -m schematics.convert {folder} OUT"
    if next(folder.rglob("data.yaml"), None) or next(folder.rglob("labels"), None):
        return f"it looks like YOLO: python -m schematics.convert {folder} OUT"
    return f"put the sheets of each split and their COCO annotations there, as {ANNOTATIONS}"


def _load(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    except RecursionError:
        raise DataError(f"{file}: not COCO annotations, it is nested too deeply; export it as COCO") from None
    except ValueError as error:
        raise DataError(f"{file}: not valid JSON ({error}); export it again") from None
    for key in ("images", "annotations", "categories"):
        rows = document.get(key) if isinstance(document, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise DataError(f'{file}: not COCO annotations, no list "{key}" of objects; export it as COCO')
    return document


def _beside(place: Path, top: Path, own: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The annotations of a split and of those beside it, by name and always in the order of SPLITS.

    A broken annotation file is passed over here: the error comes when its own split is read.
    """
    name = _name(place)
    documents = {} if name in SPLITS else {name: own}
    for split in SPLITS if name in SPLITS else ():
        try:
            if split == name:
                documents[name] = own
            elif beside := _named(top, split):
                documents[split] = _load(annotation_file(beside) or beside)
        except DataError:
            continue
    return documents
