"""Copy-paste for line art: labelled symbols of other sheets, laid over a training window.

Ghiasi et al. 2021 (arXiv 2012.07177) lay objects by their masks at random places. The mask of a drawing's
symbol is its ink, and a drawing has blank places and wires: a symbol with a lead on opposite sides is put
into a straight wire, which is taken away beneath it, or any symbol on blank paper, from where its leads go on
to the next ink. It is laid as ink is laid: the darker wins on light paper, the lighter on dark. No symbol
covers another one, or anything else but the wire that it is put into.

Windows are uint8 [H, W] or [H, W, 3], boxes float [N, 4], xyxy in px of the window, and ink is bool [H, W].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from detection.sheets import SheetReader
from schematics.windows import INK_TOLERANCE, Color, Image, ink_mask, paper_color, uneven_paper

CONTEXT = 64  # px around a symbol that are looked at for the color of its paper
SMALLEST = 8  # px; a symbol with a shorter side is not pasted
LARGEST = 0.5  # of the window's side; neither is one with a longer side than that
GAP = 6  # px of blank paper around a symbol that is not put into a wire
FAINT = 20  # gray levels from the paper's from which a pixel keeps symbols away, be it too pale for ink
WIRE = 6  # px; a stroke that is wider is no wire
STRAIGHT = 4  # px, and an eighth of the symbol, for which a lead runs straight
BEYOND = 4  # px by which a wire goes on beyond both ends of the symbol that is put into it
REACH = 96  # px up to which a lead is drawn to the next ink
STUB = 24  # px; a lead that meets no ink ends after as many at most


@dataclass(frozen=True)
class Symbol:
    """A symbol, cut from its sheet by its box. paper: what it was drawn on, an image of its shape."""

    image: Image
    ink: np.ndarray
    paper: Image
    label: int


@dataclass(frozen=True)
class Lead:
    """Where a stroke reaches one side of a symbol's box.

    direction: (x, y) of a step out of the box. place: the middle of the stroke, its distance along that side
    from the left or from the top, in px. width: of the stroke in px.
    """

    direction: tuple[int, int]
    place: int
    width: int


class Symbols:
    """The symbols of labelled sheets that can be pasted: those that touch no other one, of a fitting size.

    A class is drawn in proportion to the square root of the number of its symbols, so that rare ones come
    more often than on the sheets.
    """

    def __init__(self, reader: SheetReader, side: int):
        self.reader = reader
        found, labels = [], []
        for n, sheet in enumerate(reader.split.sheets):
            sides = sheet.boxes[:, 2:] - sheet.boxes[:, :2]
            fits = (sides.min(1) >= SMALLEST) & (sides.max(1) <= LARGEST * side) & ~sheet.crowd
            for k in np.flatnonzero(fits & ~_touched(sheet.boxes)):
                found.append((n, k))
                labels.append(int(sheet.labels[k]))
        self.found = np.array(found, np.int64).reshape(-1, 2)  # sheet, box
        _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
        weights = counts[inverse] ** -0.5 if labels else np.zeros(0)
        self.ends = np.cumsum(weights)

    def __len__(self) -> int:
        return len(self.found)

    def draw(self, rng: np.random.Generator) -> Symbol:
        """One symbol. Raises DataError as reading its sheet does."""
        n, k = self.found[np.searchsorted(self.ends, rng.random() * self.ends[-1], side="right")].tolist()
        sheet = self.reader.split.sheets[n]
        x0, y0 = np.floor(sheet.boxes[k, :2]).astype(int).tolist()
        width, height = (np.ceil(sheet.boxes[k, 2:]).astype(int) - (x0, y0)).tolist()
        around = self.reader.window(n, x0 - CONTEXT, y0 - CONTEXT, max(width, height) + 2 * CONTEXT)
        paper, ink = _paper_and_ink(around, paper_color(around), INK_TOLERANCE)
        inside = np.s_[CONTEXT : CONTEXT + height, CONTEXT : CONTEXT + width]
        return Symbol(around[inside], ink[inside], paper[inside], int(sheet.labels[k]))


def paste(
    window: Image,
    paper: Color,
    occupied: Sequence[Sequence[float]] | np.ndarray,
    symbols: Sequence[Symbol],
    rng: np.random.Generator,
) -> tuple[Image, np.ndarray, np.ndarray]:
    """Lay the symbols over a window one after the other, each where there is a place for it.

    paper: the window's color of it. occupied: boxes [N, 4] that no symbol or lead may touch. Returns the
    window, and the boxes float64 [M, 4] and labels int64 [M] of those symbols that are there now.
    """
    window = window.copy()
    taken = np.zeros(window.shape[:2], bool)
    for x0, y0, x1, y1 in np.asarray(occupied, float).reshape(-1, 4).tolist():
        taken[max(0, int(y0)) : int(np.ceil(y1)), max(0, int(x0)) : int(np.ceil(x1))] = True
    boxes, labels = [], []
    ground, ink = _paper_and_ink(window, paper, FAINT)
    dark = _is_dark(window, ground, ink)
    for symbol in symbols:
        if not symbol.ink.any():
            continue
        leads = find_leads(symbol.ink)
        inline, chance = _opposite(leads), rng.random()
        place = _in_wire(ink, taken, symbol.ink.shape, inline, rng) if inline and chance < 0.75 else None
        if place:
            x, y, wire = place
            window[wire], ink[wire] = ground[wire], False
        elif blank := _on_paper(ink, taken, symbol.ink.shape, rng):
            x, y = blank
        else:
            continue
        height, width = symbol.ink.shape
        inside = np.s_[y : y + height, x : x + width]
        _lay(window[inside], ground[inside], dark, symbol)
        if not place:
            for lead in leads:
                _draw_lead(window, ground, dark, ink, taken, symbol, (x, y), lead, rng)
        ink[inside] |= symbol.ink
        taken[inside] = True
        boxes.append((x, y, x + width, y + height))
        labels.append(symbol.label)
    return window, np.array(boxes, float).reshape(-1, 4), np.array(labels, np.int64)


def find_leads(ink: np.ndarray) -> list[Lead]:
    """The strokes that reach the sides of a symbol's box as wires do, straight on: of its ink bool [H, W].

    A stroke that is wider than a wire is an edge of the symbol itself.
    """
    sides = {(-1, 0): ink, (1, 0): ink[:, ::-1], (0, -1): ink.T, (0, 1): ink[::-1].T}
    leads = []
    for direction, side in sides.items():
        depth = max(STRAIGHT, side.shape[1] // 8)
        straight = side[:, 1 : 1 + depth].all(1)  # the first px may be pale
        at_edge = np.concatenate([[False], side[:, :2].any(1), [False]])
        for start, stop in np.flatnonzero(np.diff(at_edge.astype(np.int8))).reshape(-1, 2).tolist():
            on = start + np.flatnonzero(straight[start:stop])
            # Two strokes that meet at the side of the box, as in a zigzag, come apart farther in.
            apart = np.count_nonzero(side[max(0, start - WIRE) : stop + WIRE, depth:][:, :1]) > len(on) + 1
            if len(on) and stop - start <= WIRE and not apart:
                leads.append(Lead(direction, int(on[0] + on[-1]) // 2, len(on)))
    return leads


def _paper_and_ink(image: Image, paper: Color, tolerance: int) -> tuple[Image, np.ndarray]:
    """The paper beneath an image, of its shape, and the ink on it bool [H, W].

    On an even sheet ink is what differs from the color `paper` by more than `tolerance`. On a photograph the
    paper is that nearby, and the lines of squared paper are no ink.
    """
    if uneven := uneven_paper(image, paper):
        ground = uneven.paper(0, *image.shape[:2])
        return ground, ink_mask(image, ground, uneven.tolerance)
    ground = np.broadcast_to(np.array(paper, np.uint8), image.shape)
    return ground, ink_mask(image, paper, tolerance)


def _is_dark(image: Image, paper: Image, ink: np.ndarray) -> bool:
    """Whether ink is darker than its paper; where there is none, whether it would be on this paper."""
    if not ink.any():
        return bool(paper.mean() >= 128)
    return bool(image[ink].mean() < paper[ink].mean())


def _touched(boxes: np.ndarray) -> np.ndarray:
    """bool [N]: which of the boxes share area with another one."""
    shared = np.zeros(len(boxes), bool)
    for k, box in enumerate(boxes):  # one at a time, as a sheet may have thousands
        shared[k] = ((boxes[:, :2] < box[2:]) & (boxes[:, 2:] > box[:2])).all(1).sum() > 1
    return shared


def _opposite(leads: Sequence[Lead]) -> tuple[Lead, Lead] | None:
    """The two leads of a symbol that has no others, if a straight wire could run through both."""
    if len(leads) != 2:
        return None
    first, second = leads
    across = tuple(-step for step in second.direction) == first.direction
    return (first, second) if across and abs(first.place - second.place) <= 1 else None


def _sums(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """int [H - height + 1, W - width + 1]: how many pixels of the mask each rectangle of that size holds."""
    whole = cv2.integral(mask.view(np.uint8))
    return (
        whole[height:, width:] - whole[:-height, width:] - whole[height:, :-width] + whole[:-height, :-width]
    )


def _choose(fits: np.ndarray, rng: np.random.Generator) -> tuple[int, int] | None:
    """x, y of one of the places bool [H, W] that fit, each equally probable."""
    places = np.flatnonzero(fits)
    if not len(places):
        return None
    y, x = divmod(int(places[rng.integers(len(places))]), fits.shape[1])
    return x, y


def _on_paper(
    ink: np.ndarray, taken: np.ndarray, size: tuple[int, int], rng: np.random.Generator
) -> tuple[int, int] | None:
    """x, y of a rectangle of that size (height, width) on blank paper; None if there is none."""
    height, width = (length + 2 * GAP for length in size)
    if height > ink.shape[0] or width > ink.shape[1]:
        return None
    place = _choose(_sums(ink | taken, height, width) == 0, rng)
    return place and (place[0] + GAP, place[1] + GAP)


def _in_wire(
    ink: np.ndarray,
    taken: np.ndarray,
    size: tuple[int, int],
    leads: tuple[Lead, Lead],
    rng: np.random.Generator,
) -> tuple[int, int, np.ndarray] | None:
    """x, y of a rectangle that holds a straight wire where the leads are and nothing else, and that wire.

    The wire is bool [H, W], its pixels within the rectangle. None if there is no such place.
    """
    if leads[0].direction[0] == 0:  # seen with x and y exchanged, where the wire runs from left to right
        turned = tuple(Lead(lead.direction[::-1], lead.place, lead.width) for lead in leads)
        found = _in_wire(ink.T.copy(), taken.T.copy(), size[::-1], turned, rng)  # type: ignore[arg-type]
        return found and (found[1], found[0], found[2].T)
    height, width = size
    long = width + 2 * BEYOND
    if height > ink.shape[0] or long > ink.shape[1]:
        return None
    straight = cv2.morphologyEx(ink.view(np.uint8), cv2.MORPH_OPEN, np.ones((1, long), np.uint8)).view(bool)
    # What lies at a wire, as its blurred edge, is of it.
    near = cv2.dilate(straight.view(np.uint8), np.ones((3, 1), np.uint8)).view(bool) & ink
    other = (ink & ~near) | taken
    through = _sums(straight, 1, long)[leads[0].place : ink.shape[0] - height + 1 + leads[0].place] == long
    alone = _sums(other, height, long) == 0
    thin = _sums(near, height, long) <= WIRE * long
    place = _choose(through & alone & thin, rng)
    if not place:
        return None
    x, y = place[0] + BEYOND, place[1]
    wire = np.zeros_like(ink)
    inside = np.s_[y : y + height, x : x + width]
    # The pixels beside the wire that are paler than ink are of it too.
    wire[inside] = cv2.dilate(near.view(np.uint8), np.ones((3, 1), np.uint8)).view(bool)[inside]
    return x, y, wire


def _lay(region: Image, paper: Image, dark: bool, symbol: Symbol) -> None:
    """Lay a symbol's ink over the region of a window, which is of its size, and change the region so.

    paper: of the region. dark: whether the window has dark ink.
    """
    # The pixels around ink are paler ink, of lines drawn smooth.
    ink = cv2.dilate(symbol.ink.view(np.uint8), np.ones((3, 3), np.uint8)).view(bool)
    above = symbol.image - symbol.paper.astype(float)
    if dark != _is_dark(symbol.image, symbol.paper, symbol.ink):
        above = -above
    color = np.clip(paper + above, 0, 255).astype(np.uint8)
    laid = np.minimum(region, color) if dark else np.maximum(region, color)
    region[ink] = laid[ink]


def _draw_lead(
    window: Image,
    ground: Image,
    dark: bool,
    ink: np.ndarray,
    taken: np.ndarray,
    symbol: Symbol,
    corner: tuple[int, int],
    lead: Lead,
    rng: np.random.Generator,
) -> None:
    """Draw a lead of a symbol that lies at `corner` (x, y) on to the next ink, or a short way over paper."""
    stub = int(rng.integers(STUB + 1))
    free, met = (_first(_ahead(mask, symbol, corner, lead)) for mask in (taken, ink))
    # One that meets ink ends on it, so that no gap is left.
    length = met + 1 if met < min(free, REACH) else min(stub, max(0, free - GAP))
    if not length:
        return
    region, paper = (_ahead(image, symbol, corner, lead)[:, :length] for image in (window, ground))
    stroke, beneath = np.empty_like(region), np.empty_like(region)
    stroke[:] = np.median(symbol.image[symbol.ink], axis=0)
    beneath[:] = np.median(symbol.paper[symbol.ink], axis=0)
    _ahead(ink, symbol, corner, lead)[:, :length] = True
    _lay(region, paper, dark, Symbol(stroke, np.ones(stroke.shape[:2], bool), beneath, symbol.label))


def _ahead(array: np.ndarray, symbol: Symbol, corner: tuple[int, int], lead: Lead) -> np.ndarray:
    """What lies before a lead of a symbol at `corner` (x, y): a view [its width, way to the edge, ...].

    Its first column is the one beside the symbol's box.
    """
    (x, y), (dx, dy), (height, width) = corner, lead.direction, symbol.ink.shape
    first = lead.place - lead.width // 2
    if dx:
        band = array[y + first : y + first + lead.width]
        return band[:, x + width :] if dx > 0 else band[:, :x][:, ::-1]
    band = array[:, x + first : x + first + lead.width].swapaxes(0, 1)
    return band[:, y + height :] if dy > 0 else band[:, :y][:, ::-1]


def _first(mask: np.ndarray) -> int:
    """The first column of bool [H, W] that holds a pixel of it, W if there is none."""
    columns = np.flatnonzero(mask.any(0))
    return int(columns[0]) if len(columns) else mask.shape[1]
