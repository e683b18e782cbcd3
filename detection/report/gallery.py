"""The sheets that a report shows: which ones, at what size and with which boxes."""

from __future__ import annotations

import base64
from collections import Counter
from dataclasses import dataclass

import cv2
import numpy as np

from detection.metrics.analysis import Analysis
from detection.metrics.tide import LEFT_OUT, MISSED
from schematics.coco import Split
from schematics.sheets import read_sheet
from schematics.windows import paper_color

# Pixels of a picture's longer side; the page draws the boxes over it in the sheet's own coordinates.
LONGEST = 1400
QUALITY = 72  # of WebP: lines stay sharp, and a sheet takes some 50 to 150 kB


@dataclass(frozen=True)
class Box:
    """A box to draw, a truth or a detection."""

    xywh: tuple[float, ...]  # sheet pixels
    kind: int  # index into tide.KINDS
    label: int  # index into matches.category_ids
    partner: int  # the truth that it is, has found or overlaps, by its index; -1 for none
    score: float | None = None  # None for a truth


@dataclass(frozen=True)
class Card:
    """A sheet of the gallery."""

    name: str
    group: str  # "worst" or "best"
    f1: float
    width: int
    height: int
    picture: str  # a data URI
    dark: bool  # the sheet has light lines on dark paper, as in CAD
    truth: list[Box]
    found: list[Box]
    miscounts: list[tuple[str, int, int]]  # see `miscounts`

    def kinds(self) -> Counter:
        """How many there are of each kind, by its index: detections, and the boxes that were missed."""
        return Counter([b.kind for b in self.found] + [b.kind for b in self.truth if b.kind == MISSED])


def choose_sheets(analysis: Analysis, most: int) -> list[tuple[int, str]]:
    """(sheet, "worst" or "best") of at most so many: half with the lowest F1, then half with the highest.

    Of equal F1 the sheets with more errors are worse, and those with more boxes are better. Empty sheets on
    which nothing was found show nothing and are left out.
    """
    f1, boxes = analysis.sheet_f1, analysis.counts.truth.sum(1)
    sheets = np.flatnonzero(~np.isnan(f1))
    # F1 is 2 right / (boxes + detections), so at equal F1 more boxes and detections are more errors, too.
    size = boxes + analysis.counts.found.sum(1)
    worst = sheets[np.lexsort((sheets, -size[sheets], f1[sheets]))]
    best = sheets[np.lexsort((sheets, -size[sheets], -f1[sheets]))]
    lower = worst[: (min(most, len(sheets)) + 1) // 2].tolist()
    upper = [sheet for sheet in best.tolist() if sheet not in lower][: min(most, len(sheets)) // 2]
    return [(sheet, "worst") for sheet in lower] + [(sheet, "best") for sheet in upper]


def make_card(split: Split, analysis: Analysis, sheet: int, group: str) -> Card:
    """The card of one sheet, by its index. Raises DataError where its file can't be read."""
    matches, kinds = analysis.matches, analysis.kinds
    image_id = matches.image_ids[sheet]
    labelled = next(s for s in split.sheets if s.image_id == image_id)
    truth, found = matches.truth, matches.found
    on_sheet = np.flatnonzero((truth.sheet == sheet) & (kinds.truth != LEFT_OUT))
    made = np.flatnonzero((found.sheet == sheet) & (kinds.found != LEFT_OUT))
    image = read_sheet(labelled.file)
    return Card(
        name=labelled.file_name,
        group=group,
        f1=float(analysis.sheet_f1[sheet]),
        width=labelled.width,
        height=labelled.height,
        picture=picture_uri(image),
        dark=float(np.mean(paper_color(image))) < 128,
        truth=[
            Box(tuple(truth.xywh[g].tolist()), int(kinds.truth[g]), int(truth.label[g]), int(g))
            for g in on_sheet
        ],
        found=[
            Box(
                tuple(found.xywh[d].tolist()),
                int(kinds.found[d]),
                int(found.label[d]),
                partner=int(kinds.cause[d]),
                score=float(found.score[d]),
            )
            for d in made
        ],
        miscounts=miscounts(analysis, sheet),
    )


def miscounts(analysis: Analysis, sheet: int) -> list[tuple[str, int, int]]:
    """(class, true number, counted number) where the two differ on a sheet, the largest difference first."""
    counts = analysis.counts
    order = np.argsort(-counts.error[sheet], kind="stable")
    return [
        (analysis.matches.names[k], int(counts.truth[sheet, k]), int(counts.found[sheet, k]))
        for k in order
        if counts.error[sheet, k]
    ]


def picture_uri(image: np.ndarray) -> str:
    """A data URI of the sheet, uint8 [H, W] or [H, W, 3] RGB, with its longer side no longer than LONGEST."""
    factor = LONGEST / max(image.shape[:2])
    if factor < 1:
        size = tuple(max(1, round(side * factor)) for side in image.shape[1::-1])
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    image = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".webp", image, [cv2.IMWRITE_WEBP_QUALITY, QUALITY])
    return "data:image/webp;base64," + base64.b64encode(encoded.tobytes()).decode()
