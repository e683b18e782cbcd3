"""Copy-paste for line art: symbols come where there is a place, and the windows stay drawn ones."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from detection.data import Augment, TrainingWindows
from detection.paste import WIRE, Lead, Symbol, Symbols, find_leads, paste
from detection.sheets import SheetReader
from schematics.coco import Category, find_split, read_split, write_split
from schematics.windows import ink_mask

WHITE, BLACK = 255, 0


def resistor(paper=WHITE, ink=BLACK):
    """A frame of 60 x 20 px with a lead on the left and one on the right, cut from its paper."""
    image = np.full((20, 60), paper, np.uint8)
    cv2.rectangle(image, (12, 1), (47, 18), ink, 2)
    for x0, x1 in ((0, 12), (47, 59)):
        cv2.line(image, (x0, 10), (x1, 10), ink, 2)
    return Symbol(image, ink_mask(image, paper), np.full_like(image, paper), 3)


def turned(symbol):
    return Symbol(*(array.T.copy() for array in (symbol.image, symbol.ink, symbol.paper)), symbol.label)


def test_leads_are_the_strokes_that_run_straight_out_of_the_box():
    assert find_leads(resistor().ink) == [Lead((-1, 0), 10, 3), Lead((1, 0), 10, 3)]
    zigzag = np.zeros((40, 40), np.uint8)
    cv2.polylines(zigzag, [np.array([[0, 20], [10, 0], [20, 39], [30, 0], [39, 20]])], False, 1, 2)
    assert find_leads(zigzag.astype(bool)) == [], "its peaks touch the sides and are no wires"
    assert find_leads(np.ones((40, WIRE + 2), bool)) == []


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("paper", "ink"), [(WHITE, BLACK), (30, 220)])
def test_a_symbol_is_put_into_a_straight_wire_that_is_gone_beneath_it(paper, ink, axis):
    sheet = np.full((200, 200), paper, np.uint8)
    cv2.line(sheet, (5, 100), (195, 100), ink, 2)
    # Nothing but the wire has a place for it.
    taken = [(0, 0, 200, 85), (0, 116, 200, 200)]
    symbol = resistor()  # as drawn on white paper, whatever this sheet's is
    window, boxes, labels = sheet, np.zeros((0, 4)), np.zeros(0)
    for seed in range(20):
        if axis:
            window, boxes, labels = paste(
                sheet.T.copy(),
                paper,
                np.array(taken)[:, [1, 0, 3, 2]],
                [turned(symbol)],
                np.random.default_rng(seed),
            )
            window, boxes = window.T, boxes[:, [1, 0, 3, 2]]
        else:
            window, boxes, labels = paste(sheet, paper, taken, [symbol], np.random.default_rng(seed))
        if len(boxes):
            break
    (x0, y0, x1, y1), (label,) = boxes[0].astype(int).tolist(), labels.tolist()
    assert (x1 - x0, y1 - y0, label) == (60, 20, 3)
    found = np.abs(window.astype(int) - paper) > 40
    assert (found[y0:y1, x0:x1] == symbol.ink).all(), "the frame is empty: no wire runs through it"
    assert found[99:102].any(0)[5:195].all() == symbol.ink[8:12].any(0).all()
    assert found[99:102, 5:x0].any(0).all() and found[99:102, x1:195].any(0).all(), "the wire leads to it"
    there = window[y0:y1, x0:x1][symbol.ink].astype(int)
    assert (there < 128).all() if paper == WHITE else (there > 128).all(), "ink as this paper has it"


def test_a_lead_goes_on_to_the_next_ink():
    sheet = np.full((120, 160), WHITE, np.uint8)
    sheet[:, 3:5] = sheet[:, 155:157] = BLACK
    window, boxes, _ = paste(sheet, WHITE, [], [resistor()], np.random.default_rng(1))
    x0, y0, x1, _ = boxes[0].astype(int).tolist()
    row = window[y0 + 8 : y0 + 12]
    assert (row[:, 3:x0].min(0) < 128).all() and (row[:, x1:156].min(0) < 128).all()


@pytest.mark.parametrize("color", [False, True])
def test_no_symbol_covers_another_or_any_ink(color):
    rng = np.random.default_rng(0)
    pasted = 0
    for seed in range(30):
        sheet = np.full((256, 256), WHITE, np.uint8)
        taken = rng.integers(0, 200, (4, 2))
        taken = np.concatenate([taken, taken + 40], axis=1)
        for box in taken.tolist():
            cv2.circle(sheet, (box[0] + 20, box[1] + 20), 18, BLACK, 2)
        for x, y in rng.integers(0, 250, (5, 2)).tolist():
            cv2.putText(sheet, "R1", (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.5, BLACK, 1)
        symbols = [resistor(), turned(resistor()), resistor(240, 60)]
        if color:
            sheet = cv2.cvtColor(sheet, cv2.COLOR_GRAY2RGB)
            symbols = [
                Symbol(np.dstack([s.image] * 3), s.ink, np.dstack([s.paper] * 3), s.label) for s in symbols
            ]
        paper = (WHITE,) * 3 if color else WHITE
        before = sheet.copy()
        window, boxes, labels = paste(sheet, paper, taken, symbols, np.random.default_rng(seed))
        pasted += len(labels)
        assert (sheet == before).all(), "the window that was given is left as it was"
        assert (window <= before).all(), "ink is laid over what is there"
        everything = [*taken.tolist(), *boxes.tolist()]
        for n, (x0, y0, x1, y1) in enumerate(boxes.tolist(), start=len(taken)):
            assert min(x0, y0) >= 0 and max(x1, y1) <= 256
            for k, (a0, b0, a1, b1) in enumerate(everything):
                assert k == n or x1 <= a0 or a1 <= x0 or y1 <= b0 or b1 <= y0
        for x0, y0, x1, y1 in taken.tolist():
            assert (window[y0:y1, x0:x1] == before[y0:y1, x0:x1]).all()
    assert pasted > 45


def test_on_a_photograph_symbols_lie_between_the_lines_of_its_paper_and_in_its_shadow():
    """Squared paper in a shadow from 230 to 70: its lines are no ink, and the pen is darker everywhere."""
    shadow = np.linspace(230, 70, 256)[None].repeat(256, 0)
    sheet = shadow.copy()
    sheet[::16] -= 30
    sheet[:, ::16] -= 30
    sheet = sheet.astype(np.uint8)
    cv2.putText(sheet, "check", (10, 40), cv2.FONT_HERSHEY_SIMPLEX, 1.5, 5, 3)
    sides = set()
    for seed in range(12):
        window, boxes, _ = paste(sheet, 230, [], [resistor()], np.random.default_rng(seed))
        for x0, y0, x1, y1 in boxes.astype(int).tolist():
            ink = resistor().ink
            below = sheet[y0:y1, x0:x1].astype(int) - window[y0:y1, x0:x1]
            assert (window[y0:y1, x0:x1][ink] < 20).all(), "the pen is darker than this paper"
            assert (below[~cv2.dilate(ink.astype(np.uint8), np.ones((3, 3))).astype(bool)] == 0).all()
            sides.add(x0 > 128)
    assert sides == {False, True}, "in the light and in the shadow"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two sheets with sixteen frames of one class and a single one of another, and two that overlap."""
    root = tmp_path_factory.mktemp("data")
    folder = root / "train"
    folder.mkdir()
    images, annotations = [], []
    for n in (1, 2):
        sheet = np.full((400, 400), WHITE, np.uint8)
        places = [(50 * (k % 4), 50 * (k // 4)) for k in range(16)]
        boxes = [(x + 10, y + 10, 20, 20, 1) for x, y in places]
        boxes += [(250, 250, 30, 30, 2)] if n == 1 else [(250, 250, 30, 30, 1), (270, 260, 30, 30, 1)]
        for x, y, width, height, label in boxes:
            cv2.rectangle(sheet, (x, y), (x + width - 1, y + height - 1), BLACK, 2)
            annotations.append({"image_id": n, "category_id": label, "bbox": [x, y, width, height]})
        cv2.imwrite(str(folder / f"{n}.png"), sheet)
        images.append({"id": n, "file_name": f"{n}.png", "width": 400, "height": 400})
    write_split(folder, images, [Category(1, "relay"), Category(2, "lamp")], annotations)
    return root


def test_rare_classes_come_more_often_and_symbols_that_overlap_never(data):
    symbols = Symbols(SheetReader(read_split(find_split(data, "train")), "gray"), 256)
    assert len(symbols) == 33, "32 relays and a lamp; the two that overlap are left out"
    rng = np.random.default_rng(0)
    drawn = [symbols.draw(rng) for _ in range(400)]
    share = np.mean([symbol.label == 2 for symbol in drawn])
    assert share == pytest.approx(1 / (1 + 32**0.5), abs=0.05)
    assert {symbol.image.shape for symbol in drawn} == {(20, 20), (30, 30)}
    assert all(symbol.ink[0].all() and not symbol.ink[10, 10] for symbol in drawn), "the box is the frame's"


def test_pasting_changes_nothing_else_and_is_a_function_of_the_sample(data):
    reader = SheetReader(read_split(find_split(data, "train")), "gray")
    plain, pasted, again = (
        TrainingWindows(reader, 256, 64, 3, Augment(shift=True, scale=0.2, flip=True, paste=n))
        for n in (0, 4, 4)
    )
    more = 0
    for n, tile in reversed(list(enumerate(plain.order(0).tolist()))):
        (image, own, seed), (_, target, same), (other, second, _) = (
            windows[0, n, tile] for windows in (plain, pasted, again)
        )
        count = len(own["boxes"])
        assert torch.equal(target["boxes"][:count], own["boxes"]) and seed == same
        assert torch.equal(target["boxes"], second["boxes"])
        assert torch.equal(target["labels"][:count], own["labels"])
        assert (count == len(target["boxes"])) == torch.equal(image, other)
        more += len(target["boxes"]) - count
    assert more > 4


def test_the_command_draws_the_windows(data, tmp_path):
    out = tmp_path / "windows.png"
    command = [sys.executable, "-m", "detection.windows", "--data-dir", data, "--out", out]
    flags = ["--window", "128", "--paste", "3", "--count", "7"]
    root = Path(__file__).parents[1]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{out}: 7 windows of 128 px\n"
    picture = cv2.imread(str(out))
    assert picture.shape == (2 * 132, 5 * 132, 3)
    assert ((picture == (40, 40, 220)).all(2)).sum() > 100, "BGR, boxes of symbols that were laid there"
