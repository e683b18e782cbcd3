"""A random circuit on a lattice of uneven lines: wires on its edges, symbols on edges, nodes and stubs."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from schematics.strokes import FINER, SHAPES, Canvas, Stroke, arc, placed

CLASSES: tuple[str, ...] = tuple(SHAPES)
PITCH = 90  # px between the lines of the lattice, about
UNIT = (32.0, 64.0)  # px, of the smallest and largest symbols

EAST, SOUTH, WEST, NORTH = range(4)
STEP = ((1, 0), (0, 1), (-1, 0), (0, -1))
# Symbols that sit on a node, and where their leads go before they're mirrored and turned.
DEVICES = {"transistor": (WEST, NORTH, SOUTH), "op-amp": (WEST, SOUTH, EAST)}
REACH = 0.8  # units from a node to the ends of its device's leads
ON_EDGES = tuple(name for name in CLASSES if name not in DEVICES and name != "ground")

Node = tuple[int, int]


@dataclass
class Lattice:
    """Nodes (i, j) where uneven lines xs [I] and ys [J] cross.

    links [I, J, 4]: whether a wire leaves a node eastward, southward, ...; reach [I, J]: how far from the
    node it begins, px: not 0 where a device sits.
    """

    xs: np.ndarray
    ys: np.ndarray

    def __post_init__(self) -> None:
        self.reach = np.zeros((len(self.xs), len(self.ys)))
        self.links = np.zeros((*self.reach.shape, 4), dtype=bool)
        self.nodes: list[Node] = list(np.ndindex(*self.reach.shape))

    def next(self, node: Node, direction: int) -> Node | None:
        """The neighbour in that direction, None at the border."""
        i, j = node[0] + STEP[direction][0], node[1] + STEP[direction][1]
        return (i, j) if 0 <= i < len(self.xs) and 0 <= j < len(self.ys) else None

    def link(self, node: Node, direction: int, on: bool) -> None:
        if (there := self.next(node, direction)) is not None:
            self.links[node][direction] = self.links[there][(direction + 2) % 4] = on

    def at(self, node: Node) -> np.ndarray:
        return np.array([self.xs[node[0]], self.ys[node[1]]])


@dataclass
class Drawing:
    """A sheet in the making: its canvas, its source of randomness and the symbols so far."""

    canvas: Canvas
    rng: np.random.Generator
    unit: float  # px, of this sheet's symbols before each one's own variation
    boxes: list[np.ndarray] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def size(self) -> float:
        """Unit of the next symbol, px."""
        return float(np.clip(self.unit * self.rng.uniform(0.85, 1.2), *UNIT))

    def add(self, name: str, at: np.ndarray, unit: float, quarter: int, mirror: bool = False) -> bool:
        """Draw a symbol unless it comes within 4 px of another. Its box is that of its own ink."""
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
        self.canvas.draw([Stroke(np.stack([start, end]))])


def _lines(low: float, high: float, rng: np.random.Generator) -> np.ndarray:
    """Lines of the lattice over [low, high], about PITCH apart, the inner ones moved a little."""
    lines = np.linspace(low, high, max(2, round((high - low) / PITCH) + 1))
    lines[1:-1] += rng.uniform(-8, 8, len(lines) - 2)
    return lines


def draw_circuit(drawing: Drawing, width: int, height: int) -> None:
    rng = drawing.rng
    lattice = Lattice(_lines(64, width - 64, rng), _lines(62, height - 100, rng))
    for node in lattice.nodes:
        for direction in (EAST, SOUTH):
            lattice.link(node, direction, rng.random() < 0.75)
    _add_devices(drawing, lattice)
    _add_edges(drawing, lattice)
    _add_ends(drawing, lattice)


def _add_devices(drawing: Drawing, lattice: Lattice) -> None:
    """Transistors and op-amps in turn, on nodes that aren't neighbours."""
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
    """A wire along every link, four in ten through a symbol of two pins."""
    rng = drawing.rng
    deck: list[str] = []
    for node in lattice.nodes:
        for direction in (EAST, SOUTH):
            there = lattice.next(node, direction)
            if there is None or not lattice.links[node][direction]:
                continue
            deck = deck or [str(name) for name in rng.permutation(ON_EDGES)]  # all classes equally often
            step = np.array(STEP[direction])
            start = lattice.at(node) + lattice.reach[node] * step
            end = lattice.at(there) - lattice.reach[there] * step
            if rng.random() < 0.4 and _add_between(drawing, deck[-1], start, end, direction):
                deck.pop()
            else:
                drawing.wire(start, end)


def _add_between(drawing: Drawing, name: str, start: np.ndarray, end: np.ndarray, direction: int) -> bool:
    """A symbol somewhere on the way from `start` to `end`, and its two wires; False where none fits."""
    rng, step = drawing.rng, np.array(STEP[direction])
    room = float((end - start) @ step) - 16  # 8 px of wire at least on each side
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
    """Grounds and terminals where a wire ends, dots where wires meet, a few grounds on stubs."""
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
    unit, step = drawing.size(), np.array(STEP[direction])
    pin = at + 12 * step
    if not drawing.add("ground", pin + SHAPES["ground"].pin * unit * step, unit, direction):
        return False
    drawing.wire(at, pin)
    return True
