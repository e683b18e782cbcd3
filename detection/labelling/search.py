"""From examples and sheets to detections: what `python -m detection.find` does, for arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cluster.atomic import file_hash, sidecar
from cluster.errors import UserError
from detection.detections import Detections
from detection.inference import detect, load_detector
from detection.labelling.chance import fit_chance
from detection.labelling.correlation import (
    KEPT,
    MOST_PLACES,
    Places,
    Template,
    Whitening,
    correlate,
    template,
)
from detection.labelling.example import TURNS, Example, example_from, poses
from detection.labelling.maps import Eye, Seen, network_of, open_eye, open_network
from detection.model import Detector
from schematics.sheet_files import sheet_named
from schematics.sheets import read_sheet
from schematics.windows import Image

SMALL, LARGE = 28, 112  # px; symbols that are smaller are seen at twice their size, larger ones at half


def open_weights(weights: Path, arch: str | None = None) -> Eye:
    """The frozen network of a file; a detector's comes with its boxes, whatever their class.

    Raises UserError as `open_network` and `load_detector` do.
    """
    if weights.suffix == ".pt" and sidecar(weights).exists():
        return _detector(weights)
    return open_eye(open_network(weights, arch))


def _detector(weights: Path) -> Eye:
    detector = load_detector(weights, precision="fp32")
    assert isinstance(detector, Detector)
    spec = detector.spec
    facts = {"mean": spec.mean, "std": spec.std, "color_mode": spec.color_mode}
    network = network_of(detector.backbone.body, facts, str(weights))
    return open_eye(network, lambda image: detect(detector, image).boxes, file_hash(weights))


def read_examples(
    boxed: Sequence[tuple[Path, float, float, float, float]], crops: Sequence[Path], dpi: int
) -> list[Example]:
    """The examples of a command line: boxes x y width height on sheets, and pictures of the symbol alone.

    Raises UserError for one that shows nothing, and if there is none.
    """
    if not boxed and not crops:
        raise UserError("show what to find: --example SHEET X Y W H, or --crop FILE")
    examples = []
    for path, x, y, width, height in boxed:
        image, flag = read_sheet(sheet_named(path), dpi), f"--example {path} {x:g} {y:g} {width:g} {height:g}"
        examples.append(_example(image, (x, y, x + width, y + height), flag))
    for path in crops:
        image = read_sheet(sheet_named(path), dpi)
        examples.append(_example(image, (0, 0, image.shape[1], image.shape[0]), f"--crop {path}"))
    return examples


def _example(image: Image, box: Sequence[float], flag: str) -> Example:
    try:
        return example_from(image, box)
    except ValueError as error:
        raise UserError(f"{flag}: {error}; give another box") from None


def zoom_for(examples: Sequence[Example]) -> float:
    """The zoom at which examples of this size, the median of their longer sides, are seen by the network."""
    side = float(np.median([max(one.size) for one in examples]))
    return 2.0 if side < SMALL else 0.5 if side > LARGE else 1.0


def templates_of(
    eye: Eye,
    examples: Sequence[Example],
    scales: Sequence[float],
    upright: bool,
    zoom: float,
    white: Whitening,
) -> list[Template]:
    """Each example in all orientations, or as it is, at all scales."""
    turns = range(1 if upright else TURNS)
    return [template(eye, pose, zoom, white) for one in examples for pose in poses(one, scales, turns)]


def search_sheet(seen: Seen, wanted: Sequence[Template], zoom: float, white: Whitening) -> Places:
    """All places of a sheet that look a little like one of the templates."""
    return correlate(white(seen.features), wanted, zoom, seen.boxes)


def to_detections(places: Sequence[Places], sizes: Sequence[tuple[int, int]]) -> list[Detections]:
    """Of the places on all sheets those that are left by NMS, as detections of label 1, scores calibrated.

    sizes: width and height of each sheet.
    """
    apart = [found.strongest(KEPT) for found in places]
    number = sum(map(len, apart)) / max(1, len(apart))
    chance, detections = fit_chance([found.scores for found in places], number), []
    for found, (width, height) in zip(apart, sizes, strict=True):
        left = found.first(MOST_PLACES)
        boxes = left.boxes.clip(0, (width, height, width, height))
        detections.append(Detections(boxes, chance.calibrated(left.scores), np.ones(len(left), np.int64)))
    return detections
