"""A store of windows: all sheets decoded once, and a list of the square windows that hold ink.

The pixels of all sheets are in one file, which is mapped into memory, so that a window is read in 0.06 ms
where decoding a sheet of 7000 x 5000 px takes 50 to 190 ms. A store is there whole or not at all, and one
that matches its sheets and parameters is used again. Any number of processes may build and read a store at
once.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from schematics.folders import remove_stale, sync, turn_to_build, unfinished_folder
from schematics.sheets import DataError, Sheet, find_sheets, read_sheet, sheet_size, to_color
from schematics.windows import (
    Color,
    Image,
    cut,
    ink_mask,
    ink_windows,
    line_width,
    mean_and_std,
    nearby_paper,
    paper_color,
    starts,
    uneven_paper,
)

COLOR_MODES = ("auto", "gray", "rgb")
LAYOUT = 1  # to be raised when the files of a store change, so that stores of the old layout are built anew
STATISTICS_WINDOWS = 512  # mean and std are taken over at most this many windows, evenly spread over all
MEASURED = 8  # the width of lines is measured on each 8th of them
MARGIN = 64 << 20  # bytes, left free on the disk


@dataclass(frozen=True)
class Parameters:
    """What a store depends on beside its sheets."""

    side: int  # of a window, px
    stride: int  # largest distance between neighbouring windows, px
    min_ink: float  # share of a window's pixels
    color_mode: str  # one of COLOR_MODES
    dpi: int  # resolution of PDF pages


class WindowStore:
    """The store in `folder`, opened for reading. It may be pickled into the workers of a loader.

    color_mode is "gray" or "rgb". mean and std are three floats each in [0, 1], one a channel, over windows
    with ink. line is the width in px of the pool's thinner lines, None in a store of an older version.
    skipped has a line for each sheet that could not be read. Raises DataError if there is no whole store.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.index, self.windows = _read(self.folder)
        self.color_mode: str = self.index["color_mode"]
        self.mean: list[float] = self.index["mean"]
        self.std: list[float] = self.index["std"]
        self.line: float | None = self.index.get("line")
        self.skipped: list[str] = self.index["skipped"]
        self.sheet_names: list[str] = [entry["name"] for entry in self.index["sheets"]]
        self.side: int = self.index["parameters"]["side"]
        self._pixels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.windows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}  # each process maps the file anew

    def window(self, i: int) -> Image:
        """Window i as a copy, uint8 [side, side] if its sheet is gray, else [side, side, 3].

        Beyond the edge of the sheet it has the color of the paper.
        """
        sheet, x, y = self.windows[i].tolist()
        return cut(self.sheet(sheet), x, y, self.side, self.index["sheets"][sheet]["paper"])

    def paper(self, i: int) -> Color:
        """The most frequent color of the sheet that window i is on."""
        paper = self.index["sheets"][int(self.windows[i, 0])]["paper"]
        return tuple(paper) if isinstance(paper, list) else paper

    def tolerance(self, i: int) -> int | None:
        """How far ink is from the paper if window i is of an uneven sheet, else None (see `uneven_paper`).

        A store of an older version says None of all sheets, so that its windows are used as they were.
        """
        return self.index["sheets"][int(self.windows[i, 0])].get("tolerance")

    def sheet(self, number: int) -> Image:
        """Sheet `number`, uint8 [H, W] or [H, W, 3], as a read-only view of the file.

        Raises DataError if the store was removed or replaced since it was opened.
        """
        if self._pixels is None:
            try:
                self._pixels = np.memmap(_pixel_file(self.folder, self.index["key"]), np.uint8, mode="r")
            except OSError:
                raise DataError(f"{self.folder}: was removed or rebuilt while in use; start again") from None
        return _sheet_of(self._pixels, self.index["sheets"][number])

    def source(self, i: int) -> str:
        """Where window i is from, as "file.png @x,y", for messages."""
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
    shared: bool = False,
) -> WindowStore:
    """Decode all sheets at `root` into a store at `out`, or open the one there if it matches.

    side, stride: of the windows in px; stride is half of side if not given. min_ink: share of its pixels that
    must be ink in a window. color_mode: "gray" turns all sheets gray; "rgb" and "auto" keep each sheet as it
    is, and "auto" calls the store gray if no sheet has color. dpi: resolution of PDF pages. shared: the store
    is a folder of `out` whose name is that of these sheets and arguments, so that all who ask for the same
    have one store, which only one of them builds, and who asks for others takes it from nobody. Raises
    DataError if no sheet can be read, no window holds ink, an argument is out of range, `out` holds something
    else, or the disk has too little room. `out` is as it was before then.
    """
    if color_mode not in COLOR_MODES:
        raise DataError(f"--color-mode {color_mode}: choose auto, gray or rgb")
    parameters = Parameters(side, stride or max(1, side // 2), min_ink, color_mode, dpi)
    if min(parameters.side, parameters.stride, parameters.dpi) < 1:
        raise DataError(f"--side {side} --stride {parameters.stride} --dpi {dpi}: each must be at least 1")
    sheets = find_sheets(root) if isinstance(root, (str, Path)) else list(root)
    key = _key(sheets, parameters)
    out = Path(out).absolute() / (f"windows-{key[:12]}" if shared else "")
    if _matches(out, key):
        return WindowStore(out)
    with turn_to_build(out) if shared else contextlib.nullcontext():
        if not _matches(out, key):  # another process may just have built it
            _build(sheets, parameters, key, out)
    return WindowStore(out)


def _build(sheets: Sequence[Sheet], parameters: Parameters, key: str, out: Path) -> None:
    """Build the store at `out`. Raises DataError as `build_store` does."""
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


def _key(sheets: Sequence[Sheet], parameters: Parameters) -> str:
    """A digest of everything that the store depends on. A file that can't be looked at counts as size -1."""
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
    # The key is in the name, so that a reader whose store was replaced finds no file rather than other
    # pixels.
    return folder / f"sheets-{key[:16]}.bin"


def _read(folder: Path) -> tuple[dict[str, Any], np.ndarray]:
    """The index of a store and its windows, int64 [N, 3] sheet x y. Raises DataError unless it is whole."""
    try:
        index = json.loads((folder / "index.json").read_text())
        windows = np.load(folder / "windows.npy")
        if _pixel_file(folder, index["key"]).stat().st_size == index["bytes"]:
            return index, windows
    except (OSError, ValueError, KeyError, TypeError, EOFError):  # EOFError: windows.npy of 0 bytes
        pass
    raise DataError(f"{folder}: no whole window store; build one: python -m schematics.pack DATA {folder}")


def _matches(out: Path, key: str) -> bool:
    """Whether there is a whole store at `out` with this key."""
    try:
        return _read(out)[0]["key"] == key
    except DataError:
        return False


def _check_room(sheets: Sequence[Sheet], parameters: Parameters, folder: Path) -> None:
    """Raise DataError if the decoded sheets might not fit on the disk of `folder`."""
    channels = 1 if parameters.color_mode == "gray" else 3
    need = MARGIN
    for sheet in sheets:
        try:
            width, height = sheet_size(sheet, parameters.dpi)
        except DataError:
            continue  # the sheet can't be read: the build will say why and skip it
        need += width * height * channels
    free = shutil.disk_usage(folder).free
    if need > free:
        raise DataError(
            f"{folder}: decoded sheets need up to {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free;"
            " free some, or choose another disk or --color-mode gray"
        )


def _write(sheets: Sequence[Sheet], parameters: Parameters, key: str, folder: Path) -> None:
    """Write a store into an empty folder: the pixels, windows.npy and index.json, on the disk on return."""
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
    mean, std, line = _statistics(
        np.memmap(pixel_file, np.uint8, mode="r"), entries, windows, parameters.side
    )
    color_mode = parameters.color_mode
    if color_mode == "auto":
        color_mode = "rgb" if any(len(entry["shape"]) == 3 for entry in entries) else "gray"
    index = {
        "key": key,
        "parameters": asdict(parameters),
        "color_mode": color_mode,
        "mean": mean,
        "std": std,
        "line": line,
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
    """Append the pixels of all sheets to `file`.

    Returns the entry of each sheet in the index, the windows [N, 3] sheet x y, and a line a skipped sheet.
    """
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
        uneven = uneven_paper(image, paper)
        corners = ink_windows(image, side, stride, parameters.min_ink, paper, uneven)
        windows.append(np.insert(corners, 0, len(entries), axis=1))
        height, width = image.shape[:2]
        blank = len(starts(width, side, stride)) * len(starts(height, side, stride)) - len(corners)
        entry = {
            "name": sheet.name,
            "offset": file.tell(),
            "shape": image.shape,
            "paper": paper,
            "tolerance": uneven and uneven.tolerance,
            "blank": blank,
        }
        entries.append(entry)
        file.write(np.ascontiguousarray(image).data)
    return entries, np.concatenate(windows), skipped


def _sheet_of(pixels: np.ndarray, entry: dict[str, Any]) -> Image:
    """The sheet of an entry in the index, as a view of the mapped file."""
    offset, shape = entry["offset"], entry["shape"]
    return pixels[offset : offset + math.prod(shape)].reshape(shape)


def _statistics(
    pixels: np.ndarray, entries: list[dict[str, Any]], windows: np.ndarray, side: int
) -> tuple[list[float], list[float], float]:
    """Of evenly spread windows: mean and standard deviation of each channel, in [0, 1], and the lines' width.

    The width in px is the lower quartile over the windows, so that most lines are at least as wide.
    """
    chosen = np.linspace(0, len(windows) - 1, min(len(windows), STATISTICS_WINDOWS)).astype(int)
    widths = []

    def cuts() -> Iterator[Image]:
        for n, (sheet, x, y) in enumerate(windows[chosen].tolist()):
            paper, tolerance = entries[sheet]["paper"], entries[sheet]["tolerance"]
            window = cut(_sheet_of(pixels, entries[sheet]), x, y, side, paper)
            if n % MEASURED == 0:
                even = tolerance is None
                ink = ink_mask(window, paper) if even else ink_mask(window, nearby_paper(window), tolerance)
                widths.append(line_width(ink))
            yield window

    mean, std = mean_and_std(cuts(), len(chosen))
    return mean, std, float(np.quantile(widths, 0.25))


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
        if _matches(out, key):
            return None
        with unfinished_folder(out) as aside, contextlib.suppress(FileNotFoundError):
            os.rename(out, aside)  # not found: another process has just done the same
