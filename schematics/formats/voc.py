"""Pascal VOC: an xml file for each image, splits by ImageSets/Main/*.txt or by folders."""

import re
from dataclasses import dataclass
from pathlib import Path

from schematics.formats.source import (
    IMAGE_SUFFIXES,
    Box,
    Labelled,
    Tree,
    assign,
    box_between,
    class_name,
    is_xml_of,
    number,
    plain_parts,
    read_text,
    read_xml,
    split_named,
    whole,
)
from schematics.rows import Tally
from schematics.sheets import DataError, Sheet


@dataclass(frozen=True)
class Annotation:
    file_name: str
    size: tuple[int, int] | None
    boxes: list[Box]


def is_there(tree: Tree) -> bool:
    return any(is_xml_of(path, "annotation") for path in tree.files)


def read(tree: Tree, tally: Tally) -> tuple[dict[int, str], list[Labelled]]:
    """Classes by id, numbered in the order of their names, and the sheets. Raises DataError for bad xml."""
    files = {path: _parse(path, tree, tally) for path in tree.files if is_xml_of(path, "annotation")}
    pairs = tree.pair({path: annotation.file_name for path, annotation in files.items()}, tally)
    listed = _listed(tree, pairs, tally)
    splits = assign(tree, pairs.values(), listed, tally)
    sheets = []
    for path, image in pairs.items():
        size = tree.usable_size(image, tally) if image in splits else None
        if size:
            # The size at which the sheet was labelled, if it is given: should the sheet have been scaled
            # since, reading the split scales the boxes too.
            labelled = files[path].size or size
            sheets.append(Labelled(Sheet(image), splits[image], labelled, files[path].boxes))
    for image in set(tree.images) - set(pairs.values()):
        tally["image without a label file", tree.name(image), "dropped"] += 1
    names = sorted({box.name for sheet in sheets for box in sheet.boxes})
    return dict(enumerate(names, start=1)), sheets


def _parse(path: Path, tree: Tree, tally: Tally) -> Annotation:
    root = read_xml(path)
    boxes = []
    where = tree.name(path)
    for item in root.iter("object"):
        try:
            name = class_name(item.findtext("name"))
            sides = ("xmin", "ymin", "xmax", "ymax")
            corners = [number(item.findtext(f"bndbox/{side}") or "") for side in sides]
            boxes.append(box_between(name, corners, where, tally))
        except ValueError:
            tally["object without a name and four numbers", where, "dropped"] += 1
    width, height = (whole(root.findtext(f"size/{side}")) for side in ("width", "height"))
    size = (width, height) if width and height else None
    return Annotation((root.findtext("filename") or "").strip(), size, boxes)


def _listed(tree: Tree, pairs: dict[Path, Path], tally: Tally) -> dict[Path, str]:
    """Image -> split, by the lists in ImageSets. Raises DataError if one is in two splits."""
    by_key = {_key(tree.name(label.with_suffix(""))): image for label, image in pairs.items()}
    by_key |= {_key(tree.name(image.with_suffix(""))): image for image in pairs.values()}
    listed: dict[Path, str] = {}
    rest: set[Path] = set()  # of trainval.txt, which lists both of its parts
    for file in tree.files:
        parts = file.relative_to(tree.root).parts
        split = split_named(file.stem) or ("train" if file.stem == "trainval" else None)
        if file.suffix != ".txt" or split is None or file.parent.name not in ("Main", "ImageSets"):
            continue
        # The lists of other tasks beside Main divide the images otherwise.
        above = "/".join(parts[: -3 if file.parent.name == "Main" else -2])
        for line in filter(None, map(str.strip, read_text(file).splitlines())):
            # A drawing's number may hold blanks; a word behind it says whether a class is on the image.
            line = re.sub(rf"(?i)({'|'.join(map(re.escape, IMAGE_SUFFIXES))})$", "", line)
            names = (line, re.sub(r"\s+(1|0|-1)$", "", line))
            keys = [_key(f"{prefix}/{name}") for name in names for prefix in (above, "")]
            image = next((by_key[key] for key in keys if key in by_key), None)
            if image is None:
                tally["name in a list of the splits without a labelled sheet", tree.name(file), "kept"] += 1
            elif file.stem == "trainval":
                rest.add(image)
            elif listed.setdefault(image, split) != split:
                raise DataError(f"{file}: {line} is listed in {listed[image]} too; keep it in one split")
    return {**dict.fromkeys(rest, "train"), **listed}


def _key(name: str) -> tuple[str, ...]:
    return tuple(part for part in plain_parts(name) if part)
