"""Finetuning learns, resumes to the last bit and refuses bad input before it begins.

Also evaluate.py and predict on the detector that it made.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import Ranks, python
from small_finetuning import config_of, lines_of, weights_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster import checkpoint, distributed
from cluster.errors import UserError
from detection.finetune import main
from detection.inference import load_detector
from detection.metrics.coco import NAMES, evaluate
from detection.predict import PredictConfig
from detection.predict import main as predict
from detection.sheets import SheetReader
from detection.start import read_splits
from detection.validation import validate
from schematics.coco import find_split, read_split, to_coco
from schematics.sheets import DataError, read_sheet

HERE = Path(__file__).parents[1]
LEARN = {"steps": 100, "scheduler": "cosine", "warmup_steps": 5, "scale_jitter": 0.0, "photometric": 0.0}
FOUR = {"steps": 4, "norm": "group", "ema_decay": 0.9}
CLEAN = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four synthetic sheets in train and test, three of them in valid: the tests are about fitting them."""
    folder = tmp_path_factory.mktemp("sheets") / "data"
    draw = [sys.executable, "-m", "schematics.synthetic", "--out", str(folder)]
    subprocess.run([*draw, "--sheets", "4", "--seed", "1", "--size", "256", "256"], check=True, env=CLEAN)
    for split in ("valid", "test"):
        shutil.rmtree(folder / split)
        shutil.copytree(folder / "train", folder / split)
    annotations = folder / "valid" / "_annotations.coco.json"
    document = json.loads(annotations.read_text())
    document["images"].pop()
    annotations.write_text(json.dumps(document))
    return folder


@pytest.fixture(scope="module")
def trained(one_thread, data, tmp_path_factory):
    """An exp-dir after 100 steps."""
    exp_dir = tmp_path_factory.mktemp("runs") / "trained"
    main(config_of(data, exp_dir, **LEARN))
    return exp_dir


def test_a_few_sheets_are_learned_and_the_end_is_signed(trained):
    lines = lines_of(trained)
    assert max(line.get("valid_AP50", 0) for line in lines) >= 0.5
    assert lines[0]["loss"] > 2 * lines[-2]["loss"]
    signed = checkpoint.check_final(trained)
    assert signed["step"] == 100 and set(signed["files"]) == {"model.pt", "last.pt"}
    best = checkpoint.read(trained / "model.pt")
    assert best["valid"]["fitted"]["AP"] == max(line.get("valid_AP", 0) for line in lines)


def test_a_finished_run_says_so_and_touches_nothing(data, trained, capsys):
    before = {file: file.stat().st_mtime_ns for file in trained.glob("*.pt")}
    main(config_of(data, trained, **LEARN))
    assert "finished at step 100, nothing to do" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in trained.glob("*.pt")}


@pytest.fixture(scope="module")
def four_steps(one_thread, data, tmp_path_factory):
    exp_dir = tmp_path_factory.mktemp("runs") / "four"
    main(config_of(data, exp_dir, **FOUR))
    return exp_dir


def test_two_and_two_steps_are_four_to_the_last_bit(data, four_steps, tmp_path):
    main(config_of(data, tmp_path / "run", **{**FOUR, "steps": 2}, workers=1))
    main(config_of(data, tmp_path / "run", **FOUR))
    whole, parts = weights_of(four_steps / "last.pt"), weights_of(tmp_path / "run" / "last.pt")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    losses = [[line for line in lines_of(run) if "loss" in line] for run in (four_steps, tmp_path / "run")]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def over_two_ranks(folder, work, *args):
    """What rank 0 says."""
    with Ranks(work, *args, size=2, logs=folder / "logs") as ranks:
        assert ranks.statuses(300) == [0, 0], ranks.log() + ranks.log(1)
    return ranks.log()


def test_two_processes_take_the_gradient_of_one(data, four_steps, tmp_path):
    over_two_ranks(tmp_path, main, config_of(data, tmp_path / "run", **{**FOUR, "steps": 1}))
    one, two = lines_of(four_steps)[0], lines_of(tmp_path / "run")[0]
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def test_a_run_goes_on_with_another_number_of_ranks(data, four_steps, tmp_path):
    """Its next step has the windows, the learning rate and the gradient of the run on one rank."""
    main(config_of(data, tmp_path / "run", **{**FOUR, "steps": 2}))
    printed = over_two_ranks(tmp_path, main, config_of(data, tmp_path / "run", **FOUR))
    assert "going on at step 2" in printed
    one, two = ([line for line in lines_of(run) if "loss" in line] for run in (four_steps, tmp_path / "run"))
    assert [line["step"] for line in two] == [0, 1, 2, 3]
    assert [line["lr"] for line in two] == [line["lr"] for line in one]
    assert two[2]["grad_norm"] == pytest.approx(one[2]["grad_norm"], rel=1e-3)


def test_deterministic_changes_nothing_on_a_cpu(data, four_steps, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    main(config_of(data, tmp_path / "run", **FOUR, deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    distributed.choose_algorithms(deterministic=False)
    assert lines_of(tmp_path / "run") == lines_of(four_steps)


def validate_a_share(model, folder):
    world = distributed.start("cpu")
    split = read_split(folder)
    figures, thresholds, _ = validate(load_detector(model), SheetReader(split, "gray"), to_coco(split), world)
    print(json.dumps([figures.coco, sorted(thresholds.items())]))
    distributed.stop()


def test_ranks_with_unequal_shares_validate_as_one_process(data, trained, tmp_path):
    # Of the three sheets one rank gets two and the other one.
    printed = over_two_ranks(tmp_path, validate_a_share, trained / "model.pt", data / "valid")
    alone = checkpoint.read(trained / "model.pt")
    coco, thresholds = json.loads(printed.splitlines()[-1])
    assert coco == pytest.approx(list(alone["valid"]["coco"].values()), abs=1e-3)
    assert coco[1] >= 0.5
    assert dict(thresholds) == pytest.approx(alone["thresholds"], abs=1e-3)


def test_a_validation_split_with_ids_of_its_own_is_judged_as_the_same_classes(data, trained, tmp_path):
    for split in ("train", "valid"):
        shutil.copytree(data / split, tmp_path / split)
    annotations = tmp_path / "valid/_annotations.coco.json"
    document = json.loads(annotations.read_text())
    for row in document["categories"]:
        row["id"] = 90 - row["id"]  # the order is another one too
    for row in document["annotations"]:
        row["category_id"] = 90 - row["category_id"]
    annotations.write_text(json.dumps(document))
    _, split = read_splits(tmp_path)
    assert split.categories[0].id == 89
    detector, world = load_detector(trained / "model.pt", torch.device("cpu")), distributed.start("cpu")
    figures, thresholds, ranges = validate(detector, SheetReader(split, "gray"), to_coco(split), world)
    known = checkpoint.read(trained / "model.pt")
    assert figures.coco == pytest.approx(list(known["valid"]["coco"].values()), abs=1e-3)
    assert thresholds == pytest.approx(known["thresholds"], abs=1e-3)
    assert ranges.names == detector.ranges.names and ranges.boxes == detector.ranges.boxes


def test_a_resumed_run_takes_the_new_rate_says_so_and_goes_back_to_steps(data, tmp_path, capfd):
    def step(**changes):
        main(
            config_of(
                data, tmp_path / "run", batch_size=4, steps=None, lr_gamma=0.1, validate_every=99, **changes
            )
        )

    step(epochs=3, scheduler="step", lr=0.005, lr_step_size=2)
    step(epochs=4, scheduler="constant", lr=0.002)
    step(epochs=6, scheduler="step", lr=0.001, lr_step_size=1)
    rates = [line["lr"] for line in lines_of(tmp_path / "run") if "lr" in line]
    assert rates == pytest.approx([0.005, 0.005, 0.0005, 0.002, 0.001, 0.0001])
    told = re.findall(r"a new phase of the learning rate begins at (.*)", capfd.readouterr().out)
    assert told == ["step 3: 0.002 where it was 0.0005", "step 4: 0.001 where it was 0.002"]


def test_a_share_of_the_sheets_is_trained_on_with_all_classes_and_stays_with_the_run(data, tmp_path, capfd):
    half = config_of(data, tmp_path / "run", steps=1, train_share=0.5)
    main(half)
    assert "train: 2 of 4 sheets, drawn with seed 0; " in capfd.readouterr().out
    known, (split, _) = checkpoint.read(tmp_path / "run" / "last.pt"), read_splits(data)
    assert len(known["spec"]["categories"]) == len(split.categories)
    assert 0 < sum(known["train_boxes"].values()) < sum(len(sheet.boxes) for sheet in split.sheets)
    with pytest.raises(UserError, match=r"--train-share 1.0: the run in .* has 0.5; give that, or another"):
        main(replace(half, train_share=1.0))


def test_a_loss_that_stays_non_finite_ends_the_run_and_names_the_sheets(data, tmp_path):
    with pytest.raises(UserError, match=r"not finite 3 times in a row.*train_0000.*last good checkpoint"):
        main(config_of(data, tmp_path / "run", steps=20, lr=1e30, clip_grad=1e30))
    state = checkpoint.load_newest(tmp_path / "run" / "checkpoints")[1]
    assert all(
        torch.isfinite(tensor).all() for tensor in state["model"].values() if tensor.is_floating_point()
    )


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"backbone": "absent.safetensors"}, UserError, "no such file"),
        ({"arch": "resnet19"}, UserError, "--arch resnet19"),
        ({"window": 100}, UserError, "--window 100"),
        ({"overlap": 256}, UserError, "--overlap 256"),
        ({"validate_every": 0}, UserError, "--validate-every 0: give 1 or more"),
        ({"lr_step_size": 0}, UserError, "--lr-step-size 0: give 1 or more"),
        ({"seed": -1}, UserError, "--seed -1: give 0 or more"),
        ({"repeat": float("inf")}, UserError, "--repeat inf: give"),
        ({"score_threshold": 50.0}, UserError, "--score-threshold 50.0: give 1 or less"),
        ({"backbone": "none", "freeze_stages": 4}, UserError, "--freeze-stages 4: random weights"),
        ({"lr": -0.1}, UserError, "--lr -0.1: give 0 or more"),
        ({"clip_grad": 0.0}, UserError, "--clip-grad 0.0: give 1e-06 or more"),
        ({"data_dir": Path("nowhere")}, DataError, "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_folder(data, tmp_path, changes, error, said):
    with pytest.raises(error, match=said) as raised:
        main(config_of(data, tmp_path / "run", **changes))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_continued_with_other_settings(data, four_steps):
    with pytest.raises(UserError, match=r"--fpn-channels 32: the run in .* has 64"):
        main(config_of(data, four_steps, **{**FOUR, "fpn_channels": 32}))
    with pytest.raises(UserError, match="was begun with other classes; give the data that it was begun with"):
        other = four_steps.parent / "other"
        shutil.copytree(data, other)
        for split in ("train", "valid", "test"):
            annotations = other / split / "_annotations.coco.json"
            annotations.write_text(annotations.read_text().replace('"diode"', '"valve"'))
        main(config_of(other, four_steps, **{**FOUR, "steps": 8}))


def test_what_the_splits_lost_is_said_and_training_s_boxes_stay_with_the_detector(tmp_path, capsys):
    data = shutil.copytree(HERE / "tests" / "cases" / "20-missing-test-sheets" / "input", tmp_path / "data")
    (data / "train" / "s1.png").unlink()
    rows = json.loads((data / "train" / "_annotations.coco.json").read_text())["annotations"]
    lost = sum(row["image_id"] == 2 for row in rows)
    main(config_of(data, tmp_path / "run", steps=1))
    said = [line for line in capsys.readouterr().out.splitlines() if "schematics.check" in line]
    assert said == [
        f"train: {lost} boxes and 1 sheet dropped; see python -m schematics.check {data / 'train'}"
    ]
    counts = checkpoint.read(tmp_path / "run" / "model.pt")["train_boxes"]
    assert sum(counts.values()) == len(rows) - lost > 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert events.Tags()["images"] == ["valid/1", "valid/2"]


def report(folder, model, data, *flags):
    """Exit status of evaluate.py, with all files in the folder, and what it says."""
    where = ["--checkpoint", str(model), "--data-dir", str(data), "--out", str(folder / "out")]
    words = ["evaluate/evaluate.py", *where, "--device", "cpu", *flags]
    with Ranks(python, words, HERE, logs=folder / "logs") as ranks:
        return ranks.statuses(300)[0], ranks.log()


def test_evaluate_writes_what_it_prints(trained, data, tmp_path):
    status, said = report(tmp_path, trained / "model.pt", data, "--split", "valid", "--pictures", "2")
    assert status == 0, said
    text = (tmp_path / "out" / "validation_results.txt").read_text()
    assert text in said and text.count(" @[ IoU=") == 12
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(metrics["coco"]) == list(NAMES)
    valid = checkpoint.read(trained / "model.pt")["valid"]
    assert metrics["coco"] == pytest.approx(valid["coco"], abs=1e-6)
    assert metrics["settings"]["window"] == 256 and metrics["settings"]["max_detections"] == [1, 10, 100]

    truth = to_coco(read_split(find_split(data, "valid")))
    predictions = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {p["image_id"] for p in predictions} <= {image["id"] for image in truth["images"]}
    assert {p["category_id"] for p in predictions} <= {category["id"] for category in truth["categories"]}
    again = evaluate(truth, predictions)
    assert dict(zip(NAMES, again.coco, strict=True)) == metrics["coco"]
    assert sorted(file.name for file in (tmp_path / "out" / "pictures").iterdir()) == ["01.png", "02.png"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert len(page) > 10_000 and page.count("<dt>thresholds</dt>") == 1
    assert "on these very sheets" in page and "on these very sheets" in metrics["settings"]["thresholds"]
    best = checkpoint.read(trained / "model.pt")["thresholds"]
    assert {row["id"]: row["threshold"] for row in metrics["analysis"]["classes"]} == best


class Writes:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_evaluate_asks_for_the_signed_end(trained, data, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "final.json").unlink()
    status, said = report(tmp_path, run / "model.pt", data, "--split", "valid")
    assert status == 1 and said.count("\n") == 1
    assert "final.json: absent, that stage has not finished" in said and "--unfinished" in said
    status, said = report(tmp_path, run / "model.pt", data, "--split", "valid", "--unfinished")
    assert status == 0, said


def test_the_lines_of_the_readme_find_symbols(trained, data, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "checkpoints" / "detector")
    monkeypatch.chdir(tmp_path)
    lines = [line.strip() for line in (HERE / "README.md").read_text().splitlines()]
    first = lines.index("from detection.inference import detect, load_detector")
    names = {"image": read_sheet(next((data / "train").glob("*.png")))}
    exec("\n".join(lines[first : first + 3]), names)
    assert 0 < len(names["found"]) < 20


def test_evaluate_refuses_what_is_no_checkpoint_in_one_line(data, tmp_path):
    torch.save({"model": Writes(tmp_path / "was-here")}, tmp_path / "evil.pt")
    digest = subprocess.run(
        ["sha256sum", "evil.pt"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    (tmp_path / "evil.pt.sha256").write_text(digest.stdout)
    status, said = report(tmp_path, tmp_path / "evil.pt", data)
    assert status == 1
    assert said.startswith("error: ") and said.count("\n") == 1 and "evil.pt" in said
    assert not (tmp_path / "was-here").exists() and not (tmp_path / "out").exists()


def test_evaluate_measures_another_data_set_and_names_what_the_detector_does_not_know(
    trained, data, tmp_path
):
    other = tmp_path / "other"
    shutil.copytree(data, other)
    for split in ("train", "valid", "test"):
        annotations = other / split / "_annotations.coco.json"
        annotations.write_text(annotations.read_text().replace('"diode"', '"valve"'))
    status, said = report(tmp_path, trained / "model.pt", other, "--split", "valid")
    assert status == 0, said
    assert "boxes of classes that the detector does not know, in no figure: valve" in said
    assert "detections of classes that the data does not list, in no figure: diode" in said


def test_predict_skips_what_is_broken_and_says_so(trained, data, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"x")
    sheets = (data / "test", tmp_path / "broken.png")
    with pytest.raises(SystemExit) as stopped:
        predict(
            PredictConfig(checkpoint=trained / "model.pt", out=tmp_path / "out", sheets=sheets, json=True)
        )
    assert stopped.value.code == 1
    printed = capsys.readouterr()
    assert "skipped: " in printed.err and "broken.png" in printed.err
    document = json.loads(printed.out)
    assert document == json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [Path(image["file_name"]).name for image in document["images"]] == [
        f"train_{n:05}.png" for n in range(1, 5)
    ]
    best = checkpoint.read(trained / "model.pt")["thresholds"]
    assert all(row["score"] >= best[row["category_id"]] for row in document["annotations"])
    assert document["annotations"]
    header, *rows = [line.split(",") for line in (tmp_path / "out" / "counts.csv").read_text().splitlines()]
    assert header[1:-1] == [category["name"] for category in document["categories"]]
    assert sum(int(row[-1]) for row in rows) == len(document["annotations"])
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 4


def test_predict_without_sheets_or_with_a_foreign_file_is_refused(trained, data, tmp_path):
    with pytest.raises(UserError, match="name the sheets"):
        predict(PredictConfig(checkpoint=trained / "model.pt", out=tmp_path / "out"))
    with pytest.raises(UserError, match=r"config\.json"):
        predict(
            PredictConfig(checkpoint=trained / "config.json", out=tmp_path / "out", sheets=(data / "test",))
        )
    assert not (tmp_path / "out").exists()
