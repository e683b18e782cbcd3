"""A packed store: its size beside PNG files, what a window costs to read, and packing by processes.

    python benchmarks/store.py [--data FOLDER] [--sheets 6] [--rounds 7]

Three kinds of sheets of 3500 x 2500 px are drawn: line art in gray, in color, and the gray ones as a scan
with noise, which no codec halves. With --data, a folder of your own sheets takes their place.

Windows of 512 px in random order are read from the packed tiles and, as the peer, from pixels that lie in a
memory map as they are. Tiles cost more: a window touches 2.25 times its pixels in tiles of 256 px, at 3 GB/s.
What is left of that in the rate of pairs of views, which is what training waits for, are 10 to 15 %; a pool
of up to 1 GiB is decoded once when a run begins, and then there is no difference. From a disk, for which a
pool of pixels is too large a cache, a window is nine runs of bytes in place of 512, but here all is in
memory.

The last races are a training window of 1024 px of the detector out of a sheet of 7000 x 5000 px in color that
is not kept in memory (goal 25 ms, which is a ratio of 1 against the peer that takes so long), and packing
with one process and with all cores, in seconds by the clock. At the end, stores of a thousand and a million
windows are opened (goal 167 ms). It takes three minutes on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
import tracemalloc
from itertools import cycle
from pathlib import Path

import cv2
import numpy as np
import torch
from race import cpu_seconds, describe_machine, race

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from cluster.batches import Batches
from cluster.distributed import World
from detection.data import Augment, TrainingWindows
from detection.sheets import SheetReader, pack_split
from pretraining.data import epoch_order
from schematics.coco import Category, read_split, write_split
from schematics.drafting import draw_sheet
from schematics.recipes import two_views
from schematics.sheets import write_png
from schematics.sheetstore import SheetStore, digest_of, pixel_file
from schematics.store import WindowStore, build_store
from schematics.windows import Image, cut
from schematics.workers import cores

SIDE = 512  # px of a window
GOAL_MS = 25
EQUAL = 0.95  # a ratio that tells an equal rate from a lower one, beside the noise of a shared machine


def drawn(kind: str, count: int) -> list[Image]:
    """Sheets of a kind: "gray", "color" or "scan"."""
    sheets = [draw_sheet(0, n, 3500, 2500)[0] for n in range(count)]
    if kind == "color":
        return [np.dstack([sheet, 255 - (255 - sheet) // 2, sheet]) for sheet in sheets]
    rng = np.random.default_rng(0)
    if kind == "scan":
        noisy = (sheet * 0.9 + rng.normal(8, 5, sheet.shape) for sheet in sheets)
        return [np.clip(sheet, 0, 255).astype(np.uint8) for sheet in noisy]
    return sheets


def measure(kind: str, folder: Path, out: Path, rounds: int) -> None:
    """Print the lines for a folder of sheets."""
    store = build_store(folder, out, SIDE)
    files = [path for path in folder.rglob("*") if path.is_file()]
    pixels = [store.sheet(number) for number in range(len(store.sheets))]
    raw = sum(image.nbytes for image in pixels)
    png = sum(len(cv2.imencode(".png", image)[1]) for image in pixels)
    packed, size = store.index["bytes"], sum(path.stat().st_size for path in files)
    print(
        f"{kind}, {len(pixels)} sheets: {packed / 1e6:.1f} MB packed, {packed / png:.2f} of PNG (goal 4 at "
        f"most), {packed / size:.2f} of the files, {packed / raw:.3f} of the pixels"
    )
    mapped = [
        np.memmap(out / f"raw-{n}", np.uint8, "w+", shape=image.shape) for n, image in enumerate(pixels)
    ]
    for array, image in zip(mapped, pixels, strict=True):
        array[:] = image
    order = cycle(np.random.default_rng(0).permutation(len(store)).tolist()[:200])

    def from_map() -> Image:
        sheet, x, y = store.windows[next(order)].tolist()
        return cut(mapped[sheet], x, y, SIDE, store.sheets[sheet]["paper"])

    def views(window: Image) -> None:
        two_views(window, "drawing", 224, 0, 0, 0)

    peer = "a memory map of the pixels"
    race(
        f"{kind}, a window of {SIDE} px", lambda: store.window(next(order)), from_map, peer, None, rounds, 200
    )
    for told, source in ((" from tiles", store), ("", WindowStore(out).preload())):
        race(
            f"{kind}, a pair of drawing views{told}",
            lambda source=source: views(source.window(next(order))),  # type: ignore[misc]
            lambda: views(from_map()),
            peer,
            None if told else EQUAL,
            rounds,
            100,
        )


def training_window(folder: Path, rounds: int) -> None:
    """Race a window of the detector out of a large sheet in a store against the sheet decoded for it."""
    large = draw_sheet(1, 0, 7000, 5000)[0]
    train = folder / "train"
    train.mkdir()
    write_png(train / "a.png", np.dstack([large, 255 - (255 - large) // 2, large]))
    rng = np.random.default_rng(0)
    boxes = [
        {"image_id": 1, "category_id": 1, "bbox": [*rng.integers(0, 4900, 2).tolist(), 40, 40]}
        for _ in range(800)
    ]
    image = {"id": 1, "file_name": "a.png", "width": 7000, "height": 5000}
    write_split(train, [image], [Category(1, "symbol")], boxes)
    split = read_split(train)
    readers = [
        SheetReader(split, "rgb", store=pack_split(split, "rgb", 1.0, folder)),
        SheetReader(split, "rgb", cache_bytes=0),
        SheetReader(split, "rgb"),
    ]
    augment = Augment(shift=True, scale=0.1, photometric=0.3)
    sets = [TrainingWindows(reader, 1024, 128, 0, augment) for reader in readers]
    places = [cycle(enumerate(windows.order(0).tolist())) for windows in sets]

    def one(number: int) -> None:
        place, tile = next(places[number])
        sets[number][0, place, tile]

    one(2)  # which decodes the sheet
    name = "a training window of 1024 px, 7000 x 5000 px in color"
    race(name, lambda: one(0), lambda: one(1), "decoding the sheet", None, rounds, 3)
    ours, kept = (cpu_seconds(lambda number=number: one(number), 40) for number in (0, 2))
    missed = "" if 1e3 * ours <= GOAL_MS else ", missed"
    print(f"{name}: {1e3 * ours:.1f} ms (goal {GOAL_MS}{missed}), {1e3 * kept:.1f} ms from memory")


def packing(folder: Path, out: Path) -> None:
    """Print the seconds of packing by the number of processes, and of opening and verifying the result."""
    for workers in sorted({1, 2, cores()}):
        begun = time.perf_counter()
        build_store(folder, out / str(workers), SIDE, workers=workers)
        print(f"packing in {workers} processes: {time.perf_counter() - begun:.2f} s")
    seconds = [cpu_seconds(lambda: WindowStore(out / "1"), 10), cpu_seconds(SheetStore(out / "1").verify)]
    print(f"opening {1e3 * seconds[0]:.1f} ms, verifying all of it {1e3 * seconds[1]:.1f} ms")


def growth(small: WindowStore, out: Path) -> None:
    """Print how opening a store, reading a window and a run's keys grow with the pool.

    The large stores repeat the sheets of a small one, a hundred windows a sheet.
    """
    for count in (1_000, 1_000_000):
        folder = out / str(count)
        folder.mkdir(parents=True)
        pixels = pixel_file(small.folder, small.index)
        (folder / pixels.name).hardlink_to(pixels)
        sheets = [small.sheets[n % len(small.sheets)] for n in range(count // 100)]
        windows = small.windows[np.arange(count) % len(small.windows)]
        windows[:, 0] = np.arange(count) % len(sheets)
        np.save(folder / "windows.npy", windows)
        files = {"windows.npy": digest_of(folder / "windows.npy")}
        index = {**small.index, "sheets": sheets, "files": files}
        index["sha256"] = hashlib.sha256(json.dumps(index).encode()).hexdigest()
        (folder / "index.json").write_text(json.dumps(index))
        store = WindowStore(folder)
        order = iter(np.random.default_rng(0).permutation(count).tolist())
        times = [
            cpu_seconds(lambda folder=folder: WindowStore(folder), 5),
            cpu_seconds(lambda store=store, order=order: store.window(next(order)), 500),
        ]
        print(
            f"{count} windows: opened in {1e3 * times[0]:.0f} ms, a window in {1e3 * times[1]:.2f} ms, the "
            "hashes of its tiles included"
        )
    tracemalloc.start()
    batches = Batches(small, epoch_order(0, 100_000), 390, 256, World())  # type: ignore[arg-type]
    keys = sum(len(batch) for batch in batches.keys(0, 20 * 390))
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    print(f"the {keys} keys of 20 epochs of 100,000 windows: {peak:.1f} MB at most")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path)
    parser.add_argument("--sheets", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    print(describe_machine("lz4", "opencv-python-headless", "numpy"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kinds = {options.data.name: options.data} if options.data else {}
        for kind in () if options.data else ("gray", "color", "scan"):
            kinds[kind] = folder / kind
            kinds[kind].mkdir()
            for number, sheet in enumerate(drawn(kind, options.sheets)):
                write_png(kinds[kind] / f"{number}.png", sheet)
        for kind, sheets in kinds.items():
            measure(kind, sheets, folder / f"store of {kind}", options.rounds)
        training_window(folder, options.rounds)
        packing(options.data or folder / "color", folder / "packed")
        growth(WindowStore(folder / "packed/1"), folder / "grown")


if __name__ == "__main__":
    main()
