"""A page of labelled sheets with their boxes, those with a reason to look at them first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import cv2
import numpy as np

from schematics.folders import whole_folder
from schematics.sheets import DataError, Sheet, read_sheet

LONGEST = 1600  # px, of a picture's longer side
QUALITY = 85  # of its JPEG

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Labelled sheets</title>
<style>
body {{ margin: 1.5rem; font: 15px/1.4 system-ui, sans-serif; color: #222; background: #f4f4f2; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 34rem), 1fr)); gap: 1rem; }}
figure {{ margin: 0; padding: .75rem; background: #fff; border: 1px solid #ccc; overflow-wrap: anywhere; }}
figure.look {{ border: 2px solid #d00; }}
.sheet {{ position: relative; }}
img, svg {{ display: block; width: 100%; height: auto; }}
svg {{ position: absolute; inset: 0; height: 100%; }}
rect {{ fill: transparent; stroke-width: 2; vector-effect: non-scaling-stroke; }}
rect.bare {{ fill: #d003; stroke: #d00; stroke-width: 4; stroke-dasharray: 8 4; }}
rect:hover {{ fill: #0003; }}
b, li {{ color: #b00; }}
small span {{ display: inline-block; margin-right: .8em; }}
i {{ display: inline-block; width: .8em; height: .8em; margin-right: .25em; }}
</style>
<h1>{total} labelled sheets</h1>
<p>{suspicious} with something to look at come first. Boxes without ink are red and dashed. Point at a box
for its class.</p>
<main>
{figures}
</main>
"""


@dataclass(frozen=True)
class Card:
    """One sheet on the page."""

    title: str
    sheet: Sheet
    boxes: np.ndarray  # [N, 4], x0 y0 x1 y1 in px of the sheet
    names: Sequence[str]  # [N], classes
    bare: np.ndarray  # bool [N]: the boxes without ink
    reasons: Sequence[str]  # to look at it, the weightiest first


def write_page(out: Path, cards: Sequence[Card]) -> None:
    """Make the folder `out` with index.html and a picture of each sheet.

    First come the sheets with boxes without ink, by their share of the boxes, then the others that there is a
    reason to look at. Raises DataError if `out` exists or the disk refuses.
    """

    def rank(card: Card) -> tuple[float, bool]:
        return -card.bare.sum() / max(1, len(card.bare)), not card.reasons

    order = sorted(cards, key=rank)
    classes = sorted({name for card in cards for name in card.names})
    colors = {name: f"hsl({360 * 0.618034 * k % 360:.0f} 90% 38%)" for k, name in enumerate(classes)}
    try:
        with whole_folder(out) as folder:
            figures = []
            for number, card in enumerate(order, start=1):
                image = read_sheet(card.sheet)
                (folder / f"{number}.jpg").write_bytes(_jpeg(image))
                figures.append(_figure(card, f"{number}.jpg", image.shape[1], image.shape[0], colors))
            suspicious = sum(bool(card.reasons) for card in cards)
            page = PAGE.format(total=len(cards), suspicious=suspicious, figures="\n".join(figures))
            # A file's name may hold half of a surrogate pair, which no encoding can write.
            (folder / "index.html").write_bytes(page.encode(errors="replace"))
    except OSError as error:
        raise DataError(f"{out}: {error.strerror}; free some room or choose another folder") from error


def _jpeg(image: np.ndarray) -> bytes:
    """The sheet, uint8 [H, W] or [H, W, 3] RGB, as a JPEG that is no larger than LONGEST."""
    factor = LONGEST / max(image.shape[:2])
    if factor < 1:
        size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()


def _figure(card: Card, file: str, width: int, height: int, colors: dict[str, str]) -> str:
    """The sheet's part of the page; width, height: of the sheet in px."""
    rects = []
    for box, name, bare in zip(card.boxes.tolist(), card.names, card.bare.tolist(), strict=True):
        x0, y0, x1, y1 = box
        place = f'x="{x0:g}" y="{y0:g}" width="{x1 - x0:g}" height="{y1 - y0:g}"'
        kind = 'class="bare"' if bare else f'stroke="{colors[name]}"'
        rects.append(f"<rect {place} {kind}><title>{escape(name)}{', no ink' * bare}</title></rect>")
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in card.reasons)
    legend = "".join(
        f'<span><i style="background:{colors[name]}"></i>{escape(name)} {count}</span>'
        for name, count in Counter(card.names).most_common()
    )
    return (
        f"<figure{' class=look' * bool(card.reasons)}>"
        f"<figcaption>{escape(card.title)}<ul>{reasons}</ul></figcaption>"
        f'<div class="sheet"><img src="{file}" width="{width}" height="{height}" loading="lazy" alt="">'
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none">{"".join(rects)}</svg></div>'
        f"<small>{legend or 'no boxes'}</small></figure>"
    )
