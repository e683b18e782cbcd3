"""--precision auto depends on machine and network alone, and a run keeps what it stood for at its start."""

import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from small_detector import small_spec
from small_finetuning import config_of, lines_of
from torch import nn

from cluster import checkpoint
from cluster.config import recorded
from cluster.distributed import World
from cluster.errors import UserError
from cluster.guard import Guard
from cluster.precision import in_bf16, settle
from cluster.training import GuardedStep
from detection.finetune import main as finetune
from detection.inference import detect, load_detector
from detection.model import Detector
from simclr.pretrain import SimCLRConfig
from simclr.pretrain import main as pretrain

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=2))
DEPTHWISE = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 16, 3, groups=8))


@pytest.fixture(params=[True, False], ids=["cpu with bf16", "cpu without"])
def able(request, monkeypatch) -> bool:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: request.param)
    return request.param


def auto(device: str, model: nn.Module) -> bool:
    return in_bf16("auto", torch.device(device), model)


def test_auto_is_bf16_on_a_cpu_that_has_it_unless_convolutions_are_depthwise(able):
    assert auto("cpu", PLAIN) is able
    assert not auto("cpu", DEPTHWISE)
    assert auto("cpu", timm.create_model("test_resnet")) is able
    assert not auto("cpu", timm.create_model("test_efficientnet"))
    assert settle("auto", World(), PLAIN)[0] == ("bf16" if able else "fp32")


def test_auto_is_bf16_on_a_gpu_unless_that_emulates_it(able, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert auto("cuda", PLAIN) and auto("cuda", DEPTHWISE)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert not auto("cuda", PLAIN)


def test_a_step_computes_in_what_is_given(able):
    for precision, bf16 in (("bf16", True), ("fp32", False), ("auto", able)):
        optimizer = torch.optim.SGD(PLAIN.parameters(), 0.1)
        step = GuardedStep(PLAIN, optimizer, float, Guard(), torch.device("cpu"), precision=precision)
        assert step.bf16 is bf16


def pretraining(sheets, exp_dir, **changes) -> SimCLRConfig:
    config = SimCLRConfig(
        data_dir=sheets / "unlabeled",
        exp_dir=exp_dir,
        store_dir=exp_dir.parent,
        arch="test_resnet",
        projector=(16, 16),
        batch_size=4,
        image_size=32,
        window=96,
        workers=0,
        steps=2,
        log_every=1,
        device="cpu",
    )
    return replace(config, **changes)


def kept(exp_dir) -> str:
    return json.loads((exp_dir / "config.json").read_text())["precision"]


def test_pretraining_goes_on_in_what_it_began_with_on_a_machine_of_another_kind(
    sheets, tmp_path, monkeypatch, capfd
):
    begun = pretraining(sheets, tmp_path / "run", checkpoint_every=0.0)
    whole = pretraining(sheets, tmp_path / "whole", steps=4, min_lr_ratio=1.0, precision="bf16")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    pretrain(replace(begun, min_lr_ratio=1.0))
    assert kept(begun.exp_dir) == "bf16"
    assert "precision: bf16 (this CPU has instructions for it)" in capfd.readouterr().out
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    pretrain(replace(begun, min_lr_ratio=1.0, steps=4))
    assert "precision: bf16 (given, or kept" in capfd.readouterr().out
    pretrain(whole)
    one, other = (load_file(c.exp_dir / "backbone.safetensors") for c in (begun, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_finetuning_that_an_earlier_version_began_on_a_cpu_goes_on_in_float32(
    sheets, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    finetune(config_of(sheets, tmp_path / "run", steps=1, precision="fp32"))
    path = tmp_path / "run/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"precision": "auto"}))
    finetune(config_of(sheets, tmp_path / "run", steps=2, precision="auto"))
    finetune(config_of(sheets, tmp_path / "whole", steps=2, precision="fp32"))
    assert kept(tmp_path / "run") == "fp32"
    losses = [
        [line["loss"] for line in lines_of(tmp_path / name) if "loss" in line] for name in ("run", "whole")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_what_is_given_wins_and_what_no_run_writes_is_refused(sheets, tmp_path):
    config = pretraining(sheets, tmp_path)
    for written, given, device, taken in (
        ("bf16", "auto", "cpu", "bf16"),
        ("bf16", "fp32", "cpu", "fp32"),
        ("auto", "auto", "cuda", "auto"),
        ("auto", "auto", "cpu", "fp32"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"precision": written}))
        assert recorded(replace(config, precision=given), tmp_path, device).precision == taken
    (tmp_path / "config.json").write_text(json.dumps({"precision": "fp8"}))
    with pytest.raises(UserError, match=r"config.json: not a saved config \(precision fp8\); remove it"):
        recorded(config, tmp_path, "cpu")


def test_a_detector_finds_in_what_it_was_validated_in(able, tmp_path):
    torch.manual_seed(0)
    detector = Detector(small_spec(norm="sync")).eval()
    state = {
        "spec": detector.spec.to_dict(),
        "model": detector.state_dict(),
        "thresholds": {4: 0.25, 9: 0.75},
    }
    for written, given, bf16 in (
        ({}, "auto", False),  # as earlier versions wrote it
        ({"precision": "fp32"}, "auto", False),
        ({"precision": "bf16"}, "auto", able),
        ({"precision": "bf16"}, "fp32", False),
        ({}, "bf16", True),
    ):
        checkpoint.write_file(tmp_path / "model.pt", state | written)
        assert load_detector(tmp_path / "model.pt", precision=given).bf16 is bf16
    image = np.random.default_rng(0).integers(0, 255, (128, 128), dtype=np.uint8)
    two = [load_detector(tmp_path / "model.pt", precision=given) for given in ("fp32", "bf16")]
    exact, rounded = (detect(one, image).scores for one in two)
    assert not np.array_equal(exact, rounded)
    np.testing.assert_allclose(exact[:5], rounded[:5], atol=0.02)


def test_a_finetuning_in_bf16_validates_in_it_unless_an_earlier_version_began_it(sheets, tmp_path):
    config = config_of(sheets, tmp_path / "run", steps=1, precision="bf16")
    finetune(config)
    assert checkpoint.read(config.exp_dir / "last.pt")["precision"] == "bf16"
    ((step, _),) = checkpoint.listed(config.exp_dir / "checkpoints")[:1]
    saved = checkpoint.load_newest(config.exp_dir / "checkpoints")[1]
    del saved["validated_in"]
    checkpoint.write(config.exp_dir / "checkpoints", step, saved, keep=1)
    finetune(replace(config, steps=2))
    assert checkpoint.read(config.exp_dir / "last.pt")["precision"] == "fp32"
