"""Splits are drawn by sheet, stratified by class, by a seed, with look-alikes on one side; so are shares."""

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from schematics.coco import Category, LabelledSheet, Split
from schematics.sheets import DataError, Sheet
from schematics.splits import alike, draw, stratified, take_share

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


def labelled(classes: list[list[int]]) -> Split:
    """A training split of sheets that show these labels, 1 to 9."""
    one = {"width": 9, "height": 9, "annotation_ids": np.empty(0), "area": np.empty(0)}
    sheets = [
        LabelledSheet(
            n, f"{n}.png", Path(f"{n}.png"), boxes=np.empty((len(k), 4)), labels=np.array(k, np.int64),
            crowd=np.zeros(len(k), bool), **one,
        )
        for n, k in enumerate(classes)
    ]  # fmt: skip
    return Split(Path("train"), [Category(k, f"class {k}") for k in range(1, 10)], sheets, [])


def test_a_smaller_share_is_part_of_a_larger_one_and_keeps_all_classes():
    split = labelled([[n % 7 + 1] * (n % 3) for n in range(200)])
    for seed in range(3):
        parts = [take_share(split, share, seed)[0] for share in (0.001, 0.02, 0.05, 0.2, 0.99, 1)]
        names = [{sheet.file_name for sheet in part.sheets} for part in parts]
        assert [len(part) for part in names] == [1, 4, 10, 40, 198, 200]
        assert all(small < large for small, large in itertools.pairwise(names))
        assert all(part.categories == split.categories for part in parts)
        assert len(parts[0].sheets[0].labels)  # a lone sheet has a symbol


def test_a_share_is_drawn_by_seed_and_not_by_the_order_of_the_file():
    split = labelled([[n % 7 + 1] for n in range(100)])
    back = replace(split, sheets=split.sheets[::-1])
    drawn = [[s.file_name for s in take_share(*each)[0].sheets] for each in ((split, 0.1, 0), (back, 0.1, 0))]
    assert drawn[0] == drawn[1]
    assert drawn[0] != [s.file_name for s in take_share(split, 0.1, 1)[0].sheets]


def test_a_share_has_its_part_of_each_class_and_names_those_that_it_lost():
    """Seven rare classes, each on four sheets of 200: a plain draw of a quarter has less than all of them."""
    split = labelled([[n // 4 + 1] if n < 28 else [8] for n in range(200)])
    for seed in range(5):
        assert take_share(split, 0.25, seed)[1] == (
            f"train: 50 of 200 sheets, drawn with seed {seed}; every class has an example"
        )
        plain = {min(n // 4 + 1, 8) for n in np.random.default_rng(seed).permutation(200)[:50]}
        assert len(plain) < 8
        part, told = take_share(split, 0.02, seed)
        kept = {label for sheet in part.sheets for label in sheet.labels.tolist()}
        lost = ", ".join(f"class {k}" for k in range(1, 9) if k not in kept)
        assert told == f"train: 4 of 200 sheets, drawn with seed {seed}; no example left of {lost}"
    assert take_share(split, 1.0, 0) == (split, "")
