"""AP accumulated from weights of sheets is pycocotools' to the last bit; intervals have the right width."""

import contextlib
import io

import numpy as np
import pytest
from detections import found, jittered, truth_of
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection.metrics.bootstrap import average_precision, precision_at_recall
from detection.metrics.coco import evaluate
from detection.metrics.matching import match
from schematics.resampling import interval, ratio, resample


def pycocotools_precision(truth, detections, limit):
    """eval["precision"] [T, R, K] of all areas, from the library called directly."""
    annotations = [
        {"iscrowd": 0, "area": row["bbox"][2] * row["bbox"][3], **row, "id": n}
        for n, row in enumerate(truth["annotations"], start=1)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = {"info": {}, **truth, "annotations": annotations}
        gt.createIndex()
        rows = sorted(detections, key=lambda d: (-d["score"], d["image_id"], d["category_id"], d["bbox"]))
        evaluator = COCOeval(gt, gt.loadRes(rows), "bbox")
        evaluator.params.maxDets = [limit]
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator.eval["precision"][:, :, :, 0, 0]


@pytest.mark.parametrize(("crowd", "ties"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("seed", range(3))
def test_every_sheet_once_is_pycocotools_to_the_last_bit(seed, crowd, ties):
    truth, detections = jittered(seed, crowd=crowd, ties=ties)
    matches = match(truth, detections)
    ours = precision_at_recall(matches, np.ones((1, len(truth["images"])), np.int64))[0]
    assert np.array_equal(ours, pycocotools_precision(truth, detections, matches.limit))
    figures, exact = evaluate(truth, detections), average_precision(matches)
    assert {name: exact[name][0] for name in ("AP", "AP50", "AP75")} == {
        name: figures.fitted[name] for name in ("AP", "AP50", "AP75")
    }


@pytest.mark.parametrize("crowd", [False, True])
def test_a_resample_is_pycocotools_on_the_sheets_written_out(crowd):
    truth, detections = jittered(5, crowd=crowd)
    matches = match(truth, detections)
    weights = resample(len(truth["images"]), 6, seed=1)
    assert weights.max() > 1
    for times, ours in zip(weights, precision_at_recall(matches, weights), strict=True):
        again = {**truth, "images": [], "annotations": []}
        made: list[dict] = []
        for image, copies in zip(truth["images"], times, strict=True):
            for copy in range(copies):
                new = {"image_id": image["id"] * 100 + copy}
                again["images"].append({**image, "id": new["image_id"]})
                for source, target in ((truth["annotations"], again["annotations"]), (detections, made)):
                    target += [{**row, **new} for row in source if row["image_id"] == image["id"]]
        assert np.array_equal(ours, pycocotools_precision(again, made, matches.limit))


def test_sheets_that_are_there_ten_thousand_times_weigh_no_more():
    """Counts beyond 16 bits; only pycocotools' division by a spacing too much is felt less."""
    matches = match(*jittered(3))
    once = np.ones((1, len(matches.image_ids)), np.int64)
    many = precision_at_recall(matches, 10_000 * once)
    np.testing.assert_allclose(many, precision_at_recall(matches, once), rtol=1e-14)


def test_a_lower_limit_counts_the_best_detections_of_each_sheet():
    truth = truth_of([(3, 20 * n, 0, 10, 10) for n in range(30)])
    detections = [found(10, 3, 1 - n / 100, 20 * n, 0, 10, 10) for n in range(30)]
    matches = match(truth, detections)
    ours = precision_at_recall(matches, np.ones((1, 1), np.int64), limit=7)[0]
    assert np.array_equal(ours, pycocotools_precision(truth, detections, 7))
    assert (ours[0, :, 0] > 0).sum() == 24  # recalls 0 to 0.23 of 7 in 30


def test_resamples_hold_as_many_sheets_and_follow_the_seed():
    weights = resample(40, 300, seed=2)
    assert weights.shape == (300, 40) and (weights.sum(1) == 40).all()
    assert abs(weights.mean(0) - 1).max() < 0.3
    assert np.array_equal(weights, resample(40, 300, seed=2))
    assert not np.array_equal(weights, resample(40, 300, seed=3))


def test_the_interval_of_a_share_is_as_wide_as_the_binomial_says():
    right = np.arange(200) % 4 == 0
    draws = ratio(right.astype(float), np.ones(200), resample(200, 2000))
    bounds = interval(draws, 0.25)
    half = 1.96 * np.sqrt(0.25 * 0.75 / 200)
    assert bounds.value == 0.25
    assert bounds.low == pytest.approx(0.25 - half, abs=0.1 * half)
    assert bounds.high == pytest.approx(0.25 + half, abs=0.1 * half)


def test_an_interval_leaves_out_draws_with_nothing_to_measure():
    assert np.isnan(ratio(np.ones(2), np.zeros(2), np.ones((3, 2)))).all()
    assert interval(np.array([np.nan, 0.5, 0.5]), 0.5) == interval(np.array([0.5, 0.5]), 0.5)
    assert np.isnan(interval(np.full(3, np.nan), 0.1).low)
