"""CVAT's own xml ("CVAT for images 1.1"): a file for a task, job or project, with the shapes of each image.

CVAT's other exports, such as COCO, Pascal VOC and YOLO, are read as these are.

https://docs.cvat.ai/docs/other/xml_format
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element, ElementTree, SubElement

from schematics.formats.source import (
    Box,
    Labelled,
    Tree,
    assign,
    box_between,
    class_name,
    extent,
    is_xml_of,
    number,
    read_xml,
    split_named,
    whole,
)
from schematics.rows import Tally, printable
from schematics.sheets import DataError, Sheet

IMAGES = "images"  # the folder of the sheets in what `write` makes


def is_there(tree: Tree) -> bool:
    return any(is_xml_of(path, "annotations") for path in tree.files)


def read(tree: Tree, tally: Tally) -> tuple[dict[int, str], list[Labelled]]:
    """Classes by id, numbered in the order of their names, and the sheets.

    An image without shapes is a sheet without boxes. Raises DataError for bad xml, for tracks of a video and
    for an image that is there twice.
    """
    items: dict[Path, tuple[Path, Element]] = {}
    listed: dict[Path, str] = {}
    for path in (path for path in tree.files if is_xml_of(path, "annotations")):
        root = read_xml(path)
        if root.find("track") is not None:
            cure = 'export it as "CVAT for images 1.1", with its images'
            raise DataError(f'{path}: has tracks of a video ("CVAT for video"); {cure}')
        subset = root.findtext("meta/*/subset")  # of a task or a job; in a project each image has its own
        for item in root.findall("image"):
            name, own = item.get("name", ""), (item.get("subset") or subset or "").strip()
            image = _find(tree, path, name, own)
            if image is None:
                kind = "image that is not there (save the images with the export)"
                tally[kind, printable(name[:200]), "dropped"] += 1
                continue
            if image in items:
                both = f"{items[image][0].name} and {path.name}" if items[image][0] != path else path.name
                raise DataError(f"{image}: labelled twice, in {both}; keep one <image>")
            items[image] = path, item
            if split := split_named(own):
                listed[image] = split
    splits = assign(tree, items, listed, tally)
    sheets = []
    for image, split in splits.items():
        if found := tree.usable_size(image, tally):
            item = items[image][1]
            boxes = _boxes(item, split, tree.name(image), tally)
            width, height = (whole(item.get(side)) for side in ("width", "height"))
            size = (width, height) if min(width, height) > 0 else found
            sheets.append(Labelled(Sheet(image), split, size, boxes))
    for image in set(tree.images) - set(items):
        tally["image that the xml does not name", tree.name(image), "dropped"] += 1
    names = sorted({box.name for sheet in sheets for box in sheet.boxes})
    return dict(enumerate(names, start=1)), sheets


def _find(tree: Tree, path: Path, name: str, subset: str) -> Path | None:
    """The image that an xml file names. A project's export has a folder for each subset."""
    folder, split = tree.name(path).rpartition("/")[0], split_named(subset)
    for parts in ((folder, subset, name), (folder, name)):
        image = tree.find("/".join(filter(None, parts))) if name else None
        if image and (split is None or tree.split_of(image) in (None, split)):
            return image
    return None


def _boxes(item: Element, split: str, where: str, tally: Tally) -> list[Box]:
    """The upright boxes around the shapes of an image."""
    boxes = []
    groups: Counter[tuple[str, str]] = Counter()
    for shape in item:
        try:
            name = class_name(shape.get("label"))
            boxes.append(box_between(name, _corners(shape), where, tally))
        except ValueError:
            kind = f"shape without a label and an area ('{printable(str(shape.tag)[:40])}')"
            tally[kind, where, "dropped"] += 1
            continue
        if shape.tag == "box" and _turn(shape):
            kind = f"{split}: box turned by an angle: the upright box around it"
            tally[kind, where, "repaired"] += 1
        groups[name, shape.get("group_id", "0")] += 1
    # They may be parts of one object or objects that belong together: nothing in the file tells.
    together = sum(count for (_, group), count in groups.items() if group != "0" and count > 1)
    if together:
        tally["shapes of one label and group: a box for each", where, "kept"] += together
    return boxes


def _corners(shape: Element) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 of the upright box around a shape, in px. Raises ValueError if it surrounds nothing."""

    def sides(*names: str) -> list[float]:
        return [number(shape.get(name, "")) for name in names]

    if shape.tag == "polygon":
        pairs = (pair.split(",") for pair in shape.get("points", "").strip("; ").split(";"))
        return extent((number(x), number(y)) for x, y in pairs)
    if shape.tag == "mask":
        left, top, width, height = sides("left", "top", "width", "height")
        return left, top, left + width, top + height
    cos, sin = math.cos(_turn(shape)), math.sin(_turn(shape))
    if shape.tag == "ellipse":
        x, y, rx, ry = sides("cx", "cy", "rx", "ry")
        across, down = math.hypot(rx * cos, ry * sin), math.hypot(rx * sin, ry * cos)
    elif shape.tag == "box":
        x0, y0, x1, y1 = sides("xtl", "ytl", "xbr", "ybr")
        if not _turn(shape):
            return x0, y0, x1, y1
        x, y, a, b = (x0 + x1) / 2, (y0 + y1) / 2, abs(x1 - x0) / 2, abs(y1 - y0) / 2
        across, down = a * abs(cos) + b * abs(sin), a * abs(sin) + b * abs(cos)
    else:  # points and lines, as in labelme; a tag of the whole image; skeletons and cuboids
        raise ValueError
    return x - across, y - down, x + across, y + down


def _turn(shape: Element) -> float:
    """The angle, in radians and clockwise, by which a shape is turned about its centre."""
    return math.radians(number(shape.get("rotation") or "0"))


def write(folder: Path, sheets: Sequence[Labelled], names: Mapping[int, str], model: str) -> None:
    """Write `folder`/annotations.xml, and labels.json for the field "Raw" of a new task.

    The sheets lie in `folder`/images. CVAT's xml has no place for scores and for the name of the model.
    """
    root = Element("annotations")
    SubElement(root, "version").text = "1.1"
    labels = SubElement(SubElement(SubElement(root, "meta"), "task"), "labels")
    for name in names.values():
        label = SubElement(labels, "label")
        SubElement(label, "name").text = name
        SubElement(label, "attributes")
    for place, sheet in enumerate(sheets):
        width, height = map(str, sheet.size)
        name = sheet.sheet.path.name
        image = SubElement(root, "image", id=str(place), name=name, width=width, height=height)
        for box in sheet.boxes:
            corners = (box.x, box.y, box.x + box.width, box.y + box.height)
            row = {"label": box.name, "source": "auto", "occluded": "0", "z_order": "0"}
            row |= zip(("xtl", "ytl", "xbr", "ybr"), (f"{side:.4f}" for side in corners), strict=True)
            SubElement(image, "box", row)
    ElementTree(root).write(folder / "annotations.xml", encoding="utf-8", xml_declaration=True)
    rows = [{"name": name, "attributes": []} for name in names.values()]
    (folder / "labels.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
