"""Turn a Pascal VOC or YOLO data set into the COCO splits that all other commands read.

    python -m schematics.convert SRC OUT                          SRC's own splits are kept
    python -m schematics.convert SRC OUT --valid 0.2 --test 0.1   SRC has no splits: they are drawn at random

The result is OUT/train, OUT/valid and OUT/test, each with copies of its sheets and _annotations.coco.json.
SRC is only read, and OUT appears whole or not at all. What can't be used is left out and counted on stdout.
On two x86-64 cores, 148 sheets with 3,785 boxes take 0.3 s and 2,194 sheets with 43,773 boxes take 1.1 s. The
next command is schematics.check on OUT.
"""

import argparse
import random
import shutil
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from schematics.coco import SPLITS, Category, write_split
from schematics.command import Parser, run
from schematics.folders import refuse_existing, whole_folder
from schematics.sheets import SUFFIXES, DataError, find_sheets, looks_truncated, sheet_size

IMAGE_SUFFIXES = tuple(suffix for suffix in SUFFIXES if suffix != ".pdf")


@dataclass(frozen=True)
class Labelled:
    """A sheet of the source with its boxes as (class, x, y, width, height) in pixels."""

    path: Path
    split: str
    size: tuple[int, int]  # width and height that the boxes refer to
    boxes: list[tuple[str, float, float, float, float]]


def convert(src: Path, out: Path, valid: float = 0.0, test: float = 0.0, seed: int = 0) -> Counter[str]:
    """Write `out`/train, `out`/valid and `out`/test from a VOC or YOLO folder.

    valid, test: for a source without splits, the shares of the sheets to draw by `seed` for these two.
    Returns how often something was left out, by what it was. Raises DataError if `out` exists or `src` is
    neither VOC nor YOLO; nothing is written then.
    """
    refuse_existing(out)
    if not src.is_dir():
        raise DataError(f"{src}: no such folder")
    left_out: Counter[str] = Counter()
    if next(_xml_files(src), None):
        sheets = list(_read_voc(src, left_out))
        names = sorted({name for sheet in sheets for name, *_ in sheet.boxes})
    else:
        names = _yolo_names(src)
        sheets = list(_read_yolo(src, names, left_out))
    if not any(sheet.boxes for sheet in sheets):
        raise DataError(f"{src}: no sheet with a labelled box; give the folder that holds sheets and labels")
    if valid or test:
        sheets = _draw_splits(src, sheets, valid, test, seed)
    with whole_folder(out) as folder:
        _write(folder, sheets, names)
    return left_out


def _write(out: Path, sheets: Sequence[Labelled], names: Sequence[str]) -> None:
    ids = {name: number for number, name in enumerate(names, start=1)}
    by_split = defaultdict(list)
    for sheet in sheets:
        by_split[sheet.split].append(sheet)
    for split, members in by_split.items():
        (out / split).mkdir()
        images, annotations = [], []
        taken: set[str] = set()
        for number, sheet in enumerate(members, start=1):
            name = sheet.path.name
            # A sheet in another folder may have the same name; some file systems ignore case.
            if name.lower() in taken:
                name = f"{sheet.path.stem}-{number}{sheet.path.suffix}"
            taken.add(name.lower())
            shutil.copyfile(sheet.path, out / split / name)
            width, height = sheet.size
            images.append({"id": number, "file_name": name, "width": width, "height": height})
            for category, *bbox in sheet.boxes:
                annotations.append({"image_id": number, "category_id": ids[category], "bbox": bbox})
        write_split(out / split, images, [Category(ids[name], name) for name in names], annotations)


def _draw_splits(
    src: Path, sheets: Sequence[Labelled], valid: float, test: float, seed: int
) -> list[Labelled]:
    if any(sheet.split != "train" for sheet in sheets):
        raise DataError(f"{src}: has splits of its own; leave out --valid and --test")
    if min(valid, test) < 0 or valid + test >= 1:
        raise DataError("--valid and --test are shares of the sheets and must leave some for train")
    order = sorted(sheets, key=lambda sheet: sheet.path)
    random.Random(seed).shuffle(order)
    n_valid, n_test = round(valid * len(order)), round(test * len(order))
    splits = ["valid"] * n_valid + ["test"] * n_test + ["train"] * (len(order) - n_valid - n_test)
    return [replace(sheet, split=split) for sheet, split in zip(order, splits, strict=True)]


def _split_of(path: Path, src: Path) -> str:
    """The split after which one of the folders between `src` and the file is named, else "train"."""
    for part in path.relative_to(src).parts[:-1]:
        for split, names in SPLITS.items():
            if part.lower() in names:
                return split
    return "train"


def _usable_size(path: Path, left_out: Counter[str]) -> tuple[int, int] | None:
    """Width and height of a sheet in px, or None, which is counted, if it can't be read."""
    try:
        if not looks_truncated(path):
            return sheet_size(path)
    except DataError:
        pass
    left_out[f"image truncated or unreadable: {path.name}"] += 1
    return None


def _xml_files(src: Path) -> Iterator[Path]:
    for path in sorted(src.rglob("*.xml")):
        if not path.name.startswith(".") and b"<annotation" in path.read_bytes()[:1000]:
            yield path


def _read_voc(src: Path, left_out: Counter[str]) -> Iterator[Labelled]:
    """Yield the sheets of a VOC folder, an xml for each; splits by ImageSets/Main/*.txt or folder names."""
    listed = {}
    for split, names in SPLITS.items():
        for file in (file for name in names for file in src.rglob(f"ImageSets/Main/{name}.txt")):
            listed.update({line.split()[0]: split for line in file.read_text().splitlines() if line.strip()})
    for xml in _xml_files(src):
        try:
            root = ElementTree.parse(xml).getroot()
        except (ElementTree.ParseError, ValueError, LookupError) as error:
            raise DataError(f"{xml}: not valid XML ({error}); export it again") from None
        path = _voc_image(xml, root.findtext("filename") or "")
        size = _usable_size(path, left_out) if path else None
        if path is None:
            left_out[f"image missing beside {xml.name}"] += 1
        if path is None or size is None:
            continue
        boxes = []
        for item in root.iter("object"):
            try:
                boxes.append(_voc_box(item))
            except ValueError:
                left_out[f"object without a name and four numbers: {xml.name}"] += 1
        # The size at which the sheet was labelled, if it is given: should the sheet have been scaled since,
        # reading the split scales the boxes too.
        labelled = (_integer(root.findtext("size/width")), _integer(root.findtext("size/height")))
        yield Labelled(
            path, listed.get(xml.stem) or _split_of(xml, src), labelled if all(labelled) else size, boxes
        )


def _voc_box(item: ElementTree.Element) -> tuple[str, float, float, float, float]:
    """Class, x, y, width, height in px. Raises ValueError if one of them is missing."""
    name = (item.findtext("name") or "").strip()
    left, top, right, bottom = (
        float(item.findtext(f"bndbox/{side}") or "") for side in ("xmin", "ymin", "xmax", "ymax")
    )
    if not name:
        raise ValueError("no name")
    return name, left, top, right - left, bottom - top


def _integer(text: str | None) -> int:
    return int(text) if text and text.strip().isdigit() else 0


def _voc_image(xml: Path, file_name: str) -> Path | None:
    """The image file of an xml, by the name that it gives or else by the xml's own; None without one."""
    folders = (xml.parent, xml.parent.parent / "JPEGImages", xml.parent.parent / "images")
    names = [
        file_name.replace("\\", "/").rsplit("/", 1)[-1],
        *(xml.stem + suffix for suffix in IMAGE_SUFFIXES),
    ]
    places = (folder / name for folder in folders for name in names if name)
    return next((place for place in places if place.is_file()), None)


def _yolo_names(src: Path) -> list[str]:
    """Class names by index, from data.yaml or classes.txt. Raises DataError if there are none."""
    for file in sorted([*src.glob("*.yaml"), *src.glob("*.yml")]):
        try:
            names = yaml.safe_load(file.read_text(encoding="utf-8"))["names"]
            if isinstance(names, dict):
                return [str(names.get(index, index)) for index in range(max(names) + 1)]
            return [str(name) for name in names]
        except (yaml.YAMLError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{file}: no class names under `names` ({type(error).__name__})") from None
    for file in sorted([*src.rglob("classes.txt"), *src.rglob("obj.names")]):
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line.strip() for line in lines if line.strip()]
    raise DataError(f"{src}: neither VOC (xml files) nor YOLO (data.yaml or classes.txt with class names)")


def _read_yolo(src: Path, names: Sequence[str], left_out: Counter[str]) -> Iterator[Labelled]:
    """Yield the sheets of a YOLO folder.

    Label files are in labels/ as the sheets are in images/, or each is beside its sheet. A sheet without one
    has no boxes.
    """
    for path in sorted({sheet.path for sheet in find_sheets(src)}):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        size = _usable_size(path, left_out)
        if size is None:
            continue
        parts = list(path.relative_to(src).with_suffix(".txt").parts)
        if "images" in parts[:-1]:
            parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
        file = src.joinpath(*parts)
        boxes = []
        for line in file.read_text(errors="replace").splitlines() if file.is_file() else ():
            if not line.strip():
                continue
            box = _yolo_box(line.split(), names, *size)
            if box:
                boxes.append(box)
            else:
                left_out[f"line without a known class and a box: {file.name}"] += 1
        yield Labelled(path, _split_of(path, src), size, boxes)


def _yolo_box(
    words: Sequence[str], names: Sequence[str], width: int, height: int
) -> tuple[str, float, float, float, float] | None:
    """Class, x, y, width, height in px; None if the line gives no box of a known class.

    The line is `class cx cy w h [score]`, or the outline `class x1 y1 x2 y2 x3 y3 ...`, in shares of the
    sheet's width and height.
    """
    try:
        index, *values = (float(word) for word in words)
    except ValueError:
        return None
    is_outline = len(values) >= 6 and len(values) % 2 == 0
    if index not in range(len(names)) or not (is_outline or len(values) in (4, 5)):
        return None
    if not is_outline:
        cx, cy, w, h = values[:4]
        left, top = cx - w / 2, cy - h / 2
    else:
        left, top = min(values[::2]), min(values[1::2])
        w, h = max(values[::2]) - left, max(values[1::2]) - top
    return names[int(index)], left * width, top * height, w * width, h * height


def main(args: argparse.Namespace) -> None:
    left_out = convert(args.src, args.out, args.valid, args.test, args.seed)
    for reason, count in left_out.items():
        print(f"left out: {count} {reason}")
    print(f"wrote {', '.join(sorted(path.name for path in args.out.iterdir()))} to {args.out}")
    print(f"next: python -m schematics.check {args.out}")


if __name__ == "__main__":
    parser = Parser("schematics.convert", __doc__)
    parser.add_argument("src", type=Path, help="Folder of a Pascal VOC or YOLO data set, which is only read.")
    parser.add_argument("out", type=Path, help="Folder to write, which must not exist.")
    for split in ("valid", "test"):
        parser.add_argument(
            f"--{split}",
            type=float,
            default=0.0,
            metavar="SHARE",
            help=f"Share of the sheets, from 0 to 1, to draw for {split} (default %(default)s).",
        )
    parser.add_argument(
        "--seed", type=int, default=0, help="Number from which these sheets are drawn (default %(default)s)."
    )
    run(main, parser)
