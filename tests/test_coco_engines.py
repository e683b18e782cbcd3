"""One run of an engine serves figures, thresholds and analysis. hotcoco gives what pycocotools gives, to the
last bit, on random and on adversarial sets."""

import json
import sys

import numpy as np
import pytest
from detections import check_same_matches, grid_set, perfect, random_set
from hypothesis import given, settings
from hypothesis import strategies as st

from detection.metrics import matching
from detection.metrics.analysis import analyse, fit_thresholds
from detection.metrics.bootstrap import average_precision
from detection.metrics.coco import evaluate, measure
from detection.metrics.matching import AREAS, coco_classes, match
from schematics.sheets import DataError

FAST = "hotcoco"
ENGINES = (FAST, "pycocotools")


def check_same(truth, detections, **options):
    """Figures, thresholds and the whole analysis, equal as their texts are: -1, NaN and every bit."""
    (figures, one), (others, other) = (measure(truth, detections, engine=e, **options) for e in ENGINES)
    assert json.dumps(figures.to_dict()) == json.dumps(others.to_dict())
    check_same_matches(one, other)
    for matches in ((one, other), [match(truth, detections, engine=e) for e in ENGINES]):
        assert fit_thresholds(matches[0]) == fit_thresholds(matches[1])
        analyses = [json.dumps(analyse(m, resamples=20).to_dict()) for m in matches]
        assert analyses[0] == analyses[1]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_random_sets(seed, crowd, ties):
    truth, detections = random_set(seed, crowd=crowd)
    if ties:
        detections = [{**row, "score": round(row["score"], 1)} for row in detections]
    check_same(truth, detections)


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
    "more than 100 of a class": (grid_set(250), perfect(grid_set(250))),
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


@pytest.mark.parametrize("limit", [100, 137])
def test_a_limit_that_is_asked_for(limit):
    truth = grid_set(250)
    check_same(truth, perfect(truth), max_detections=limit)


def test_an_engine_that_is_not_installed_is_named_with_its_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "hotcoco", None)  # what an absent package looks like to import
    with pytest.raises(DataError, match=r"hotcoco is not installed: pip install 'linework\[fast\]'"):
        evaluate(grid_set(2), [], engine=FAST)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_run_serves_figures_thresholds_and_analysis(engine, monkeypatch):
    runs, evaluators = [], []

    def recorded_classes(name):
        coco, evaluation = coco_classes(name)
        runs.append(name)
        return coco, lambda *arguments: evaluators.append(evaluation(*arguments)) or evaluators[-1]

    monkeypatch.setattr(matching, "coco_classes", recorded_classes)
    figures, matches = measure(*random_set(1), engine=engine)
    thresholds = fit_thresholds(matches)
    analyse(matches, thresholds=thresholds, resamples=5)
    assert runs == [engine] and len(evaluators) == {"pycocotools": 1, "hotcoco": 2}[engine]
    matched = [tuple(span) for evaluator in evaluators for span in evaluator.params.areaRng]
    assert len(matched) == len(set(matched)) == len(AREAS) + len(figures.sizes), "each range once"
    evaluate(*random_set(1), engine=engine)
    match(*random_set(1), engine=engine)
    assert runs == [engine] * 3


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


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("limit", [None, 150])
def test_measure_gives_what_evaluate_and_match_give_apart(name, engine, limit):
    figures, matches = measure(*SETS[name], max_detections=limit, engine=engine)
    assert figures == evaluate(*SETS[name], max_detections=limit, engine=engine)
    check_same_matches(matches, match(*SETS[name], max_detections=limit, engine=engine))
    assert figures.max_detections == matches.limit


@pytest.mark.parametrize("engine", ENGINES)
def test_detections_beyond_the_limit_are_matched_and_leave_the_figures_alone(engine):
    truth, detections = fuller_than_the_limit()
    figures, matches = measure(truth, detections, engine=engine)
    assert figures.max_detections == 200 and matches.found.rank.max() == 359
    right = matches.match[0] >= 0
    assert right[matches.found.rank < 200].any() and right[matches.found.rank >= 200].any()
    best = sorted(detections, key=lambda row: -row["score"])
    best = [row for k in (1, 2) for row in [row for row in best if row["category_id"] == k][:200]]
    fewer = evaluate(truth, best, engine=engine)
    assert (figures.coco, figures.fitted, figures.sizes) == (fewer.coco, fewer.fitted, fewer.sizes)
    exact = average_precision(matches)
    assert {name: exact[name][0] for name in ("AP", "AP50", "AP75")} == {
        name: figures.fitted[name] for name in ("AP", "AP50", "AP75")
    }
    assert figures.fitted["AR"] < evaluate(truth, detections, 400, engine).fitted["AR"]
    assert figures.detections == 540 and figures.false_positives_without_truth == {"lamp": 180}
