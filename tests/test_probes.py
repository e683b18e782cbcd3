"""Probes say what is known in advance, and intervals over sheets are as wide as sheets are few."""

import json

import numpy as np
import pytest
import torch

from pretraining import plots
from pretraining.embedding import evenly, tsne
from pretraining.judgement import difference, judge, report, write_judgements
from pretraining.probe import knn_votes, linear_probe, neighbours, sheet_parts
from pretraining.shots import difference as gain
from pretraining.shots import draw_shots, shot_curve, table, write_curves

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ["valve", "pump", "motor", "lamp"]
DECAYS = (1e-4, 1e-2)
Y = torch.arange(240) % 4
SHEETS = [f"sheet {n // 12}" for n in range(240)]  # twenty, with three crops of each class


def features(seed=0, spread=0.3):
    """Clouds around four corners: [240, 16]."""
    corners = torch.eye(4, 16) * 4
    return corners[Y] + spread * torch.randn(240, 16, generator=torch.Generator().manual_seed(seed))


def shuffled(seed):
    return Y[torch.randperm(240, generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize("probe", ["linear", "knn"])
def test_separable_features_are_all_right_and_permuted_labels_are_at_chance(probe):
    def scores(labels):
        if probe == "knn":
            return knn_votes(features(), labels, features(1), 4)
        return linear_probe((features(), labels), (features(2), labels), features(1), 4, DECAYS).scores

    right = judge(scores(Y), Y, SHEETS, CLASSES, 200)
    assert all(figure.value == figure.low == figure.high == 1 for figure in right.figures.values())
    assert list(right.classes) == CLASSES and (right.confusion == np.eye(4) * 60).all()
    chance = judge(scores(shuffled(3)), shuffled(4), SHEETS, CLASSES, 200)
    assert 0.15 < chance.figures["top1"].value < 0.35 and chance.figures["mean_per_class"].value < 0.35
    above = difference(right, chance)["top1"]
    assert above.value == pytest.approx(1 - chance.figures["top1"].value) and above.low > 0.5
    assert difference(right, right)["top1"].high == 0


def test_an_interval_over_sheets_is_wider_where_the_crops_of_a_sheet_are_alike():
    wrong_sheets = torch.tensor([int(sheet.split()[1]) % 2 for sheet in SHEETS])
    scores = torch.nn.functional.one_hot((Y + wrong_sheets) % 4, 4).float()
    over_sheets = judge(scores, Y, SHEETS, CLASSES, 500).figures["top1"]
    over_crops = judge(scores, Y, [str(n) for n in range(240)], CLASSES, 500).figures["top1"]
    assert over_sheets.value == over_crops.value == 0.5
    assert over_sheets.high - over_sheets.low > 3 * (over_crops.high - over_crops.low)


def test_top_5_counts_the_five_best_and_no_class_without_a_vote():
    scores = torch.arange(8.0).repeat(8, 1)  # class 7 is the first choice, 3 the fifth
    assert (
        judge(scores, torch.arange(8), list("abcdefgh"), list("ABCDEFGH"), 20).figures["top5"].value == 5 / 8
    )
    scores[:, :6] = -torch.inf
    assert (
        judge(scores, torch.arange(8), list("abcdefgh"), list("ABCDEFGH"), 20).figures["top5"].value == 2 / 8
    )


def test_a_class_that_few_resamples_have_leaves_no_nan_and_an_unseen_one_is_wrong(tmp_path):
    labels = torch.tensor([0, 0, 0, 0, 2])
    scores = torch.eye(4)[[0, 0, 1, 0, 3]]
    found = judge(scores, labels, ["a", "b", "c", "d", "e"], CLASSES, 50)
    assert list(found.classes) == ["valve", "motor"] and found.classes["motor"].value == 0
    assert found.figures["mean_per_class"].value == pytest.approx(0.375)
    write_judgements(tmp_path / "j.json", {"weights": found, "raw": found}, list("abcde"), {"k": 3})
    document = json.loads((tmp_path / "j.json").read_text(), parse_constant=pytest.fail)
    assert (
        document["top1"]["value"] == 0.6 and document["baselines"]["raw"]["difference"]["top1"]["high"] == 0
    )
    assert (document["crops"], document["sheets"], document["settings"]) == (5, 5, {"k": 3})
    text = report({"mine": found, "raw": found}, list("abcde"), "sheets")
    assert (
        "5 sheets, which are few" in text and "its lowest classes: motor 0.00 of 1, valve 0.75 of 4" in text
    )


def test_cross_validation_keeps_a_sheet_in_one_part():
    sheets = ["long"] * 50 + [f"s{n // 3}" for n in range(60)]
    parts = sheet_parts(sheets)
    assert len(parts) == 5 and (sum(part.astype(int) for part in parts) == 1).all()
    for part in parts:
        assert not {s for s, held in zip(sheets, part, strict=True) if held} & {
            s for s, held in zip(sheets, part, strict=True) if not held
        }
    assert [part.sum() for part in sheet_parts(["one"] * 10)] == [2] * 5  # a single sheet: by crops
    assert sheet_parts(["one"]) == []


@pytest.mark.parametrize("decays", [(1e-4, 1e3), (1e3, 1e-4)])
def test_the_weight_decay_that_is_better_on_other_crops_is_taken(decays):
    """With 1e3 the weights vanish, so that every crop is of the class that most crops are of."""
    most = torch.nonzero((Y == 0) | (torch.arange(240) < 80))[:, 0]
    train = features()[most], Y[most]
    for chooser in ((features(1), Y), [SHEETS[n] for n in most]):
        assert linear_probe(train, chooser, features(2), 4, decays).weight_decay == 1e-4
    alone = linear_probe((features()[:1], Y[:1]), SHEETS[:1], features(), 4, DECAYS)
    assert alone.scores.isfinite().all() and (alone.scores.argmax(1) == 0).all()


def test_draws_are_nested_and_take_all_of_a_small_class():
    labels = np.array([0] * 30 + [1] * 3 + [2])
    one, five = draw_shots(labels, 1, 0, 4), draw_shots(labels, 5, 0, 4)
    assert np.bincount(labels[one]).tolist() == [1, 1, 1] and np.bincount(labels[five]).tolist() == [5, 3, 1]
    assert set(one) <= set(five) and draw_shots(labels, 0, 0, 4).tolist() == list(range(34))
    assert draw_shots(labels, 5, 0, 4).tolist() != draw_shots(labels, 5, 0, 5).tolist()


@pytest.mark.parametrize("valid", [True, False], ids=["valid", "one split"])
def test_shots_of_all_are_the_linear_probe_and_fewer_are_worse(valid, tmp_path):
    x, test = features(spread=2.0), features(1, 2.0)
    chooser = (features(2, 2.0), Y) if valid else None
    options = ((SHEETS, SHEETS), CLASSES, (1, 0), 3, DECAYS, 100, 0)
    few, whole = points = shot_curve((x, Y), chooser, (test, Y), *options)
    probe = linear_probe((x, Y), chooser or SHEETS, test, 4, DECAYS)
    linear = judge(probe.scores, Y, SHEETS, CLASSES, 100)
    assert whole.top1 == linear.figures["top1"] and whole.crops == 240
    assert few.top1.value < whole.top1.value - 0.1 and few.crops == 4
    other = shot_curve((x * 2, Y), chooser, (test * 2, Y), *options)  # standardised, so the same
    assert gain(points[0], other[0]).value == pytest.approx(0, abs=0.01)
    curves = {"mine, $5": points, "_other": other}
    assert "1 (4 crops)" in table(curves)
    write_curves(tmp_path, curves, {})
    assert len((tmp_path / "shots.csv").read_text().splitlines()) == 1 + 2 * (2 + 3)
    assert json.loads((tmp_path / "shots.json").read_text())["curves"]["_other"]["all"]["crops"] == 240
    plots.plot_shots(tmp_path / "shots.png", curves, "top-1")
    assert (tmp_path / "shots.png").read_bytes().startswith(b"\x89PNG")


def test_neighbours_come_nearest_first_and_knn_votes_for_their_classes():
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    similarity, places = neighbours(train, torch.tensor([[2.0, 0.0]]), 5)
    assert places.tolist() == [[0, 1, 2]] and similarity[0, 0] == 1 and similarity[0, 2] == 0
    votes = knn_votes(train, torch.tensor([1, 1, 3]), torch.tensor([[2.0, 0.0]]), 5, k=2)
    assert votes.isinf().tolist() == [[True, False, True, True, True]]


@pytest.mark.parametrize("x", [features()[:40], torch.ones(5, 16), features()[:2]], ids=["40", "alike", "2"])
def test_t_sne_keeps_clouds_apart_and_takes_what_is_degenerate(x):
    points = tsne(x, seed=0)
    assert points.shape == (len(x), 2) and np.isfinite(points).all() and (points == tsne(x, seed=0)).all()
    if len(x) == 40:
        nearest = ((points[:, None] - points) ** 2).sum(-1) + np.eye(40) * 1e9
        assert (Y[:40].numpy()[nearest.argmin(1)] == Y[:40].numpy()).all()


def test_evenly_spaced_crops():
    assert evenly(7, 10).tolist() == list(range(7)) and evenly(101, 5).tolist() == [0, 25, 50, 75, 100]


def test_names_are_drawn_letter_by_letter(tmp_path):
    names = ["_4", "a $x_1$ {", "Größe <b>", "x" * 90]
    plots.plot_confusion(tmp_path / "c.png", np.eye(4, dtype=np.int64), names)
    plots.plot_embeddings(tmp_path / "e.png", {"$": (np.zeros((4, 2)), [0, 1, 2, 3])}, names)
    assert {path.read_bytes()[:4] for path in tmp_path.iterdir()} == {b"\x89PNG"}
