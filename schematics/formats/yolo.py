"""YOLO: a text file for each image, a line for each box, classes by number.

Read are the layouts of Ultralytics (data.yaml), Roboflow, Darknet and CVAT (obj.data, obj.names) and Label
Studio (classes.txt).
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from schematics.formats.source import (
    IMAGE_SUFFIXES,
    Box,
    Labelled,
    Tree,
    assign,
    box_between,
    class_name,
    extent,
    number,
    plain_parts,
    read_text,
    split_named,
)
from schematics.rows import Tally
from schematics.sheets import DataError, Sheet

IMAGES = "images"  # the folder of the sheets in what `write` makes
NAME_FILES = ("classes.txt", "obj.names")
LARGEST_YAML = 2**18  # bytes: PyYAML reads some ten kB a second and takes a kB of memory for each three
LARGEST_INDEX = 10**6  # of a class
# What a line may start with: a class's number and four more, or the name that someone wrote in its place.
LABEL_LINE = re.compile(r"\s*\S+(\s+[-+]?[\d.][\d.eE+-]*){4}")


class _Loader(yaml.BaseLoader):
    """Leaves each value the text that stands there: a class may be called NO or on.

    An alias, through which few bytes can stand for gigabytes, and a key that stands there twice are refused.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("has an alias (*name); write out what it stands for")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        twice = [key for key, count in Counter(key.value for key, _ in node.value).items() if count > 1]
        if twice:
            raise yaml.YAMLError(f"has {twice[0]!r} twice")
        return super().construct_mapping(node, deep)


def is_there(tree: Tree) -> bool:
    return bool(_name_files(tree) or [path for path in _yaml_files(tree) if "names" in _load(path)])


def read(tree: Tree, tally: Tally) -> tuple[dict[int, str], list[Labelled]]:
    """Classes by id, which is the class's number + 1, and the sheets.

    A sheet without a label file has no boxes. Raises DataError if classes or splits can't be told.
    """
    description, file = _description(tree)
    names = _names(description["names"], file) if file else _listed_names(_name_files(tree))
    by_name: dict[str, int] = {}
    for index, name in names.items():
        if by_name.setdefault(name, index) != index:
            kind = f"class name {name!r} stands at {by_name[name]} and {index}: joined"
            tally[kind, file.name if file else "class names", "repaired"] += 1
    lines = _label_lines(tree)
    pairs = tree.pair(dict.fromkeys(lines, ""), tally)
    label_of = {image: label for label, image in pairs.items()}
    keypoints = _keypoints(description, file, lines.values())
    splits = assign(tree, tree.images, _listed(tree, description, file, tally), tally)
    sheets = []
    for image, split in splits.items():
        size = tree.usable_size(image, tally)
        if size is None:
            continue
        label = label_of.get(image)
        if label is None:
            tally["sheet without a label file: taken as one without boxes", tree.name(image), "kept"] += 1
        where = tree.name(label or image)
        boxes = []
        for line in lines[label] if label else ():
            try:
                boxes.append(_box(line.split(), names, keypoints, size, where, tally))
            except ValueError as error:
                tally[f"line {error}", where, "dropped"] += 1
        sheets.append(Labelled(Sheet(image), split, size, boxes))
    for path in tree.files:
        if path.suffix.lower() == ".pdf":
            tally["PDF: labels of this form can't name a page", tree.name(path), "dropped"] += 1
    return {index + 1: name for name, index in by_name.items()}, sheets


def _yaml_files(tree: Tree) -> list[Path]:
    return [p for p in tree.files if p.parent == tree.root and p.suffix.lower() in (".yaml", ".yml")]


def _name_files(tree: Tree) -> list[Path]:
    return [path for path in tree.files if path.name.lower() in NAME_FILES]


def _load(file: Path) -> dict[str, Any]:
    try:
        document = yaml.load(read_text(file, LARGEST_YAML), _Loader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{file}: no class names that can be read ({reason}); mend or remove it") from None
    return document if isinstance(document, dict) else {}


def _description(tree: Tree) -> tuple[dict[str, Any], Path | None]:
    """The one yaml file with class names, and its path; obj.data where there is none."""
    found = {path: document for path in _yaml_files(tree) if "names" in (document := _load(path))}
    best = [path for path in found if path.stem.lower() in ("data", "dataset")] or list(found)
    if len(best) > 1:
        both = ", ".join(path.name for path in best)
        raise DataError(f"{tree.root}: class names in {both}; keep one of them")
    if best:
        return found[best[0]], best[0]
    document = {}
    for path in tree.files:
        if path.name.lower() == "obj.data":
            pairs = (line.partition("=") for line in read_text(path, LARGEST_YAML).splitlines())
            document |= {key.strip(): value.strip() for key, _, value in pairs}
    return document, None


def _names(names: Any, file: Path) -> dict[int, str]:
    """Class names by number. Raises DataError if they aren't a list or a dictionary of texts."""
    try:
        listed = names if isinstance(names, list) else []
        pairs = names.items() if isinstance(names, dict) else enumerate(listed)
        found = {int(index): class_name(name) for index, name in pairs}
        if found and min(found) >= 0 and max(found) <= LARGEST_INDEX and len(found) == len(names):
            return found
        reason = f"no list of names, or numbers that aren't from 0 to {LARGEST_INDEX}"
    except ValueError as error:
        reason = str(error)
    raise DataError(f"{file}: no class names under `names` ({reason})")


def _listed_names(files: Sequence[Path]) -> dict[int, str]:
    """Class names by number, a line each. Raises DataError if two files differ or a line between is empty."""
    lists = {path: [line.strip() for line in read_text(path).rstrip().splitlines()] for path in files}
    for path in (path for path in files if "" in lists[path]):
        raise DataError(f"{path}: line {lists[path].index('') + 1} is empty; each class has its line")
    other = next((path for path in files if lists[path] != lists[files[0]]), None)
    if other:
        raise DataError(f"{files[0]} and {other}: not the same class names; convert each folder by itself")
    return dict(enumerate(lists[files[0]]))


def _label_lines(tree: Tree) -> dict[Path, list[str]]:
    """Text files that hold labels, which an empty one does too, and their lines that aren't empty."""
    found = {}
    for path in tree.files:
        if path.suffix.lower() == ".txt" and path.name.lower() not in NAME_FILES:
            lines = [line for line in read_text(path, errors="replace").splitlines() if line.strip()]
            if any(LABEL_LINE.match(line) for line in lines) or (not lines and not split_named(path.stem)):
                found[path] = lines
    return found


def _keypoints(
    description: dict[str, Any], file: Path | None, lines: Iterable[Sequence[str]]
) -> tuple[int, int] | None:
    """How many keypoints stand behind each box, and how many numbers each has; None where lines are outlines.

    Raises DataError where each line could be both, and data.yaml doesn't say.
    """
    if "kpt_shape" in description:
        try:
            count, dim = (int(side) for side in description["kpt_shape"] or (0, 2))
        except (ValueError, TypeError):
            count, dim = -1, 2
        if count < 0 or dim not in (2, 3):
            raise DataError(f"{file}: kpt_shape must be [count, 2 or 3], or [] for outlines")
        return (count, dim) if count else None
    rows = [words for text in lines for line in text if len(words := line.split()) > 6]
    if rows and all(len(words) == len(rows[0]) and _may_be_pose(words) for words in rows):
        cure = "write kpt_shape: [COUNT, 2 or 3] into data.yaml, or kpt_shape: [] if they are outlines"
        raise DataError(
            f"{file or 'labels'}: lines of {len(rows[0])} numbers may be outlines or poses; {cure}"
        )
    return None


def _may_be_pose(words: Sequence[str]) -> bool:
    """Whether numbers are a box and points inside it, each with or without a third number for its state."""
    try:
        cx, cy, w, h, *rest = (number(word) for word in words[1:])
    except ValueError:
        return False
    for dim in (2, 3):
        points = list(zip(*(rest[i::dim] for i in range(dim)), strict=False))
        if len(rest) % dim == 0 and all(
            ((abs(x - cx) <= w / 2 and abs(y - cy) <= h / 2) or x == y == 0) and set(state) <= {0, 1, 2}
            for x, y, *state in points
        ):
            return True
    return False


def _box(
    words: Sequence[str],
    names: dict[int, str],
    keypoints: tuple[int, int] | None,
    size: tuple[int, int],
    where: str,
    tally: Tally,
) -> Box:
    """The box of a line, in px. Raises ValueError, whose text follows "line", if it gives none.

    The line is `class cx cy w h [score]`, or these and keypoints, or the outline `class x1 y1 x2 y2 x3 y3
    ...`, which the four corners of a turned box are too; all in shares of the sheet's width and height.
    """
    try:
        index, *values = (number(word) for word in words)
    except ValueError:
        raise ValueError("that is not all numbers") from None
    if index not in names:
        raise ValueError("of a class that is not listed")
    of_pose = 4 + keypoints[0] * keypoints[1] if keypoints else 4
    if len(values) in (4, 5, of_pose):
        cx, cy, w, h = values[:4]
        corners = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
    elif keypoints is None and len(values) >= 6 and len(values) % 2 == 0:
        corners = extent(zip(values[::2], values[1::2], strict=True))
    else:
        raise ValueError(f"of {len(values)} numbers is neither a box nor an outline (poses need kpt_shape)")
    if max(map(abs, corners)) > 1.5:
        raise ValueError("whose numbers are no shares of the sheet's sides")
    width, height = size
    x0, y0, x1, y1 = corners
    return box_between(names[int(index)], (x0 * width, y0 * height, x1 * width, y1 * height), where, tally)


def _listed(tree: Tree, description: dict[str, Any], file: Path | None, tally: Tally) -> dict[Path, str]:
    """Image -> split, by the keys train, val, ... of data.yaml or obj.data, or by lists called train.txt, ...

    A key holds a folder, a text file that lists images, or several of these. The most exact one counts.
    Raises DataError if a sheet is in two splits.
    """
    entries = {
        split: value if isinstance(value, list) else [value]
        for key, value in description.items()
        if (split := split_named(key)) and value
    }
    top = min((len(path.parts) for path in tree.files), default=0)
    if not entries:
        for path in tree.files:
            lists = path.suffix == ".txt" and len(path.parts) == top and (split := split_named(path.stem))
            if lists and split and _lists_images(path):
                entries[split] = [path.name]
    listed: dict[Path, tuple[int, str]] = {}  # how much of the image's path the key gives, and the split
    for split, values in entries.items():
        for value in values:
            found = _named(tree, str(value), str(description.get("path", "")), tally)
            if not found:
                tally[f"{split}: {str(value)[:200]!r} is not in the folder", "data.yaml", "kept"] += 1
            for image, depth in found.items():
                other = listed.get(image, (-1, split))
                if other[0] == depth and other[1] != split:
                    cure = "name them in one, and let --valid draw the other"
                    raise DataError(f"{image}: in {other[1]} and in {split} by data.yaml; {cure}")
                listed[image] = max(other, (depth, split))
    return {image: split for image, (_, split) in listed.items()}


def _lists_images(path: Path) -> bool:
    lines = read_text(path).split("\n", 1)
    return lines[0].strip().lower().endswith(IMAGE_SUFFIXES)


def _named(tree: Tree, value: str, above: str, tally: Tally) -> dict[Path, int]:
    """The images of an entry, each with how exactly it is named. Nothing outside the tree is looked at.

    Of a folder's path, as much as is there counts from its end on: exports name folders of other machines.
    """
    if value.lower().endswith(".txt"):
        *_, name = plain_parts(value)
        lists = [path for path in tree.files if path.name.casefold() == name]
        exact = [path for path in lists if plain_parts(tree.name(path)) == plain_parts(value)] or lists
        found = {}
        for line in filter(None, map(str.strip, read_text(exact[0]).splitlines() if len(exact) == 1 else ())):
            if image := tree.find(line):
                found[image] = 99
            else:
                tally["listed sheet that is not there", tree.name(exact[0]), "kept"] += 1
        return found
    parts = [part for part in re.split(r"[\\/]", f"{above}/{value}") if part not in ("", ".", "..")]
    own = [part for part in re.split(r"[\\/]", value) if part not in ("", ".", "..") and "*" not in part]
    parts = [part.casefold() for part in parts if "*" not in part]
    fewest = min(len(own), 1 if re.match(r"[\\/]|\w:", value) else len(own))
    for length in range(len(parts), fewest - 1, -1):
        folder = parts[len(parts) - length :]
        found = {}
        for image in tree.images:
            folders = [part.casefold() for part in image.relative_to(tree.root).parts[:-1]]
            if folders[:length] == folder:
                found[image] = length
        if found:
            return found
    return {}


def write(folder: Path, sheets: Sequence[Labelled], names: Mapping[int, str], model: str) -> None:
    """Write `folder`/labels, and class names as data.yaml (Ultralytics) and classes.txt (Label Studio).

    The sheets lie in `folder`/images. A line has no score: the tools would take a sixth number for another
    form.
    """
    (folder / "labels").mkdir()
    numbers = {name: number for number, name in enumerate(names.values())}
    for sheet in sheets:
        width, height = sheet.size
        lines = []
        for box in sheet.boxes:
            shares = (
                (box.x + box.width / 2) / width,
                (box.y + box.height / 2) / height,
                box.width / width,
                box.height / height,
            )
            lines.append(" ".join([str(numbers[box.name]), *(f"{share:.9f}" for share in shares)]) + "\n")
        (folder / "labels" / f"{sheet.sheet.path.stem}.txt").write_text("".join(lines), encoding="utf-8")
    description = {"path": ".", "train": IMAGES, "names": dict(enumerate(names.values()))}
    text = yaml.safe_dump(description, allow_unicode=True, sort_keys=False, width=10**6)
    (folder / "data.yaml").write_text(text, encoding="utf-8")
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in numbers), encoding="utf-8")
