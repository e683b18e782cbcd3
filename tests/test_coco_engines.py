"""hotcoco gives what pycocotools gives, to the last bit, on random and on adversarial sets."""

import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_coco_metrics import grid_set, perfect, random_set

from detection.metrics.analysis import analyse, fit_thresholds
from detection.metrics.coco import evaluate
from schematics.sheets import DataError

FAST = "hotcoco"


def check_same(truth, detections, **options):
    """Figures, thresholds and the whole analysis, equal as their texts are: -1, NaN and every bit."""
    figures = [
        json.dumps(evaluate(truth, detections, engine=e, **options).to_dict()) for e in (FAST, "pycocotools")
    ]
    assert figures[0] == figures[1]
    assert fit_thresholds(truth, detections, FAST) == fit_thresholds(truth, detections)
    analyses = [analyse(truth, detections, resamples=20, engine=e) for e in (FAST, "pycocotools")]
    assert json.dumps(analyses[0].to_dict()) == json.dumps(analyses[1].to_dict())
    one, other = (analysis.matches for analysis in analyses)
    assert np.array_equal(one.match, other.match) and np.array_equal(one.ignored, other.ignored)
    assert np.array_equal(one.found.xywh, other.found.xywh)


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
        truth_of(squares((0, 0), side=30.0)), scored(squares((10, 0), side=30.0), 0.9),
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
}  # fmt: skip


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
