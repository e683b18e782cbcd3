"""doubts.html: a gallery of doubtful labels in one file, and the part of it that a report shows."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from cluster.atomic import write_text
from detection.labelling.doubts import CLASS, DOUBLED, MISSING, PLACED, SPURIOUS, Doubt
from detection.report.gallery import picture_uri
from detection.report.page import STYLE
from schematics.coco import LabelledSheet
from schematics.sheets import read_sheet
from schematics.windows import paper_color

TEMPLATE, OWN_STYLE, SCRIPT = (
    Path(__file__).with_name(name) for name in ("doubt_cards.html.j2", "doubts.css", "doubts.js")
)
KIND_NAMES = ("missing", "wrong class", "doubled", "badly placed", "nothing there")
CONTEXT = 0.8  # of a box's longer side, shown around it
LEAST = 40.0  # px that are shown around it at least


@dataclass(frozen=True)
class Card:
    """One doubt as it is shown."""

    kind: int
    kind_name: str
    score: float
    says: str
    sheet: str
    annotation: int  # 0 for a missing one
    classes: list[int]  # label's and suggestion's, 1..K
    seen: bool  # its judge was trained on the sheet
    view: tuple[int, int, int, int]  # x y width height of the part of the sheet, px
    picture: str  # a data URI
    dark: bool
    given: tuple[float, ...] | None  # xyxy
    better: tuple[float, ...] | None
    beside: list[tuple[float, ...]]


def says(doubt: Doubt, sheet: LabelledSheet, names: Sequence[str]) -> str:
    """A doubt in words."""
    given = names[doubt.given - 1] if doubt.given else ""
    suggested = names[doubt.suggested - 1] if doubt.suggested else ""
    twin = names[sheet.labels[doubt.twin] - 1] if doubt.twin >= 0 else ""
    return {
        MISSING: f"no label: {suggested}",
        CLASS: f"{given}: rather {suggested}",
        DOUBLED: f"{given} twice" if twin == given else f"{given} on {twin}",
        PLACED: f"{given}: placed otherwise",
        SPURIOUS: f"{given}: nothing found",
    }[doubt.kind]


def make_cards(
    doubts: Sequence[Doubt], sheets: Sequence[LabelledSheet], names: Sequence[str], seen: Sequence[bool]
) -> list[Card]:
    """The cards of doubts, in their order. seen: by sheet, whether its judge was trained on it.

    Raises DataError for a sheet that can't be read.
    """
    cards: dict[int, Card] = {}
    for number in sorted({doubt.sheet for doubt in doubts}):  # each sheet is read once
        sheet = sheets[number]
        image = read_sheet(sheet.file)
        dark = float(np.mean(paper_color(image))) < 128
        for place, doubt in enumerate(doubts):
            if doubt.sheet == number:
                cards[place] = _card(doubt, sheet, names, seen[number], image, dark)
    return [cards[place] for place in range(len(doubts))]


def _card(
    doubt: Doubt, sheet: LabelledSheet, names: Sequence[str], seen: bool, image: np.ndarray, dark: bool
) -> Card:
    given = None if doubt.label < 0 else tuple(sheet.boxes[doubt.label].tolist())
    stays = tuple(sheet.boxes[doubt.twin].tolist()) if doubt.twin >= 0 else None
    better = doubt.box or stays or (given if doubt.kind == CLASS else None)
    x0, y0, x1, y1 = _view(np.array([box for box in (given, better) if box]), image.shape[1], image.shape[0])
    beside = [
        tuple(box)
        for n, box in enumerate(sheet.boxes.tolist())
        if n not in (doubt.label, doubt.twin) and box[0] < x1 and box[1] < y1 and box[2] > x0 and box[3] > y0
    ]
    return Card(
        kind=doubt.kind,
        kind_name=KIND_NAMES[doubt.kind],
        score=doubt.score,
        says=says(doubt, sheet, names),
        sheet=sheet.file_name,
        annotation=0 if doubt.label < 0 else int(sheet.annotation_ids[doubt.label]),
        classes=sorted({label for label in (doubt.given, doubt.suggested) if label}),
        seen=seen,
        view=(x0, y0, x1 - x0, y1 - y0),
        picture=picture_uri(np.ascontiguousarray(image[y0:y1, x0:x1])),
        dark=dark,
        given=given,
        better=better,
        beside=beside,
    )


def _view(boxes: np.ndarray, width: int, height: int) -> tuple[int, int, int, int]:
    """The part of a sheet that shows the boxes [N, 4] and what is around them, xyxy in whole px."""
    low, high = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    margin = max(LEAST, CONTEXT * float((high - low).max()))
    (x0, y0), (x1, y1) = np.floor(low - margin), np.ceil(high + margin)
    return max(0, int(x0)), max(0, int(y0)), min(width, int(x1)), min(height, int(y1))


def write_page(
    path: Path,
    cards: Sequence[Card],
    names: Sequence[str],
    *,
    title: str,
    labels: int,
    sheets: int,
    notes: Sequence[str],
) -> None:
    """Write the gallery, whole or not at all. names: of the classes 1..K. labels, sheets: how many there are.

    Raises UserError where the file can't be written.
    """
    script = SCRIPT.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shown = {label for card in cards for label in card.classes}
    page = _render(
        cards,
        part=False,
        title=title,
        labels=labels,
        sheets=sheets,
        notes=notes,
        base_style=Markup(STYLE.read_text(encoding="utf-8")),
        script=Markup(script),
        script_sha256=digest,
        kind_names=KIND_NAMES,
        classes=[(label, name) for label, name in enumerate(names, start=1) if label in shown],
    )
    write_text(path, page)


def as_part(cards: Sequence[Card]) -> Markup:
    """The cards alone, for a page that has the report's style."""
    return Markup(_render(cards, part=True))


def _render(cards: Sequence[Card], **values: Any) -> str:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"f2": lambda value: f"{value:.2f}", "short": lambda value: f"{value:.1f}"}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    style = Markup(OWN_STYLE.read_text(encoding="utf-8"))
    return template.render(cards=cards, style=style, **values)
