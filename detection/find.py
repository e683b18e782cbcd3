"""Find on drawings what one or a few examples show, with a network that was trained on none of it.

    python -m detection.find --weights OUT/backbone.safetensors --example SHEET X Y W H --out FOUND SHEETS...

FOUND gets what `python -m detection.predict` writes: predictions.json, counts.csv and pictures/. Each sheet's
feature map stays in FOUND/maps, or in --maps, so that the next symbol is found without the network. A file
that can't be read is skipped and named on stderr, and the exit status is then 1. docs/labelling.md says how
places are found and what their scores mean.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from tyro.conf import Positional, UseAppendAction, arg

from cluster.config import Config, setting
from cluster.entry import run
from cluster.errors import FAILED
from detection.counting import tally_sheets, to_counts
from detection.output import (
    Tool,
    clear_pictures,
    drawings,
    image_entry,
    picture_name,
    save_picture,
    told,
    write_for_tools,
    write_found,
)
from schematics.progress import progress
from schematics.sheets import DataError, Sheet, read_sheet

if TYPE_CHECKING:
    from torch import Tensor

Boxed = tuple[Path, float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class FindConfig(Config):
    # Network to look with: a backbone.safetensors, other weights that docs/weights.md lists, a model.pt, or
    # none for random ones.
    weights: Path = Path("checkpoints/vicreg/backbone.safetensors")
    # Architecture of --weights, where the file doesn't tell it.
    arch: str | None = None
    # Example: a sheet and a box on it, x y width height in px; give it several times for several examples.
    example: UseAppendAction[tuple[Annotated[Boxed, arg(metavar="SHEET X Y W H")], ...]] = ()
    # Example: a picture that shows the symbol and nothing else; give it several times likewise.
    crop: UseAppendAction[tuple[Path, ...]] = ()
    # Name of the symbol in what is written.
    name: str = "symbol"
    # Folder for what is written.
    out: Path = Path("found")
    # Drawings to look at: image files, PDFs, folders of them.
    sheets: Positional[tuple[Path, ...]] = ()
    # Find the symbol as the example shows it, neither turned nor mirrored.
    upright: bool = False
    # Sizes of the symbol on the sheets, in units of the example's.
    scales: tuple[float, ...] = setting((0.63, 0.79, 1.0, 1.26, 1.59), least=0.1, most=10)
    # False places that are expected on a sheet; a lower number finds fewer and surer ones.
    false_positives: float = setting(0.3, least=1e-9)
    # Folder of the sheets' feature maps; by default maps/ in --out.
    maps: Path | None = None
    # Replace the predictions of an earlier run in --out.
    overwrite: bool = False
    # Tool in which boxes will be corrected: --out gets a folder that it imports. May be given several times.
    tool: UseAppendAction[tuple[Tool, ...]] = ()
    # Print predictions.json on stdout, and nothing else there.
    json: bool = False
    # Write an annotated PNG of each sheet.
    pictures: bool = True
    # Resolution in dots per inch at which PDF pages are drawn.
    dpi: int = setting(200, least=1)


def main(config: FindConfig) -> None:
    # Imported here, so that --help and wrong flags are answered before torch is loaded.
    from detection.labelling import search
    from detection.labelling.chance import standardise
    from detection.labelling.correlation import whitening
    from detection.labelling.maps import look_at

    sheets, home = drawings(config.sheets, config.out, config.overwrite, config.tool)
    examples = search.read_examples(config.example, config.crop, config.dpi)
    eye, zoom = search.open_weights(config.weights, config.arch), search.zoom_for(examples)
    folder = config.maps or config.out / "maps"
    images, read, skipped = [], dict[int, Sheet](), []

    def each_map() -> Iterator[Tensor]:
        for number, sheet in enumerate(progress(sheets, "maps"), start=1):
            try:
                image = read_sheet(sheet, config.dpi)
            except DataError as error:
                skipped.append(str(error))
                continue
            images.append(image_entry(number, sheet, image, home))
            read[number] = sheet
            yield look_at(eye, image, zoom, folder).features

    white = whitening(each_map())
    templates = search.templates_of(eye, examples, config.scales, config.upright, zoom, white)
    places = []
    for sheet in progress(list(read.values()), "search"):
        seen = look_at(eye, read_sheet(sheet, config.dpi), zoom, folder)
        places.append(search.search_sheet(seen, templates, zoom, white))
    sizes = [(image["width"], image["height"]) for image in images]
    least = 1 / (1 + config.false_positives)
    detections = search.to_detections(standardise(places, len(templates)), sizes)
    found = {number: all.above(least) for number, all in zip(read, detections, strict=True)}
    pictures = clear_pictures(config.out)
    for number, sheet in read.items() if config.pictures else ():
        image = read_sheet(sheet, config.dpi)
        save_picture(pictures / picture_name(number, sheet), image, found[number], [config.name])
    classes, files = [(1, config.name)], list(read.values())
    counted = tally_sheets(list(found.values()), np.array([least]))
    counts = to_counts([sheet.name for sheet in files], counted, [config.name])
    write_for_tools(config.out, config.tool, files, images, found, classes, config.weights, config.dpi)
    text = write_found(config.out, images, found, classes, counts)
    print(text if config.json else told(config.out, found, home, config.tool))
    for line in skipped:
        print(f"skipped: {line}", file=sys.stderr)
    if skipped:
        raise SystemExit(FAILED)


if __name__ == "__main__":
    run(FindConfig, main)
