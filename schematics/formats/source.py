"""What the readers of other tools' labels share: the files of a source, found by name, and what is read."""

import os
import re
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from schematics.coco import SPLITS
from schematics.containers import looks_truncated
from schematics.rows import Tally, printable
from schematics.sheets import SUFFIXES, DataError, Sheet, find_sheets, sheet_size
from schematics.uploads import before_upload, upload_form

IMAGE_SUFFIXES = tuple(suffix for suffix in SUFFIXES if suffix != ".pdf")
# A label file holds up to this many bytes, those of the picture that labelme may put into it included.
# Readers need up to 25 times as much memory.
LARGEST = 64 * 2**20
# Folders that tell images from labels. What they hold is paired as if these folders were not there:
# images/train/a.png and labels/train/a.txt, train/images/a.png and train/labels/a.txt, a.png and a.txt.
ROLES = {"images", "image", "imgs", "img", "jpegimages", "labels", "label", "annotations", "annotation"}
ROLES |= {"ann", "anns", "xml", "xmls", "json", "jsons", "txt"}
# Roboflow, COCO (train2017), Darknet and CVAT (obj_train_data, obj_Validation_data).
SPLIT_FOLDER = re.compile(r"(?:obj_)?(train|val|valid|validation|test)(?:ing)?(?:_?data|_?set|[-_]?\d{4})?")


@dataclass(frozen=True)
class Box:
    """A box of a class, in px of the size at which its sheet was labelled."""

    name: str
    x: float
    y: float
    width: float
    height: float
    columns: Mapping[str, Any] = field(default_factory=dict)  # what else a COCO row says of it


@dataclass(frozen=True)
class Labelled:
    """A sheet of the source with its boxes."""

    sheet: Sheet
    split: str  # "train", "valid" or "test"
    size: tuple[int, int]  # width and height that the boxes refer to, in px
    boxes: list[Box]
    columns: Mapping[str, Any] = field(default_factory=dict)  # what else a COCO row says of it


def form(name: str) -> str:
    """A name without what tools and file systems change: normal form, case and percent-encoding."""
    return unicodedata.normalize("NFC", unquote(name)).casefold()


def split_named(name: str) -> str | None:
    """The split after which a folder or a list is named, or None."""
    if found := SPLIT_FOLDER.fullmatch(form(name)):
        return next(split for split, names in SPLITS.items() if found[1] in names)
    return None


def plain_parts(name: str) -> list[str]:
    """The parts of a path as a label file gives it, by `form`, without drives, "." and "..", and roles."""
    parts = [form(part) for part in re.split(r"[\\/]", name)]
    folders = (part for part in parts[:-1] if part not in ("", ".", "..") and not part.endswith(":"))
    return [*(part for part in folders if part not in ROLES), parts[-1]]


def read_text(path: Path, largest: int = LARGEST, errors: str = "strict") -> str:
    """The text of a file in UTF-8 or, if it begins with a byte order mark, UTF-16.

    errors: as in bytes.decode. Raises DataError if it is another encoding or above `largest` bytes.
    """
    if path.stat().st_size > largest:
        raise DataError(f"{path}: above {largest // 2**10} kB; this can't be a file of labels")
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding, errors)
    except ValueError:
        raise DataError(f"{path}: neither UTF-8 nor UTF-16; save it as UTF-8") from None


def is_xml_of(path: Path, element: str) -> bool:
    """Whether a file is called xml and opens such an element among its first 4,000 bytes."""
    if path.suffix.lower() != ".xml":
        return False
    with open(path, "rb") as file:
        head = file.read(4000).replace(b"\0", b"")  # which UTF-16 has
    return bool(re.search(rb"<%s[\s/>]" % element.encode(), head))


def read_xml(path: Path) -> ElementTree.Element:
    """The root of an xml file. Raises DataError if it is too large, broken or has a document type."""
    if path.stat().st_size > LARGEST:
        raise DataError(f"{path}: above {LARGEST // 2**20} MB; this can't be a file of labels")
    data = path.read_bytes()
    # Entities could stand for gigabytes, and no tool writes them into labels.
    if b"<!DOCTYPE" in data.replace(b"\0", b""):
        raise DataError(f"{path}: has a document type; take the <!DOCTYPE ...> out")
    # Expat knows few encodings, such as UTF-8 and UTF-16, and none of these.
    declared = re.match(rb"(?i)<\?xml[^>]*encoding=[\"']((?:gb|big5|shift|euc|cp|windows|koi8)[\w-]*)", data)
    try:
        return ElementTree.fromstring(data.decode(declared[1].decode()) if declared else data)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise DataError(f"{path}: not valid XML ({error}); export it again") from None


def number(text: str) -> float:
    """The finite number that a text is. Raises ValueError if it is none."""
    value = float(text)
    if not abs(value) < 1e300 or "_" in text:
        raise ValueError(f"{text!r} is no number")
    return value


def whole(text: str | None) -> int:
    """The whole number that a text is, and 0 for any other."""
    try:
        return int(number(text or ""))
    except ValueError:
        return 0


def class_name(value: object) -> str:
    """A class's name without blanks around it. Raises ValueError where nothing or no text is left."""
    name = value.strip() if isinstance(value, str) else ""
    if not name or any(0xD800 <= ord(letter) < 0xE000 for letter in name):
        raise ValueError("no name of a class")
    return name


def box_between(name: str, corners: Iterable[float], where: str, tally: Tally) -> Box:
    """The box between x0 y0 and x1 y1. One drawn backwards is turned about.

    Raises ValueError if one of the four is not finite.
    """
    x0, y0, x1, y1 = corners
    if not max(map(abs, (x0, y0, x1, y1))) < 1e300:
        raise ValueError("a side that is not finite")
    if x1 < x0 or y1 < y0:
        tally["box drawn backwards: turned about", where, "repaired"] += 1
    return Box(name, min(x0, x1), min(y0, y1), abs(x1 - x0), abs(y1 - y0))


def extent(points: Iterable[tuple[float, float]]) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 of what surrounds the points."""
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


class Tree:
    """The files below a folder. Files that labels name are looked for among these, and nowhere else."""

    def __init__(self, root: Path, tally: Tally) -> None:
        self.root = root
        self.files = sorted(self._walk(tally))
        self.images = [path for path in self.files if path.suffix.lower() in IMAGE_SUFFIXES]
        self._paired: dict[tuple[str, ...], list[Path]] = defaultdict(list)
        self._based: dict[str, list[Path]] = defaultdict(list)
        for path in self.images:
            parts = plain_parts(self.name(path))
            stem = form(path.stem)
            key = (*parts[:-1], stem)
            self._paired[key].append(path)
            for base in {parts[-1], stem}:
                self._based[base].append(path)

    def name(self, path: Path) -> str:
        """The path from the root on, in posix form."""
        return path.relative_to(self.root).as_posix()

    def split_of(self, path: Path) -> str | None:
        """The split after which one of the folders between the root and a file is named."""
        parts = path.relative_to(self.root).parts[:-1]
        return next((split for split in map(split_named, parts) if split), None)

    def usable_size(self, path: Path, tally: Tally) -> tuple[int, int] | None:
        """Width and height of an image in px, or None, which is tallied, if it has no one picture."""
        reason = "image truncated or unreadable"
        try:
            if not looks_truncated(path):
                if path.suffix.lower() not in (".tif", ".tiff") or len(find_sheets(path)) == 1:
                    return sheet_size(path)
                reason = "image of several pages, of which labels of this form can't name one"
        except (DataError, OSError):
            pass
        tally[reason, self.name(path), "dropped"] += 1
        return None

    def find(self, name: str) -> Path | None:
        """The image that a label file names, if just one agrees with as much of the path as both give."""
        parts = plain_parts(name)
        fits = [path for path in self._based.get(parts[-1], []) if self._agrees(path, parts)]
        exact = [path for path in fits if self.name(path) == name or (len(fits) > 1 and path.name == name)]
        fits = exact or fits
        return fits[0] if len(fits) == 1 else None

    def find_upload(self, name: str, tally: Tally) -> Path | None:
        """Like `find`, and also by the name that the file had before it was uploaded, which is tallied."""
        if image := self.find(name):
            return image
        bare = before_upload(name)
        last = upload_form(bare.rpartition("/")[2])
        alike = [path for path in self.images if last in (upload_form(path.name), upload_form(path.stem))]
        image = self.find(bare) or (alike[0] if len(alike) == 1 else None)
        if image:
            kind = "image found by its name before the upload"
            tally[kind, f"{self.name(image)} for {printable(name)[:200]}", "repaired"] += 1
        return image

    def _agrees(self, path: Path, parts: list[str]) -> bool:
        own = plain_parts(self.name(path))[:-1]
        shared = min(len(own), len(parts) - 1)
        return own[len(own) - shared :] == parts[len(parts) - 1 - shared : -1]

    def pair(self, labels: Mapping[Path, str], tally: Tally) -> dict[Path, Path]:
        """Label file -> its image: that of the same stem or else that which the file names.

        labels: label file -> the name of the image that it gives, which may be outdated or "".
        Raises DataError if two label files have one image.
        """
        pairs = {label: image for label in labels if (image := self._of_same_stem(label))}
        taken = set(pairs.values())
        for label, name in labels.items():
            if label in pairs:
                if name and self.find(name) not in (None, pairs[label]):
                    kind = "label file that names another sheet: that of its own name taken"
                    tally[kind, self.name(label), "repaired"] += 1
                continue
            found = (self.find(candidate) for candidate in (name, label.stem) if candidate)
            image = next((image for image in found if image), None) or self.find_upload(label.stem, tally)
            if image in taken or image is None or self.split_of(image) != self.split_of(label):
                tally["label file without its image", self.name(label), "dropped"] += 1
            else:
                pairs[label] = image
        images = Counter(pairs.values())
        for image in (image for image, count in images.items() if count > 1):
            both = " and ".join(self.name(label) for label in pairs if pairs[label] == image)
            raise DataError(f"{image}: labelled by {both}; keep one of them")
        return pairs

    def _of_same_stem(self, label: Path) -> Path | None:
        fits = self._paired.get((*plain_parts(self.name(label))[:-1], form(label.stem)), [])
        for narrower in (
            [path for path in fits if path.stem == label.stem],
            [path for path in fits if path.parent == label.parent],
        ):
            fits = narrower or fits
        return fits[0] if len(fits) == 1 else None

    def _walk(self, tally: Tally) -> Iterator[Path]:
        """Yield all files that are not hidden, through links too, of which those that lead out are told."""
        inside, seen = os.path.realpath(self.root), set()
        for folder, subfolders, names in os.walk(self.root, followlinks=True):
            real = os.path.realpath(folder)
            # A folder is entered once: a link back to one of its parents would lead round in circles.
            subfolders[:] = [] if real in seen else [s for s in subfolders if s[0] != "." and s != "__MACOSX"]
            if real in seen:
                continue
            seen.add(real)
            for path in (Path(folder, name) for name in names if name[0] != "."):
                if path.is_file():  # and no pipe, from which nothing might ever come
                    if os.path.commonpath([inside, os.path.realpath(path)]) != inside:
                        tally["file behind a link that leads out of the folder", self.name(path), "kept"] += 1
                    yield path


def assign(tree: Tree, images: Iterable[Path], listed: Mapping[Path, str], tally: Tally) -> dict[Path, str]:
    """Image -> its split, by the source's own lists, else by its folder, else "train".

    Where the source lists its train split, an image that neither a list nor a folder puts anywhere is left
    out.
    """
    splits = {}
    all_listed = "train" in listed.values()
    for image in images:
        split = listed.get(image) or tree.split_of(image)
        if split or not all_listed:
            splits[image] = split or "train"
        else:
            tally["sheet that no list of the splits names", tree.name(image), "dropped"] += 1
    return splits
