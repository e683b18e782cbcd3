"""Decode all sheets once into a store of windows, from which training reads what it needs.

    python -m schematics.pack DATA OUT [--side 512] [--stride 256] [--color-mode auto|gray|rgb] [--dpi 200]
    python -m schematics.pack --verify STORE

The result is a folder OUT with the pixels of all sheets, packed without loss into about the bytes of PNG
files, and a list of the square windows that hold ink. On two x86-64 cores a pool of 599 drawings takes 4 s
and becomes 3,255 windows and 22 MB. Decoding a sheet of 7000 x 5000 px takes 50 to 190 ms, reading a window
of 512 px from the store 0.2 ms in gray and 0.4 to 0.8 ms in color.

Sheets are decoded on all cores, and the store is the same whatever their number. OUT appears whole or not at
all; a build that was killed goes on with the sheets that it has packed, and a store that matches its sheets
and flags is used again. Any number of processes may build and read a store at once. Pretraining builds its
store by itself.

A store holds the hashes of its content. What training reads is checked when it is first read; --verify reads
all of it.
"""

import argparse
from pathlib import Path

from schematics.command import Parser, run
from schematics.sheets import DataError
from schematics.store import COLOR_MODES, WindowStore, build_store
from schematics.workers import cores


def main(args: argparse.Namespace) -> None:
    if args.verify:
        return verify(args.data)
    if args.out is None:
        raise DataError("give DATA and OUT, or --verify STORE")
    if args.workers < 1:
        raise DataError(f"--workers {args.workers}: give at least 1")
    store = build_store(
        args.data,
        args.out,
        args.side,
        args.stride,
        args.min_ink,
        args.color_mode,
        args.dpi,
        workers=args.workers,
    )
    for line in store.skipped:
        print(f"skipped {line}")
    if uneven := sum(entry.get("tolerance") is not None for entry in store.sheets):
        print(f"{uneven} sheets of uneven paper (shadow, squares, panels): ink is told by the paper nearby")
    blank = sum(entry["blank"] for entry in store.sheets)
    print(
        f"{len(store.sheet_names)} sheets, {len(store)} {store.color_mode} windows of {store.side} px,"
        f" {blank / (blank + len(store)):.0%} of the paper blank and skipped,"
        f" {store.index['bytes'] / 1e6:.1f} MB in {store.folder}"
    )


def verify(folder: Path) -> None:
    """Print that a store is whole and as it was written. Raises DataError if it is not."""
    store = WindowStore(folder)
    told = "as they were packed" if store.verify() else "not checked, since an older version wrote no hashes"
    print(f"{folder}: {len(store.sheet_names)} sheets, {len(store)} windows, {told}")


if __name__ == "__main__":
    parser = Parser("schematics.pack", __doc__)
    parser.add_argument("data", type=Path, help="A sheet, or a folder of sheets; with --verify, a store.")
    parser.add_argument(
        "out", type=Path, nargs="?", help="Folder of the store: a new one, or a store to bring up to date."
    )
    parser.add_argument(
        "--verify", action="store_true", help="Read every byte of a store and compare it with its hashes."
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=cores(),
        help="Processes that decode sheets (default: the cores this process may use).",
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
