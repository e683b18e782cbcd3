"""Turn a data set of another tool into the COCO splits that all other commands read, and draw missing splits.

    python -m schematics.convert SRC OUT                          SRC's own splits are kept
    python -m schematics.convert SRC OUT --valid 0.2 --test 0.1   what SRC lacks is drawn from its train split

SRC is Pascal VOC, YOLO, labelme, CVAT's xml, Label Studio's json, a csv table or, for splits to be drawn,
COCO. The result is OUT/train, OUT/valid and OUT/test, each with copies of its sheets and
_annotations.coco.json. SRC is only read, and OUT appears whole or not at all. What is left out or changed is
counted on stdout. The next command is schematics.check on OUT.
"""

import argparse
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from schematics.coco import Category, write_split
from schematics.command import Parser, run
from schematics.folders import refuse_existing, whole_folder
from schematics.formats import coco, cvat, label_studio, labelme, table, voc, yolo
from schematics.formats.source import Labelled, Tree
from schematics.rows import Tally
from schematics.sheets import DataError
from schematics.splits import draw

FORMATS = {
    "voc": voc,
    "yolo": yolo,
    "labelme": labelme,
    "cvat": cvat,
    "label-studio": label_studio,
    "csv": table,
    "coco": coco,
}


def convert(
    src: Path,
    out: Path,
    valid: float = 0.0,
    test: float = 0.0,
    seed: int = 0,
    tool: str | None = None,
) -> Tally:
    """Write `out`/train, `out`/valid and `out`/test from a labelled folder.

    valid, test: shares of the sheets of `src`'s train split to draw by `seed` for these two. tool: a key of
    FORMATS, for a folder with labels of several. Returns what was left out or changed, and how often. Raises
    DataError if `out` exists or if `src` can't be read; nothing is written then.
    """
    refuse_existing(out)
    if not src.is_dir():
        raise DataError(f"{src}: no such folder")
    if min(valid, test) < 0 or not valid + test < 1:
        raise DataError("--valid and --test are shares of the sheets and must leave some for train")
    tally: Tally = Counter()
    tree = Tree(src, tally)
    tool = _tool(tree, tool)
    if tool == "coco" and not valid + test:
        raise DataError(f"{src}: is COCO already; read it as it is, or give --valid or --test to draw these")
    names, sheets = FORMATS[tool].read(tree, tally)
    if not any(sheet.boxes for sheet in sheets):
        reason = "; ".join(f"{count} x {kind} ({where})" for (kind, where, _), count in tally.most_common(3))
        raise DataError(f"{src}: no sheet with a labelled box{reason and ': '}{reason}")
    _tally_names_alike(names.values(), tally)
    sheets = _draw_splits(src, sheets, {"valid": valid, "test": test}, seed)
    with whole_folder(out) as folder:
        _write(folder, sheets, names, tally)
    return tally


def _tool(tree: Tree, wanted: str | None) -> str:
    found = [name for name in ([wanted] if wanted else FORMATS) if FORMATS[name].is_there(tree)]
    if len(found) > 1:
        raise DataError(f"{tree.root}: has labels of {' and '.join(found)}; give --format with one of them")
    if not found and wanted:
        raise DataError(f"{tree.root}: no labels of {wanted}")
    if not found:
        raise DataError(
            f"{tree.root}: neither VOC or CVAT (xml files), YOLO (data.yaml or classes.txt with class names),"
            " labelme and Label Studio (json files), a csv table (with columns filename, class, xmin, ymin,"
            " xmax, ymax) nor COCO; give the folder that holds sheets and labels"
        )
    return found[0]


def _tally_names_alike(names: Iterable[str], tally: Tally) -> None:
    alike = defaultdict(set)
    for name in names:
        alike[" ".join(name.casefold().split())].add(name)
    for group in (group for group in alike.values() if len(group) > 1):
        kind = f"classes whose names differ in case or blanks only: {', '.join(map(repr, sorted(group)))}"
        tally[kind, "all sheets", "kept"] += 1


def _draw_splits(
    src: Path, sheets: Sequence[Labelled], shares: Mapping[str, float], seed: int
) -> list[Labelled]:
    shares = {split: share for split, share in shares.items() if share}
    for split in shares:
        if any(sheet.split == split for sheet in sheets):
            raise DataError(f"{src}: has a {split} split of its own; leave out --{split}")
    pool = [sheet for sheet in sheets if sheet.split == "train"]
    if not shares:
        return list(sheets)
    drawn = draw([p.sheet for p in pool], [[box.name for box in p.boxes] for p in pool], shares, seed)
    others = [sheet for sheet in sheets if sheet.split != "train"]
    return [*(replace(sheet, split=split) for sheet, split in zip(pool, drawn, strict=True)), *others]


def _write(out: Path, sheets: Sequence[Labelled], names: Mapping[int, str], tally: Tally) -> None:
    ids = {name: number for number, name in names.items()}
    by_split = defaultdict(list)
    for sheet in sheets:
        by_split[sheet.split].append(sheet)
    for split, members in by_split.items():
        (out / split).mkdir()
        images: list[dict] = []
        annotations: list[dict] = []
        copies: dict[Path, str] = {}
        taken: set[str] = set()
        for number, labelled in enumerate(members, start=1):
            path = labelled.sheet.path
            if path not in copies:
                copies[path] = name = _free_name(path, number, taken)
                shutil.copyfile(path, out / split / name)
                if name != path.name:
                    tally[f"name taken or unfit: {name} in its place", _text(path), "repaired"] += 1
            width, height = labelled.size
            page = "" if labelled.sheet.page is None else f"#page={labelled.sheet.page}"
            own = {"id": number, "file_name": copies[path] + page, "width": width, "height": height}
            images.append({**labelled.columns, **own})
            for box in labelled.boxes:
                bbox = [box.x, box.y, box.width, box.height]
                own = {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": ids[box.name],
                    "bbox": bbox,
                }
                annotations.append({**box.columns, **own})
        write_split(
            out / split, images, [Category(number, name) for number, name in names.items()], annotations
        )


def _free_name(path: Path, number: int, taken: set[str]) -> str:
    """The file's name, or one like it if that is taken, or no text. Some file systems ignore case."""
    name = _text(path.name)
    while name.lower() in taken:
        name = f"{Path(name).stem[:80]}-{number}{path.suffix}"
        number += 1
    taken.add(name.lower())
    return name


def _text(name: str | os.PathLike) -> str:
    """A name in which bytes that are no text have become question marks."""
    return os.fspath(name).encode("utf-8", errors="replace").decode()


def main(args: argparse.Namespace) -> None:
    tally = convert(args.src, args.out, args.valid, args.test, args.seed, args.format)
    kinds = defaultdict(list)
    for (kind, where, action), count in tally.items():
        kinds[action, kind].append((where, count))
    for (action, kind), places in sorted(kinds.items()):
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        examples = ", ".join(where for where, _ in places[:3])
        print(_text(f"{action}: {sum(count for _, count in places)} {kind}: {examples}{more}"))
    for path in sorted(args.out.iterdir()):
        print(_text(f"wrote {path}"))
    if not (args.out / "valid").is_dir():
        print("no valid split, which finetuning needs: give --valid 0.2 to draw one")
    print(f"next: python -m schematics.check {args.out}")


if __name__ == "__main__":
    parser = Parser("schematics.convert", __doc__)
    parser.add_argument("src", type=Path, help="Labelled folder, which is only read.")
    parser.add_argument("out", type=Path, help="Folder to write, which must not exist.")
    for split in ("valid", "test"):
        parser.add_argument(
            f"--{split}",
            type=float,
            default=0.0,
            metavar="SHARE",
            help=f"Share of SRC's train sheets, from 0 to 1, to draw for {split} (default %(default)s).",
        )
    parser.add_argument(
        "--seed", type=int, default=0, help="Number from which these sheets are drawn (default %(default)s)."
    )
    parser.add_argument("--format", choices=FORMATS, help="Labels to read, if SRC holds several kinds.")
    run(main, parser)
