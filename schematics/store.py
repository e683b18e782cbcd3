"""A store of windows: the sheets of a pool, and a list of the square windows that hold ink.

The sheets are packed as schematics/sheetstore.py does it, so that a window of 512 px is read in 0.2 to 0.8 ms
where decoding a sheet of 7000 x 5000 px takes 50 to 190 ms. The list is `windows.npy`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from schematics.sheets import DataError, Sheet, find_sheets, read_sheet, to_color
from schematics.sheetstore import Facts, Plan, SheetStore, build, digest_of, key_of
from schematics.windows import (
    Color,
    Image,
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
CONTENT = 1  # in the key; to be raised when the same sheets give other windows
STATISTICS_WINDOWS = 512  # mean and std are taken over at most this many windows, evenly spread over all
MEASURED = 8  # the width of lines is measured on each 8th of them


@dataclass(frozen=True)
class Parameters:
    """What a store depends on beside its sheets."""

    side: int  # of a window, px
    stride: int  # largest distance between neighbouring windows, px
    min_ink: float  # share of a window's pixels
    color_mode: str  # one of COLOR_MODES
    dpi: int  # resolution of PDF pages


class WindowStore(SheetStore):
    """The store in `folder`, opened for reading. It may be pickled into the workers of a loader.

    color_mode is "gray" or "rgb". mean and std are three floats each in [0, 1], one a channel, over windows
    with ink. line is the width in px of the pool's thinner lines, None in a store of an older version.
    skipped has a line for each sheet that could not be read. Raises DataError if there is no whole store.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.windows = np.load(self.folder / "windows.npy")  # int64 [N, 3] sheet x y
        self.color_mode: str = self.index["color_mode"]
        self.mean: list[float] = self.index["mean"]
        self.std: list[float] = self.index["std"]
        self.line: float | None = self.index.get("line")
        self.skipped: list[str] = self.index["skipped"]
        self.sheet_names: list[str] = [entry["name"] for entry in self.sheets]
        self.side: int = self.index["parameters"]["side"]

    def __len__(self) -> int:
        return len(self.windows)

    def window(self, i: int) -> Image:
        """Window i, uint8 [side, side] if its sheet is gray, else [side, side, 3]; only to be read.

        Beyond the edge of the sheet it has the color of the paper. Raises DataError as `cut` does.
        """
        sheet, x, y = self.windows[i].tolist()
        if self._kept is not None:  # views are made of the sheet itself, which takes no copy
            part = self._kept[sheet][y : y + self.side, x : x + self.side]
            if part.shape[:2] == (self.side, self.side):
                return part
        return self.cut(sheet, x, y, self.side)

    def paper(self, i: int) -> Color:
        """The most frequent color of the sheet that window i is on."""
        paper = self.index["sheets"][int(self.windows[i, 0])]["paper"]
        return tuple(paper) if isinstance(paper, list) else paper

    def tolerance(self, i: int) -> int | None:
        """How far ink is from the paper if window i is of an uneven sheet, else None (see `uneven_paper`).

        A store of an older version says None of all sheets, so that its windows are used as they were.
        """
        return self.sheets[int(self.windows[i, 0])].get("tolerance")

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
    workers: int | None = None,
) -> WindowStore:
    """Decode all sheets at `root` into a store at `out`, or open the one there if it matches.

    side, stride: of the windows in px; stride is half of side if not given. min_ink: share of its pixels that
    must be ink in a window. color_mode: "gray" turns all sheets gray; "rgb" and "auto" keep each sheet as it
    is, and "auto" calls the store gray if no sheet has color. dpi: resolution of PDF pages. shared: the store
    is a folder of `out` whose name is that of these sheets and arguments, so that all who ask for the same
    have one store, and who asks for others takes it from nobody. workers: processes that decode, by default
    one a core; they change nothing in the store. Raises DataError if no sheet can be read, no window holds
    ink, an argument is out of range, `out` holds something else, or the disk has too little room. `out` is as
    it was before then.
    """
    if color_mode not in COLOR_MODES:
        raise DataError(f"--color-mode {color_mode}: choose auto, gray or rgb")
    parameters = Parameters(side, stride or max(1, side // 2), min_ink, color_mode, dpi)
    if min(parameters.side, parameters.stride, parameters.dpi) < 1:
        raise DataError(f"--side {side} --stride {parameters.stride} --dpi {dpi}: each must be at least 1")
    sheets = find_sheets(root) if isinstance(root, (str, Path)) else list(root)
    key = key_of(sheets, CONTENT, asdict(parameters))
    out = Path(out).absolute() / (f"windows-{key[:12]}" if shared else "")
    plan = Plan(sheets, key, partial(_find_windows, parameters), partial(_list_windows, parameters), dpi)
    build(plan, out, workers)
    return WindowStore(out)


def pack(
    data_dir: Path,
    exp_dir: Path,
    store_dir: Path | None,
    window: int,
    stride: int | None,
    color_mode: str,
    dpi: int,
) -> Path:
    """The folder of the pool's packed windows, built unless one that matches exists.

    It is --data-dir itself if that is a packed store, the folder of this run if an earlier version made one,
    else a folder of `store_dir`, by default beside the exp-dir, that all runs on the same sheets and windows
    share. Prints the sheets that cannot be read.
    """
    if (data_dir / "windows.npy").exists():
        return data_dir
    own = exp_dir / "windows"
    shared = not own.exists()
    out = (store_dir or exp_dir.parent) if shared else own
    store = build_store(data_dir, out, window, stride, color_mode=color_mode, dpi=dpi, shared=shared)
    for line in store.skipped:
        print(f"skipped {line}")
    print(f"windows in {store.folder}, {store.index['bytes'] / 1e6:.0f} MB", flush=True)
    return store.folder


def _find_windows(parameters: Parameters, sheet: Sheet) -> tuple[Image, Facts]:
    """A sheet as it is kept, and its windows with the rest that the index says of it."""
    image = read_sheet(sheet, parameters.dpi)
    if parameters.color_mode == "gray":
        image = to_color(image, "gray")
    side, stride = parameters.side, parameters.stride
    paper = paper_color(image)
    uneven = uneven_paper(image, paper)
    corners = ink_windows(image, side, stride, parameters.min_ink, paper, uneven)
    height, width = image.shape[:2]
    blank = len(starts(width, side, stride)) * len(starts(height, side, stride)) - len(corners)
    tolerance = uneven and uneven.tolerance
    return image, {"paper": paper, "tolerance": tolerance, "blank": blank, "windows": corners.tolist()}


def _list_windows(
    parameters: Parameters, folder: Path, index: dict[str, Any], skipped: list[str]
) -> dict[str, Any]:
    """Write windows.npy, and return what the index of a store of windows holds beside its sheets."""
    sheets = index["sheets"]
    found = [
        np.insert(np.array(entry.pop("windows"), np.int64).reshape(-1, 2), 0, number, axis=1)
        for number, entry in enumerate(sheets)
    ]
    windows = np.concatenate(found)
    if len(windows) == 0:
        raise DataError(
            f"all {len(sheets)} sheets ({sheets[0]['name']}, ...) are blank paper: give drawings,"
            f" or a --min-ink below {parameters.min_ink}"
        )
    np.save(folder / "windows.npy", windows)
    color_mode = parameters.color_mode
    if color_mode == "auto":
        color_mode = "rgb" if any(len(entry["shape"]) == 3 for entry in sheets) else "gray"
    mean, std, line = _statistics(SheetStore(folder, index), windows, parameters.side)
    return {
        "files": {"windows.npy": digest_of(folder / "windows.npy")},
        "parameters": asdict(parameters),
        "color_mode": color_mode,
        "mean": mean,
        "std": std,
        "line": line,
        "skipped": skipped,
    }


def _statistics(store: SheetStore, windows: np.ndarray, side: int) -> tuple[list[float], list[float], float]:
    """Of evenly spread windows: mean and standard deviation of each channel, in [0, 1], and the lines' width.

    The width in px is the lower quartile over the windows, so that most lines are at least as wide.
    """
    chosen = np.linspace(0, len(windows) - 1, min(len(windows), STATISTICS_WINDOWS)).astype(int)
    widths = []

    def cuts() -> Iterator[Image]:
        for n, (sheet, x, y) in enumerate(windows[chosen].tolist()):
            paper, tolerance = store.sheets[sheet]["paper"], store.sheets[sheet]["tolerance"]
            window = store.cut(sheet, x, y, side)
            if n % MEASURED == 0:
                even = tolerance is None
                ink = ink_mask(window, paper) if even else ink_mask(window, nearby_paper(window), tolerance)
                widths.append(line_width(ink))
            yield window

    mean, std = mean_and_std(cuts(), len(chosen))
    return mean, std, float(np.quantile(widths, 0.25))
