"""Weights of other projects: each is found by its keys, whole, with its features, and nothing is run."""

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cluster.backbone import build_backbone, read_backbone
from cluster.errors import UserError
from cluster.foreign import LITE, convert, read_weights
from pretraining.features import open_backbone
from pretraining.stage import Method, pretrain
from simclr.loss import nt_xent
from simclr.pretrain import SimCLRConfig

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parent.parent
ARCH = "test_resnet"
CHILDREN = {"conv1": 0, "bn1": 1, **{f"layer{i}": i + 3 for i in range(1, 5)}}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def network(arch=ARCH, seed=0):
    """A network in eval mode whose every tensor differs from those of another seed, statistics included."""
    torch.manual_seed(seed)
    made = build_backbone(arch)
    made(torch.randn(4, 3, 64, 64))
    return made.eval()


NET = network()
BARE = NET.state_dict()
OTHER = network(seed=1).state_dict()  # a momentum or key encoder, which must not be taken


def under(prefix, tensors):
    return {f"{prefix}{key}": tensor for key, tensor in tensors.items()}


def numbered(tensors):
    pairs = ((key.partition("."), tensor) for key, tensor in tensors.items())
    return {f"{CHILDREN[child]}.{rest}": tensor for (child, _, rest), tensor in pairs}


def mlp(prefix):
    return under(prefix, nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).state_dict())


def lightning(tensors):
    flags = argparse.Namespace(lr=np.float64(0.1), decay=functools.partial(print, "never"))
    return {"state_dict": tensors, "hyper_parameters": {"args": flags}, "pytorch-lightning_version": "2.0"}


HEAD = {"fc.weight": torch.zeros(9, 8), "fc.bias": torch.zeros(9)}
CLASSIFIER = {"classifier.weight": torch.zeros(9, 8), "classifier.bias": torch.zeros(9)}
UNCOUNTED = {key: tensor for key, tensor in BARE.items() if not key.endswith("tracked")}
MOCO = under("module.encoder_q.", BARE) | mlp("module.encoder_q.fc.") | under("module.encoder_k.", OTHER)
MOCO_V3 = under("module.base_encoder.", BARE) | mlp("module.base_encoder.fc.") | mlp("module.predictor.")
VICREG = under("module.backbone.", BARE) | mlp("module.projector.")
SOLO = mlp("projector.") | CLASSIFIER
STHALLES = under("backbone.", BARE) | mlp("backbone.fc.")
IMAGENET, SCALED = "0.485 ± 0.229", "mean ± std 0 ± 1"
FILES = {  # what is in the file, and what must be said of it
    "torchvision": (
        BARE | HEAD,
        "torchvision or timm, under bare keys; mean ± std 0.5 ± 0.5",
    ),  # timm's for ARCH
    "torchvision before counters": (UNCOUNTED | HEAD, "counters of batches, which old files lack, set to 0"),
    "compiled, on many GPUs": (under("module._orig_mod.", BARE), "torchvision or timm, under bare keys"),
    "VICReg": (
        {"epoch": 1, "model": VICREG, "optimizer": {"weight_decay_filter": mlp}},
        f"VICReg, under backbone.; left out beside it: 4 of projector; mean ± std {IMAGENET}",
    ),
    "solo-learn": (
        lightning(under("backbone.", BARE) | under("momentum_backbone.", OTHER) | SOLO),
        "under backbone.; left out beside it: 2 of classifier, 90 of momentum_backbone, 4 of projector; mean",
    ),
    "solo-learn 1": (
        lightning(under("encoder.", BARE) | under("momentum_encoder.", OTHER) | SOLO),
        "solo-learn, under encoder.; left out beside it: 2 of classifier, 90 of momentum_encoder",
    ),
    "lightly": (
        under("backbone.", numbered(BARE)) | mlp("projection_head."),
        f"under backbone.; numbered as the children of a ResNet; left out beside it: 4 of projection_head; "
        f"mean ± std {IMAGENET}",
    ),
    "MoCo v2": (
        {"arch": ARCH, "state_dict": MOCO | {"module.queue": torch.zeros(4, 8)}},
        "MoCo, under encoder_q.; left out beside it: 90 of encoder_k, 1 of queue",
    ),
    "MoCo v3": (
        {"state_dict": MOCO_V3 | under("module.momentum_encoder.", OTHER)},
        "MoCo v3, under base_encoder.; left out beside it: 90 of momentum_encoder, 4 of predictor",
    ),
    "stable-pretraining": (
        lightning(under("backbone.", BARE) | mlp("projector.") | mlp("callbacks_modules.probe.")),
        "stable-pretraining, under backbone.; left out beside it: 4 of callbacks_modules, 4 of projector",
    ),
    "stable-pretraining, teacher and student": (
        lightning(under("backbone.student.", BARE) | under("backbone.teacher.", OTHER)),
        "under backbone.student.; left out beside it: 90 of backbone",
    ),
    "SimCLR of sthalles": (
        {"epoch": 3, "arch": ARCH, "state_dict": STHALLES, "optimizer": {"lr": np.float64(1)}},
        f"SimCLR of sthalles, under backbone.; {SCALED}",
    ),
    "SimCLR of sthalles, earlier": (
        under("features.", numbered(BARE)) | {"l1.weight": torch.zeros(8, 8), "l2.weight": torch.zeros(4, 8)},
        "children of a ResNet; left out beside it: 1 of l1, 1 of l2; " + SCALED,
    ),
    "SimCLR of Spijkervet": (
        under("encoder.", BARE) | mlp("projector."),
        f"SimCLR of Spijkervet, under encoder.; left out beside it: 4 of projector; {SCALED}",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_backbone_is_found_whole_with_the_features_it_had(kind, tmp_path):
    content, said = FILES[kind]
    torch.save(content, tmp_path / "file.pth")
    tensors, meta, story = convert(str(tmp_path / "file.pth"), ARCH)
    found = build_backbone(ARCH).eval()
    found.load_state_dict(tensors)
    with torch.no_grad():
        assert torch.equal(found(IMAGES), NET(IMAGES))
    assert said in story and f"backbone: {len(BARE)} of {len(BARE)} tensors matched" in story
    assert (meta["arch"], meta["color_mode"], meta["init"]["file"]) == (ARCH, "rgb", "file.pth")


def test_the_file_of_a_timm_model_says_its_architecture_mean_and_std(tmp_path):
    save_file(BARE | HEAD, tmp_path / "model.safetensors")
    card = {"architecture": ARCH, "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    (tmp_path / "config.json").write_text(json.dumps(card))
    tensors, meta, story = convert(str(tmp_path / "model.safetensors"), None)
    assert (meta["arch"], meta["mean"], meta["std"]) == (ARCH, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert "2 tensors of its classifier ignored" in story and set(tensors) == set(BARE)
    with pytest.raises(UserError, match=f"holds a {ARCH}; give --arch {ARCH}"):
        convert(str(tmp_path / "model.safetensors"), "resnet18")


def test_efficientnet_lite_is_mapped_by_order_and_refused_in_another_order(tmp_path):
    made = network(LITE)
    names = [f"_layer.{i}" for i in range(len(made.state_dict()))]
    tensors = [*made.state_dict().values(), torch.zeros(1000, 1280), torch.zeros(1000)]
    content = dict(zip(["_conv_stem.weight", *names[1:], "_fc.weight", "_fc.bias"], tensors, strict=True))
    torch.save(content, tmp_path / "lite.pth")
    found, meta, story = convert(str(tmp_path / "lite.pth"), None)
    loaded = build_backbone(LITE).eval()
    loaded.load_state_dict(found)
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), made(IMAGES))
    assert (meta["arch"], meta["mean"]) == (LITE, [0.5] * 3) and "294 of 294" in story
    torch.save(dict(reversed(content.items())), tmp_path / "turned.pth")
    with pytest.raises(UserError, match="of 296 tensors match"):
        read_weights(str(tmp_path / "turned.pth"))


class Writes:
    """An object whose pickle, where code in it is run, writes a file."""

    path = ""

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            under("backbone.", BARE | {"conv1.0.weight": Writes()}),
            "conv1.0.weight is an object, not",
        ),
        ({"state_dict": Writes(), "epoch": 3}, "state_dict is an object, and nothing in it was run"),
        ([BARE], "it holds a list"),
        ({"epoch": 3}, "it holds no tensors"),
        (under("trunk.", BARE), "0 of 90 tensors matched"),
        ({key: BARE[key] for key in list(BARE)[1:]}, r"89 of 90 tensors .* \(conv1.0.weight is missing"),
        (BARE | {"layer9.weight": torch.zeros(1)}, "layer9.weight has no place"),
    ],
)
def test_what_is_no_whole_backbone_is_one_line_and_runs_nothing(content, said, tmp_path, monkeypatch):
    monkeypatch.setattr(Writes, "path", str(tmp_path / "was-here"))
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(UserError, match=said) as refusal:
        convert(str(tmp_path / "file.pth"), ARCH)
    assert str(tmp_path / "file.pth") in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "was-here").exists()


def test_objects_beside_the_tensors_are_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Writes, "path", str(tmp_path / "was-here"))
    torch.save({"state_dict": BARE, "flags": Writes()}, tmp_path / "file.pth")
    assert set(convert(str(tmp_path / "file.pth"), ARCH)[0]) == set(BARE)
    assert not (tmp_path / "was-here").exists()


def test_the_command_shows_and_converts(tmp_path):
    torch.save({"state_dict": MOCO}, tmp_path / "moco.pth.tar")
    words = [sys.executable, "-m", "cluster.weights", "moco.pth.tar", "out.safetensors", "--arch", ARCH]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "MoCo, under encoder_q." in done.stdout and "90 of 90 tensors matched" in done.stdout
    backbone, meta = open_backbone(tmp_path / "out.safetensors")
    with torch.no_grad():
        assert torch.equal(backbone[1](IMAGES), NET(IMAGES))
    assert meta["init"]["kind"] == "MoCo" and len(meta["init"]["sha256"]) == 64


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def config(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "pool").mkdir()
    for number in range(4):
        sheet = np.full((160, 160), 255, np.uint8)
        for x, y in rng.integers(10, 140, (12, 2)).tolist():
            cv2.line(sheet, (x, y), (x + 15, y + 5), 0, 2)
        cv2.imwrite(str(tmp_path / f"pool/{number}.png"), sheet)
    torch.save({"arch": ARCH, "state_dict": MOCO}, tmp_path / "moco.pth")
    return SimCLRConfig(
        data_dir=tmp_path / "pool",
        exp_dir=tmp_path / "run",
        init=tmp_path / "moco.pth",
        projector=(8, 8),
        batch_size=4,
        image_size=32,
        window=64,
        steps=2,
        base_lr=0.0,
        workers=0,
        device="cpu",
    )


METHOD = Method(
    name="simclr",
    loss=functools.partial(nt_xent, temperature=0.1),
    joint=True,
    last_norm=True,
    base_lr=lambda batch_size, epochs: 0.1,
)


def test_pretraining_goes_on_from_them_with_their_mean_and_std(config, capsys):
    pretrain(config, METHOD)
    assert "90 of 90 tensors matched" in capsys.readouterr().out
    tensors, meta = read_backbone(config.exp_dir / "backbone.safetensors")
    # At a rate of 0 the weights stay, and by default BatchNorm's statistics too.
    assert all(torch.equal(tensors[name], value) for name, value in NET.state_dict().items())
    assert meta["mean"] == [0.485, 0.456, 0.406] and meta["arch"] == ARCH
    assert meta["init"] == read_weights(str(config.init))[1]["init"]
    # A longer run goes on from its checkpoint: the file of --init may be gone, but not another one be given.
    config.init.unlink()
    pretrain(dataclasses.replace(config, steps=3), METHOD)
    again = read_backbone(config.exp_dir / "backbone.safetensors")[1]
    assert (again["init"], again["mean"], again["step"]) == (meta["init"], meta["mean"], 3)
    with pytest.raises(UserError, match=r"--init .*other.pth: the run in .* has .*moco.pth"):
        pretrain(dataclasses.replace(config, steps=4, init=config.init.with_name("other.pth")), METHOD)


def test_their_statistics_are_kept_while_their_weights_are_trained(config):
    """Also by a resumed run, and by the probes that put the network into eval mode and back."""
    held = {name: value for name, value in NET.named_buffers() if "running" in name}
    for statistics in (None, "init", "batch"):
        exp_dir = config.exp_dir / str(statistics)
        run = dataclasses.replace(config, statistics=statistics, base_lr=0.1, exp_dir=exp_dir)
        for steps in (2, 4):
            pretrain(dataclasses.replace(run, steps=steps), METHOD)
            if statistics == "batch":  # an earlier version had no such flag, and its runs go on as they began
                saved = exp_dir / "config.json"
                flags = json.loads(saved.read_text())
                assert flags.pop("statistics") == "batch"
                saved.write_text(json.dumps(flags))
                run = dataclasses.replace(run, statistics=None)
        tensors, _ = read_backbone(exp_dir / "backbone.safetensors")
        changed = {name for name, value in held.items() if not torch.equal(tensors[name], value)}
        assert changed == ({*held} if statistics == "batch" else set())
        assert not torch.equal(tensors["bn1.bias"], NET.state_dict()["bn1.bias"])


def test_what_init_can_not_be_is_one_line(config):
    with pytest.raises(UserError, match="--statistics init: random weights have none to keep; give --init"):
        dataclasses.replace(config, init=None, statistics="init")
    with pytest.raises(UserError, match=f"--arch resnet18: .*holds a {ARCH}; give --arch {ARCH}"):
        pretrain(dataclasses.replace(config, arch="resnet18"), METHOD)
    with pytest.raises(UserError, match=r"--init .*absent.pth: no such file"):
        pretrain(dataclasses.replace(config, init=config.init.with_name("absent.pth")), METHOD)
