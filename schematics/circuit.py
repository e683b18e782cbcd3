"""A random circuit on a lattice of uneven lines: wires on its edges, symbols on edges, nodes and stubs."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from schematics.strokes import FINER, SHAPES, Canvas, Stroke, arc, placed

CLASSES: tuple[str, ...] = tuple(SHAPES)
PITCH = 90  # px, about the distance between neighbouring lines of the lattice
UNIT = (32.0, 64.0)  # px, the unit length of the smallest and of the largest symbols

EAST, SOUTH, WEST, NORTH = range(4)
STEP = ((1, 0), (0, 1), (-1, 0), (0, -1))
# Symbols that sit on a node, and the directions of their leads before a symbol is mirrored and turned.
DEVICES = {"transistor": (WEST, NORTH, SOUTH), "op-amp": (WEST, SOUTH, EAST)}
REACH = 0.8  # distance from a node to the ends of its device's leads, in the device's unit length
ON_EDGES = tuple(name for name in CLASSES if name not in DEVICES and name != "ground")

Node = tuple[int, int]


@dataclass
class Lattice:
    """Nodes (i, j), where the vertical lines at xs [I] px cross the horizontal lines at ys [J] px.

    links [I, J, 4] says whether a wire leaves a node to the east, south, west and north. reach [I, J] is how
    far from the node these wires begin, in px: 0 unless a device sits on the node.
    """

    xs: np.ndarray
    ys: np.ndarray

    def __post_init__(self) -> None:
        self.reach = np.zeros((len(self.xs), len(self.ys)))
        self.links = np.zeros((*self.reach.shape, 4), dtype=bool)
        self.nodes: list[Node] = list(np.ndindex(*self.reach.shape))

    def next(self, node: Node, direction: int) -> Node | None:
        """The neighbouring node in that direction, or None at the border."""
        i, j = node[0] + STEP[direction][0], node[1] + STEP[direction][1]
        return (i, j) if 0 <= i < len(self.xs) and 0 <= j < len(self.ys) else None

    def link(self, node: Node, direction: int, on: bool) -> None:
        """Say whether a wire joins the node and its neighbour in that direction."""
        if (there := self.next(node, direction)) is not None:
            self.links[node][direction] = self.links[there][(direction + 2) % 4] = on

    def at(self, node: Node) -> np.ndarray:
        """The node's place [2] on the sheet, x y in px."""
        return np.array([self.xs[node[0]], self.ys[node[1]]])


@dataclass
class Drawing:
    """A sheet in the making: its canvas, its random generator and the symbols drawn so far."""

    canvas: Canvas
    rng: np.random.Generator
    unit: float  # px, the unit length of this sheet's symbols, which each symbol varies a little
    boxes: list[np.ndarray] = field(default_factory=list)  # [4] each, x0 y0 x1 y1 in px
    labels: list[int] = field(default_factory=list)  # 1 is the first of CLASSES

    def size(self) -> float:
        """Draw the unit length of the next symbol, in px."""
        return float(np.clip(self.unit * self.rng.uniform(0.85, 1.2), *UNIT))

    def add(self, name: str, at: np.ndarray, unit: float, quarter: int, mirror: bool = False) -> bool:
        """Draw a symbol and note the box of its own ink, unless the box comes within 4 px of another.

        Returns whether the symbol was drawn.
        """
        patch, x, y = self.canvas.sketch(placed(SHAPES[name].strokes, at, unit, quarter, mirror))
        rows, columns = np.flatnonzero(patch.max(axis=1) > 127), np.flatnonzero(patch.max(axis=0) > 127)
        box = np.array([x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1]) / FINER
        others = np.array(self.boxes).reshape(-1, 4)
        if ((box[:2] < others[:, 2:] + 4) & (others[:, :2] < box[2:] + 4)).all(axis=1).any():
            return False
        self.canvas.stamp(patch, x, y)
        if SHAPES[name].leads:
            self.canvas.draw(placed(SHAPES[name].leads, at, unit, quarter, mirror))
        self.boxes.append(box)
        self.labels.append(CLASSES.index(name) + 1)
        return True

    def wire(self, start: np.ndarray, end: np.ndarray) -> None:
        """Draw a straight wire between two places [2] in px."""
        self.canvas.draw([Stroke(np.stack([start, end]))])


def _lines(low: float, high: float, rng: np.random.Generator) -> np.ndarray:
    """Places of lines from `low` to `high`, about PITCH px apart, the inner ones moved a little."""
    lines = np.linspace(low, high, max(2, round((high - low) / PITCH) + 1))
    lines[1:-1] += rng.uniform(-8, 8, len(lines) - 2)
    return lines


def draw_circuit(drawing: Drawing, width: int, height: int) -> None:
    """Draw a circuit over a sheet of width x height px, with room for a frame and a title block."""
    rng = drawing.rng
    lattice = Lattice(_lines(64, width - 64, rng), _lines(62, height - 100, rng))
    for node in lattice.nodes:
        for direction in (EAST, SOUTH):
            lattice.link(node, direction, rng.random() < 0.75)
    _add_devices(drawing, lattice)
    _add_edges(drawing, lattice)
    _add_ends(drawing, lattice)


def _add_devices(drawing: Drawing, lattice: Lattice) -> None:
    """Draw transistors and op-amps in turn on some nodes, no two of which are neighbours."""
    rng = drawing.rng
    names = [str(name) for name in rng.permutation(list(DEVICES))]
    done: list[Node] = []
    for k in rng.permutation(len(lattice.nodes)):
        node, name = lattice.nodes[k], names[len(done) % 2]
        quarter, mirror = int(rng.integers(4)), bool(rng.random() < 0.5)
        leads = [((-d if mirror else d) + quarter) % 4 for d in DEVICES[name]]
        near = any(abs(node[0] - i) + abs(node[1] - j) < 2 for i, j in done)
        if near or any(lattice.next(node, d) is None for d in leads):
            continue
        unit = drawing.size()
        if drawing.add(name, lattice.at(node), unit, quarter, mirror):
            for d in range(4):
                lattice.link(node, d, d in leads)
            lattice.reach[node] = REACH * unit
            done.append(node)
        if len(done) >= 0.07 * len(lattice.nodes):
            return


def _add_edges(drawing: Drawing, lattice: Lattice) -> None:
    """Draw a wire along every link, four in ten through a symbol of two pins if there is room for it."""
    rng = drawing.rng
    deck: list[str] = []
    for node in lattice.nodes:
        for direction in (EAST, SOUTH):
            there = lattice.next(node, direction)
            if there is None or not lattice.links[node][direction]:
                continue
            # Names are dealt like cards, so that all classes come equally often.
            deck = deck or [str(name) for name in rng.permutation(ON_EDGES)]
            step = np.array(STEP[direction])
            start = lattice.at(node) + lattice.reach[node] * step
            end = lattice.at(there) - lattice.reach[there] * step
            if rng.random() < 0.4 and _add_between(drawing, deck[-1], start, end, direction):
                deck.pop()
            else:
                drawing.wire(start, end)


def _add_between(drawing: Drawing, name: str, start: np.ndarray, end: np.ndarray, direction: int) -> bool:
    """Draw a symbol somewhere between `start` and `end` with its two wires. Returns whether it had room."""
    rng, step = drawing.rng, np.array(STEP[direction])
    room = float((end - start) @ step) - 16  # at least 8 px of wire stay on each side
    pin = SHAPES[name].pin
    unit = min(drawing.size(), room / (2 * pin))
    if unit < UNIT[0]:
        return False
    at = start + step * (8 + pin * unit + (room - 2 * pin * unit) * rng.uniform(0.2, 0.8))
    backwards = 2 * int(rng.integers(2))
    if not drawing.add(name, at, unit, direction + backwards, bool(rng.random() < 0.5)):
        return False
    drawing.wire(start, at - step * pin * unit)
    drawing.wire(at + step * pin * unit, end)
    return True


def _add_ends(drawing: Drawing, lattice: Lattice) -> None:
    """Draw a ground or a terminal where a wire ends, dots where wires meet, and a few grounds on stubs."""
    rng = drawing.rng
    for node in lattice.nodes:
        if lattice.reach[node] > 0:
            continue
        at, links = lattice.at(node), lattice.links[node]
        count, free = int(links.sum()), np.flatnonzero(~links)
        grounded = (count == 1 and rng.random() < 0.4) or (count in (2, 3) and rng.random() < 0.06)
        grounded = grounded and _add_ground(drawing, at, int(rng.choice(free)))
        if count == 1 and not grounded:
            outward = (int(np.argmax(links)) + 2) % 4
            drawing.canvas.draw([arc(at + 4 * np.array(STEP[outward]), 4)])
        elif count + grounded >= 3:
            drawing.canvas.draw([arc(at, 1.2 + drawing.canvas.pen, filled=True)])


def _add_ground(drawing: Drawing, at: np.ndarray, direction: int) -> bool:
    """Draw a ground at the end of a short wire that leaves `at`. Returns whether it had room."""
    unit, step = drawing.size(), np.array(STEP[direction])
    pin = at + 12 * step
    if not drawing.add("ground", pin + SHAPES["ground"].pin * unit * step, unit, direction):
        return False
    drawing.wire(at, pin)
    return True
