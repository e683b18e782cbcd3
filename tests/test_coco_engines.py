"""Figures are those of pycocotools and of hotcoco to the last bit, and matches those of pycocotools in every
range of areas, on random and on adversarial sets."""

import contextlib
import io
import json
import sys

import numpy as np
import pytest
from detections import check_same_matches, grid_set, perfect, random_set
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection.metrics.analysis import analyse, fit_thresholds
from detection.metrics.bootstrap import average_precision
from detection.metrics.boxes import fullest
from detection.metrics.coco import evaluate, measure
from detection.metrics.engines import to_coco
from detection.metrics.matching import AREAS, match, match_in_ranges
from schematics.sheets import DataError

ENGINES = ("linework", "pycocotools", "hotcoco")


def check_same(truth, detections, **options):
    """Figures equal as their texts are: -1, NaN and every bit; matches as pycocotools makes them."""
    runs = [measure(truth, detections, engine=engine, **options) for engine in ENGINES]
    texts = [json.dumps(figures.to_dict()) for figures, _ in runs]
    assert texts[0] == texts[1] == texts[2]
    for _, matches in runs[1:]:
        check_same_matches(runs[0][1], matches)
    check_matches(runs[0][1], [AREAS[0], AREAS[2], (300.0, 2000.0)])
    analyse(runs[0][1], thresholds=fit_thresholds(runs[0][1]), resamples=5)


def check_matches(matches, areas):
    """Each range's matches against those of pycocotools."""
    found, (truth, results) = matches.found, to_coco(matches)
    with contextlib.redirect_stdout(io.StringIO()):
        gt, dt = COCO(), COCO()
        gt.dataset, dt.dataset = truth, {**truth, "annotations": results}
        gt.createIndex()
        dt.createIndex()
        evaluator = COCOeval(gt, dt, "bbox")
        evaluator.params.maxDets = [fullest(found.sheet, found.label) + 1]
        evaluator.params.areaRng = [list(area) for area in areas]
        evaluator.evaluate()
    for area, ours in zip(areas, match_in_ranges(matches, areas), strict=True):
        theirs, ignored = np.full(ours.shape, -1), np.zeros(ours.shape, bool)
        for result in evaluator.evalImgs:
            if result and tuple(result["aRng"]) == area:
                rows = np.array(result["dtIds"], np.int64) - 1
                assert found.rank[rows].tolist() == [*range(len(rows))]
                theirs[:, rows] = result["dtMatches"].astype(np.int64) - 1
                ignored[:, rows] = result["dtIgnore"]
        assert np.array_equal(ours, theirs)
        if area == AREAS[0]:
            assert np.array_equal(matches.match, theirs) and np.array_equal(matches.ignored, ignored)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_random_sets(seed, crowd, ties):
    truth, detections = random_set(seed, crowd=crowd)
    if ties:
        detections = [{**row, "score": round(row["score"], 1)} for row in detections]
    check_same(truth, detections)


@st.composite
def crammed(draw):
    """Two sheets on which boxes of few sizes lie on a coarse grid, so that IoUs tie, as scores do.

    Areas lie on both sides of COCO's edges or are annotated otherwise, and some boxes are crowds. Some
    detections have no or a negative size.
    """
    side = st.sampled_from([10.0, 20.0, 31.0, 32.0, 33.0, 64.0, 96.0, 97.0])
    place = st.integers(0, 8).map(lambda n: 8.0 * n)
    number, sheet = st.integers(1, 2), st.integers(1, 2)
    box = st.builds(lambda *v: list(v), place, place, side, side)
    crowd, area = st.sampled_from([0, 0, 0, 1]), st.sampled_from([0, 0, 0, 400.0, 1024.0, 9216.0])
    keys = ("image_id", "category_id", "bbox", "iscrowd", "area")
    boxes = draw(st.lists(st.tuples(sheet, number, box, crowd, area), max_size=25))
    bare = st.builds(lambda *v: list(v), place, place, st.sampled_from([0.0, -5.0, 20.0]), side)
    score = st.integers(0, 6).map(lambda n: n / 6)
    made = draw(st.lists(st.tuples(sheet, number, st.one_of(box, box, box, bare), score), max_size=40))
    truth = truth_of([dict(zip(keys, row, strict=True)) for row in boxes])
    keys = ("image_id", "category_id", "bbox", "score")
    return truth, [dict(zip(keys, row, strict=True)) for row in made]


@settings(max_examples=60, deadline=None)
@given(crammed())
def test_crammed_sets(drawn):
    check_same(*drawn)


def squares(*rows, side=20.0):
    """Annotations or detections of class 1 on sheet 1: (x, y) of squares."""
    return [{"image_id": 1, "category_id": 1, "bbox": [x, y, side, side]} for x, y in rows]


def truth_of(annotations, classes=2):
    return {
        "images": [{"id": 1, "width": 700, "height": 700}, {"id": 2, "width": 700, "height": 700}],
        "categories": [{"id": n, "name": f"class {n}"} for n in range(1, classes + 1)],
        "annotations": annotations,
    }


def scored(rows, *scores):
    return [{**row, "score": score} for row, score in zip(rows, scores, strict=True)]


ADVERSARIAL = {
    "annotation ids from 0": (grid_set(20, first_id=0), perfect(grid_set(20))),
    "doubled annotation ids": (
        truth_of([{**row, "id": 5} for row in squares((0, 0), (50, 50))]),
        scored(squares((0, 0), (50, 50)), 0.9, 0.8),
    ),
    "more than 100 of a class": (grid_set(120), perfect(grid_set(120))),
    "nothing found": (grid_set(5), []),
    "no truth at all": (truth_of([]), scored(squares((0, 0)), 0.9)),
    "neither truth nor detections": (truth_of([]), []),
    "a class without truth": (
        truth_of(squares((0, 0))),
        [*scored(squares((0, 0)), 0.9), *scored([{**squares((9, 9))[0], "category_id": 2}], 0.5)],
    ),
    "every score the same": (grid_set(30), perfect(grid_set(30))[::-1] * 2),
    "scores 0, 1 and the least double": (
        truth_of(squares((0, 0), (50, 0), (100, 0))),
        scored(squares((0, 0), (50, 0), (100, 0)), 0.0, 1.0, 5e-324),
    ),
    "boxes without area": (
        truth_of(squares((0, 0))),
        [{"image_id": 1, "category_id": 1, "bbox": [0.0, 0.0, 0.0, 5.0], "score": 0.9}],
    ),
    "IoU of exactly one half": (
        truth_of(squares((0, 0), side=30.0)),
        scored(squares((10, 0), side=30.0), 0.9),
    ),
    "areas on the edges of the size bins": (
        truth_of([r for side in (32.0, 96.0) for r in squares((2 * side, 0), side=side)]),
        scored([r for side in (32.0, 96.0) for r in squares((2 * side, 0), side=side)], 0.9, 0.8),
    ),
    "a crowd that takes several": (
        truth_of([{**squares((0, 0), side=200.0)[0], "iscrowd": 1}, *squares((300, 300))]),
        scored(squares((0, 0), (50, 50), (300, 300), (301, 300)), 0.9, 0.8, 0.7, 0.6),
    ),
    "nested boxes of one class": (
        truth_of([*squares((0, 0), side=60.0), *squares((10, 10))]),
        scored([*squares((0, 0), side=60.0), *squares((10, 10)), *squares((1, 0), side=60.0)], 0.5, 0.9, 0.7),
    ),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_sets(name):
    check_same(*ADVERSARIAL[name])


def test_a_limit_that_is_asked_for():
    truth = grid_set(120)
    check_same(truth, perfect(truth), max_detections=107)


def test_an_engine_that_is_not_installed_is_named_with_its_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "hotcoco", None)  # what an absent package looks like to import
    with pytest.raises(DataError, match=r"hotcoco is not installed: pip install 'linework\[fast\]'"):
        evaluate(grid_set(2), [], engine="hotcoco")


def fuller_than_the_limit():
    """60 boxes of a class on a sheet, so that the limit is 200, and 360 detections of it, the 60 right ones
    among them at all ranks; 180 of another class without truth."""
    rng = np.random.default_rng(0)
    truth = grid_set(60)
    truth["categories"].append({"id": 2, "name": "lamp"})
    rows = perfect(truth)
    rows += [{**row, "bbox": [*rng.uniform(0, 600, 2).tolist(), 20, 20]} for row in 5 * rows]
    rows += [{**row, "category_id": 2} for row in rows[-180:]]
    scores = rng.permutation(len(rows)) / len(rows)
    return truth, [{**row, "score": score} for row, score in zip(rows, scores.tolist(), strict=True)]


SETS = {
    **{f"random set {seed}": random_set(seed, crowd=seed % 2 == 1) for seed in range(4)},
    "more detections on a sheet than the limit": fuller_than_the_limit(),
    "nothing found": (grid_set(5), []),
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("limit", [None, 150])
def test_measure_gives_what_evaluate_and_match_give_apart(name, limit):
    figures, matches = measure(*SETS[name], max_detections=limit)
    assert figures == evaluate(*SETS[name], max_detections=limit)
    check_same_matches(matches, match(*SETS[name], max_detections=limit))
    assert figures.max_detections == matches.limit


def test_detections_beyond_the_limit_are_matched_and_leave_the_figures_alone():
    truth, detections = fuller_than_the_limit()
    figures, matches = measure(truth, detections)
    assert figures.max_detections == 200 and matches.found.rank.max() == 359
    right = matches.match[0] >= 0
    assert right[matches.found.rank < 200].any() and right[matches.found.rank >= 200].any()
    best = sorted(detections, key=lambda row: -row["score"])
    best = [row for k in (1, 2) for row in [row for row in best if row["category_id"] == k][:200]]
    fewer = evaluate(truth, best)
    assert (figures.coco, figures.fitted, figures.sizes) == (fewer.coco, fewer.fitted, fewer.sizes)
    exact = average_precision(matches)
    assert {name: exact[name][0] for name in ("AP", "AP50", "AP75")} == {
        name: figures.fitted[name] for name in ("AP", "AP50", "AP75")
    }
    assert figures.fitted["AR"] < evaluate(truth, detections, 400).fitted["AR"]
    assert figures.detections == 540 and figures.false_positives_without_truth == {"lamp": 180}
