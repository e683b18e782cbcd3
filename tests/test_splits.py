"""Splits are drawn by sheet, stratified by class, by a seed, with look-alikes on one side."""

from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from schematics.sheets import DataError, Sheet
from schematics.splits import alike, draw, stratified

SHARES = {"train": 0.8, "valid": 0.2}


def drawing(path: Path, seed: int, size: tuple[int, int] = (120, 90)) -> Sheet:
    """A sheet of twelve dark lines, other ones for each seed."""
    rng = np.random.default_rng(seed)
    image = np.full((90, 120), 255, np.uint8)
    for x0, y0, x1, y1 in rng.integers(0, 90, (12, 4)).tolist():
        cv2.line(image, (x0, y0), (x1, y1), 0, 2)
    cv2.imwrite(str(path), cv2.resize(image, size, interpolation=cv2.INTER_AREA))
    return Sheet(path)


@pytest.mark.parametrize("seed", range(5))
def test_classes_are_dealt_out_by_the_shares_rare_ones_too(seed):
    """100 sheets: a class on all, one on half of them, one on five and one on a single sheet."""
    classes = {"all": range(100), "half": range(50), "five": range(3, 8), "one": [60]}
    groups = [(1, Counter(name for name, where in classes.items() if n in where)) for n in range(100)]
    drawn = stratified(groups, SHARES, seed)
    of = {name: Counter(drawn[n] for n in where) for name, where in classes.items()}
    assert of["all"] == {"train": 80, "valid": 20} and of["half"] == {"train": 40, "valid": 10}
    assert of["five"] == {"train": 4, "valid": 1} and of["one"] == {"train": 1}


def test_a_plain_draw_does_worse():
    """So stratifying is worth its lines: five rare classes on five sheets each, and valid has all of them."""
    groups = [(1, Counter({f"rare {n // 5}": 1})) for n in range(25)] + [(1, Counter())] * 75
    for seed in range(5):
        drawn = stratified(groups, SHARES, seed)
        assert {f"rare {n // 5}" for n in range(25) if drawn[n] == "valid"} == {f"rare {n}" for n in range(5)}
        plain = np.random.default_rng(seed).permutation(100)[:20]
        assert len({n // 5 for n in plain if n < 25}) < 5


def test_the_same_seed_and_no_other_gives_the_same_splits(tmp_path):
    sheets = [drawing(tmp_path / f"{n}.png", n) for n in range(12)]
    classes = [["valve"]] * 12
    drawn = draw(sheets, classes, {"valid": 0.25}, seed=0)
    assert Counter(drawn) == {"train": 9, "valid": 3}
    assert draw(sheets[::-1], classes, {"valid": 0.25}, seed=0) == drawn[::-1]
    assert draw(sheets, classes, {"valid": 0.25}, seed=1) != drawn


def test_look_alikes_are_on_one_side(tmp_path):
    first = drawing(tmp_path / "a.png", 1)
    (tmp_path / "copy.png").write_bytes(first.path.read_bytes())
    scans = [Image.open(drawing(tmp_path / f"page {n}.png", n).path) for n in (8, 9)]
    scans[0].save(tmp_path / "scan.tif", save_all=True, append_images=scans[1:])
    pages = [Sheet(tmp_path / "scan.tif", page) for page in (1, 2)]
    sheets = [
        first,
        drawing(tmp_path / "other.png", 2),
        Sheet(tmp_path / "copy.png"),
        drawing(tmp_path / "shrunk.png", 1, (100, 75)),
        drawing(tmp_path / "plan_png.rf.0a1b.jpg", 3),
        drawing(tmp_path / "plan_png.rf.ffff.jpg", 4),
        *pages,
    ]
    a, other, copy, shrunk, one, two, page, next_page = alike(sheets[:6]) + alike(pages)
    assert a == copy == shrunk and one == two and page == next_page
    assert len({a, other, one}) == 3
    for seed in range(8):
        drawn = draw(sheets[:6], [["valve"]] * 6, {"valid": 0.34}, seed)
        assert drawn[0] == drawn[2] == drawn[3] and drawn[4] == drawn[5] and set(drawn) == {"train", "valid"}


def test_where_all_sheets_are_one_drawing_nothing_is_drawn(tmp_path):
    sheets = [drawing(tmp_path / f"{n}.png", 1) for n in range(3)]
    with pytest.raises(DataError, match=r"too few to draw train, valid: .* of 3 sheets 1 differ"):
        draw(sheets, [["valve"]] * 3, {"valid": 0.3}, 0)
