"""The sheets a report shows: which ones, at what size, with which boxes."""

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

LONGEST = 1400  # pixels of a picture's longer side; boxes are drawn over it at the sheet's own coordinates
QUALITY = 72  # of WebP: lines stay sharp, a sheet takes some 50 to 150 kB


@dataclass(frozen=True)
class Box:
    """A box to draw, in sheet pixels; `kind` and `label` as in `tide.Kinds` and `matching`."""

    xywh: tuple[float, ...]
    kind: int
    label: int
    partner: int  # number of the truth it is, lies on or overlaps; -1 for none
    score: float | None = None


@dataclass(frozen=True)
class Card:
    name: str
    group: str  # "worst" or "best"
    f1: float
    width: int
    height: int
    picture: str  # data URI
    dark: bool  # light lines on dark paper, as in CAD
    truth: list[Box]
    found: list[Box]
    miscounts: list[tuple[str, int, int]]  # class, true number, counted number

    def kinds(self) -> Counter:
        """How many of each kind, by index: detections, and the boxes that were missed."""
        return Counter([b.kind for b in self.found] + [b.kind for b in self.truth if b.kind == MISSED])


def choose_sheets(analysis: Analysis, most: int) -> list[tuple[int, str]]:
    """(sheet, "worst" or "best"), half of each, the lowest and the highest F1 first.

    Of equal F1 the sheets with more errors are worse, and those with more boxes better. Sheets that are
    rightly left empty show nothing and are left out.
    """
    f1, boxes = analysis.sheet_f1, analysis.counts.truth.sum(1)
    sheets = np.flatnonzero(~np.isnan(f1))
    # F1 is 2 right / (boxes + detections): where it is equal, more of these are more errors, too.
    size = boxes + analysis.counts.found.sum(1)
    worst = sheets[np.lexsort((sheets, -size[sheets], f1[sheets]))]
    best = sheets[np.lexsort((sheets, -size[sheets], -f1[sheets]))]
    lower = worst[: (min(most, len(sheets)) + 1) // 2].tolist()
    upper = [sheet for sheet in best.tolist() if sheet not in lower][: min(most, len(sheets)) // 2]
    return [(sheet, "worst") for sheet in lower] + [(sheet, "best") for sheet in upper]


def card(split: Split, analysis: Analysis, sheet: int, group: str) -> Card:
    """One sheet of the report. Raises DataError if its file can't be read."""
    matches, kinds = analysis.matches, analysis.kinds
    image_id = matches.image_ids[sheet]
    labelled = next(s for s in split.sheets if s.image_id == image_id)
    truth, found = matches.truth, matches.found
    on_sheet = np.flatnonzero((truth.sheet == sheet) & (kinds.truth != LEFT_OUT))
    made = np.flatnonzero((found.sheet == sheet) & (kinds.found != LEFT_OUT))
    image = read_sheet(labelled.path)
    return Card(
        name=labelled.file_name,
        group=group,
        f1=float(analysis.sheet_f1[sheet]),
        width=labelled.width,
        height=labelled.height,
        picture=picture(image),
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
    """(class, true number, counted number) where they differ on a sheet, the largest difference first."""
    counts = analysis.counts
    order = np.argsort(-counts.error[sheet], kind="stable")
    return [
        (analysis.matches.names[k], int(counts.truth[sheet, k]), int(counts.found[sheet, k]))
        for k in order
        if counts.error[sheet, k]
    ]


def picture(image: np.ndarray) -> str:
    """A data URI of the sheet, uint8 [H, W] or [H, W, 3] RGB, no larger than LONGEST."""
    factor = LONGEST / max(image.shape[:2])
    if factor < 1:
        size = tuple(max(1, round(side * factor)) for side in image.shape[1::-1])
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    image = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".webp", image, [cv2.IMWRITE_WEBP_QUALITY, QUALITY])
    return "data:image/webp;base64," + base64.b64encode(encoded.tobytes()).decode()
