"""coverage.py: what ranges of counts hold over random splits of the sheets that evaluate.py measured."""

import importlib.util
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from detections import jittered

from cluster.errors import UserError
from schematics.coco import Category, write_split

SCRIPT = Path(__file__).parent.parent / "evaluate" / "coverage.py"
spec = importlib.util.spec_from_file_location("evaluate_coverage", SCRIPT)
coverage = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = coverage
spec.loader.exec_module(coverage)


def run_of(folder, split, seed, sheets=20):
    """What evaluate.py leaves in `folder` / split of a detector that moves, renames and doubles the truth."""
    truth, detections = jittered(seed, sheets)
    (folder / "data" / split).mkdir(parents=True)
    images = [row | {"file_name": f"{split}{row['id']}.png"} for row in truth["images"]]
    for row in images:
        cv2.imwrite(str(folder / "data" / split / row["file_name"]), np.full((800, 800), 255, np.uint8))
    classes = [Category(row["id"], row["name"]) for row in truth["categories"]]
    write_split(folder / "data" / split, images, classes, truth["annotations"])
    metrics = {
        "settings": {"data_dir": str(folder / "data"), "split": split},
        "sheets": {row["id"]: row["file_name"] for row in images},
        "classes": [{"category_id": one.id, "name": one.name} for one in classes],
        "analysis": {"classes": []},
    }
    (folder / split).mkdir()
    (folder / split / "metrics.json").write_text(json.dumps(metrics))
    (folder / split / "predictions.json").write_text(json.dumps(detections))
    return folder / split


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return run_of(folder, "valid", 0), run_of(folder, "test", 1)


def said(capsys, runs, **flags):
    coverage.main(coverage.CoverageConfig(runs=runs, **flags))
    return capsys.readouterr().out


def test_coverage_and_width_over_splits_of_the_sheets_of_two_runs(runs, capsys):
    first = said(capsys, runs, splits=30)
    assert (
        "40 sheets" in first and "30 splits, seed 0: 20 sheets labelled, 20 counted, 90 % promised" in first
    )
    rows = {line[:34].strip(): line[34:].split() for line in first.splitlines()}
    hold, low, _, high, width, ranges, without = rows["sheets, all classes together"]
    assert float(low) <= float(hold) <= float(high) and float(hold) > 0.85
    assert float(width) > 0 and (ranges, without) == ("20", "0")
    assert float(rows["classes found on a sheet"][0]) > 0.85
    assert float(rows["class 41"][-1]) > 0, "which no sheet has: nothing is promised where it is found"
    assert "the quarter of the sheets with the widest ranges has" in first
    assert said(capsys, runs, splits=30) == first != said(capsys, runs, splits=30, seed=1)
    wide = {
        line[:34].strip(): line[34:].split()
        for line in said(capsys, runs, splits=30, level=0.95).splitlines()
    }
    assert float(wide["sheets, all classes together"][4]) > float(width)


def test_few_sheets_promise_nothing(runs, capsys):
    with pytest.raises(UserError, match="8 labelled sheets can't promise 90 % for a count: that takes 9"):
        said(capsys, runs, labelled=8)
    with pytest.raises(UserError, match="give fewer than the 40 sheets"):
        said(capsys, runs, labelled=40)
    with pytest.raises(UserError, match=r"coverage\.py RUN"):
        said(capsys, ())


def test_runs_on_other_classes_are_refused(runs, capsys, tmp_path):
    other = run_of(tmp_path, "test", 2)
    metrics = json.loads((other / "metrics.json").read_text())
    metrics["classes"].pop()
    (other / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(UserError, match="has other classes than"):
        said(capsys, (runs[0], other))
    (other / "metrics.json").unlink()
    with pytest.raises(UserError, match=r"no metrics\.json says which sheets it is of"):
        said(capsys, (other,))
