"""A study's file becomes chains of commands, and its results tables, differences and plots."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cluster.array import Run
from cluster.errors import UserError
from cluster.flags import words
from detection.measured import read_run
from detection.metrics.comparison import compare
from detection.metrics.matching import match
from detection.studies import read_study
from schematics.coco import find_split, read_split, to_coco

ROOT = Path(__file__).parent.parent
STUDY = """
folder = "out"
data = "sheets"
pool = "sheets/unlabeled"
seeds = [0, 1]
[arms.random]
backbone = "none"
[arms.ssl]
method = "simclr"
pretrain = {init = "weights.pth", steps = 4}
[[labels]]
share = 0.25
finetune = {steps = 10}
[[labels]]
share = 1
seeds = [0]
[pretrain]
steps = 9
arch = "resnet18"
[finetune]
steps = 99
flip = true
"""


@pytest.fixture
def written(sheets, tmp_path, monkeypatch):
    """Writes a study beside a folder `sheets` and reads it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sheets").symlink_to(sheets)

    def write(text: str):
        (tmp_path / "study.toml").write_text(text)
        return read_study(Path("study.toml"))

    return write


def test_the_runs_are_the_arms_by_labels_by_seeds_from_one_pretraining_an_arm(written, tmp_path):
    runs = {run.name: run for run in written(STUDY).runs()}
    assert [*runs] == [
        "pretrain_ssl",
        *("random_25pc_seed0", "random_25pc_seed1", "ssl_25pc_seed0", "ssl_25pc_seed1"),
        *("random_100pc_seed0", "ssl_100pc_seed0"),
    ]
    here = str(tmp_path)
    pretrain = f"-m simclr.pretrain --data-dir {here}/sheets/unlabeled --exp-dir {here}/out/pretrain_ssl "
    assert runs["pretrain_ssl"] == Run(
        "pretrain_ssl", (tuple(f"{pretrain}--steps 4 --arch resnet18 --init {here}/weights.pth".split()),)
    )
    finetune = (
        f"-m detection.finetune --data-dir {here}/sheets "
        f"--backbone {here}/out/pretrain_ssl/backbone.safetensors --exp-dir {here}/out/ssl_25pc_seed1 "
        "--seed 1 --train-share 0.25 --steps 10 --flip"
    )
    evaluate = (
        f"evaluate/evaluate.py --checkpoint {here}/out/ssl_25pc_seed1/model.pt --data-dir {here}/sheets "
        f"--split test --out {here}/out/ssl_25pc_seed1/evaluate"
    )
    chain = tuple(finetune.split()), tuple(evaluate.split())
    assert runs["ssl_25pc_seed1"] == Run("ssl_25pc_seed1", chain, ("pretrain_ssl",))
    whole = " ".join(runs["random_100pc_seed0"].commands[0])
    assert "--backbone none" in whole and "train-share" not in whole and "--steps 99" in whole


def test_in_classification_a_pretraining_has_the_seed_and_given_weights_have_one_run(written):
    text = STUDY.replace('folder = "out"', 'folder = "out"\ntask = "classification"')
    text = text.replace('backbone = "none"', 'backbone = "weights.pth"').replace(
        "share = 0.25", 'name = "small"'
    )
    text = text.replace("share = 1\n", 'name = "large"\ndata = "more"\n')
    runs = {run.name: run for run in written(text).runs()}
    assert [name for name in runs if "pretrain" in name] == ["pretrain_ssl_seed0", "pretrain_ssl_seed1"]
    assert "--seed 1" in " ".join(runs["pretrain_ssl_seed1"].commands[0])
    assert {"random_small_seed0", "ssl_small_seed0", "ssl_small_seed1", "ssl_large_seed0"} < {*runs}
    assert "random_small_seed1" not in runs
    (command,) = runs["ssl_large_seed0"].commands
    assert command[:2] == ("evaluate/linear.py", "--checkpoint") and runs["ssl_large_seed0"].after


def test_in_classification_the_sheets_of_a_share_are_drawn_by_the_seed(written, tmp_path):
    text = STUDY.replace('folder = "out"', 'folder = "out"\ntask = "classification"')
    runs = {run.name: run for run in written(text.replace('backbone = "none"', 'backbone = "w.pth"')).runs()}
    assert {"random_25pc_seed0", "random_25pc_seed1", "random_100pc_seed0"} < {*runs}
    (command,) = runs["random_25pc_seed1"].commands
    rest = f"--train-share 0.25 --seed 1 --out {tmp_path}/out/random_25pc_seed1/linear"
    assert command == (
        *f"evaluate/linear.py --checkpoint {tmp_path}/w.pth".split(),
        *f"--data-dir {tmp_path}/sheets {rest}".split(),
    )
    assert "--train-share" not in runs["random_100pc_seed0"].commands[0]


def test_a_classifier_is_trained_by_its_head_or_as_a_whole_and_alike_pretrainings_are_one(written, tmp_path):
    arms = """[arms.random]
backbone = "none"
train = "whole"
finetune = {arch = "resnet18"}
[arms.head]
method = "simclr"
train = "head"
[arms.whole]
method = "simclr"
train = "whole"
[arms.longer]
method = "simclr"
train = "whole"
pretrain = {steps = 10}
[[labels]]"""
    text = STUDY.replace('folder = "out"', 'folder = "out"\ntask = "classification"').replace(
        "share = 1\n", ""
    )
    text = text[: text.index("[arms.random]")] + arms + text[text.index("\nshare = 0.25") :]
    text = text.replace("share = 0.25", 'name = "few"').replace("flip = true", "batch-size = 8")
    study = written(text)
    runs = {run.name: run for run in study.runs()}
    here = str(tmp_path)
    rest = f"--exp-dir {here}/out/random_few_seed1 --seed 1 --steps 10 --batch-size 8 --arch resnet18"
    command = f"evaluate/classify.py --data-dir {here}/sheets --checkpoint none {rest}"
    assert runs["random_few_seed1"] == Run("random_few_seed1", (tuple(command.split()),))
    assert {name for name in runs if "pretrain" in name} == {
        f"pretrain_{arm}_seed{seed}" for arm in ("head", "longer") for seed in (0, 1)
    }
    head, whole = (runs[f"{arm}_few_seed1"] for arm in ("head", "whole"))
    assert head.after == whole.after == ("pretrain_head_seed1",)
    assert "--freeze" in head.commands[0] and "--freeze" not in whole.commands[0]
    assert f"{here}/out/pretrain_head_seed1/backbone.safetensors" in whole.commands[0]
    assert {study.result(cell).relative_to(tmp_path / "out").as_posix() for cell in study.cells} >= {
        "random_few_seed0/classify.json",
        "whole_few_seed1/classify.json",
    }


def test_flags_are_words_as_a_command_line_has_them():
    flags = {"a": 1, "b": True, "c": False, "d": [2, 3], "e": "it's"}
    assert words(flags) == ("--a", "1", "--b", "--no-c", "--d", "2", "3", "--e", "it's")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seeds = [0, 1]", "seed = [0, 1]", "unknown key seed; the nearest is seeds"),
        ("flip = true", "flipp = true", "unknown key finetune.flipp; the nearest is flip"),
        ('method = "simclr"', 'methd = "simclr"', "unknown key arms.ssl.methd; the nearest is method"),
        ('method = "simclr"', 'method = "byol"', 'arms.ssl: method = "byol": give one of simclr, vicreg'),
        ('method = "simclr"', "", "arms.ssl: give it a backbone, or a method to pretrain one with"),
        ("share = 0.25", "share = 25", "labels: share = 25: give more than 0 and at most 1"),
        ("share = 0.25", 'share = "few"', "labels.share = few: give a float"),
        ("share = 0.25", "share = 1", "two of labels have one name; give each its own"),
        ("seeds = [0, 1]", "seeds = [0.5]", r"seeds = [0.5]: give whole numbers from 0 on"),
        ("flip = true", "seed = 3", "finetune: seed is set by the study itself; leave it out"),
        ('folder = "out"', "", "folder is required"),
        ('pool = "sheets/unlabeled"', "", "pool is required, the unlabelled drawings that an arm is"),
        ("[arms.random]", "[arms.'a b']", "arms.a b: a name of letters, digits"),
        (
            'backbone = "none"',
            'backbone = "none"\ntrain = "whole"',
            'arms.random: train = "whole": give head or',
        ),
        (
            'folder = "out"',
            'folder = "out"\ntask = "classification"',
            'arms.random: backbone = "none": a layer',
        ),
        ("[arms.random]", "[arms", "cannot be read as TOML (Expected ']'"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(written, old, new, said):
    with pytest.raises(UserError) as error:
        written(STUDY.replace(old, new, 1))
    assert str(error.value).startswith(f"study.toml: {said}") and "\n" not in str(error.value)


def test_shipped_studies_are_read():
    found = sorted((ROOT / "evaluate" / "studies").glob("*.toml"))
    assert len(found) >= 4
    for path in found:
        study = read_study(path)
        assert study.name and len(study.arms) >= 2 and len(study.runs()) >= 2


def test_a_pretraining_with_other_flags_is_refused_where_runs_began_from_it(written, tmp_path):
    study = written(STUDY)
    (tmp_path / "out" / "done").mkdir(parents=True)
    record = {"commands": study.runs()[0].commands}
    (tmp_path / "out" / "done" / "pretrain_ssl.json").write_text(json.dumps(record))
    (tmp_path / "out" / "ssl_25pc_seed0").mkdir()
    study.refuse_changes()
    with pytest.raises(
        UserError, match="pretrain_ssl: it was made with other flags, and ssl_25pc_seed0 began"
    ):
        written(STUDY.replace("steps = 4", "steps = 5")).refuse_changes()


def leave_results(study, quality) -> None:
    """What evaluate.py would leave, of detectors that find each box with the probability quality(cell)."""
    split = read_split(find_split(study.labels[0].data, "test"))
    truth = to_coco(split)
    for cell in study.cells:
        rng = np.random.default_rng(cell.seed)  # the better detector finds all that the worse one does
        kept = rng.random(len(truth["annotations"])) < quality(cell)
        results = [
            {**{key: row[key] for key in ("image_id", "category_id", "bbox")}, "score": 0.9}
            for row, found in zip(truth["annotations"], kept, strict=True)
            if found
        ]
        classes = [{"category_id": row["id"], "name": row["name"]} for row in truth["categories"]]
        metrics = {
            "sheets": {sheet.image_id: sheet.file_name for sheet in split.sheets},
            "classes": classes,
            "settings": {},
            "analysis": {"classes": [{"id": row["category_id"], "threshold": 0.5} for row in classes]},
        }
        out = study.out(cell)
        out.mkdir(parents=True)
        (out / "predictions.json").write_text(json.dumps(results))
        (out / "metrics.json").write_text(json.dumps(metrics))


def report(tmp_path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "evaluate" / "study.py", "report", "study.toml", "--resamples", "50"]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)


def test_a_report_has_means_over_seeds_and_paired_differences(written, tmp_path):
    study = written(STUDY)
    leave_results(study, lambda cell: {"random": 0.5, "ssl": 0.9}[cell.arm.name])
    done = report(tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out" / "report"
    assert all((out / name).read_bytes()[:4] == b"\x89PNG" for name in ("figures.png",))
    rows = list(csv.DictReader((out / "results.csv").open()))
    ap = {(r["arm"], r["labels"], int(r["seed"])): float(r["value"]) for r in rows if r["figure"] == "AP"}
    assert set(ap) == {(cell.arm.name, cell.labels.name, cell.seed) for cell in study.cells}
    table = (out / "table.md").read_text()
    cells = [[word.strip() for word in line.split("|")[1:-1]] for line in table.splitlines() if "|" in line]
    (means,) = (row for row in cells if row[:2] == ["25pc", "ssl"])
    assert float(means[3].split()[0]) == pytest.approx(
        (ap["ssl", "25pc", 0] + ap["ssl", "25pc", 1]) / 2, abs=1e-3
    )
    (one,) = (row for row in cells if row[:2] == ["100pc", "ssl - random"])
    truth = to_coco(read_split(find_split(tmp_path / "sheets", "test")))
    pair = [read_run(tmp_path / "out" / f"{arm}_100pc_seed0" / "evaluate") for arm in ("random", "ssl")]
    expected = compare(*(match(truth, each.results) for each in pair), resamples=50)["AP"].gain
    told = [float(number) for number in re.findall(r"[-+][\d.]+", one[3])]
    assert told == pytest.approx([expected.value, expected.low, expected.high], abs=6e-4) and expected.low > 0


def test_a_report_of_nothing_is_refused_and_one_of_a_part_names_the_rest(written, tmp_path):
    study = written(STUDY)
    done = report(tmp_path)
    assert done.returncode == 1 and "no run has a result yet" in done.stderr
    leave_results(study, lambda cell: 0.7)
    (study.out(study.cells[-1]) / "metrics.json").unlink()
    assert report(tmp_path).returncode == 0
    table = (tmp_path / "out" / "report" / "table.md").read_text()
    assert "Without a result yet: ssl_100pc_seed0." in table


def leave_linear(written, figures) -> None:
    """The results of a study of classifiers, random weights and ssl; figures: of a cell, as linear.json."""
    text = STUDY.replace('folder = "out"', 'folder = "out"\ntask = "classification"')
    study = written(
        text.replace('backbone = "none"', 'backbone = "w.pth"').replace("share = 0.25", 'name = "few"')
    )
    for cell in study.cells:
        study.out(cell).mkdir(parents=True)
        (study.out(cell) / "linear.json").write_text(json.dumps(figures(cell)))


def test_a_report_on_classification_reads_what_earlier_versions_left(written, tmp_path):
    def figures(cell):
        value = 0.5 + 0.2 * (cell.arm.name == "ssl") + 0.1 * cell.seed
        return {"top1": {"value": value, "low": value - 0.05, "high": value + 0.05}, "crops": 9}

    leave_linear(written, figures)
    done = report(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| few | ssl | 2 | 0.750 [0.700, 0.800] |" in done.stdout
    assert "| few | ssl - random | 1 | +0.200 [+0.200, +0.200] |" in done.stdout


def test_in_classification_differences_are_paired_and_the_baselines_are_beside(written, tmp_path):
    """Resamples that move all alike make wide intervals of each figure, and a narrow one of a difference."""
    luck = np.linspace(-0.1, 0.1, 201)

    def judged(value, own):
        bounds = {"value": value, "low": value - 0.1, "high": value + 0.1}
        return {"top1": bounds, "draws": {"top1": (value + luck + own).tolist()}}

    def figures(cell):
        value = 0.5 + 0.2 * (cell.arm.name == "ssl")
        beside = {"raw": judged(0.4, 0.0), "random": judged(0.3, 0.0)}
        return judged(value, 0.01 * np.sin(99 * luck)) | {"baselines": beside}

    leave_linear(written, figures)
    done = report(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| few | raw pixels | 2 | 0.400 [0.305, 0.495] |" in done.stdout
    assert "| few | ssl - random | 1 | +0.200 [+0.200, +0.200] |" in done.stdout
    assert "| few | ssl - raw pixels | 2 | +0.300 [+0.29" in done.stdout
    assert "| few | random, as ssl | 2 | 0.300 [" in done.stdout
    assert (tmp_path / "out" / "report" / "figures.png").exists()
