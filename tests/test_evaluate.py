"""evaluate.py on test sets that differ from what the detector knows, and compare.py on what it leaves.

The detector is untrained: looked at is which boxes and detections are counted, not how many are right.
"""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_detector import small_spec

from cluster import checkpoint
from cluster.errors import UserError
from detection.anchors import fit_anchors
from detection.classes import match_classes
from detection.detections import Detections
from detection.model import Detector
from schematics.coco import read_split

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent
CASES = ROOT / "tests" / "cases"
OTHER_IDS, FEWER = (CASES / "15-test-set-with-other-class-list" / name for name in ("h2a", "h2b"))
LOST = CASES / "20-missing-test-sheets" / "input"


def script(name):
    """A file of evaluate/ as a module."""
    spec = importlib.util.spec_from_file_location(f"evaluate_{name}", ROOT / "evaluate" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


evaluate, compare = script("evaluate"), script("compare")


def write_detector(path, *categories):
    torch.manual_seed(0)
    spec = small_spec(
        categories=categories, window=320, anchors=fit_anchors(np.array([[0.0, 0, 24, 24]])), proposals=64
    )
    state = {
        "spec": spec.to_dict(),
        "model": Detector(spec).state_dict(),
        "thresholds": {number: 0.0 for number, _ in categories},
        "train_boxes": {number: 5 for number, _ in categories},
    }
    checkpoint.write_file(path, state)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_detector(tmp_path_factory.mktemp("detector") / "model.pt", (1, "valve"), (2, "pump"))


def measured(model, out, data, **flags):
    """metrics.json of evaluate.py on the split test, and the note lines that every output has."""
    config = {"data_dir": data, "pictures": 1, "device": "cpu", **flags}
    evaluate.main(evaluate.EvaluateConfig(checkpoint=model, out=out, **config))
    metrics = json.loads((out / "metrics.json").read_text())
    page, text = ((out / name).read_text() for name in ("report.html", "validation_results.txt"))
    for note in metrics["notes"]:
        assert note in text and note in page.replace("&#39;", "'"), note
    return metrics


def classes_of(metrics):
    return {(row["category_id"], row["name"]): row["boxes"] for row in metrics["classes"]}


def detections_of(metrics):
    return {row["name"]: row["detections"] for row in metrics["classes"]}


def test_classes_are_matched_by_name(model, tmp_path, capsys):
    """The names of h2a stand under 0 and 1, those of the detector under 1 and 2; h2b has no pump."""
    by_name = measured(model, tmp_path / "a", OTHER_IDS)
    assert classes_of(by_name).keys() == {(0, "valve"), (1, "pump")} and by_name["notes"] == []
    results = json.loads((tmp_path / "a" / "predictions.json").read_text())
    assert {row["category_id"] for row in results} == {0, 1}
    fewer = measured(model, tmp_path / "b", FEWER)
    assert classes_of(fewer).keys() == {(1, "valve")}
    assert detections_of(fewer)["valve"] == detections_of(by_name)["valve"]
    pumps = detections_of(by_name)["pump"]
    (note,) = fewer["notes"]
    assert note == f"{pumps} detections of classes that the data does not list, in no figure: pump {pumps}"
    assert fewer["left_out"]["detections_of_unlisted_classes"] == {"pump": pumps}
    assert note in capsys.readouterr().out


def test_a_class_that_the_detector_does_not_know_is_counted_beside_the_figures(tmp_path):
    model = write_detector(tmp_path / "model.pt", (7, "pump"))
    metrics = measured(model, tmp_path / "out", OTHER_IDS)
    valves = sum(
        row["category_id"] == 0
        for row in json.loads((OTHER_IDS / "test" / "_annotations.coco.json").read_text())["annotations"]
    )
    assert classes_of(metrics).keys() == {(1, "pump")} and valves > 0
    assert metrics["left_out"]["boxes_of_unknown_classes"] == {"valve": valves}
    assert metrics["notes"] == [
        f"{valves} boxes of classes that the detector does not know, in no figure: valve {valves}"
    ]
    stranger = write_detector(tmp_path / "stranger.pt", (1, "door"))
    with pytest.raises(
        UserError, match=r"no box of a class that .* knows; it has boxes of valve, pump, not of"
    ):
        measured(stranger, tmp_path / "none", OTHER_IDS)
    assert not (tmp_path / "none").exists()


def test_names_in_another_order_or_twice(tmp_path):
    """A name that stands twice is one class, unless detector and data have it under the same ids."""
    split = read_split(OTHER_IDS / "test")  # valve 0, pump 1
    found = Detections(np.zeros((3, 4)), np.array([0.9, 0.8, 0.7]), np.array([1, 2, 3]))
    turned = match_classes([(5, "pump"), (3, "lamp"), (9, "valve")], split)
    assert turned.relabel(found).labels.tolist() == [2, 1] and turned.relabel(found).scores.tolist() == [
        0.9,
        0.7,
    ]
    assert turned.unknown == {} and [sheet.labels.tolist() for sheet in turned.split.sheets] == [
        sheet.labels.tolist() for sheet in split.sheets
    ]
    twice = match_classes([(1, "valve"), (2, "valve"), (3, "pump")], split)
    assert twice.relabel(found).labels.tolist() == [1, 1, 2]

    split.categories[1] = type(split.categories[1])(1, "valve")  # both names are valve now
    one = match_classes([(4, "valve")], split)
    assert [c.id for c in one.split.categories] == [0] and one.labels.tolist() == [0, 1]
    assert all((sheet.labels == 1).all() for sheet in one.split.sheets)
    same = match_classes([(0, "valve"), (1, "valve")], split)
    assert [c.id for c in same.split.categories] == [0, 1] and same.labels.tolist() == [0, 1, 2]


def test_a_test_set_that_lost_sheets_says_so_everywhere(model, tmp_path, capsys):
    metrics = measured(model, tmp_path / "out", LOST, split="test")
    assert metrics["left_out"]["sheets"] == ["s0.png", "s1.png"] and metrics["sheets"] == {"3": "s2.png"}
    first, second = metrics["notes"]
    assert "test: " in first and "8 boxes" in first and "2 sheets" in first
    assert second == "sheets that are not in the figures: s0.png, s1.png"
    said = capsys.readouterr().out
    assert first in said and second in said


def test_without_data_dir_and_split_it_is_what_the_detector_was_finetuned_on(model, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(model.parent, run)
    flags = {"checkpoint": run / "model.pt", "unfinished": True, "pictures": 0, "device": "cpu"}
    with pytest.raises(UserError, match=r"--data-dir is required: no .*config\.json says on what model\.pt"):
        evaluate.main(evaluate.EvaluateConfig(**flags))
    data = shutil.copytree(LOST, tmp_path / "data")
    (run / "config.json").write_text(json.dumps({"data_dir": str(data)}))
    evaluate.main(evaluate.EvaluateConfig(**flags))
    assert f"on {data / 'test'}, 1 sheet, in fp32\n" in capsys.readouterr().out
    shutil.rmtree(data / "test")
    evaluate.main(evaluate.EvaluateConfig(**flags))
    assert f"on {data / 'valid'}, 3 sheets, in fp32\n" in capsys.readouterr().out
    assert (run / "evaluate-test").is_dir() and (run / "evaluate-valid").is_dir()
    shutil.rmtree(data)
    with pytest.raises(
        UserError, match=r"--data-dir is required: .*config\.json names .*data, which is not there"
    ):
        evaluate.main(evaluate.EvaluateConfig(**flags))


def test_ranges_of_counts_are_made_tried_and_refused_in_words(model, tmp_path, capsys):
    first = measured(model, tmp_path / "first", OTHER_IDS)
    assert first["ranges"].keys() == {"from"} and "written before there were any" in first["ranges"]["from"]
    made = json.loads((tmp_path / "first/ranges.json").read_text())
    assert (made["names"], made["sheets"], sum(made["boxes"])) == (["valve", "pump"], 2, 8)
    few = measured(model, tmp_path / "few", OTHER_IDS, ranges=tmp_path / "first/ranges.json")
    said = "no ranges of the counts: 2 labelled sheets can't promise 90 % for a count: that takes 9"
    assert few["ranges"]["from"] == said and said in capsys.readouterr().out
    for part in ("found", "unfound"):
        made[part] = [{"reach": 3.0, "sheets": 30, "pooled": False}] * 2
    made |= {"sheets": 30, "total": {"reach": 1.0, "sheets": 30, "pooled": False}}
    (tmp_path / "ranges.json").write_text(json.dumps(made))
    tried = measured(model, tmp_path / "tried", OTHER_IDS, ranges=tmp_path / "ranges.json", pictures=0)[
        "ranges"
    ]
    assert tried["total"]["ranges"] == 2 and tried["found"]["ranges"] + tried["not found"]["ranges"] == 4
    assert [row["name"] for row in tried["classes"]] == ["valve", "pump"]
    assert (
        "90 % ranges of the counts held the true one for"
        in (tmp_path / "tried/validation_results.txt").read_text()
    )
    fewer = measured(model, tmp_path / "fewer", FEWER, ranges=tmp_path / "ranges.json", pictures=0)["ranges"]
    assert fewer["total"]["ranges"] == 0, "that of two classes says nothing of the total of one"


def test_two_runs_are_compared_on_the_same_sheets(model, tmp_path, capsys):
    one, other = tmp_path / "one", tmp_path / "other"
    measured(model, one, OTHER_IDS)
    shutil.copytree(one, other)
    truth = json.loads((OTHER_IDS / "test" / "_annotations.coco.json").read_text())["annotations"]
    perfect = [
        {key: row[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9} for row in truth
    ]
    (other / "predictions.json").write_text(json.dumps(perfect))
    capsys.readouterr()
    compare.main(compare.CompareConfig(runs=(one, other), resamples=50))
    ap = json.loads((one / "metrics.json").read_text())["fitted"]["AP"]
    was = [f"{ap:.3f}", "1.000", f"{1 - ap:+.3f}"]
    rows = {line[:13].strip(): line[13:].split() for line in capsys.readouterr().out.splitlines()}
    assert rows["AP"][:3] == was and float(rows["AP"][-3]) > 0.9
    assert {"AP50", "AP75", "F1", "Counts right", "Sheets right"} <= rows.keys()
    compare.main(compare.CompareConfig(runs=(other, other), resamples=50))
    assert "+0.000 to +0.000" in capsys.readouterr().out

    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps(perfect))
    compare.main(compare.CompareConfig(runs=(one, plain), data_dir=OTHER_IDS, split="test", resamples=50))
    assert "F1" not in capsys.readouterr().out
    measured(model, tmp_path / "lost", LOST, split="test")
    with pytest.raises(UserError, match=r"lost: measured on other sheets than those of .*: .* s"):
        compare.main(compare.CompareConfig(runs=(one, tmp_path / "lost")))
    with pytest.raises(UserError, match=r"not what evaluate\.py writes"):
        compare.main(compare.CompareConfig(runs=(one, tmp_path)))


def test_the_report_shows_the_labels_that_are_most_in_doubt(model, tmp_path):
    """But not those of a split that the detector was trained on, nor where none are asked for."""
    data, shown = tmp_path / "data", {}
    for split in ("train", "test"):
        shutil.copytree(OTHER_IDS / "test", data / split)
    for name, flags in (("test", {"doubts": 3}), ("none", {"doubts": 0}), ("train", {"split": "train"})):
        measured(model, tmp_path / name, data, **flags)
        shown[name] = (tmp_path / name / "report.html").read_text()
    assert shown["test"].count('class="doubt') == 1 + 3 and 'href="#doubts"' in shown["test"]
    for name in ("none", "train"):
        assert "doubt" not in shown[name]
