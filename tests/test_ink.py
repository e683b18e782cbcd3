"""Boxes around connected ink: they find the symbols of a drawing, in its wires and on any paper."""

import subprocess
import sys

import cv2
import numpy as np
import pytest

from schematics.boxes import box_iou
from schematics.coco import find_split, read_split
from schematics.ink import ink_boxes
from schematics.sheets import read_sheet
from schematics.windows import uneven_paper


def reached(symbols, boxes):
    return box_iou(np.array(symbols, float), boxes).max(1)


def circuit(paper=255, ink=0):
    """400 x 300 px: a loop of wire with a frame, a capacitor and a circle in it, and their boxes."""
    sheet = np.full((300, 400), paper, np.uint8)
    cv2.rectangle(sheet, (60, 60), (340, 240), ink, 2)
    boxes = [(150, 45, 210, 75), (42, 130, 78, 150), (280, 220, 320, 260)]
    for x0, y0, x1, y1 in boxes:
        sheet[y0:y1, x0:x1] = paper
    cv2.rectangle(sheet, (150, 46), (209, 74), ink, 2)
    sheet[130:133, 42:78] = sheet[147:150, 42:78] = ink
    cv2.circle(sheet, (300, 240), 19, ink, 2)
    return sheet, boxes


@pytest.mark.parametrize(("paper", "ink"), [(255, 0), (30, 220)])
@pytest.mark.parametrize("color", [False, True])
def test_symbols_in_wires_get_boxes_of_their_own(paper, ink, color):
    sheet, symbols = circuit(paper, ink)
    boxes = ink_boxes(np.dstack([sheet] * 3) if color else sheet)
    assert boxes.dtype == np.float32 and boxes.shape[1] == 4
    assert (reached(symbols, boxes) > 0.7).all()
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= (400, 300)).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_a_photograph_has_them_too():
    """Squared paper in a shadow from 230 to 70: its lines are no ink."""
    sheet, symbols = circuit()
    shadow = np.linspace(230, 70, 400)[None].repeat(300, 0)
    shadow[::16] -= 20
    photo = np.where(sheet == 0, 5, shadow).astype(np.uint8)
    uneven = uneven_paper(photo)
    assert uneven
    assert (reached(symbols, ink_boxes(photo)) > 0.5).all()
    # As for a window of a store, which knows that its sheet is uneven.
    assert (reached(symbols, ink_boxes(photo, tolerance=uneven.tolerance)) > 0.5).all()


def test_they_are_few_and_differ_and_the_likeliest_come_first():
    sheet, symbols = circuit()
    few, many = ink_boxes(sheet, 12, 0.5), ink_boxes(sheet, 2000, 0.5)
    np.testing.assert_array_equal(few, many[:12])
    iou = box_iou(many.astype(float), many) - np.eye(len(many))
    assert iou.max() <= 0.5 + 1e-6
    assert (reached(symbols, few) > 0.5).all()


def test_no_ink_has_no_box():
    assert ink_boxes(np.full((64, 64), 255, np.uint8)).shape == (0, 4)
    dot = np.full((64, 64), 255, np.uint8)
    dot[30:32, 30:32] = 0
    assert ink_boxes(dot).shape == (0, 4), "smaller than a symbol"


def test_a_larger_sheet_has_those_of_a_small_one():
    sheet, symbols = circuit()
    large = np.tile(sheet, (3, 3))
    moved = np.concatenate([np.array(symbols) + np.array([x, y, x, y]) for x in (0, 800) for y in (0, 600)])
    boxes = ink_boxes(large)
    assert len(boxes) <= 2000
    assert (reached(moved, boxes) > 0.5).all()


def test_the_command_tells_the_recall_of_drawn_sheets(sheets, tmp_path):
    out = tmp_path / "found.png"
    command = [sys.executable, "-m", "schematics.proposals", sheets, "--split", "valid", "--out", out]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    first, recall, numbers, drawn = done.stdout.splitlines()
    split = read_split(find_split(sheets, "valid"))
    symbols = sum(len(sheet.boxes) for sheet in split.sheets)
    assert first == f"{sheets} valid: {symbols} symbols on 4 sheets"
    labelled = [sheet for sheet in split.sheets if len(sheet.boxes)]
    best = np.concatenate([reached(s.boxes, ink_boxes(read_sheet(s.file))) for s in labelled])
    shares = [100 * float(np.mean(best >= least)) for least in (0.3, 0.5, 0.7)]
    assert recall == "recall by IoU: {:.1f} % at 0.3  {:.1f} % at 0.5  {:.1f} % at 0.7".format(*shares)
    assert shares[1] >= 90
    assert "boxes a sheet" in numbers and drawn == f"{out}: 4 sheets"
    picture = cv2.imread(str(out))
    assert picture.shape == (1280, 1920, 3)
    assert ((picture == (60, 150, 0)).all(2)).sum() > 500, "BGR, symbols that were found"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--most", "0"], "--most 0: give 1 or more"),
        (["--out", "nowhere/x.png"], "there is no folder nowhere"),
    ],
)
def test_wrong_flags_are_a_line(flags, expected, sheets):
    command = [sys.executable, "-m", "schematics.proposals", str(sheets), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and expected in done.stderr and done.stderr.count("\n") == 1
