"""Kinds of errors, confusions, curves, thresholds and counts: each against cases worked by hand,
brute force or pycocotools."""

import itertools
import json
import random

import numpy as np
import pytest
from detections import CLASSES, found, jittered, truth_of

from detection.metrics.analysis import analyse, fit_thresholds
from detection.metrics.coco import evaluate, measure
from detection.metrics.counts import count, count_figures
from detection.metrics.curves import best_thresholds, curves, operating
from detection.metrics.matching import match
from detection.metrics.tide import KINDS, confusion_matrix, confusions, delta_ap50, kinds_of
from schematics.resampling import resample
from schematics.sheets import DataError

# Kinds of errors

SYMBOL = (100, 100, 40, 40)
ASIDE = (125, 100, 40, 40)  # IoU 0.23 with SYMBOL
CLOSE = (105, 100, 40, 40)  # IoU 0.78
AWAY = (600, 600, 40, 40)


@pytest.mark.parametrize(
    ("made", "kind_of_detection", "kind_of_truth"),
    [
        (found(10, 3, 0.9, *CLOSE), "found", "found"),
        (found(10, 7, 0.9, *CLOSE), "class", "class"),
        (found(10, 3, 0.9, *ASIDE), "localisation", "localisation"),
        (found(10, 7, 0.9, *ASIDE), "both", "missed"),
        (found(10, 3, 0.9, *AWAY), "background", "missed"),
    ],
)
def test_each_kind_of_error_is_told(made, kind_of_detection, kind_of_truth):
    kinds = kinds_of(match(truth_of([(3, *SYMBOL)]), [made]))
    assert [KINDS[kind] for kind in kinds.found] == [kind_of_detection]
    assert [KINDS[kind] for kind in kinds.truth] == [kind_of_truth]
    assert kinds.cause.tolist() == [-1 if kind_of_detection == "background" else 0]
    counts = kinds.counts()
    assert counts.pop(kind_of_detection) == 1
    assert counts.pop("missed") == (kind_of_truth == "missed")
    assert not any(counts.values())


def test_the_second_best_on_a_found_symbol_is_a_duplicate():
    made = [found(10, 3, 0.8, *CLOSE), found(10, 3, 0.9, *SYMBOL)]
    kinds = kinds_of(match(truth_of([(3, *SYMBOL)]), made))
    assert [KINDS[kind] for kind in kinds.found] == ["found", "duplicate"]
    assert kinds.cause.tolist() == [0, 0]


def test_detections_on_a_sheet_without_symbols_are_background():
    kinds = kinds_of(match(truth_of([], [(3, *SYMBOL)]), [found(10, 3, 0.9, *SYMBOL)]))
    assert [KINDS[kind] for kind in kinds.found] == ["background"]


def test_crowds_and_what_lies_in_them_have_no_kind():
    truth = truth_of([(3, 0, 0, 200, 200)])
    truth["annotations"][0]["iscrowd"] = 1
    kinds = kinds_of(match(truth, [found(10, 3, 0.9, 50, 50, 20, 20), found(10, 3, 0.8, *AWAY)]))
    assert kinds.truth.tolist() == [-1]
    assert kinds.found[0] == -1 and KINDS[kinds.found[1]] == "background"


def test_only_detections_above_their_threshold_have_a_kind():
    matches = match(
        truth_of([(3, *SYMBOL), (7, 300, 300, 40, 40)]),
        [found(10, 3, 0.3, *SYMBOL), found(10, 7, 0.3, 300, 300, 40, 40)],
    )
    kinds = kinds_of(matches, matches.above(np.array([0.5, 0.2, 0.5])))
    assert kinds.found.tolist() == [-1, 0]
    assert [KINDS[kind] for kind in kinds.truth] == ["missed", "found"]


def test_mending_class_gives_back_what_the_wrong_names_cost():
    """Four symbols of class 3, three found, one called 7; the only symbol of class 7 is found, below it."""
    truth = truth_of([(3, 100 * n, 0, 40, 40) for n in range(4)] + [(7, *AWAY)])
    made = [found(10, 3, 0.9, 100 * n, 0, 40, 40) for n in range(3)]
    made += [found(10, 7, 0.8, 300, 0, 40, 40), found(10, 7, 0.7, *AWAY)]
    before = (76 / 101 + 0.5) / 2  # class 3: recalls 0 to 0.75; class 7: precision 1/2
    gains = delta_ap50(match(truth, made))
    assert gains.pop("class") == pytest.approx(1 - before)
    assert not any(gains.values())


def test_mending_localisation_keeps_the_best_of_several():
    truth = truth_of([(3, *SYMBOL), (3, *AWAY)])
    made = [found(10, 3, 0.9, *ASIDE), found(10, 3, 0.8, 75, 100, 40, 40), found(10, 3, 0.7, *AWAY)]
    gains = delta_ap50(match(truth, made))
    assert gains.pop("localisation") == pytest.approx(1 - (51 / 101) / 3)
    assert not any(gains.values())


def test_mending_a_wrong_name_on_a_found_symbol_only_drops_it():
    truth = truth_of([(3, *SYMBOL), (3, *AWAY), (7, 300, 300, 40, 40)])
    made = [found(10, 3, 0.9, *SYMBOL), found(10, 7, 0.8, *CLOSE), found(10, 7, 0.7, 300, 300, 40, 40)]
    assert delta_ap50(match(truth, made))["class"] == pytest.approx(0.25)  # of class 7, from 1/2 to 1


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("background", found(10, 3, 0.9, *AWAY)),
        ("duplicate", found(10, 3, 0.6, *CLOSE)),
        ("both", found(10, 3, 0.9, 325, 300, 40, 40)),
    ],
)
def test_mending_a_stray_detection_drops_it(kind, extra):
    """Found: 3 at 0.7 and at 0.5, and 7. A stray above one of them costs precision."""
    truth = truth_of([(3, *SYMBOL), (3, 300, 100, 40, 40), (7, 300, 300, 40, 40)])
    made = [found(10, 3, 0.7, *SYMBOL), found(10, 3, 0.5, 300, 100, 40, 40)]
    made += [found(10, 7, 0.7, 300, 300, 40, 40)]
    cost = (1 / 3) / 2 if extra["score"] > 0.7 else (1 / 3) * (50 / 101) / 2
    gains = delta_ap50(match(truth, [*made, extra]))
    assert gains.pop(kind) == pytest.approx(cost)
    assert not any(gains.values())


def test_mending_missed_no_longer_asks_for_them():
    """Of class 3 half is missed; class 7 is missed whole and leaves the mean."""
    truth = truth_of([(3, *SYMBOL), (3, *AWAY), (7, 300, 300, 40, 40)])
    gains = delta_ap50(match(truth, [found(10, 3, 0.9, *SYMBOL)]))
    assert gains.pop("missed") == pytest.approx(1 - (51 / 101) / 2)
    assert not any(gains.values())


def test_a_symbol_with_a_mendable_error_on_it_is_not_missed():
    truth = truth_of([(3, *SYMBOL)])
    for box, number in ((ASIDE, 3), (CLOSE, 7)):
        assert delta_ap50(match(truth, [found(10, number, 0.1, *box)]))["missed"] == 0


# Confusions


def test_confusion_matrix_of_a_case_worked_by_hand():
    truth = truth_of(
        [(3, *SYMBOL), (3, 300, 100, 40, 40), (7, 500, 100, 40, 40), (41, 100, 500, 40, 40)], [(7, *SYMBOL)]
    )
    made = [
        found(10, 3, 0.9, *CLOSE),  # right
        found(10, 41, 0.8, 300, 100, 40, 40),  # a 3 called 41
        found(10, 7, 0.7, *AWAY),  # nothing there
        found(20, 7, 0.2, *SYMBOL),  # right, but below the threshold
    ]
    matches = match(truth, made)
    matrix = confusion_matrix(matches, matches.above(np.full(3, 0.5)))
    assert matrix.tolist() == [[1, 0, 1, 0], [0, 0, 0, 2], [0, 0, 0, 1], [0, 1, 0, 0]]
    assert confusions(matrix) == [(0, 2, 1)]


def test_overlapping_symbols_of_two_classes_are_not_confused():
    """The diagonal is what AP counts as right, whichever box is a little closer."""
    truth = truth_of([(3, *SYMBOL), (7, *CLOSE)])
    matches = match(truth, [found(10, 3, 0.9, *CLOSE), found(10, 7, 0.8, *SYMBOL)])
    matrix = confusion_matrix(matches, matches.above(np.zeros(3)))
    assert matrix.sum() == 2 and matrix[0, 0] == matrix[1, 1] == 1


def test_leftovers_pair_closest_first():
    truth = truth_of([(3, *SYMBOL), (3, 110, 100, 40, 40)])
    matches = match(truth, [found(10, 7, 0.9, *CLOSE), found(10, 41, 0.8, 109, 100, 40, 40)])
    matrix = confusion_matrix(matches, matches.above(np.zeros(3)))
    assert matrix[0].tolist() == [0, 1, 1, 0] and matrix.sum() == 2


@pytest.mark.parametrize("seed", range(3))
def test_confusion_rows_are_the_boxes_and_columns_the_detections(seed):
    matches = match(*jittered(seed, crowd=True))
    kept = matches.above(np.full(3, 0.3))
    matrix, at = confusion_matrix(matches, kept), operating(matches, kept)
    assert matrix[:-1].sum(1).tolist() == at.boxes.tolist()
    assert matrix[:, :-1].sum(0).tolist() == at.found.tolist()
    assert np.diag(matrix)[:-1].tolist() == at.right.tolist()


# Curves and thresholds


def test_the_mean_of_a_precision_curve_is_ap50():
    truth, detections = jittered(1)
    lines = curves(match(truth, detections))
    for row, ours in zip(evaluate(truth, detections).classes, lines.precision, strict=True):
        if row.boxes:
            assert ours.mean() == pytest.approx(row.ap50, abs=1e-12)
        else:
            assert np.isnan(ours).all()


def test_the_f1_curve_is_the_f1_at_each_threshold():
    matches = match(*jittered(2, crowd=True))
    lines = curves(matches)
    for n in (0, 17, 50, 99, 100):
        at = operating(matches, matches.above(np.full(3, lines.thresholds[n])))
        assert lines.f1[:2, n].tolist() == at.f1[:2].tolist()
    assert np.isnan(lines.f1[2]).all()


@pytest.mark.parametrize(("seed", "ties"), [*itertools.product(range(4), (False, True))])
def test_no_other_threshold_has_a_higher_f1(seed, ties):
    truth, detections = jittered(seed, ties=ties)
    matches = match(truth, detections)
    best = best_thresholds(matches)
    ours = operating(matches, matches.above(best)).f1
    for score in {*matches.found.score.tolist(), 0.0, 1.1}:
        others = operating(matches, matches.above(np.full(3, score))).f1
        assert (others[:2] <= ours[:2]).all()
    random.Random(seed).shuffle(detections)
    assert best_thresholds(match(truth, detections)).tolist() == best.tolist()


def test_a_threshold_lies_between_the_last_counted_and_the_next():
    truth = truth_of([(3, *SYMBOL), (7, *AWAY)])
    made = [found(10, 3, 0.8, *SYMBOL), found(10, 3, 0.4, *AWAY), found(10, 7, 0.7, *AWAY)]
    thresholds = best_thresholds(match(truth, made))
    assert thresholds[:2] == pytest.approx([0.6, 0.7])  # of class 7 nothing comes after


def test_a_class_without_boxes_or_finds_takes_the_threshold_of_all_pooled():
    truth = truth_of([(3, *SYMBOL), (41, 0, 0, 40, 40)])
    made = [found(10, 3, 0.8, *SYMBOL), found(10, 7, 0.4, *AWAY), found(10, 41, 0.3, *AWAY)]
    assert best_thresholds(match(truth, made)) == pytest.approx([0.8, 0.6, 0.6])
    assert best_thresholds(match(truth, [])).tolist() == [0.5, 0.5, 0.5]


# Counts


def test_counts_of_three_sheets_worked_by_hand():
    truth = truth_of([(3, *SYMBOL), (3, *AWAY), (7, 300, 300, 40, 40)], [(3, *SYMBOL)], [])
    made = [found(10, 3, 0.9, *SYMBOL), found(10, 3, 0.9, *ASIDE)]  # both 3s, one badly; no 7
    made += [found(20, 3, 0.9, *SYMBOL), found(20, 41, 0.9, *AWAY), found(20, 3, 0.1, *AWAY)]
    matches = match(truth, made)
    counts = count(matches, matches.above(np.full(3, 0.5)))
    assert counts.truth.tolist() == [[2, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert counts.found.tolist() == [[2, 0, 0], [1, 0, 1], [0, 0, 0]]
    figures = count_figures(counts, resample(3, 1000))
    assert figures["exact_pairs"].value == 2 / 4
    assert figures["exact_sheets"].value == 1 / 3
    assert figures["count_error"].value == 2 / 4
    assert figures["total_error"].value == 2 / 4
    assert figures["exact_sheets"].low == 0 and figures["exact_sheets"].high == 1


# All together


def test_an_analysis_agrees_with_the_figures_and_goes_into_json():
    truth, detections = jittered(4)
    figures, matches = measure(truth, detections)
    analysis = analyse(matches, resamples=50)
    table = json.loads(json.dumps(analysis.to_dict(), allow_nan=False))
    for name in ("AP", "AP50", "AP75"):
        bounds = table["intervals"][name]
        assert bounds["value"] == figures.fitted[name]
        assert bounds["low"] <= bounds["value"] <= bounds["high"]
    assert table["max_detections"] == figures.max_detections
    assert [row["boxes"] for row in table["classes"]] == [row.boxes for row in figures.classes]
    assert table["classes"][2]["AP50"]["value"] is None
    kinds, matrix = table["errors"]["counts"], np.array(table["confusion"])
    assert kinds["found"] == np.diag(matrix)[:-1].sum()
    f1 = 2 * kinds["found"] / (matrix[:-1].sum() + matrix[:, :-1].sum())
    assert table["intervals"]["F1"]["value"] == pytest.approx(f1)


def test_counts_are_not_cut_at_the_limit_of_ap():
    rows = [found(10, 3, 0.9, *SYMBOL)] + [found(10, 3, 0.8, 400, 2 * n, 9, 9) for n in range(299)]
    rows += [found(10, 7, 0.8, 600, 2 * n, 9, 9) for n in range(250)]
    truth = truth_of([(3, *SYMBOL)])
    analysis = analyse(match(truth, rows), thresholds=dict.fromkeys(CLASSES, 0.5), resamples=5)
    assert analysis.matches.limit == 100
    assert analysis.counts.found.tolist() == [[300, 250, 0]]
    assert analysis.operating.found.tolist() == [300, 250, 0]
    assert analysis.confusion[-1].tolist() == [299, 250, 0, 0]
    assert analysis.intervals["AP50"].value == evaluate(truth, rows).fitted["AP50"]


def test_an_analysis_does_not_depend_on_the_order_of_detections():
    truth, detections = jittered(6, ties=True)
    first = analyse(match(truth, detections), resamples=20).to_dict()
    random.Random(0).shuffle(detections)
    assert analyse(match(truth, detections), resamples=20).to_dict() == first


def test_thresholds_that_came_with_the_detector_are_used():
    truth, detections = jittered(7)
    analysis = analyse(match(truth, detections), thresholds={3: 0.25, 7: 0.75, 41: 0.5}, resamples=5)
    assert analysis.thresholds.tolist() == [0.25, 0.75, 0.5] and analysis.thresholds_given
    assert not analyse(match(truth, detections), resamples=5).thresholds_given


def test_thresholds_fitted_on_one_split_are_those_an_analysis_of_it_chooses():
    truth, detections = jittered(7)
    fitted = fit_thresholds(match(truth, detections))
    assert list(fitted) == list(CLASSES)
    assert analyse(match(truth, detections), resamples=5).thresholds.tolist() == list(fitted.values())


def test_a_class_on_few_sheets_has_no_interval():
    analysis = analyse(match(truth_of([(3, *SYMBOL)], *[[(7, *AWAY)]] * 5), []), resamples=20)
    assert np.isnan(analysis.class_ap50[0].low)
    assert analysis.class_ap50[1].low == analysis.class_ap50[1].high == 0


def test_nothing_found_is_analysed_too():
    analysis = analyse(match(truth_of([(3, *SYMBOL)], []), []), resamples=10)
    assert analysis.intervals["AP50"].value == 0
    assert analysis.intervals["exact_sheets"].value == 0.5
    assert analysis.kinds.counts()["missed"] == 1 and analysis.delta_ap50["background"] == 0
    assert analysis.delta_ap50["missed"] == 1, "the one error there is"
    assert analysis.sheet_f1[0] == 0 and np.isnan(analysis.sheet_f1[1])


def test_detections_of_another_split_are_refused():
    with pytest.raises(DataError, match="image_id 99"):
        analyse(match(truth_of([(3, *SYMBOL)]), [found(99, 3, 0.5, *SYMBOL)]))
