"""Say what is in a data folder, what is repaired when it is read, and whether it can be used.

    python -m schematics.check DIR               labelled sheets in train/, valid/, test/, or in one of these
    python -m schematics.check DIR --pictures OUT            also a page of the sheets with their boxes
    python -m schematics.check --unlabeled DIR   a pool of drawings without labels, for pretraining

Every sheet is decoded, so that a damaged file shows here and not in the middle of a training run. Nothing is
changed on disk. On two x86-64 cores, 148 labelled sheets of about 800 x 700 px take 0.9 s, 2,194 sheets of
about 700 x 450 px take 7 s, and a pool of 599 drawings takes 2 s.

The report has the sizes of sheets and boxes, the number of boxes of each class, and the findings: what is
fatal, what is dropped or repaired, and what is kept but worth a look, such as boxes on bare paper. If the
data can't be used, or has no split to train on or to validate by, the exit status is 1 and one line on stderr
names the cure. docs/data-format.md shows a report and lists all findings.

--pictures makes a new folder with a page, index.html: the sheets with a finding first, then all others.
"""

import argparse
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path

import numpy as np

from schematics.coco import SPLITS, Finding, Split, find_splits, inspect_split
from schematics.command import Parser, run
from schematics.folders import refuse_existing
from schematics.pictures import Card, write_page
from schematics.sheets import DataError, Sheet, find_sheets, read_sheet
from schematics.windows import ink_and_bare

ACTIONS = ("fatal", "dropped", "repaired", "kept")
BLANK = (
    1e-4  # a sheet with less ink than this share of its pixels is blank or nearly so; drawings have over .005
)
SIZE_HEADER = ("in color", "median px", "largest px")


@dataclass(frozen=True)
class Decoded:
    """The outcome of reading one sheet: a digest of its file, and the image's shape or else the error.

    ink: share of its pixels. bare: bool [N], the boxes that were given with it and hold no ink.
    """

    digest: str
    shape: tuple[int, ...] = ()
    error: str = ""
    ink: float = 1.0
    bare: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))


def check(data_dir: Path, files: int, pictures: Path | None = None) -> None:
    """Print the report on labelled data, with the names of at most `files` files under each finding.

    pictures: a new folder for a page of the sheets with their boxes. Raises DataError, after the report, if
    the data can't be used, and before it if `pictures` exists.
    """
    if pictures:
        refuse_existing(pictures)
    try:
        splits = [inspect_split(folder) for folder in find_splits(data_dir)]
    except DataError as error:
        raise DataError(f"{error}; for drawings without labels: --unlabeled") from None
    labelled = [sheet for split in splits for sheet in split.sheets]
    results = _decode_all([sheet.file for sheet in labelled], [sheet.boxes for sheet in labelled])
    # By identity, as two splits may list one file with other boxes.
    decoded = {id(sheet): result for sheet, result in zip(labelled, results, strict=True)}
    findings = [(split, finding) for split in splits for finding in split.findings]
    findings += [(split, finding) for split in splits for finding in _on_files(split, splits, decoded)]
    findings += _untrained(splits)
    findings += _unmeasured(splits)
    _print_splits(splits, decoded)
    _print_findings(findings, files)
    if pictures:
        write_page(pictures, [card for split in splits for card in _cards(split, decoded)])
        print(f"pictures: {pictures / 'index.html'}")
    fatal = [f"{split.place(f)}: {f.kind}" for split, f in findings if f.action == "fatal"]
    if fatal:
        raise DataError(fatal[0] + (f" (and {len(fatal) - 1} more, above)" if len(fatal) > 1 else ""))
    _refuse_missing(data_dir, splits)


def _refuse_missing(data_dir: Path, splits: Sequence[Split]) -> None:
    """Raise DataError if finetuning would miss a split. A folder that is a split is checked for itself."""
    there = {split.name for split in splits}
    if splits[0].folder == data_dir and there <= SPLITS.keys():
        return
    if missing := [name for name in ("train", "valid") if name not in there]:
        raise DataError(
            f"{data_dir}: no {' and no '.join(missing)} split, without which there is no finetuning;"
            f" draw one: python -m schematics.convert {data_dir} OUT --valid 0.2"
        )


def _on_files(split: Split, splits: Sequence[Split], decoded: Mapping[int, Decoded]) -> Iterator[Finding]:
    """Yield the findings that show only when the files are decoded and compared."""
    elsewhere = defaultdict(set)
    for other in splits:
        if other is not split:
            for sheet in other.sheets:
                elsewhere[decoded[id(sheet)].digest].add(other.name)
    for sheet in split.sheets:
        result = decoded[id(sheet)]
        if result.error:
            kind = "image damaged: replace it, or delete it to go on without"
            yield Finding(kind, sheet.file_name, 1, "fatal")
        if bare := int(np.count_nonzero(result.bare)):
            yield Finding(
                "boxes that hold no ink", f"{sheet.file_name}: {bare} of {len(sheet.boxes)}", bare, "kept"
            )
        if result.ink < BLANK:
            yield Finding("sheet blank or nearly so", sheet.file_name, 1, "kept")
        if homes := elsewhere[result.digest]:
            yield Finding(f"the same file is also in {', '.join(sorted(homes))}", sheet.file_name, 1, "kept")
    known = {sheet.path.resolve() for other in splits for sheet in other.sheets}
    dropped = {finding.where for finding in split.findings if finding.action == "dropped"}
    for path in _drawings_in(split.folder):
        name = path.relative_to(split.folder).as_posix()
        if path.resolve() not in known and name not in dropped:
            yield Finding("file that the annotations don't name", name, 1, "kept")


def _untrained(splits: Sequence[Split]) -> Iterator[tuple[Split, Finding]]:
    """Yield a finding for each class that has boxes in a split but none in train.

    It is evaluated and never learned, which costs mAP whatever the model.
    """
    trained = {name for split in splits if split.name == "train" for name in _counts(split)}
    for split in splits:
        for name, count in _counts(split).items():
            if trained and name not in trained:
                kind = f"class {name!r} has boxes here and none in train"
                yield split, Finding(kind, "all sheets", count, "kept")


def _counts(split: Split) -> Counter[str]:
    """The number of boxes by class name. The ids of a class may differ from split to split."""
    return Counter(split.categories[label - 1].name for sheet in split.sheets for label in sheet.labels)


def _unmeasured(splits: Sequence[Split]) -> Iterator[tuple[Split, Finding]]:
    """Yield a finding for each class that has boxes in train but none in a split that measures."""
    trained = {name: n for split in splits if split.name == "train" for name, n in _counts(split).items()}
    for split in splits:
        for name in sorted(trained.keys() - _counts(split).keys()):
            kind = "classes of train without a box here, whose AP can't be measured"
            yield split, Finding(kind, f"{name!r}, {trained[name]} in train", 1, "kept")


def _cards(split: Split, decoded: Mapping[int, Decoded]) -> Iterator[Card]:
    """Yield what the page shows of each sheet that can be read, with the reasons to look at it."""
    found = defaultdict(list)
    for finding in split.findings:
        found[finding.where].append(f"{finding.kind} ({finding.action}, {finding.count})")
    for sheet in split.sheets:
        result = decoded[id(sheet)]
        if result.error:
            continue
        reasons = found[sheet.file_name]
        if result.ink < BLANK:
            reasons = ["sheet blank or nearly so", *reasons]
        if bare := int(np.count_nonzero(result.bare)):
            reasons = [f"{bare} of {len(sheet.boxes)} boxes hold no ink", *reasons]
        names = [split.categories[label - 1].name for label in sheet.labels]
        yield Card(
            f"{split.name}/{sheet.file_name}",
            sheet.file,
            sheet.boxes,
            names,
            result.bare,
            reasons,
        )


def check_pool(root: Path, files: int) -> None:
    """Print the report on an unlabelled pool, with at most `files` of the sheets that can't be read.

    Pretraining skips those. Raises DataError, after the report, if no sheet can be read.
    """
    sheets = find_sheets(root)
    results = _decode_all(sheets)
    shapes = [result.shape for result in results if result.shape]
    errors = [result.error for result in results if result.error]
    pages = {(result.digest, sheet.page) for sheet, result in zip(sheets, results, strict=True)}
    copies = len(sheets) - len(pages)
    print(f"{root}: {len(sheets)} sheets, {len(errors)} unreadable, {copies} byte-identical to another")
    _table([["readable", *SIZE_HEADER], [str(len(shapes)), *_sizes(shapes)]])
    for error in errors[:files]:
        print(f"  {error}")
    if len(errors) > files:
        print(f"  and {len(errors) - files} more")
    if not shapes:
        raise DataError(f"{root}: none of {len(sheets)} drawings can be read; the first: {errors[0]}")


def _decode_all(sheets: Sequence[Sheet], boxes: Iterable[np.ndarray | None] = repeat(None)) -> list[Decoded]:
    """Read all sheets. boxes: of each sheet, [N, 4] in px, in which ink is looked for; None asks for none."""

    def decode(sheet: Sheet, boxes: np.ndarray | None) -> Decoded:
        try:
            digest = hashlib.sha256(sheet.path.read_bytes()).hexdigest()
            image = read_sheet(sheet)
            if boxes is None:
                return Decoded(digest, image.shape)
            return Decoded(digest, image.shape, "", *ink_and_bare(image, boxes))
        except OSError as error:
            return Decoded(sheet.name, error=str(error))
        except DataError as error:
            return Decoded(digest, error=str(error))

    # PDFium can't work in two threads at once.
    has_pdf = any(sheet.path.suffix.lower() == ".pdf" for sheet in sheets)
    # A large sheet takes a gigabyte while it is decoded, so there are few threads even on a large machine.
    with ThreadPoolExecutor(1 if has_pdf else min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(decode, sheets, boxes))


def _drawings_in(folder: Path) -> list[Path]:
    try:
        return sorted({sheet.path for sheet in find_sheets(folder)})
    except DataError:
        return []


def _sizes(shapes: Sequence[tuple[int, ...]]) -> list[str]:
    """Cells of a table under SIZE_HEADER: sheets in color, size of the median sheet and of the largest."""
    if not shapes:
        return ["0", "-", "-"]
    by_area = sorted(shapes, key=lambda shape: shape[0] * shape[1])
    color = sum(len(shape) == 3 for shape in shapes)
    return [str(color), *(f"{shape[1]} x {shape[0]}" for shape in (by_area[len(by_area) // 2], by_area[-1]))]


def _print_splits(splits: Sequence[Split], decoded: Mapping[int, Decoded]) -> None:
    rows = [["split", "sheets", "without boxes", "boxes", *SIZE_HEADER]]
    sides = [["box side px", "least", "5 %", "median", "95 %", "most"]]
    for split in splits:
        boxes = np.concatenate([sheet.boxes for sheet in split.sheets] or [np.zeros((0, 4))])
        empty = sum(len(sheet.boxes) == 0 for sheet in split.sheets)
        shapes = [shape for sheet in split.sheets if (shape := decoded[id(sheet)].shape)]
        rows.append([split.name, *map(str, (len(split.sheets), empty, len(boxes))), *_sizes(shapes)])
        if len(boxes):
            side = np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1))
            quantiles = np.quantile(side, [0, 0.05, 0.5, 0.95, 1])
            sides.append([split.name, *(f"{quantile:.0f}" for quantile in quantiles)])
    _table(rows)
    _table(sides)
    counts = [_counts(split) for split in splits]
    classes = splits[0].categories  # all splits have the same names
    rows = [["id", "class", *(split.name for split in splits)]]
    _table(rows + [[str(c.id), c.name, *(str(count[c.name]) for count in counts)] for c in classes])


def _print_findings(findings: Iterable[tuple[Split, Finding]], files: int) -> None:
    groups = defaultdict(list)
    for split, finding in findings:
        groups[finding.action, split.name, finding.kind].append(finding)
    print(f"{len(groups)} findings" if groups else "nothing to repair")
    for (action, split_name, kind), group in sorted(groups.items(), key=lambda g: ACTIONS.index(g[0][0])):
        print(f"  {action:8} {sum(f.count for f in group):6}  {split_name}: {kind}")
        for finding in group[:files]:
            print(f"{finding.count:20}  {finding.where}")
        if len(group) > files:
            print(f"{sum(f.count for f in group[files:]):20}  in {len(group) - files} more")


def _table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns, text at the left edge and numbers at the right edge, and a blank line."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if rows[-1][i][:1].isdigit() else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    print()


def main(args: argparse.Namespace) -> None:
    if args.unlabeled and args.pictures:
        raise DataError("--pictures shows labelled sheets; leave out --unlabeled")
    if args.unlabeled:
        check_pool(args.dir, args.files)
    else:
        check(args.dir, args.files, args.pictures)


if __name__ == "__main__":
    parser = Parser("schematics.check", __doc__)
    parser.add_argument("dir", type=Path, help="Folder with train/, valid/ or test/, or one of these.")
    parser.add_argument("--unlabeled", action="store_true", help="DIR is a pool of drawings without labels.")
    parser.add_argument(
        "--pictures", type=Path, metavar="OUT", help="New folder for a page of the labelled sheets."
    )
    parser.add_argument(
        "--files", type=int, default=5, help="Number of files to name under a finding (default %(default)s)."
    )
    run(main, parser)
