"""Draw a picture of the views that pretraining sees of your sheets.

    python -m schematics.views SHEETS OUT.png [--recipe drawing] [--image-size 224] [--view PX] [--window 512]
    python -m schematics.views --exp-dir RUN OUT.png
    python -m schematics.views SHEETS OUT.png --matches 12

Each row shows a window beside pairs of its views. Of SHEETS, a folder of drawings or a packed store, there is
a row for each recipe: `drawing`, `simclr` and `vicreg`, which docs/views.md explains. With --exp-dir it is
the run's own windows with the very views that its first epochs show it; other flags are then the run's. With
--matches both views of a pair have rings of one color where they show the same ink: what --dense-weight goes
by.

On two x86-64 cores the default of 3 sheets and 4 pairs takes 0.5 s.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from schematics.command import Parser, run
from schematics.pixels import resize
from schematics.places import Place, across
from schematics.recipes import RECIPES, default_extent, other_parts, placed_views
from schematics.sheets import DataError, find_sheets, read_sheet, to_color, write_png
from schematics.store import WindowStore
from schematics.windows import Color, Image, cut, ink_mask, ink_windows, paper_color, uneven_paper

MIN_INK = 0.002  # share of a window's pixels, as in a store
RING = 4  # px, radius


@dataclass(frozen=True)
class Sample:
    """A window of the pool, by its number there, and what is known of its sheet.

    That is the color of its paper, and the tolerance of ink if it is uneven.
    """

    number: int
    window: Image
    paper: Color
    tolerance: int | None


def contact_sheet(
    samples: Sequence[Sample], recipes: Sequence[str], pairs: int, matches: int, flags: dict[str, Any]
) -> Image:
    """An RGB picture with a row a window and recipe: the window itself, then `pairs` pairs of views.

    matches: rings at most that are drawn in a view. flags: the arguments of `placed_views` that all share.
    """
    rows = []
    for sample in samples:
        for recipe in recipes:
            cells = [to_color(resize(sample.window, flags["size"]), "rgb")]
            for epoch in range(pairs):
                (first, place1), (second, place2) = placed_views(
                    sample.window,
                    recipe,
                    epoch=epoch,
                    sample=sample.number,
                    paper=sample.paper,
                    tolerance=sample.tolerance,
                    **flags,
                )
                if matches:
                    ring_matches(first, second, place1, place2, matches)
                cells += [first, second]
            rows.append(
                cv2.copyMakeBorder(np.hstack(cells), 0, 2, 0, 0, cv2.BORDER_CONSTANT, value=(255, 80, 0))
            )
    return np.vstack(rows)


def ring_matches(first: Image, second: Image, place1: Place, place2: Place, most: int) -> None:
    """Draw rings of one color in both views, uint8 RGB [S, S, 3], where they show the same ink.

    The ink is that of the first view, as far as the second shows it: `most` pixels, far from one another.
    """
    side, matrix = len(first), across(place1, place2)
    y, x = np.nonzero(ink_mask(first))
    points = np.column_stack([x + 0.5, y + 0.5]) * 2 / side - 1  # [N, 2], (u, v)
    there = points @ matrix[:, :2].T + matrix[:, 2]
    both = (np.abs(there) < 1).all(axis=1)
    points, there = points[both], there[both]
    apart = np.full(len(points), np.inf)
    for k in range(min(most, len(points))):
        chosen = int(apart.argmax())  # the pixel that is furthest from all that have a ring
        apart = np.minimum(apart, np.linalg.norm(points - points[chosen], axis=1))
        hue = np.array([[[180 * k // most, 255, 230]]], np.uint8)
        color = cv2.cvtColor(hue, cv2.COLOR_HSV2RGB)[0, 0].tolist()
        for view, at in ((first, points[chosen]), (second, there[chosen])):
            middle = ((at + 1) * side / 2 - 0.5).round().astype(int).tolist()
            cv2.circle(view, middle, RING, color, 1, cv2.LINE_AA)


def of_store(store: WindowStore, most: int) -> list[Sample]:
    """`most` windows, evenly spread over the store."""
    numbers = np.unique(np.linspace(0, len(store) - 1, most).astype(int)).tolist()
    return [Sample(i, store.window(i), store.paper(i), store.tolerance(i)) for i in numbers]


def of_sheets(folder: Path, most: int, side: int, dpi: int) -> list[Sample]:
    """A window from the middle of each of the first sheets. Raises DataError if all of them are blank."""
    samples = []
    for number, sheet in enumerate(find_sheets(folder)[:most]):
        image = read_sheet(sheet, dpi)
        paper = paper_color(image)
        uneven = uneven_paper(image, paper)
        tolerance = uneven.tolerance if uneven else None
        corners = ink_windows(image, side, max(1, side // 2), MIN_INK, paper, uneven)
        if len(corners):
            x, y = corners[len(corners) // 2].tolist()
            samples.append(Sample(number, cut(image, x, y, side, paper), paper, tolerance))
    if not samples:
        raise DataError(f"{folder}: blank paper; give drawings with lines")
    return samples


def of_run(exp_dir: Path) -> tuple[WindowStore, dict[str, Any]]:
    """The windows of a pretraining run and its flags. Raises DataError if it has not begun its first step."""
    try:
        config = json.loads((exp_dir / "config.json").read_text())
        data_dir, _ = Path(config["data_dir"]), config["recipe"]
    except (OSError, ValueError, TypeError, KeyError):
        raise DataError(
            f"{exp_dir}: no config.json of a pretraining run; give SHEETS and its flags"
        ) from None
    named = exp_dir / "store.txt"  # runs of earlier versions have their windows in the exp-dir
    packed = (data_dir / "windows.npy").exists()
    own = data_dir if packed else exp_dir / "windows"
    return WindowStore(Path(named.read_text()) if named.exists() else own), config


def main(args: argparse.Namespace) -> None:
    if min(args.most, args.pairs, args.window, args.image_size, args.view or 1, args.matches + 1) < 1:
        raise DataError(
            "--most, --pairs, --window, --image-size and --view must each be at least 1, --matches 0"
        )
    flags, recipes, line = vars(args), [args.recipe] if args.recipe else RECIPES, None
    if args.exp_dir:
        store, flags = of_run(args.exp_dir)
        samples, line, recipes = of_store(store, args.most), store.line, [flags["recipe"]]
    elif args.sheets is None:
        raise DataError("give SHEETS and OUT.png, or --exp-dir RUN and OUT.png")
    elif (args.sheets / "windows.npy").exists():
        store = WindowStore(args.sheets)
        samples, line = of_store(store, args.most), store.line
    else:
        samples = of_sheets(args.sheets, args.most, args.window, args.dpi)
    size = flags["image_size"]
    extent = min(samples[0].window.shape[0], flags.get("view") or default_extent(size, line))
    shared = {name: flags[name] for name in ("seed", "strength", "orientation")}
    shared["without"] = flags.get("without", ())  # runs of earlier versions left nothing out
    for wrong in (other_parts(recipe, shared["without"]) for recipe in recipes):
        if wrong:
            raise DataError(wrong)
    sized = {"size": size, "extent": extent, **shared}
    picture = contact_sheet(samples, recipes, args.pairs, args.matches, sized)
    write_png(args.out, picture)
    print(
        f"{args.out}: the window on the left, then pairs of views; from top to bottom of each group"
        f" {', '.join(recipes)}; a drawing view shows at most {extent} px of the sheet, drawn at {size} px"
    )


if __name__ == "__main__":
    parser = Parser("schematics.views", __doc__)
    parser.add_argument(
        "sheets", type=Path, nargs="?", help="A sheet, a folder of sheets, or a packed store."
    )
    parser.add_argument("out", type=Path, help="PNG file to write; an old one is replaced.")
    parser.add_argument(
        "--exp-dir", type=Path, help="A pretraining run, whose windows and settings are shown."
    )
    parser.add_argument(
        "--most", type=int, default=3, help="Largest number of windows to show (default %(default)s)."
    )
    parser.add_argument(
        "--pairs",
        type=int,
        default=4,
        help="Number of pairs of views to show a recipe (default %(default)s).",
    )
    parser.add_argument(
        "--matches",
        type=int,
        default=0,
        help="Number of places to ring in both views of a pair (default %(default)s).",
    )
    parser.add_argument("--recipe", choices=RECIPES, help="The only recipe to show (default: all of them).")
    parser.add_argument(
        "--window",
        "--side",
        type=int,
        default=512,
        help="Side of a window in pixels of the sheet (default %(default)s).",
    )
    parser.add_argument(
        "--image-size",
        "--size",
        type=int,
        default=224,
        help="Side of a view in pixels (default %(default)s).",
    )
    parser.add_argument(
        "--view",
        type=int,
        help="Pixels of the sheet that a drawing view shows at most (default: 1.75 times --image-size).",
    )
    parser.add_argument(
        "--strength", type=float, default=1.0, help="Factor on the color jitter (default %(default)s)."
    )
    parser.add_argument(
        "--without", nargs="+", default=(), metavar="PART", help="Changes of the recipe that are left out."
    )
    parser.add_argument("--orientation", action="store_true", help="Mirror and turn drawing views too.")
    parser.add_argument(
        "--dpi", type=int, default=200, help="Resolution of PDF pages, dots per inch (default %(default)s)."
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="Number from which the views are drawn (default %(default)s)."
    )
    run(main, parser)
