"""A store of sheets: all of them decoded once into one file, of which any window is read by itself.

A store is a folder: `tiles-<key>.bin` with one packed sheet after another (schematics/tiles.py), and
`index.json`, which holds where each of them begins and whatever else a kind of store knows. It is there whole
or not at all. A build that is killed goes on with the sheets that are packed. Any number of processes may
build and read a store at once.

index.json holds its own sha256, that of every other small file, and of each sheet that of its table, which
holds those of its tiles. The small files are checked whenever a store is opened, a tile when a process first
reads it, so a damaged byte is an error in one line, never a wrong pixel.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import mmap
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from schematics import tiles
from schematics.folders import remove_stale, resumable_folder, sync, unfinished_folder
from schematics.progress import progress
from schematics.sheets import DataError, Sheet, sheet_size
from schematics.windows import Image, cut
from schematics.workers import in_order

LAYOUT = 2  # of the files of a store; stores of layout 1 hold pixels as they are and no hashes, and are read
MARGIN = 64 << 20  # bytes, left free on the disk
KEEP = 1 << 30  # bytes of decoded sheets that `preload` may keep in memory
JOURNAL = "packed.jsonl"  # in an unfinished store: a line for each sheet whose bytes are in the file
# Bytes that a packed sheet takes, at most, for each byte of its file: 0.8 to 1.7 were measured of PNG files,
# 5 to 12 of JPEG. PDF pages take about an eighth of their pixels.
GROWTH, OTHER_GROWTH, PDF_SHARE = {".png": 3.0}, 12.0, 0.125

Store = TypeVar("Store", bound="SheetStore")
Facts = dict[str, Any]  # what a store says of a sheet, as JSON


class SheetStore:
    """The store in `folder`, opened for reading. It may be pickled into the workers of a loader.

    index: the content of index.json, read and checked unless it is given. sheets: a dict for each sheet, with
    its "name", its "shape" and the color of its "paper". Raises DataError if there is no whole store.
    """

    def __init__(self, folder: Path, index: dict[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self.index = index or read_index(self.folder)
        self.sheets: list[Facts] = self.index["sheets"]
        self._file: memoryview | None = None
        self._open: dict[int, tiles.PackedSheet] = {}
        self._kept: list[Image] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_open": {}, "_kept": None}  # each process maps the file anew

    def preload(self: Store) -> Store:
        """Decode all sheets now if they take at most KEEP bytes, so that windows are copied from memory.

        Workers that are forked later share them. Returns the store. Raises DataError as `cut` does.
        """
        if "layout" in self.index and sum(math.prod(facts["shape"]) for facts in self.sheets) <= KEEP:
            self._kept = [self.sheet(number) for number in range(len(self.sheets))]
            for image in self._kept:
                image.setflags(write=False)
            self._open = {}
        return self

    def sheet(self, number: int) -> Image:
        """Sheet `number`, uint8 [H, W] or [H, W, 3]. Raises DataError as `cut` does."""
        packed = self._packed(number)
        return packed if isinstance(packed, np.ndarray) else packed.whole()

    def cut(self, number: int, x: int, y: int, side: int) -> Image:
        """A window of sheet `number`, as `windows.cut` makes it.

        Raises DataError if it is damaged, or if the store was removed or replaced since it was opened.
        """
        packed, paper = self._packed(number), self.sheets[number]["paper"]
        return (
            cut(packed, x, y, side, paper)
            if isinstance(packed, np.ndarray)
            else packed.cut(x, y, side, paper)
        )

    def verify(self) -> bool:
        """Read it all. Raises DataError if a byte has changed. False if the store is too old for hashes."""
        if "layout" not in self.index:
            return False
        again = SheetStore(self.folder, self.index)
        for number in range(len(self.sheets)):
            packed = again._packed(number)
            assert isinstance(packed, tiles.PackedSheet)
            packed.verify()
        return True

    def _packed(self, number: int) -> tiles.PackedSheet | np.ndarray:
        """A sheet as it lies in the file; that of a store of layout 1, or kept in memory, is an array."""
        if self._kept is not None:
            return self._kept[number]
        if self._file is None:
            try:
                with open(pixel_file(self.folder, self.index), "rb") as file:
                    self._file = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            except OSError:
                raise DataError(f"{self.folder}: was removed or rebuilt while in use; start again") from None
        facts = self.sheets[number]
        begin, shape = facts["offset"], tuple(facts["shape"])
        if "layout" not in self.index:
            return np.frombuffer(self._file, np.uint8, math.prod(shape), begin).reshape(shape)
        if number not in self._open:
            told = (
                f"{self.folder}: its copy of {facts['name']} is damaged; delete this folder and run the "
                "command again, which packs the sheets anew (a store of your own: python -m schematics.pack)"
            )
            data = self._file[begin : begin + facts["bytes"]]
            self._open[number] = tiles.PackedSheet(data, shape, facts["sha256"], told)
        return self._open[number]


def pixel_file(folder: Path, index: dict[str, Any]) -> Path:
    """The file with the sheets of a store."""
    # The key is in the name, so that a reader whose store was replaced finds no file rather than other
    # pixels; the layout too, so that code that knows only layout 1 does not take tiles for pixels.
    return folder / f"{'tiles' if 'layout' in index else 'sheets'}-{index['key'][:16]}.bin"


def read_index(folder: Path) -> dict[str, Any]:
    """The content of index.json. Raises DataError unless the store is whole and its small files unchanged."""
    try:
        index = json.loads((folder / "index.json").read_text())
        if "layout" in index:
            told = index.pop("sha256")
            whole = index["layout"] == LAYOUT and told == _digest(json.dumps(index).encode())
            for name, digest in index["files"].items():
                whole = whole and _digest((folder / name).read_bytes()) == digest
        else:
            whole = np.load(folder / "windows.npy", mmap_mode="r").shape[1] == 3
        if whole and pixel_file(folder, index).stat().st_size == index["bytes"] and index["sheets"]:
            return index
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError):  # whatever junk gives
        pass
    raise DataError(f"{folder}: no whole window store; build one: python -m schematics.pack DATA {folder}")


def matches(out: Path, key: str) -> bool:
    """Whether there is a whole store at `out` with this key."""
    try:
        return read_index(out)["key"] == key
    except DataError:
        return False


def key_of(sheets: Sequence[Sheet], *parameters: Any) -> str:
    """A digest of all that a store depends on. A file that can't be looked at counts as size -1."""
    files: list[list[Any]] = []
    for sheet in sheets:
        try:
            stat = sheet.path.stat()
            files.append([str(sheet.path.resolve()), sheet.page, stat.st_size, stat.st_mtime_ns])
        except OSError:
            files.append([str(sheet.path.resolve()), sheet.page, -1, -1])
    return _digest(json.dumps([*parameters, files]).encode())


@dataclass(frozen=True)
class Plan:
    """What to build. prepare: turns a sheet into the image to keep and its facts, "paper" among them.

    It is called in other processes, so it must be a function of a module or a partial of one. finish: is
    given the folder, its index so far and a line for each sheet that could not be read; it may write files,
    and returns what else the index holds, with the sha256 of each file under "files". dpi: of PDF pages.
    """

    sheets: Sequence[Sheet]
    key: str
    prepare: Callable[[Sheet], tuple[Image, Facts]]
    finish: Callable[[Path, dict[str, Any], list[str]], dict[str, Any]]
    dpi: int = 200


def build(plan: Plan, out: Path, workers: int | None = None) -> None:
    """Build the store at `out` unless it is there. The files do not depend on the number of workers.

    Raises DataError if `out` holds something else, no sheet can be read, `finish` does or the disk fails.
    `out` is as it was before then.
    """
    if matches(out, plan.key):
        return
    if out.exists() and not (out / "index.json").exists() and (out.is_file() or any(out.iterdir())):
        raise DataError(f"{out}: exists and is no window store; choose another folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(out, plan.key)
        with resumable_folder(out, plan.key) as folder:
            if not matches(out, plan.key):  # another process may just have built it
                _write(plan, folder, workers)
                _publish(folder, out, plan.key)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cure = (
            "free some room or choose another folder, and packing goes on"
            if full
            else "choose another folder"
        )
        raise DataError(f"{out}: {error.strerror}; {cure}") from error


def _write(plan: Plan, folder: Path, workers: int | None) -> None:
    """Write a store into a folder, on the disk on return, and go on with what is packed there already."""
    index: dict[str, Any] = {"key": plan.key, "layout": LAYOUT}
    with open(pixel_file(folder, index), "a+b") as file, open(folder / JOURNAL, "a+b") as journal:
        records = _packed_before(file, journal)
        rest = plan.sheets[len(records) :]
        sizes = [_pixels(sheet, plan.dpi) for sheet in rest]
        if not records:
            _check_room(rest, sizes, folder)
        work = _Packing(plan.prepare)
        for _, (data, record) in zip(
            progress(rest, "packing"), in_order(work, rest, sizes, workers), strict=True
        ):
            record["offset"] = file.tell()
            file.write(data)
            file.flush()
            journal.write(json.dumps(record).encode() + b"\n")
            journal.flush()
            records.append(record)
        index["bytes"] = file.tell()
    skipped = [record["skipped"] for record in records if "skipped" in record]
    index["sheets"] = [record for record in records if "skipped" not in record]
    if not index["sheets"]:
        raise DataError(f"none of {len(plan.sheets)} sheets can be read; the first: {skipped[0]}")
    index.update(plan.finish(folder, index, skipped))
    index["sha256"] = _digest(json.dumps(index).encode())
    (folder / "index.json").write_text(json.dumps(index))
    (folder / JOURNAL).unlink()
    for path in [*folder.iterdir(), folder]:
        sync(path)


@dataclass(frozen=True)
class _Packing:
    """Turn a sheet into its bytes in the store, and what the index says of it."""

    prepare: Callable[[Sheet], tuple[Image, Facts]]

    def __call__(self, sheet: Sheet) -> tuple[bytes, Facts]:
        try:
            image, facts = self.prepare(sheet)
        except DataError as error:
            return b"", {"skipped": str(error), "bytes": 0}
        data, sha256 = tiles.pack(image)
        return data, {"name": sheet.name, "shape": image.shape, "bytes": len(data), "sha256": sha256, **facts}


def _packed_before(file: BinaryIO, journal: BinaryIO) -> list[Facts]:
    """The sheets that an earlier process has packed and whose bytes are as it wrote them.

    Both files are cut behind them: a line without its end or a sheet without its line is not used.
    """
    records: list[Facts] = []
    size = file.seek(0, os.SEEK_END)
    journal.seek(0)
    told = end = 0
    for line in journal:
        with contextlib.suppress(ValueError, KeyError, TypeError, DataError):
            record = json.loads(line)
            whole = line.endswith(b"\n") and record["offset"] == end and end + record["bytes"] <= size
            if whole:
                if "skipped" not in record:
                    file.seek(end)
                    data = memoryview(file.read(record["bytes"]))
                    tiles.PackedSheet(data, tuple(record["shape"]), record["sha256"], "").verify()
                records.append(record)
                end, told = end + record["bytes"], told + len(line)
                continue
        break
    file.truncate(end)
    journal.truncate(told)
    file.seek(end)
    journal.seek(told)
    return records


def _pixels(sheet: Sheet, dpi: int) -> int:
    """Bytes of the decoded sheet, at most; 0 if it can't be read, which the build finds out by itself."""
    try:
        width, height = sheet_size(sheet, dpi)
    except DataError:
        return 0
    return 3 * width * height


def _check_room(sheets: Sequence[Sheet], pixels: Sequence[int], folder: Path) -> None:
    """Raise DataError if the packed sheets might not fit on the disk of `folder`."""
    pages, need = Counter(sheet.path for sheet in sheets), float(MARGIN)
    for sheet, size in zip(sheets, pixels, strict=True):
        suffix = sheet.path.suffix.lower()
        if suffix == ".pdf":
            need += PDF_SHARE * size
        elif size:
            share = sheet.path.stat().st_size / pages[sheet.path]
            need += min(size, GROWTH.get(suffix, OTHER_GROWTH) * share)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise DataError(
            f"{folder.parent}: packed sheets need up to {need / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free;"
            " free some, or choose another disk or --color-mode gray"
        )


def _publish(folder: Path, out: Path, key: str) -> None:
    """Rename `folder` to `out`, unless another process has put the same store there in the meantime.

    A store of other sheets or parameters gives way.
    """
    while True:
        try:
            os.rename(folder, out)
            return sync(out.parent)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if matches(out, key):
            return None
        with unfinished_folder(out) as aside, contextlib.suppress(FileNotFoundError):
            os.rename(out, aside)  # not found: another process has just done the same


def digest_of(path: Path) -> str:
    """The sha256 of a small file."""
    return _digest(path.read_bytes())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
