"""A pretraining with labelled crops beside it says whether it helped, and is else the run without them."""

import json
import os
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import stages
import status
import torch
from processes import Ranks
from safetensors.torch import load_file
from small_finetuning import config_of

from cluster.backbone import Judged, build_backbone, read_backbone, write_backbone
from cluster.distributed import World
from cluster.errors import UserError
from detection.start import Beginning, read_splits
from pretraining import benefit
from pretraining.benefit import Before, judge
from pretraining.config import PretrainConfig
from pretraining.features import ClassFolder, class_features, class_names, open_backbone
from pretraining.probe import accuracy, knn_predict
from pretraining.stage import Method, pretrain
from schematics.sheets import DataError
from schematics.symbols import cut_symbols
from simclr.loss import nt_xent
from simclr.pretrain import base_lr

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def crops(sheets, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("crops") / "crops"
    cut_symbols(sheets, folder)
    return folder


@pytest.fixture
def config(sheets, tmp_path) -> PretrainConfig:
    """Four steps of 4 windows, two of which are an epoch's."""
    return PretrainConfig(
        data_dir=sheets / "unlabeled",
        exp_dir=tmp_path / "run",
        arch="test_resnet",
        projector=(16, 16),
        batch_size=4,
        steps=4,
        image_size=32,
        window=256,
        workers=0,
        log_every=1,
        probe_every=1,
        device="cpu",
        precision="fp32",
    )


def run(config, loss=nt_xent):
    pretrain(config, Method(name="simclr", loss=loss, joint=True, last_norm=True, base_lr=base_lr))
    return journal(config), load_file(config.exp_dir / "backbone.safetensors")


def journal(config):
    return [json.loads(line) for line in (config.exp_dir / "metrics.jsonl").read_text().splitlines()]


def told(config):
    """What the sign-off says of the backbone, which its meta says too."""
    told = json.loads((config.exp_dir / "final.json").read_text())["told"]
    assert read_backbone(config.exp_dir / "backbone.safetensors")[1]["judged"]["told"] == told
    return told


def stop_in_call(number):
    calls = iter(range(100))

    def loss(z1, z2):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGUSR2)
        return nt_xent(z1, z2)

    return loss


def test_a_probed_run_is_bitwise_the_run_without_and_says_what_became_of_its_start(config, crops, capfd):
    lines, weights = run(config)
    probed = replace(config, exp_dir=config.exp_dir.with_name("probed"), probe_dir=crops)
    both, same = run(probed)
    assert [line for line in both if "knn" not in line] == lines
    assert weights.keys() == same.keys() and all(torch.equal(weights[k], same[k]) for k in weights)

    # The figure is that of evaluate/knn.py on these splits, and the last one is in every place.
    last = [line for line in both if "knn" in line][-1]
    network, meta = open_backbone(probed.exp_dir / "backbone.safetensors")
    classes = class_names(crops, ["train", "valid"])
    folders = [ClassFolder(crops / split, classes, 32, meta["color_mode"]) for split in ("train", "valid")]
    train, test = (class_features(network, folder, torch.device("cpu"), workers=0) for folder in folders)
    assert last["knn"] == accuracy(knn_predict(*train, test[0], len(classes)), test[1])[0]
    assert last["step"] == 3 and {"knn_start", "knn_raw"} < set(last)
    said = told(probed)
    assert said.startswith(f"kNN {last['knn']:.2f}, at the start {last['knn_start']:.2f}, raw 16 x 16 pixels")
    (line,) = status.lines_of([stages.Stage("pretrain", probed.exp_dir, [], [])], {}, config.exp_dir)
    assert status.table([line]).endswith(f"knn_start {last['knn_start']:.4g}; {said}")
    assert capfd.readouterr().out.rstrip().endswith(said)


def test_a_resumed_run_is_compared_with_its_true_start(config, crops):
    """Whether or not it still has the file that says so, or had crops at all when it began."""
    config = replace(config, probe_dir=crops)
    whole, _ = run(replace(config, exp_dir=config.exp_dir.with_name("whole")))
    with pytest.raises(SystemExit):
        run(config, stop_in_call(1))
    (config.exp_dir / benefit.KEPT).unlink()
    assert run(config)[0] == whole


def test_without_labels_the_second_views_are_told_by_the_weights_of_start_and_end(config):
    run(config)
    whole = told(config)
    assert whole.startswith("second views found 0.") and "those you began with" in whole
    start = Before(**json.loads((config.exp_dir / benefit.KEPT).read_text()))
    assert start.queries == start.neighbours <= 2 * benefit.WINDOWS
    again = replace(config, exp_dir=config.exp_dir.with_name("again"))
    with pytest.raises(SystemExit):
        run(again, stop_in_call(1))
    run(again)
    assert told(again) == whole


def probe_on_two(config):
    run(config)


def test_the_other_rank_waits_for_the_probe(config, crops, tmp_path):
    with Ranks(probe_on_two, replace(config, probe_dir=crops), size=2, logs=tmp_path / "logs") as ranks:
        assert ranks.statuses() == [0, 0], ranks.log() + ranks.log(1)
    assert ranks.log().count("at the start") == 2 and "kNN" not in ranks.log(1)


def test_worse_and_better_are_more_than_chance():
    before = Before(data="", neighbours=1, queries=400, start=0.66, raw=0.7)
    assert judge("kNN", 0.55, before) == Judged(
        "worse",
        "kNN 0.55, at the start 0.66, raw 16 x 16 pixels 0.70: these weights are worse than those you began "
        "with",
    )
    assert [judge("kNN", now, before).verdict for now in (0.61, 0.71, 0.75)] == ["same", "same", "better"]
    assert judge("kNN", 0.61, replace(before, queries=2048)).verdict == "worse"


@pytest.mark.parametrize("verdict", ["worse", "better"])
def test_finetuning_warns_of_a_backbone_that_its_own_pretraining_found_worse(sheets, tmp_path, verdict):
    meta = {"arch": "resnet10t", "color_mode": "gray", "mean": [0.5] * 3, "std": [0.5] * 3}
    meta["judged"] = asdict(judge("kNN", 0.9 if verdict == "better" else 0.1, Before("", 1, 100, 0.5, 0.5)))
    file = tmp_path / "backbone.safetensors"
    write_backbone(file, build_backbone("resnet10t").state_dict(), meta)
    config = config_of(sheets, tmp_path / "out", backbone=str(file), arch=None)
    beginning = Beginning(splits=read_splits(sheets), norm="sync", world=World(), **config.beginning)
    warned = f"warning: {file}: kNN 0.10, at the start 0.50" in beginning.build(256)[1]
    assert warned == (verdict == "worse")

    meta["judged"]["verdict"] = "bad"
    write_backbone(file, build_backbone("resnet10t").state_dict(), meta)
    with pytest.raises(UserError, match="verdict is 'bad', not better or same or worse"):
        read_backbone(file)


def test_crops_that_cannot_be_used_are_one_line_before_training(config, crops, tmp_path):
    with pytest.raises(UserError, match=r"absent/train: no class folders there; cut them with"):
        run(replace(config, probe_dir=tmp_path / "absent"))
    shutil.copytree(crops, tmp_path / "empty", ignore=lambda folder, names: {n for n in names if ".png" in n})
    with pytest.raises(DataError, match=str(tmp_path / "empty")):
        run(replace(config, probe_dir=tmp_path / "empty", dry_run=True))
    assert not (config.exp_dir / "metrics.jsonl").exists()
