"""The 12 figures are pycocotools' own on a clean set, and right where plain pycocotools is wrong."""

import contextlib
import copy
import io
import random

import numpy as np
import pytest
from detections import grid_set, perfect, random_set
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection.metrics.coco import evaluate
from schematics.sheets import DataError

one = pytest.approx(1.0)  # pycocotools divides by a spacing too much: 0.9999999999999998


def plain_pycocotools(truth, detections):
    """The 12 figures as the library gives them when called as its demo does."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        gt = COCO()
        gt.dataset = copy.deepcopy(truth)
        gt.createIndex()
        evaluator = COCOeval(gt, gt.loadRes(copy.deepcopy(detections)), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    lines = [line for line in printed.getvalue().splitlines() if " @[ IoU" in line]
    return tuple(evaluator.stats.tolist()), "\n".join(lines)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_a_clean_set_scores_as_in_pycocotools_to_the_last_bit(seed, crowd):
    truth, detections = random_set(seed, crowd=crowd)
    if not detections:
        return
    figures = evaluate(truth, detections)
    expected, printed = plain_pycocotools(truth, detections)
    assert figures.coco == expected
    assert figures.table() == printed


def test_trap_1_annotation_id_zero_is_matched():
    truth = grid_set(20, first_id=0)
    wrong, _ = plain_pycocotools(truth, perfect(truth))
    assert wrong[0] < 0.9
    assert evaluate(truth, perfect(truth)).coco[0] == one
    single = grid_set(1, first_id=0)
    assert plain_pycocotools(single, perfect(single))[0][0] == 0.0
    assert evaluate(single, perfect(single)).coco[0] == one


def test_trap_2_doubled_annotation_ids():
    truth = grid_set(20)
    for annotation in truth["annotations"]:
        annotation["id"] = 1 + annotation["id"] % 2
    assert plain_pycocotools(truth, perfect(truth))[0][0] < 0.2
    assert evaluate(truth, perfect(truth)).coco[0] == one


def test_trap_3_more_than_a_hundred_symbols_of_one_class_on_a_sheet():
    truth = grid_set(250)
    figures = evaluate(truth, perfect(truth))
    assert figures.coco == plain_pycocotools(truth, perfect(truth))[0]
    assert figures.coco[0] == pytest.approx(0.406, abs=1e-3)
    assert figures.max_detections == 500
    assert figures.fitted == {"AP": one, "AP50": one, "AP75": one, "AR": one}
    assert "500 detections" in figures.details()


def test_trap_4_false_positives_of_a_class_without_truth_are_reported():
    truth = grid_set(4)
    truth["categories"].append({"id": 0, "name": "symbols"})
    strays = [{"image_id": 1, "category_id": 0, "bbox": [0, 0, 9, 9], "score": 0.99}] * 3
    figures = evaluate(truth, perfect(truth) + strays)
    assert figures.coco[0] == one
    assert figures.false_positives_without_truth == {"symbols": 3}
    assert "symbols 3" in figures.details()


def test_strays_are_counted_by_class_and_not_in_crowds():
    truth = grid_set(4)
    truth["categories"] += [
        {"id": 8, "name": "relay"},
        {"id": 9, "name": "relay"},
        {"id": 10, "name": "lamp"},
    ]
    crowd = {"id": 99, "image_id": 1, "category_id": 10, "bbox": [0, 0, 50, 50], "area": 2500, "iscrowd": 1}
    truth["annotations"].append(crowd)
    strays = [(8, 0), (8, 20), (9, 40), (10, 10), (10, 200)]  # the fourth lies in the crowd of lamps
    rows = [{"image_id": 1, "category_id": c, "bbox": [x, x, 9, 9], "score": 0.9} for c, x in strays]
    figures = evaluate(truth, perfect(truth)[:4] + rows)
    assert figures.false_positives_without_truth == {"relay (8)": 2, "relay (9)": 1, "lamp": 1}


@pytest.mark.parametrize("last", [0, 2])
def test_strays_beyond_the_limit_are_not_counted_in_crowds_either(last):
    """150 detections of a class whose only box is a crowd, with a limit of 100; the last few lie outside."""
    truth = grid_set(1)
    truth["annotations"][0]["iscrowd"] = 1
    inside = [{**perfect(truth)[0], "score": 0.9 - n / 1000} for n in range(150 - last)]
    outside = [{**perfect(truth)[0], "bbox": [300.0, 9.0 * n, 9, 9], "score": 0.1} for n in range(last)]
    figures = evaluate(truth, inside + outside)
    assert figures.max_detections == 100
    assert figures.false_positives_without_truth == ({"relay": last} if last else {})


def test_trap_5_no_predictions_and_missing_fields():
    truth = grid_set(4)
    with pytest.raises(IndexError):
        plain_pycocotools(truth, [])
    assert evaluate(truth, []).coco[:3] == (0.0, 0.0, 0.0)
    bare = copy.deepcopy(truth)
    del bare["info"]
    for annotation in bare["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    with pytest.raises(KeyError):
        plain_pycocotools(bare, perfect(bare))
    assert evaluate(bare, perfect(bare)).coco == evaluate(truth, perfect(truth)).coco
    nothing = {**truth, "annotations": []}
    assert evaluate(nothing, perfect(truth)).coco[0] == -1.0


def test_trap_6_size_bins_fit_the_boxes():
    truth = grid_set(90)
    for n, annotation in enumerate(truth["annotations"]):
        side = 20 + n % 3  # 20, 21 and 22 px: all small to COCO
        annotation["bbox"][2:] = [side, side]
        annotation["area"] = side * side
    detections = [d for d in perfect(truth) if d["bbox"][2] != 22]
    figures = evaluate(truth, detections)
    assert figures.coco[4] == figures.coco[5] == -1.0
    assert [(s.low, s.high, s.boxes) for s in figures.sizes] == [(20, 21, 30), (21, 23, 60)]
    assert figures.sizes[0].ap == one
    assert figures.sizes[-1].ap < 0.6


def test_trap_7_ids_of_another_data_set_are_refused():
    truth = grid_set(4)
    off_by_one = [{**d, "category_id": d["category_id"] + 1} for d in perfect(truth)]
    with pytest.raises(DataError, match="category_id 2 is not in the ground truth"):
        evaluate(truth, off_by_one)
    with pytest.raises(DataError, match="image_id 5 is not in the ground truth"):
        evaluate(truth, [{**d, "image_id": 5} for d in perfect(truth)])
    with pytest.raises(DataError, match="not finite"):
        evaluate(truth, [{**d, "score": float("nan")} for d in perfect(truth)])
    with pytest.raises(DataError, match="image_id 1 has a box that is not four numbers"):
        evaluate(truth, [{**d, "bbox": d["bbox"][:3]} for d in perfect(truth)])
    for key in ("image_id", "category_id"):
        strange = {**truth, "annotations": [{**truth["annotations"][0], key: 99}]}
        with pytest.raises(DataError, match=f"an annotation has {key} 99, which is not listed"):
            evaluate(strange, [])


def test_trap_8_the_order_of_tied_scores_does_not_matter():
    truth, detections = random_set(5)
    for detection in detections:
        detection["score"] = 0.5
    shuffler = random.Random(0)
    plain, ours = set(), set()
    for _ in range(6):
        shuffler.shuffle(detections)
        plain.add(plain_pycocotools(truth, detections)[0])
        ours.add(evaluate(truth, detections).coco)
    assert len(plain) > 1
    assert len(ours) == 1


def test_trap_9_a_pixel_of_shift_is_seen_as_such():
    truth = grid_set(20)
    shifted = [{**d, "bbox": [d["bbox"][0] + 1, d["bbox"][1] + 1, 20, 20]} for d in perfect(truth)]
    figures = evaluate(truth, shifted)
    assert figures.coco[0] == pytest.approx(0.7, abs=0.01)
    row = figures.classes[0]
    assert (row.name, row.boxes, row.ap50, row.ap75) == ("relay", 20, one, one)
    assert row.ap == figures.coco[0]


def test_trap_10_boxes_keep_double_precision():
    # IoU is 0.95 to the last bit of a double and below it once stored as float32.
    truth = grid_set(1, side=1.9)
    box = [0.0, 0.0, 1.9, 1.9 * 0.95]
    detection = [{"image_id": 1, "category_id": 1, "bbox": box, "score": 0.9}]
    stored = [{**detection[0], "bbox": np.array(box, np.float32).tolist()}]
    truth["annotations"][0]["area"] = 1.9 * 1.9
    assert evaluate(truth, detection).coco[0] != evaluate(truth, stored).coco[0]
    assert evaluate(truth, detection).coco == plain_pycocotools(truth, detection)[0]


def test_input_is_left_as_it_was():
    truth, detections = random_set(3)
    before = copy.deepcopy((truth, detections))
    evaluate(truth, detections)
    assert (truth, detections) == before
