"""python -m detection.doubt: who may judge, what it writes, and that it goes on; on drawn sheets."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Browser, find_chromium
from small_detector import small_spec

from cluster import checkpoint
from cluster.errors import UserError
from detection.doubt import DoubtConfig, main
from detection.labelling.doubt_page import KIND_NAMES
from detection.model import Detector
from schematics.coco import read_split

ROOT = Path(__file__).parent.parent
TINY = (
    "--backbone none --arch resnet10t --fpn-channels 16 --window 256 --overlap 64 "
    "--batch-size 2 --steps 1 --workers 0"
)


@pytest.fixture(scope="module")
def model(sheets, tmp_path_factory):
    """A detector with random weights, as if trained on half of the drawn sheets."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    categories = tuple((c.id, c.name) for c in read_split(sheets / "train").categories)
    detector = Detector(small_spec(categories=categories, proposals=64, window=256, overlap=64))
    thresholds = {number: 0.5 for number, _ in categories}
    state = {"spec": detector.spec.to_dict(), "model": detector.state_dict(), "thresholds": thresholds}
    checkpoint.write_file(folder / "model.pt", state)
    config = {"data_dir": str(sheets), "train_share": 0.5, "seed": 0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "model.pt"


def doubt(data, out, **options):
    main(DoubtConfig(data=data, out=out, device="cpu", **options))
    return json.loads((out / "doubts.json").read_text())


@pytest.fixture(scope="module")
def written(sheets, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("doubts")
    return out, doubt(sheets / "valid", out, checkpoint=(model,), top=40)


def test_doubts_name_the_annotation_and_what_is_suggested(sheets, written):
    split = read_split(sheets / "valid")
    known = {sheet.file_name: sheet for sheet in split.sheets}
    names = {category.name for category in split.categories}
    _, document = written
    assert document["labels"] == sum(len(sheet.boxes) for sheet in split.sheets) and document["sheets"] == 4
    assert len(document["doubts"]) == 40
    for row in document["doubts"]:
        sheet = known[row["sheet"]]
        assert 0 <= row["score"] <= 1 and row["split"] == "valid" and not row["seen"]
        if row["kind"] == "missing":
            assert row["annotation_id"] is None and row["suggested_class"] in names
            assert len(row["suggested_box"]) == 4
            continue
        place = sheet.annotation_ids.tolist().index(row["annotation_id"])
        assert place == row["label"]
        assert np.allclose(row["box"], sheet.xywh[place])
        assert row["class"] == split.categories[sheet.labels[place] - 1].name
    scores = [row["score"] for row in document["doubts"]]
    assert scores == sorted(scores, reverse=True)


def test_sheets_of_the_training_are_left_out_or_marked(sheets, model, tmp_path, capsys):
    document = doubt(sheets / "train", tmp_path / "some", checkpoint=(model,))
    assert document["sheets"] == 4
    left_out = "4 of 8 sheets were in the training of the detector and are left out; --seen judges them too"
    assert document["notes"] == [left_out] and left_out in capsys.readouterr().out
    document = doubt(sheets / "train", tmp_path / "all", checkpoint=(model,), seen=True, top=1000)
    assert document["sheets"] == 8 and "are marked, and weaker" in document["notes"][0]
    assert {row["seen"] for row in document["doubts"]} == {True, False}


def test_a_sheet_is_judged_by_the_detector_that_has_not_seen_it(sheets, model, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model.parent, other)
    (other / "config.json").write_text(json.dumps({"data_dir": str(sheets), "train_share": 1.0, "seed": 0}))
    train = sheets / "train"
    with pytest.raises(UserError, match=r"all 8 sheets were in the training of the detector.*--folds 3"):
        doubt(train, tmp_path / "none", checkpoint=(other / "model.pt",))
    assert doubt(train, tmp_path / "half", checkpoint=(other / "model.pt", model))["sheets"] == 4


def test_what_cannot_be_judged_is_refused_in_a_line(sheets, model, tmp_path, written):
    lone = tmp_path / "lone" / "model.pt"
    shutil.copytree(model.parent, lone.parent)
    (lone.parent / "config.json").unlink()
    valid = sheets / "valid"
    for options, line in (
        ({"data": None, "checkpoint": (model,)}, "name the labelled sheets"),
        ({"data": valid}, "who is to judge"),
        ({"data": valid, "checkpoint": (model,), "folds": 2}, "leave out --checkpoint, or --folds"),
        ({"data": valid, "checkpoint": (lone,)}, r"trained is not known .*give --seen"),
        ({"data": valid, "folds": 2, "finetune": "--data-dir x"}, "--data-dir is set by the folds"),
        ({"data": valid, "folds": 2, "finetune": "'"}, "close the quotes"),
        ({"data": valid, "folds": 9}, "too few to draw"),
    ):
        with pytest.raises(Exception, match=line) as caught:
            main(DoubtConfig(out=tmp_path / "out", **options))
        assert caught.value.exit_status == 1 and not (tmp_path / "out" / "doubts.json").exists()
    with pytest.raises(UserError, match="holds doubts; name another folder, or give --overwrite"):
        doubt(valid, written[0], checkpoint=(model,))


def test_folds_train_their_judges_and_the_same_command_goes_on(sheets, tmp_path, capsys):
    """Each sheet is judged once, by the detector that was not trained on it."""
    data, out = tmp_path / "data", tmp_path / "out"
    for split in ("valid", "test"):
        shutil.copytree(sheets / split, data / split)
    options = {"folds": 2, "finetune": f"{TINY} --device cpu"}
    document = doubt(data, out, **options)
    assert document["sheets"] == 8
    assert {row["split"] for row in document["doubts"]} == {"valid", "test"}
    assert not any(row["seen"] for row in document["doubts"])
    held = [{s.file_name for s in read_split(out / f"folds/fold{k}/valid").sheets} for k in range(2)]
    for k in range(2):
        trained = {sheet.file_name for sheet in read_split(out / f"folds/fold{k}/train").sheets}
        assert trained == held[1 - k] and not trained & held[k]
    assert "0 of 2 runs are done" in capsys.readouterr().out
    assert doubt(data, out, **options, overwrite=True) == document
    assert "2 of 2 runs are done" in capsys.readouterr().out
    annotations = data / "test" / "_annotations.coco.json"
    changed = json.loads(annotations.read_text())
    changed["annotations"] = changed["annotations"][1:]
    annotations.write_text(json.dumps(changed))
    with pytest.raises(UserError, match="was made of other sheets or labels"):
        doubt(data, out, **options, overwrite=True)


def test_planted_faults_are_measured(sheets, model, tmp_path):
    flags = ["--data-dir", str(sheets), "--split", "valid", "--checkpoint", str(model), "--faults", "12"]
    done = subprocess.run(
        [
            sys.executable,
            "benchmarks/planted_faults.py",
            *flags,
            "--out",
            str(tmp_path / "out"),
            "--device",
            "cpu",
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    faults = json.loads((tmp_path / "out" / "faults.json").read_text())
    assert [fault["kind"] for fault in faults] == 3 * ["dropped", "renamed", "moved", "doubled"]
    before = {s.file_name: len(s.boxes) for s in read_split(sheets / "valid").sheets}
    after = {s.file_name: len(s.boxes) for s in read_split(tmp_path / "out/data/valid").sheets}
    assert sum(after.values()) == sum(before.values()) - 3 + 3
    lines = done.stdout.splitlines()
    head, first, *_ = (
        line.split() for line in lines[[" precision " in line for line in lines].index(True) :]
    )
    assert head[:3] == ["first", "precision", "recall"] and first[0] == "50"
    assert int(first[-1]) == 3, "doubles need no detector that has learnt"
    found = sum(map(int, first[3:]))
    assert float(first[2]) == pytest.approx(found / 12, abs=1e-3) and float(first[1]) >= found / 50


# The gallery, in Chromium


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not find_chromium():
        reason = "no chromium here: apt-get install -y chromium"
        if os.environ.get("CI") or os.environ.get("LINEWORK_REQUIRE_SLURM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


def test_the_gallery_opens_clean_and_filters(written, browser):
    out, document = written
    browser.open(out / "doubts.html")
    assert not browser.problems and all(url.startswith(("file:", "data:")) for url in browser.requests)
    shown = "[...document.querySelectorAll('.doubt')].filter((d) => d.offsetHeight > 0).length"
    assert browser.run(shown) == 40
    assert browser.run("document.querySelector('#status').textContent") == "40 of 40 doubts"
    missing = sum(row["kind"] == "missing" for row in document["doubts"])
    assert 0 < missing < 40
    browser.click("input[value='0']")
    assert browser.run(shown) == 40 - missing
    name = next(row["class"] for row in document["doubts"] if row["class"])
    options = "[...document.querySelectorAll('#class option')]"
    label = browser.run(f"{options}.find((o) => o.textContent === {json.dumps(name)}).value")
    browser.run(
        "(() => { const c = document.querySelector('#class'); "
        f"c.value = '{label}'; c.dispatchEvent(new Event('change')); }})()"
    )
    wanted = [
        r for r in document["doubts"] if r["kind"] != "missing" and name in (r["class"], r["suggested_class"])
    ]
    assert browser.run(shown) == len(wanted)
    crops = browser.run(
        "[...document.querySelectorAll('.doubt image')].every((i) => i.href.baseVal.startsWith('data:'))"
    )
    assert crops and len(KIND_NAMES) == browser.run("document.querySelectorAll('input[name=kind]').length")


def test_the_gallery_fits_a_phone(written, browser):
    browser.open(written[0] / "doubts.html", width=390, height=800)
    assert browser.run("document.documentElement.scrollWidth") <= 390
    assert not browser.problems
