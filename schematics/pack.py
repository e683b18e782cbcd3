"""Decoded sheets in one memory-mapped file, with the windows that hold ink.

    python -m schematics.pack DATA OUT [--side 512] [--stride 256] [--color-mode auto|gray|rgb] [--dpi 200]

A 7000 x 5000 sheet takes 50 to 190 ms to decode, a window out of the map 0.06 ms: decoding happens once.
The store is built in a temporary folder beside OUT and renamed, so it is there whole or not at all; one that
matches its sources and parameters is used again. Any number of processes may build and read at once.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from schematics.command import Parser, run
from schematics.folders import remove_stale, sync, unfinished_folder
from schematics.sheets import DataError, Sheet, find_sheets, read_sheet, sheet_size, to_color
from schematics.windows import Image, cut, ink_windows, mean_and_std, paper_color, starts

COLOR_MODES = ("auto", "gray", "rgb")
LAYOUT = 1  # raise it when the files below change, and stores of the old layout are built anew
STATISTICS_WINDOWS = 512  # mean and std come from at most this many windows, evenly spread
MARGIN = 64 << 20  # bytes left free on the disk


@dataclass(frozen=True)
class Parameters:
    """What a store depends on beside its sheets."""

    side: int  # px
    stride: int  # px
    min_ink: float  # share of a window's pixels
    color_mode: str  # "auto", "gray" or "rgb"
    dpi: int  # for PDF pages


class WindowStore:
    """The windows of a store at `folder`, opened for reading; cheap to pickle into loader workers.

    color_mode: "gray" or "rgb"; mean, std: three floats in [0, 1] over windows with ink;
    skipped: one line for each sheet that could not be read. Raises DataError if there is no whole store.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.index, self.windows = _read(self.folder)
        self.color_mode: str = self.index["color_mode"]
        self.mean: list[float] = self.index["mean"]
        self.std: list[float] = self.index["std"]
        self.skipped: list[str] = self.index["skipped"]
        self.sheet_names: list[str] = [entry["name"] for entry in self.index["sheets"]]
        self.side: int = self.index["parameters"]["side"]
        self._pixels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.windows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}  # each process maps the file for itself

    def window(self, i: int) -> Image:
        """Window i, uint8 [side, side] where its sheet is gray, else [side, side, 3]; padded with paper."""
        sheet, x, y = self.windows[i].tolist()
        return cut(self.sheet(sheet), x, y, self.side, self.index["sheets"][sheet]["paper"])

    def sheet(self, number: int) -> Image:
        """Sheet `number` as decoded, a read-only view of the file."""
        if self._pixels is None:
            try:
                self._pixels = np.memmap(_pixel_file(self.folder, self.index["key"]), np.uint8, mode="r")
            except OSError:
                raise DataError(f"{self.folder}: was removed or rebuilt while in use; start again") from None
        return _sheet_of(self._pixels, self.index["sheets"][number])

    def source(self, i: int) -> str:
        """Window i in words, for messages: "file.png @x,y"."""
        sheet, x, y = self.windows[i].tolist()
        return f"{self.sheet_names[sheet]} @{x},{y}"


def build_store(
    root: Path | Sequence[Sheet],
    out: Path,
    side: int = 512,
    stride: int | None = None,
    min_ink: float = 0.002,
    color_mode: str = "auto",
    dpi: int = 200,
) -> WindowStore:
    """Decode all sheets at `root` into a store at `out`, or open the one there if it matches.

    side, stride: of the windows in pixels (stride: half of side); a window needs min_ink of its pixels.
    color_mode: "auto" keeps gray and color as found and calls the store rgb if any sheet has color.
    Raises DataError when no sheet can be read, none holds ink, or the disk has too little room; nothing is
    written then.
    """
    if color_mode not in COLOR_MODES:
        raise DataError(f"--color-mode {color_mode}: choose auto, gray or rgb")
    parameters = Parameters(side, stride or max(1, side // 2), min_ink, color_mode, dpi)
    if min(parameters.side, parameters.stride, parameters.dpi) < 1:
        raise DataError(f"--side {side} --stride {stride} --dpi {dpi}: each must be at least 1")
    sheets = find_sheets(root) if isinstance(root, (str, Path)) else list(root)
    out = Path(out).absolute()
    key = _key(sheets, parameters)
    if _matches(out, key):
        return WindowStore(out)
    if out.exists() and not (out / "index.json").exists() and (out.is_file() or any(out.iterdir())):
        raise DataError(f"{out}: exists and is no window store; choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    _check_room(sheets, parameters, out.parent)
    remove_stale(out)
    try:
        with unfinished_folder(out) as folder:
            _write(sheets, parameters, key, folder)
            _publish(folder, out, key)
    except OSError as error:
        raise DataError(f"{out}: {error.strerror}; free some room or choose another folder") from error
    return WindowStore(out)


def _key(sheets: Sequence[Sheet], parameters: Parameters) -> str:
    """A digest of everything the store depends on; a file that can't be looked at counts as size -1."""
    files: list[list[Any]] = []
    for sheet in sheets:
        try:
            stat = sheet.path.stat()
            files.append([str(sheet.path.resolve()), sheet.page, stat.st_size, stat.st_mtime_ns])
        except OSError:
            files.append([str(sheet.path.resolve()), sheet.page, -1, -1])
    told = json.dumps([LAYOUT, asdict(parameters), files])
    return hashlib.sha256(told.encode()).hexdigest()


def _pixel_file(folder: Path, key: str) -> Path:
    # Named by the key: a reader of a store that was replaced finds no file rather than other pixels.
    return folder / f"sheets-{key[:16]}.bin"


def _read(folder: Path) -> tuple[dict[str, Any], np.ndarray]:
    """The index and the windows, int64 [N, 3] (sheet, x, y), of a whole store. Raises DataError."""
    try:
        index = json.loads((folder / "index.json").read_text())
        windows = np.load(folder / "windows.npy")
        if _pixel_file(folder, index["key"]).stat().st_size == index["bytes"]:
            return index, windows
    except (OSError, ValueError, KeyError):
        pass
    raise DataError(f"{folder}: no whole window store; build one: python -m schematics.pack DATA {folder}")


def _matches(out: Path, key: str) -> bool:
    try:
        return _read(out)[0]["key"] == key
    except DataError:
        return False


def _check_room(sheets: Sequence[Sheet], parameters: Parameters, folder: Path) -> None:
    channels = 1 if parameters.color_mode == "gray" else 3
    need = MARGIN
    for sheet in sheets:
        try:
            width, height = sheet_size(sheet, parameters.dpi)
        except DataError:
            continue  # reading it will say why
        need += width * height * channels
    free = shutil.disk_usage(folder).free
    if need > free:
        raise DataError(
            f"{folder}: decoded sheets need up to {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free;"
            " free some, or choose another disk or --color-mode gray"
        )


def _write(sheets: Sequence[Sheet], parameters: Parameters, key: str, folder: Path) -> None:
    """Decode into `folder`: the pixels, windows.npy and index.json, all on the disk on return."""
    pixel_file = _pixel_file(folder, key)
    with open(pixel_file, "wb") as file:
        entries, windows, skipped = _decode(sheets, parameters, file)
    if not entries:
        raise DataError(f"none of {len(sheets)} sheets can be read; the first: {skipped[0]}")
    if len(windows) == 0:
        raise DataError(
            f"all {len(entries)} sheets ({entries[0]['name']}, ...) are blank paper: give drawings,"
            f" or a --min-ink below {parameters.min_ink}"
        )
    np.save(folder / "windows.npy", windows)
    mean, std = _statistics(np.memmap(pixel_file, np.uint8, mode="r"), entries, windows, parameters.side)
    color_mode = parameters.color_mode
    if color_mode == "auto":
        color_mode = "rgb" if any(len(entry["shape"]) == 3 for entry in entries) else "gray"
    index = {
        "key": key,
        "parameters": asdict(parameters),
        "color_mode": color_mode,
        "mean": mean,
        "std": std,
        "bytes": pixel_file.stat().st_size,
        "sheets": entries,
        "skipped": skipped,
    }
    (folder / "index.json").write_text(json.dumps(index))
    for path in [*folder.iterdir(), folder]:
        sync(path)


def _decode(
    sheets: Sequence[Sheet], parameters: Parameters, file: BinaryIO
) -> tuple[list[dict[str, Any]], np.ndarray, list[str]]:
    """Append all sheets to `file`; returns their entries, the windows [N, 3] and one line a skipped sheet."""
    entries: list[dict[str, Any]] = []
    windows: list[np.ndarray] = [np.zeros((0, 3), np.int64)]
    skipped: list[str] = []
    side, stride = parameters.side, parameters.stride
    for sheet in sheets:
        try:
            image = read_sheet(sheet, parameters.dpi)
        except DataError as error:
            skipped.append(str(error))
            continue
        if parameters.color_mode == "gray":
            image = to_color(image, "gray")
        paper = paper_color(image)
        corners = ink_windows(image, side, stride, parameters.min_ink, paper)
        windows.append(np.insert(corners, 0, len(entries), axis=1))
        height, width = image.shape[:2]
        blank = len(starts(width, side, stride)) * len(starts(height, side, stride)) - len(corners)
        entry = {
            "name": sheet.name,
            "offset": file.tell(),
            "shape": image.shape,
            "paper": paper,
            "blank": blank,
        }
        entries.append(entry)
        file.write(np.ascontiguousarray(image).data)
    return entries, np.concatenate(windows), skipped


def _sheet_of(pixels: np.ndarray, entry: dict[str, Any]) -> Image:
    offset, shape = entry["offset"], entry["shape"]
    return pixels[offset : offset + math.prod(shape)].reshape(shape)


def _statistics(
    pixels: np.ndarray, entries: list[dict[str, Any]], windows: np.ndarray, side: int
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel in [0, 1], over evenly spread windows."""
    chosen = np.linspace(0, len(windows) - 1, min(len(windows), STATISTICS_WINDOWS)).astype(int)
    cuts = (
        cut(_sheet_of(pixels, entries[sheet]), x, y, side, entries[sheet]["paper"])
        for sheet, x, y in windows[chosen].tolist()
    )
    return mean_and_std(cuts, len(chosen))


def _publish(folder: Path, out: Path, key: str) -> None:
    """Rename `folder` to `out`. A stale store there gives way, a matching one (another process) stays."""
    while True:
        try:
            os.rename(folder, out)
            return sync(out.parent)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if _matches(out, key):
            return None
        # Another process may have moved it away first.
        with unfinished_folder(out) as aside, contextlib.suppress(FileNotFoundError):
            os.rename(out, aside)


def main(args: argparse.Namespace) -> None:
    store = build_store(args.data, args.out, args.side, args.stride, args.min_ink, args.color_mode, args.dpi)
    for line in store.skipped:
        print(f"skipped {line}")
    blank = sum(entry["blank"] for entry in store.index["sheets"])
    print(
        f"{len(store.sheet_names)} sheets, {len(store)} {store.color_mode} windows of {store.side} px,"
        f" {blank / (blank + len(store)):.0%} of the paper blank and skipped,"
        f" {store.index['bytes'] / 1e6:.1f} MB in {store.folder}"
    )


if __name__ == "__main__":
    parser = Parser("schematics.pack", __doc__)
    parser.add_argument("data", type=Path, help="A sheet, or a folder of sheets.")
    parser.add_argument(
        "out", type=Path, help="Folder of the store: a new one, or a store to bring up to date."
    )
    parser.add_argument(
        "--side", type=int, default=512, help="Side of a window in pixels (default %(default)s)."
    )
    parser.add_argument(
        "--stride", type=int, help="Largest distance between neighbours in pixels (default: half of --side)."
    )
    parser.add_argument(
        "--min-ink",
        type=float,
        default=0.002,
        metavar="SHARE",
        help="Share of a window's pixels that must be ink, or it is left out (default %(default)s).",
    )
    parser.add_argument(
        "--color-mode",
        choices=COLOR_MODES,
        default="auto",
        help="gray turns all sheets gray, rgb keeps color, auto is rgb if a sheet has color (default auto).",
    )
    parser.add_argument(
        "--dpi", type=int, default=200, help="Resolution of PDF pages, dots per inch (default %(default)s)."
    )
    run(main, parser)
