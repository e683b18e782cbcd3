"""Synthetic sheets: boxes are tight to their symbol's own ink, none overlap, a sheet is f(seed, index)."""

import json
import subprocess
import sys

import cv2
import numpy as np
import pytest

from schematics.circuit import CLASSES, UNIT, Drawing
from schematics.coco import read_split
from schematics.drafting import draw_sheet
from schematics.sheets import DataError, read_sheet
from schematics.strokes import FINER, SHAPES, Canvas, placed
from schematics.synthetic import write_sheets


def blank_canvas(side=160, skew=0.0, pen=1.5):
    matrix = cv2.getRotationMatrix2D((side / 2, side / 2), skew, 1.0)
    return Canvas(np.zeros((FINER * side, FINER * side), np.uint8), matrix, pen)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("quarter", range(4))
def test_a_box_is_tight_to_the_symbol_drawn_alone(name, quarter):
    for unit, pen, skew, mirror in (
        (UNIT[0], 1.0, 0.0, False),
        (48.3, 1.5, 0.5, True),
        (UNIT[1], 2.5, -0.5, False),
    ):
        at = np.array([80.2, 79.7])
        drawing = Drawing(blank_canvas(skew=skew, pen=pen), np.random.default_rng(0), unit)
        assert drawing.add(name, at, unit, quarter, mirror)
        alone = blank_canvas(skew=skew, pen=pen)
        alone.draw(placed(SHAPES[name].strokes, at, unit, quarter, mirror))
        ink = cv2.resize(alone.ink, (160, 160), interpolation=cv2.INTER_AREA)
        (x0, y0, x1, y1), (ys, xs) = drawing.boxes[0], np.nonzero(ink > 100)
        want = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        np.testing.assert_allclose([x0, y0, x1, y1], want, atol=1.0)
        assert 24 <= max(x1 - x0, y1 - y0) <= 68


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_boxes_of_a_sheet_hold_ink_up_to_every_side_and_never_overlap(noise):
    for index in range(6):
        image, boxes, labels = draw_sheet(3, index, noise=noise)
        assert image.shape == (512, 512) and image.dtype == np.uint8
        assert boxes.dtype == np.float64 and labels.dtype == np.int64 and len(boxes) == len(labels) >= 6
        assert (boxes[:, :2] >= 18).all() and (boxes[:, 2:] <= 512 - 18).all()
        dark = image < 170
        for k, box in enumerate(boxes):
            x0, y0, x1, y1 = np.rint(box).astype(int)
            for side in (dark[y0 : y0 + 2, x0:x1], dark[y1 - 2 : y1, x0:x1]):
                assert side.any()
            for side in (dark[y0:y1, x0 : x0 + 2], dark[y0:y1, x1 - 2 : x1]):
                assert side.any()
            others = np.delete(boxes, k, axis=0)
            apart = (box[2:] < others[:, :2]).any(axis=1) | (others[:, 2:] < box[:2]).any(axis=1)
            assert apart.all()


def test_a_sheet_depends_on_seed_and_index_alone():
    first = draw_sheet(1, 5, noise=0.5)
    draw_sheet(1, 6)
    for a, b in zip(first, draw_sheet(1, 5, noise=0.5), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(draw_sheet(2, 5)[0], draw_sheet(1, 5)[0])
    assert not np.array_equal(draw_sheet(1, 5)[0], draw_sheet(1, 6)[0])


def test_all_classes_occur_about_equally_often_in_many_sizes_and_four_orientations():
    boxes, labels = zip(*(draw_sheet(0, index)[1:] for index in range(40)), strict=True)
    counts = np.bincount(np.concatenate(labels), minlength=len(CLASSES) + 1)[1:]
    assert len(CLASSES) == 12 and counts.min() > 20 and counts.max() < 3 * counts.min()
    sides = np.concatenate(boxes)[:, 2:] - np.concatenate(boxes)[:, :2]
    assert sides.max(axis=1).min() < 32 and sides.max(axis=1).max() > 55
    resistors = sides[np.concatenate(labels) == CLASSES.index("resistor") + 1]
    assert 0.25 < (resistors[:, 0] > resistors[:, 1]).mean() < 0.75


def test_larger_sheets_hold_more_symbols_of_the_same_size():
    _, small, _ = draw_sheet(0, 0)
    _, large, _ = draw_sheet(0, 0, 1500, 1000)
    assert len(large) > 3 * len(small)
    assert (large[:, 2:] - large[:, :2]).max() < 70


def test_written_splits_are_clean_coco_and_share_no_sheet(tmp_path):
    out = tmp_path / "made here"
    counts = write_sheets(out, sheets=5, seed=7, unlabeled=3)
    assert counts == {"train": 5, "valid": 4, "test": 4, "unlabeled": 3}
    pictures = set()
    for split in ("train", "valid", "test"):
        read = read_split(out / split)
        assert [c.name for c in read.categories] == list(CLASSES) and read.findings == []
        assert len(read.sheets) == counts[split]
        pictures |= {read_sheet(sheet.path).tobytes() for sheet in read.sheets}
    unlabeled = list((out / "unlabeled").iterdir())
    assert len(unlabeled) == 3 and {path.suffix for path in unlabeled} == {".png"}
    assert len(pictures | {read_sheet(path).tobytes() for path in unlabeled}) == 16
    _, boxes, labels = draw_sheet(7, 0)
    first = read_split(out / "train").sheets[0]
    np.testing.assert_allclose(first.boxes, boxes)
    np.testing.assert_array_equal(first.labels, labels)
    # More sheets leave the first ones as they were.
    write_sheets(tmp_path / "more", sheets=6, seed=7)
    same = [(folder / "train" / "train_00005.png").read_bytes() for folder in (out, tmp_path / "more")]
    assert same[0] == same[1]


def test_a_folder_in_use_is_left_alone(tmp_path):
    write_sheets(tmp_path / "a", sheets=1, seed=0)
    before = (tmp_path / "a/train/_annotations.coco.json").stat().st_mtime_ns
    write_sheets(tmp_path / "a", sheets=1, seed=0)  # the same again: nothing to do
    with pytest.raises(DataError, match="--out"):
        write_sheets(tmp_path / "a", sheets=1, seed=1)
    assert (tmp_path / "a/train/_annotations.coco.json").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="--noise"):
        write_sheets(tmp_path / "b", sheets=1, seed=1, noise=2)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "schematics.synthetic", "--out", str(tmp_path / "d"), "--sheets", "1"]
    done = subprocess.run([*command, "--size", "300", "260"], capture_output=True, text=True, check=True)
    assert "1 train, 4 valid, 4 test, 2 unlabeled" in done.stdout
    image = json.loads((tmp_path / "d/test/_annotations.coco.json").read_text())["images"][0]
    assert (image["width"], image["height"]) == (300, 260)
    failed = subprocess.run([*command, "--seed", "1"], capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1 and failed.stderr.startswith("error: ")
