"""A classifier learns from random weights, a resumed run equals an uninterrupted one, two ranks equal one."""

import csv
import dataclasses
import json
import os
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from processes import Ranks

from cluster import checkpoint
from cluster.backbone import build_backbone, write_backbone
from cluster.errors import UserError
from pretraining import classifier_stage
from pretraining.classifier import Boundary, TrainingCrops, epoch_of_crops, moved
from pretraining.classifier_config import ClassifierConfig
from pretraining.classifier_results import RESULTS
from pretraining.classifier_stage import train_classifier
from pretraining.features import ClassFolder, square
from schematics.sheets import DataError

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = ["bar", "cross", "disc", "ring"]
EPOCHS, PER_EPOCH = 4, 5


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Path:
    root, rng = tmp_path_factory.mktemp("toy") / "crops", np.random.default_rng(0)
    for split, number in (("train", 10), ("valid", 5), ("test", 10)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for n in range(number):
                picture = np.full((30, 26 + n % 8), int(rng.integers(200, 256)), np.uint8)
                x, y = (int(v) for v in rng.integers(12, 16, 2))
                if name in ("disc", "ring"):
                    cv2.circle(picture, (x, y), 8, 0, -1 if name == "disc" else 2)
                else:
                    cv2.line(picture, (x - 8, y), (x + 8, y), 0, 3)
                if name == "cross":
                    cv2.line(picture, (x, y - 8), (x, y + 8), 0, 3)
                cv2.imwrite(str(root / split / name / f"{split}{n // 2}_{n}.png"), picture)
    return root


@pytest.fixture
def config(crops, tmp_path) -> ClassifierConfig:
    return ClassifierConfig(
        data_dir=crops,
        exp_dir=tmp_path / "run",
        checkpoint="none",
        arch="test_resnet",
        image_size=32,
        epochs=EPOCHS,
        batch_size=8,
        warmup_steps=2,
        workers=0,
        log_every=1,
        resamples=20,
        device="cpu",
        precision="fp32",
    )


def lines(config) -> list[dict]:
    return [json.loads(line) for line in (config.exp_dir / "metrics.jsonl").read_text().splitlines()]


def kept(config) -> dict:
    return checkpoint.read(config.exp_dir / "classifier.pt")["classifier"]


def test_a_run_stopped_in_an_epoch_and_resumed_equals_an_uninterrupted_one(config, monkeypatch, capfd):
    train_classifier(config)
    parts = dataclasses.replace(config, exp_dir=config.exp_dir.with_name("parts"))

    class Interrupted(Boundary):
        def __call__(self, step: int) -> None:
            if step == PER_EPOCH + 2:
                os.kill(os.getpid(), signal.SIGUSR2)
            super().__call__(step)

    with monkeypatch.context() as changed, pytest.raises(SystemExit) as stopped:
        changed.setattr(classifier_stage, "Boundary", Interrupted)
        train_classifier(parts)
    assert stopped.value.code == 75
    assert PER_EPOCH + 2 <= checkpoint.listed(parts.exp_dir / "checkpoints")[0][0] < 2 * PER_EPOCH
    train_classifier(dataclasses.replace(parts, workers=1))
    assert (parts.exp_dir / "metrics.jsonl").read_bytes() == (config.exp_dir / "metrics.jsonl").read_bytes()
    whole, resumed = kept(config), kept(parts)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)

    by_epoch = [line for line in lines(config) if "valid_top1" in line]
    assert [line["step"] + 1 for line in by_epoch] == [PER_EPOCH * n for n in range(1, EPOCHS + 1)]
    own = [line["loss"] for line in lines(config) if "loss" in line]
    assert by_epoch[1]["train_loss"] == pytest.approx(np.mean(own[PER_EPOCH : 2 * PER_EPOCH]))
    capfd.readouterr()
    train_classifier(config)
    assert f"finished at step {EPOCHS * PER_EPOCH}, nothing to do" in capfd.readouterr().out
    with pytest.raises(UserError, match=r"--lr 0.1: the run in .* has 0.05"):
        train_classifier(dataclasses.replace(config, lr=0.1))


def test_it_learns_from_random_weights_and_its_best_epoch_is_tested(config, capsys):
    train_classifier(dataclasses.replace(config, epochs=12))
    document = json.loads((config.exp_dir / "classify.json").read_text())
    assert document["top1"]["value"] > 0.7 and document["crops"] == 40 and document["sheets"] == 5
    assert set(document["classes"]) == set(CLASSES) and set(document["baselines"]) == {"raw"}
    rows = list(csv.DictReader((config.exp_dir / "epochs.csv").open()))
    assert len(rows) == 12 and all(float(row["seconds"]) > 0 for row in rows)
    best = max(rows, key=lambda row: (float(row["valid_top1"]), -float(row["valid_loss"])))
    assert document["settings"]["best_step"] == int(best["step"])
    assert document["settings"]["training_minutes"] >= 0
    assert set(json.loads((config.exp_dir / "final.json").read_text())["files"]) == set(RESULTS)
    assert "raw 16 x 16 pixels" in capsys.readouterr().out
    # A longer run goes on, and keeps the best of all its epochs.
    train_classifier(dataclasses.replace(config, epochs=13))
    assert "the length of this run has changed" in capsys.readouterr().out
    assert len(list(csv.DictReader((config.exp_dir / "epochs.csv").open()))) == 13


def test_a_frozen_backbone_stays_as_it_is_to_the_last_bit(config, tmp_path):
    torch.manual_seed(1)
    tensors = build_backbone("test_resnet").state_dict()
    meta = {
        "arch": "test_resnet",
        "color_mode": "gray",
        "mean": [0.8] * 3,
        "std": [0.3] * 3,
        "image_size": 32,
    }
    write_backbone(tmp_path / "backbone.safetensors", tensors, meta)
    config = dataclasses.replace(config, checkpoint=str(tmp_path / "backbone.safetensors"), epochs=2)
    config = dataclasses.replace(config, arch=None, image_size=None)
    moved_by = []
    for freeze in (True, False):
        train_classifier(dataclasses.replace(config, freeze=freeze, exp_dir=tmp_path / str(freeze)))
        after = kept(dataclasses.replace(config, exp_dir=tmp_path / str(freeze)))
        moved_by.append(
            [name for name in tensors if not torch.equal(after[f"backbone.{name}"], tensors[name])]
        )
    assert moved_by[0] == [] and len(moved_by[1]) > len(tensors) / 2
    (tmp_path / "backbone.safetensors").unlink()  # a resumed run has its own weights
    train_classifier(dataclasses.replace(config, exp_dir=tmp_path / "False", epochs=3))


def test_two_ranks_equal_one(config, tmp_path):
    """Without BatchNorm, whose statistics are per rank on a CPU."""
    config = dataclasses.replace(config, arch="test_convnext", epochs=1, optimizer="adamw", lr=0.001)
    train_classifier(config)
    both = dataclasses.replace(config, exp_dir=tmp_path / "both")
    with Ranks(train_classifier, both, size=2, logs=tmp_path / "logs") as ranks:
        assert ranks.statuses() == [0, 0], ranks.log() + ranks.log(1)
    for one, two in zip(lines(config), lines(both), strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
    one, two = kept(config), kept(both)
    assert all(torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-5) for name in one)


def test_a_set_smaller_than_a_batch_fills_it_and_each_place_has_changes_of_its_own(crops):
    order = epoch_of_crops(seed=3, crops=5, batch_size=8)
    assert len(order(0)) == 10 and sorted(order(1)[:5]) == [*range(5)] and [*order(0)] != [*order(1)]
    folder = ClassFolder(crops / "train", CLASSES, 32, "gray")
    one = TrainingCrops(folder, 3, 0.1)
    assert torch.equal(one[1, 2, 3][0], TrainingCrops(folder, 3, 0.1)[1, 2, 3][0])
    assert not torch.equal(one[1, 2, 3][0], one[1, 7, 3][0])
    assert torch.equal(TrainingCrops(folder, 3, 0.0)[1, 2, 3][0], folder[3][0])


def test_a_crop_is_moved_and_scaled_no_further_than_asked():
    crop = np.full((40, 60), 250, np.uint8)
    crop[18:22, 28:32] = 0  # in the middle
    places, sizes = [], []
    for seed in range(200):
        seen = square(moved(crop, 0.2, np.random.default_rng(seed)), 240)[0].numpy()
        assert seen[0, 0] == 250
        ys, xs = np.nonzero(seen < 125)
        places += [(xs.mean() - 119.5) / 240, (ys.mean() - 119.5) / 240]
        sizes.append(np.sqrt(len(xs)) / 16)
    assert 0.17 < max(np.abs(places)) < 0.2 * 1.2 + 0.02
    assert 1 / 1.25 < min(sizes) < 0.9 and 1.1 < max(sizes) < 1.25


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"valid_split": "train"}, "--valid-split train: it is also the --train-split; give another"),
        ({"test_split": "train"}, "--test-split train: it is also the --train-split; give another"),
        ({"test_split": "valid"}, "--valid-split valid: it is also the --test-split"),
        ({"valid_split": "dev"}, "dev: no class folders there; cut them with"),
        ({"valid_split": "empty"}, "empty: no drawings found"),
        ({"checkpoint": "gone.pth"}, "gone.pth: no such file"),
        ({"arch": "resnet19"}, "--arch resnet19: timm has no such model; near: "),
        ({"batch_size": 1}, "--batch-size 1: BatchNorm needs 2"),
    ],
)
def test_what_cannot_be_is_one_line(config, crops, flags, said):
    (crops / "empty" / "bar").mkdir(parents=True, exist_ok=True)
    with pytest.raises((UserError, DataError)) as error:
        train_classifier(dataclasses.replace(config, **flags))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (config.exp_dir / "config.json").exists()


def test_other_classes_than_those_of_the_run_are_refused(config, crops, tmp_path):
    short = dataclasses.replace(config, steps=1)
    train_classifier(short)
    (tmp_path / "other" / "train").mkdir(parents=True)
    for split in ("valid", "test"):
        (tmp_path / "other" / split).symlink_to(crops / split)
    for name in CLASSES:
        (tmp_path / "other" / "train" / name.upper()).symlink_to(crops / "train" / name)
    with pytest.raises(UserError, match="its classes are others than this run has"):
        train_classifier(dataclasses.replace(short, steps=2, data_dir=tmp_path / "other"))
