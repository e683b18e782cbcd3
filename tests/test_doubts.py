"""Planted faults are found, and called what they are; a score is the share of faults among such cases."""

from dataclasses import replace

import numpy as np
import pytest

from detection.detections import Detections
from detection.labelling.doubts import (
    CLASS,
    DOUBLED,
    HELD,
    KINDS,
    MISSING,
    PLACED,
    SPURIOUS,
    Judged,
    Labels,
    find_doubts,
    look,
    shares,
)

SIDE = 40.0


def sheet(boxes, labels, *found, bare=()):
    """found: (box, class, score) of each detection, best first; bare: the labels that hold no ink."""
    places = [box for box, _, _ in found]
    marks = np.isin(np.arange(len(boxes)), bare)
    detections = Detections(
        np.array(places, float).reshape(-1, 4),
        np.array([score for _, _, score in found], float),
        np.array([label for _, label, _ in found], int),
    )
    given = Labels(np.array(boxes, float).reshape(-1, 4), np.array(labels, int), marks)
    none = Labels(np.empty((0, 4)), np.empty(0, int), np.empty(0, bool))
    return Judged(given, detections, none)


def square(x, y=0.0, side=SIDE):
    return [x, y, x + side, y + side]


def clean_set(count=60, seed=0):
    """Sheets of eight symbols of three classes in a row, and a detector that is good but not perfect.

    It misses one symbol in fifty, calls one in fifty by another name, and sees one on bare paper on every
    fourth sheet with a score like those of symbols, only lower as a rule.
    """
    rng = np.random.default_rng(seed)
    sheets = []
    for number in range(count):
        boxes = np.array([square(100 * n + rng.uniform(0, 40)) for n in range(8)])
        labels = rng.integers(1, 4, 8)
        found = []
        for box, label in zip(boxes, labels.tolist(), strict=True):
            kind, score = rng.random(), float(rng.beta(8, 2))
            if kind > 0.04:
                found.append((box + rng.normal(0, 2, 4), label, score))
            elif kind > 0.02:
                found.append((box + rng.normal(0, 2, 4), label % 3 + 1, 0.5 * score))
                found.append((box + rng.normal(0, 2, 4), label, 0.3 * score))
        if number % 4 == 0:
            found.append((square(50, 300), 1, float(rng.beta(2, 8))))
        sheets.append(sheet(boxes, labels, *sorted(found, key=lambda row: -row[2])))
    elsewhere = [replace(s.given, boxes=s.given.boxes + np.array([50.0, 150, 50, 150])) for s in sheets]
    return [replace(s, elsewhere=elsewhere[n - 1]) for n, s in enumerate(sheets)]


def with_labels(judged, boxes, labels):
    given = Labels(np.array(boxes, float), np.array(labels), np.zeros(len(labels), bool))
    return replace(judged, given=given)


def plant(sheets):
    """Five faults of each kind, one on a sheet from the first on; and (sheet, kind) of each."""
    made, faults = list(sheets), []
    for number in range(5 * len(KINDS)):
        kind, given = number % len(KINDS), sheets[number].given
        boxes, labels = given.boxes.copy(), given.labels.copy()
        if kind == MISSING:
            boxes, labels = boxes[1:], labels[1:]
        elif kind == CLASS:
            labels[0] = labels[0] % 3 + 1
        elif kind == DOUBLED:
            boxes, labels = np.vstack([boxes, boxes[0] + [2, 1, 3, 1]]), np.append(labels, labels[0])
        elif kind == PLACED:
            boxes[0] += 0.4 * SIDE * np.array([1, -1, 1, -1])
        else:
            boxes, labels = np.vstack([boxes, square(300, 200)]), np.append(labels, 1)
        made[number] = with_labels(sheets[number], boxes, labels)
        faults.append((number, kind))
    return made, faults


def test_most_planted_faults_come_first_and_are_called_what_they_are():
    """25 faults among 480 labels, beside the detector's own mistakes, some of which look the same."""
    made, faults = plant(clean_set())
    doubts = find_doubts(made)
    for first, least in ((25, 15), (50, 20)):
        called = {(doubt.sheet, doubt.kind) for doubt in doubts[:first]} & set(faults)
        assert len(called) >= least, sorted(called)
    clean = find_doubts(clean_set())
    assert sum(doubt.score for doubt in clean[:25]) < 0.8 * sum(doubt.score for doubt in doubts[:25])


def only(judged, kind):
    """The cases of a kind on one sheet."""
    return [doubt for doubt in look(0, judged).doubts if doubt.kind == kind]


def test_a_sure_detection_where_there_is_no_label_misses_one():
    seen = sheet([square(0)], [1], (square(0), 1, 0.9), (square(200), 2, 0.8), (square(204), 1, 0.6))
    (doubt,) = only(seen, MISSING)
    assert (doubt.label, doubt.given, doubt.suggested) == (-1, 0, 2), "the best of those on each other"
    assert doubt.box == tuple(square(200))


@pytest.mark.parametrize(
    "label, box",
    [
        (1, square(5)),  # on it, badly placed
        (2, square(5)),  # of another class
        (2, square(12, side=20.0)),  # a part of a symbol of its class
        (0, square(12, side=20.0)),  # a part of something that can't be judged
    ],
)
def test_a_detection_on_a_label_misses_none(label, box):
    assert not only(sheet([square(0)], [label], (box, 2 if label != 1 else 1, 0.9)), MISSING)


def test_a_symbol_within_a_larger_one_of_another_class_may_be_missing():
    assert only(sheet([square(0, side=200.0)], [1], (square(50), 2, 0.9)), MISSING)


def test_a_label_that_is_found_by_another_name_is_of_the_wrong_class():
    seen = sheet([square(0), square(100)], [1, 1], (square(0), 2, 0.9), (square(0), 1, 0.1))
    (doubt,) = only(seen, CLASS)
    assert (doubt.label, doubt.given, doubt.suggested, doubt.box) == (0, 1, 2, None)
    right = sheet([square(0)], [1], (square(0), 1, 0.9), (square(0), 2, 0.1))
    assert not only(right, CLASS)


def test_what_another_label_accounts_for_is_no_reason():
    """Two symbols on each other, both found and both labelled."""
    both = sheet([square(0), square(8)], [1, 2], (square(0), 1, 0.9), (square(8), 2, 0.8))
    assert not only(both, CLASS) and not only(both, MISSING)
    (doubled,) = only(both, DOUBLED)
    assert doubled.score < 0.2
    same = sheet([square(0), square(16)], [1, 1], (square(0), 1, 0.9), (square(16), 1, 0.8))
    assert [doubt.box for doubt in only(same, PLACED)] == [tuple(square(0)), tuple(square(16))]


def test_of_two_labels_on_one_symbol_the_less_sure_one_goes():
    (doubt,) = only(sheet([square(0), square(3)], [1, 2], (square(0), 2, 0.9)), DOUBLED)
    assert (doubt.label, doubt.twin, doubt.suggested) == (0, 1, 0)
    assert not only(sheet([square(0), square(20)], [1, 2], (square(0), 2, 0.9)), DOUBLED)


def test_a_label_beside_its_symbol_is_badly_placed():
    (doubt,) = only(sheet([square(16)], [1], (square(0), 1, 0.9)), PLACED)
    assert (doubt.label, doubt.suggested, doubt.box) == (0, 1, tuple(square(0)))


def test_labels_without_ink_come_before_those_that_were_only_not_found():
    boxes = [square(100 * n) for n in range(6)]
    seen = sheet(boxes, [1] * 6, *((box, 1, 0.9) for box in boxes[:4]), bare=[5])
    spurious = sorted(only(seen, SPURIOUS), key=lambda doubt: -doubt.score)
    assert [doubt.label for doubt in spurious[:2]] == [5, 4]
    assert spurious[2].score == pytest.approx(0.1)


def test_a_label_is_doubted_once_and_one_that_cannot_be_judged_never():
    made, _ = plant(clean_set(30))
    doubts = find_doubts(made)
    labels = [(doubt.sheet, doubt.label) for doubt in doubts if doubt.label >= 0]
    assert len(labels) == len(set(labels))
    assert [doubt.score for doubt in doubts] == sorted((doubt.score for doubt in doubts), reverse=True)
    assert not find_doubts([sheet([square(0)], [0], (square(0), 1, 0.9))])


def test_no_sheet_no_label_or_no_detection_is_no_doubt_or_a_calm_one():
    assert find_doubts([]) == []
    assert find_doubts([sheet([], [])]) == []
    assert all(0 <= doubt.score <= 1 for doubt in find_doubts([sheet([square(0)], [1])]))


def test_a_score_is_the_share_of_faults_among_cases_of_such_evidence():
    """Against a naive transcription of the formula."""
    rng = np.random.default_rng(1)
    seen, like = rng.random(200).round(2), rng.beta(5, 1, 400).round(2)
    of, like_of = rng.integers(1, 4, 200), rng.integers(1, 4, 400)
    got = shares(seen, of, like, like_of, weight=0.5)
    levels = [e for e in like if (like >= e).mean() >= 0.1]
    weight = 0.5 * min(1, *(((seen >= e).sum() + 1) / (0.5 * (like >= e).sum()) for e in levels))
    assert weight < 0.5

    def raw(evidence, k):
        expected, cases = weight * (like >= evidence).sum(), (seen >= evidence).sum()
        pooled = expected / (max(expected, cases) + 1)
        mine = weight * ((like >= evidence) & (like_of == k)).sum()
        return (mine + HELD * pooled) / (max(mine, ((seen >= evidence) & (of == k)).sum()) + HELD)

    for n in range(200):
        below = [raw(e, of[n]) for e, k in zip(seen, of, strict=True) if k == of[n] and e <= seen[n]]
        assert got[n] == pytest.approx(max(below))


def test_faults_that_nobody_sees_are_not_believed_in():
    """With RATE as it is, eight faults of such evidence would be expected; one such case is seen."""
    like, like_of = np.full(400, 0.9), np.ones(400, int)
    few, many = (shares(np.full(n, 0.9), np.ones(n, int), like, like_of, 0.02) for n in (1, 8))
    assert few[0] == pytest.approx(0.667, abs=0.1) and many[0] > 0.85
    crowd = shares(np.full(200, 0.9), np.ones(200, int), like, like_of, 0.02)
    assert crowd[0] == pytest.approx(0.04, abs=0.005)
