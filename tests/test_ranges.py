"""Ranges of counts hold the true number as often as they promise, and promise nothing that they can't."""

import itertools
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from detections import jittered

from cluster.errors import UserError
from detection.counting import applying, look_first, read_ranges, tally_sheets, to_counts, without_range
from detection.detections import Detections
from detection.metrics.coverage import FOUND, TOTAL, UNFOUND, cover
from detection.metrics.curves import best_thresholds
from detection.metrics.matching import match
from detection.metrics.ranges import (
    OWN,
    Basis,
    cross_tally,
    fewest,
    fit_ranges,
    reach,
    tally,
    tally_matches,
    why_none,
    widest_first,
)

NAMES = ("resistor", "relay", "lamp", "fuse")
THRESHOLDS = np.full(4, 0.5)


def counted_sheets(sheets, seed, means=(6.0, 2.0, 0.1, 0.1)):
    """A tally and the truth int64 [I, K] of drawn sheets, of which some are hard: much is missed there."""
    rng = np.random.default_rng(seed)
    truth = rng.poisson(means, (sheets, len(means)))
    hard = rng.random((sheets, 1)) < 0.3
    seen, noise = rng.binomial(truth, np.where(hard, 0.6, 0.95)), rng.poisson(0.5, truth.shape)
    sheet, label = np.nonzero(np.ones(truth.shape))
    rows = np.repeat(np.arange(truth.size), seen.ravel()), np.repeat(np.arange(truth.size), noise.ravel())
    score = np.concatenate([rng.beta(6, 2, len(rows[0])), rng.beta(2, 6, len(rows[1]))])
    pair = np.concatenate(rows)
    return tally(sheet[pair], label[pair], score, THRESHOLDS[: len(means)], sheets), truth


def fitted(sheets, seed, level=0.9, **changes):
    counted, truth = counted_sheets(sheets, seed, **changes)
    return fit_ranges(NAMES[: truth.shape[1]], counted, truth, THRESHOLDS[: truth.shape[1]], level=level)


@pytest.mark.parametrize("level", [0.8, 0.9])
def test_ranges_hold_as_often_as_promised(level):
    """150 draws of 60 labelled sheets and 60 new ones: the level or more, but for three standard errors."""
    shares = {kind: [] for kind in (FOUND, UNFOUND, TOTAL, "pooled")}
    for seed in range(150):
        ranges, (counted, truth) = fitted(60, (seed, 0), level), counted_sheets(60, (seed, 1))
        covered = cover(ranges, counted, truth)
        for kind in (FOUND, UNFOUND, TOTAL):
            pairs = covered.promised & covered.pairs(kind)
            shares[kind].append(covered.holds[pairs].mean())
        rare = [k for k, basis in enumerate(ranges.found) if basis.pooled]
        rows = (covered.promised & covered.pairs(FOUND))[:, rare]
        held = [hold[row].mean() for hold, row in zip(covered.holds[:, rare], rows, strict=True) if row.any()]
        shares["pooled"] += [np.mean(held)] if held else []
    assert len(shares["pooled"]) > 75
    for kind, values in shares.items():
        assert np.mean(values) >= level - 3 * np.std(values) / math.sqrt(len(values)), kind
    # A range is no wider than it must be: the share lies within 1 / (n + 1) and ties above the level.
    assert np.mean(shares[TOTAL]) <= level + 0.03


def test_the_correction_for_a_finite_sample():
    errors = np.arange(100.0)
    for sheets in range(9, 60):
        expected = errors[math.ceil(round((sheets + 1) * 0.9, 9)) - 1]
        assert reach(errors[:sheets], np.arange(sheets), 0.9) == expected, sheets


def test_pairs_of_one_sheet_share_its_weight():
    """Nine sheets need all the weight that they have; a tenth allows for the furthest pair of one of two."""
    assert reach(np.array([*range(9)] * 3), np.array([*range(9)] * 3), 0.9) == 8
    errors, sheet = np.array([*[1.0] * 19, 5.0, 9.0]), np.array([*range(19), 19, 19])
    assert reach(errors, sheet, 0.9) == 1 and reach(errors, sheet, 0.92) == 5
    assert reach(errors, sheet, 0.95) == 9


def test_a_higher_level_reaches_further():
    levels = (0.5, 0.8, 0.9, 0.95)
    counted, _ = counted_sheets(40, 1)
    bounds = [fitted(100, 0, level).bounds(counted) for level in levels]
    for (low, high), (lower, higher) in itertools.pairwise(bounds):
        made = ~np.isnan(low)
        assert (lower[made] <= low[made]).all() and (higher[made] >= high[made]).all()
    assert (bounds[-1][1] > bounds[0][1]).any()
    for low, high in bounds:
        made = ~np.isnan(low)
        assert (low[made] >= 0).all() and (low <= counted.found)[made].all()
        assert (high >= counted.found)[made].all(), "what counts.csv says lies in its range"


def test_too_few_sheets_promise_nothing_and_say_so():
    assert [fewest(level) for level in (0.5, 0.8, 0.9, 0.95)] == [1, 4, 9, 19]
    assert reach(np.zeros(8), np.arange(8), 0.9) == np.inf and reach(np.zeros(9), np.arange(9), 0.9) == 0
    few = fitted(8, 0)
    low, high = few.bounds(counted_sheets(5, 1)[0])
    assert np.isnan(low).all() and np.isnan(high).all()
    ranges, said = applying(few, NAMES, THRESHOLDS, 1.0, Path("model.pt"))
    assert ranges is None
    assert said == "no ranges of the counts: 8 labelled sheets can't promise 90 % for a count: that takes 9"
    assert why_none(1, 0.8).startswith("1 labelled sheet can't promise 80 %") and not why_none(9)


def test_classes_on_few_sheets_share_a_range_and_unseen_ones_have_none():
    ranges = fitted(40, 0, means=(6.0, 2.0, 0.3, 0.0))
    assert [basis.pooled for basis in ranges.found] == [False, False, True, False]
    assert ranges.found[0].sheets >= OWN > ranges.found[2].sheets >= fewest(0.9)
    assert ranges.boxes[3] == 0 and ranges.found[3] == ranges.unfound[3] == Basis()
    covered = cover(ranges, *counted_sheets(30, 1))
    assert not covered.promised[:, 3].any() and covered.promised[:, -1].all()
    assert covered.figures()[FOUND].without == (covered.found[:, 3] > 0).sum() > 0
    assert without_range(ranges).endswith("labelled sheets have them: fuse")
    assert not without_range(fitted(200, 0, means=(6.0, 2.0)))


def test_a_range_is_for_the_counts_that_it_was_fitted_on(tmp_path):
    ranges, file = fitted(40, 0), Path("model.pt")
    assert applying(ranges, NAMES, THRESHOLDS, 1.0, file)[0] == ranges
    for change, said in (
        ((None, NAMES, THRESHOLDS, 1.0), "model.pt was written before there were any"),
        ((ranges, NAMES, THRESHOLDS + 0.1, 1.0), "they hold at other thresholds"),
        ((ranges, NAMES, THRESHOLDS, 0.5), "they hold at --scale 1"),
    ):
        none, words = applying(*change, file)
        assert none is None and said in words
        assert "`python evaluate/evaluate.py --checkpoint model.pt --split valid" in words
    turned = ranges.of(("fuse", "lamp", "relay", "resistor"))
    assert turned.found == ranges.found[::-1] and turned.total == ranges.total
    other = ranges.of(("fuse", "motor"))
    assert other.found == (ranges.found[3], Basis()) and other.total == Basis()


def test_a_file_of_ranges_is_read_again_and_a_damaged_one_refused(tmp_path):
    ranges, path = fitted(40, 0), tmp_path / "ranges.json"
    path.write_text(json.dumps(ranges.to_dict()))
    assert read_ranges(path) == ranges
    below = replace(ranges, total=Basis(-1.0, 40))
    for damaged in ({**asdict(ranges), "boxes": [1]}, asdict(below), {"names": []}, []):
        path.write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=r"ranges.json: .*; give the ranges.json that evaluate.py wrote"):
            read_ranges(path)
    path.write_text("{")
    with pytest.raises(UserError, match="not read"):
        read_ranges(path)


def test_the_table_of_counts_and_the_sheets_to_look_at():
    """A sheet of one sure symbol, one of three doubtful ones, and one on which nothing is found."""
    boxes = np.zeros((3, 4))
    sheets = [
        Detections(boxes[:1], np.array([0.99]), np.array([1])),
        Detections(boxes, np.array([0.6, 0.55, 0.4]), np.array([1, 1, 1])),
        Detections(boxes[:0], np.zeros(0), np.zeros(0, np.int64)),
    ]
    counted = tally_sheets(sheets, THRESHOLDS[:2])
    assert counted.found.tolist() == [[1, 0, 1], [2, 0, 2], [0, 0, 0]]
    np.testing.assert_allclose(counted.spread[1, 0] ** 2, 1 + 0.6 * 0.4 + 0.55 * 0.45 + 0.4 * 0.6)
    names = ("=relay", "lamp")
    plain = "sheet,'=relay,lamp,total\na,1,0,1\nb,2,0,2\nc,0,0,0\n"
    assert to_counts(("a", "b", "c"), counted, names) == plain
    basis = Basis(1.6, 30), Basis()
    ranges = replace(
        fitted(40, 0),
        names=names,
        thresholds=(0.5, 0.5),
        boxes=(9, 0),
        found=basis,
        unfound=basis,
        total=basis[0],
    )
    lines = to_counts(("a", "b", "c"), counted, names, ranges).splitlines()
    assert (
        lines[0]
        == "sheet,'=relay,lamp,total,look at,total low,total high,'=relay low,'=relay high,lamp low,lamp high"
    )
    assert lines[1:] == ["a,1,0,1,2,0,2,0,2,,", "b,2,0,2,1,0,4,0,4,,", "c,0,0,0,3,0,1,0,1,,"]
    assert widest_first(*ranges.bounds(counted)).tolist() == [1, 0, 2]
    assert tally_sheets([], THRESHOLDS).found.shape == (0, 5)


def test_the_sheets_in_doubt_are_named_first():
    ranges, (counted, _) = fitted(60, 0), counted_sheets(20, 1)
    low, high = ranges.bounds(counted)
    width = np.nansum((high - low)[:, :-1], 1)
    first = widest_first(low, high)
    assert (np.diff(width[first]) <= 0).all() and width[first[0]] > width[first[-1]]
    said = look_first(ranges, counted, [f"sheet {n}" for n in range(20)])
    assert f"sheet {first[0]} ({width[first[0]]:.0f})" in said
    places = [int(row.split(",")[6]) for row in to_counts("x" * 20, counted, NAMES, ranges).splitlines()[1:]]
    assert np.argsort(places).tolist() == first.tolist()


def test_thresholds_of_some_sheets_are_those_of_a_match_of_them_alone():
    truth, detections = jittered(3, sheets=12, crowd=True)
    matches = match(truth, detections)
    chosen = np.arange(12) % 3 > 0
    kept = {number for number, there in zip(matches.image_ids.tolist(), chosen, strict=True) if there}
    part = {
        **truth,
        "images": [row for row in truth["images"] if row["id"] in kept],
        "annotations": [row for row in truth["annotations"] if row["image_id"] in kept],
    }
    alone = match(part, [row for row in detections if row["image_id"] in kept])
    np.testing.assert_array_equal(best_thresholds(matches, chosen), best_thresholds(alone))
    found = tally_matches(matches, THRESHOLDS[:3]).on(np.flatnonzero(chosen)).found
    np.testing.assert_array_equal(found, tally_matches(alone, THRESHOLDS[:3]).found)


def test_labelled_sheets_are_counted_at_the_thresholds_of_the_others():
    """Each of six sheets, picked among twelve, is counted at what the five others of them give."""
    matches = match(*jittered(3, sheets=12))
    sheets = np.array([7, 2, 9, 4, 11, 5])
    crossed = cross_tally(matches, sheets)
    for row, sheet in enumerate(sheets):
        others = np.isin(np.arange(12), sheets[sheets != sheet])
        alone = tally_matches(matches, best_thresholds(matches, others)).on(sheets[row : row + 1])
        assert (
            np.array_equal(crossed.found[row], alone.found[0])
            and crossed.spread[row, -1] == alone.spread[0, -1]
        )
    own = tally_matches(matches, best_thresholds(matches, np.isin(np.arange(12), sheets))).on(sheets)
    off = [abs(one.found[:, :-1] - matches.positives[sheets]).sum() for one in (own, crossed)]
    assert off[0] < off[1], "their own thresholds flatter them"
