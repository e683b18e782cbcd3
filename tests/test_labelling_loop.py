"""The loop of docs/labelling.md: labels, a detector, its proposals corrected in a tool, more labels."""

import json
from pathlib import Path

import pytest
from small_finetuning import config_of, lines_of

from detection import corrections
from detection.finetune import main as finetune
from detection.predict import PredictConfig
from detection.predict import main as predict
from schematics.coco import read_split
from schematics.convert import convert
from schematics.labelling import Box, Labelled, lay_out
from schematics.sheets import DataError, Sheet

SMALL = {
    "arch": "test_resnet",
    "fpn_channels": 16,
    "window": 128,
    "overlap": 32,
    "steps": 2,
    "validate_every": 2,
}


def truth_of(split: Path, stop: int) -> dict[str, Labelled]:
    """The first sheets of a split, with their boxes, by file name."""
    whole, sheets = read_split(split), {}
    for sheet in whole.sheets[:stop]:
        names = [whole.categories[label - 1].name for label in sheet.labels]
        corners = zip(names, sheet.boxes.tolist(), strict=True)
        boxes = [Box(name, x0, y0, x1 - x0, y1 - y0) for name, (x0, y0, x1, y1) in corners]
        sheets[sheet.path.name] = Labelled(Sheet(sheet.path), "train", (sheet.width, sheet.height), boxes)
    return sheets


def corrected(proposed: Path, truth: dict[str, Labelled], export: Path) -> None:
    """What a person does with the tasks in the tool, and its export: `truth` is submitted for each."""
    names = sorted({box.name for sheet in truth.values() for box in sheet.boxes})
    lay_out(export.with_suffix(".truth"), ["label-studio"], list(truth.values()), dict(enumerate(names, 1)))
    answers = json.loads((export.with_suffix(".truth") / "label-studio/tasks.json").read_text())
    results = {task["data"]["image"]: task["predictions"][0]["result"] for task in answers}
    tasks = json.loads((proposed / "tasks.json").read_text())
    for task in tasks:
        task["annotations"] = [{"result": results[task["data"]["image"]]}]
    (proposed / "images").rename(export / "images")
    (export / "export.json").write_text(json.dumps(tasks))


def test_each_round_adds_the_corrected_sheets_and_counts_what_was_corrected(
    sheets, tmp_path, capsys, one_thread
):
    """Three sheets labelled by hand, then four whose proposals are corrected, in one folder of exports."""
    exports = tmp_path / "EXPORTS"
    by_hand, pool = truth_of(sheets / "train", 3), truth_of(sheets / "valid", 4)
    (exports / "1").mkdir(parents=True)
    (exports / "2").mkdir()
    names = dict(enumerate(sorted({b.name for s in by_hand.values() for b in s.boxes}), 1))
    lay_out(tmp_path, ["label-studio"], list(by_hand.values()), names)
    corrected(tmp_path / "label-studio", by_hand, exports / "1")
    rounds = []
    for number in (1, 2):
        labels, run = tmp_path / f"LABELS_{number}", tmp_path / f"ROUND_{number}"
        convert(exports, labels, valid=0.34)
        capsys.readouterr()
        finetune(config_of(labels, run, **SMALL))
        rounds.append(next(line["valid_AP"] for line in lines_of(run) if "valid_AP" in line))
        if number == 2:
            break
        found = tmp_path / "FOUND_1"
        drawings = tuple(labelled.sheet.path for labelled in pool.values())
        flags = {"checkpoint": run / "model.pt", "threshold": 0.0, "device": "cpu", "tool": ("label-studio",)}
        predict(PredictConfig(sheets=drawings, out=found, pictures=False, **flags))
        proposed = len(json.loads((found / "predictions.json").read_text())["annotations"])
        corrected(found / "label-studio", pool, exports / "2")
    capsys.readouterr()
    corrections.main(corrections.CorrectionsConfig(places=(found, labels), json=True))
    told = json.loads(capsys.readouterr().out)
    drawn = sum(len(sheet.boxes) for sheet in pool.values())
    assert told["sheets"] == 4 and told["boxes"] == drawn > 0 and proposed > 0
    assert told["kept"] + told["moved"] + told["renamed"] + told["removed"] == proposed
    assert told["kept"] + told["moved"] + told["renamed"] + told["added"] == drawn
    assert told["corrections"] == sum(told[kind] for kind in ("moved", "renamed", "removed", "added"))
    learned = [
        sum(len(read_split(split).sheets) for split in (tmp_path / f"LABELS_{n}").iterdir()) for n in (1, 2)
    ]
    assert learned == [3, 7] and all(0 <= score <= 1 for score in rounds)
    with pytest.raises(DataError, match="label-studio: exists already"):
        predict(PredictConfig(sheets=drawings, out=found, overwrite=True, **flags))
