"""CIFAR and the like: folders out of torchvision's local copies, and a ResNet with the stem for 32 px."""

import hashlib
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.datasets import CIFAR10

from cluster.backbone import build_backbone
from cluster.errors import UserError
from cluster.foreign import convert
from detection.model import Pyramid
from pretraining.config import PretrainConfig
from pretraining.datasets import DatasetsConfig, main
from pretraining.features import open_backbone
from pretraining.stage import Method, pretrain
from schematics.sheets import find_sheets, read_sheet
from simclr.loss import nt_xent
from simclr.pretrain import base_lr

torch.set_num_threads(1)
CLASSES = ["airplane", "truck"]


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Folders made of a copy that torchvision takes for whole, 12 and 6 images, and the pixels of these."""
    folder = tmp_path / "copy" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (18, 3 * 32 * 32), np.uint8)

    def written(name, content):
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    labels = [i % 2 for i in range(18)]
    train = written("data_batch_1", {"data": pixels[:12], "labels": labels[:12]})
    test = written("test_batch", {"data": pixels[12:], "labels": labels[12:]})
    meta = written("batches.meta", {"label_names": CLASSES})
    monkeypatch.setattr(CIFAR10, "train_list", [train])
    monkeypatch.setattr(CIFAR10, "test_list", [test])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    main(DatasetsConfig(words=("cifar10", str(tmp_path / "copy"), str(tmp_path / "out"))))
    return tmp_path / "out", pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def test_images_are_those_of_the_copy_each_in_the_folder_of_its_class(cifar):
    out, pixels = cifar
    assert sorted(path.name for path in (out / "train").iterdir()) == CLASSES
    assert np.array_equal(read_sheet(find_sheets(out / "train" / "truck")[1]), pixels[3])
    assert len(find_sheets(out / "train")) == 12 and len(find_sheets(out / "test" / "airplane")) == 3


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "mnist"])
def test_a_copy_that_is_not_there_is_one_line_and_leaves_no_folder(tmp_path, name):
    words = (name, str(tmp_path), str(tmp_path / "out"))
    with pytest.raises(UserError, match="choose cifar10" if name == "mnist" else f"no whole {name} there"):
        main(DatasetsConfig(words=words))
    assert not list(tmp_path.iterdir())


def run(config):
    pretrain(config, Method(name="simclr", loss=nt_xent, joint=True, last_norm=True, base_lr=base_lr))


def test_a_run_with_the_small_stem_is_resumed_probed_gone_on_from_and_no_detector(cifar, tmp_path):
    folder, _ = cifar
    config = PretrainConfig(
        data_dir=folder / "train",
        exp_dir=tmp_path / "run",
        arch="resnet18",
        stem="cifar",
        recipe="simclr",
        projector=(8, 8),
        batch_size=4,
        steps=1,
        image_size=32,
        window=32,
        workers=0,
        probe_dir=folder,
        device="cpu",
        precision="fp32",
    )
    run(config)
    for again in (
        config,
        replace(config, arch=None),
        replace(config, arch="resnet18.cifar", stem="imagenet"),
    ):
        run(replace(again, steps=2))
    with pytest.raises(UserError, match=r"--arch resnet18: the run in .* has resnet18\.cifar"):
        run(replace(config, stem="imagenet"))

    file = config.exp_dir / "backbone.safetensors"
    network, meta = open_backbone(file)
    assert meta["arch"] == "resnet18.cifar" and network[1].conv1.weight.shape == (64, 3, 3, 3)
    assert network[1].forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 512, 4, 4)
    assert convert(str(file), None)[1]["arch"] == convert(str(file), "resnet18.cifar")[1]["arch"]
    with pytest.raises(UserError, match=r"--arch resnet18: .* holds a resnet18\.cifar"):
        convert(str(file), "resnet18")
    with pytest.raises(UserError, match="--stem cifar: give --arch too"):
        run(replace(config, exp_dir=tmp_path / "on", arch=None, init=file))
    with pytest.raises(UserError, match=r"--arch resnet18\.cifar: no pyramid of strides 4 to 32"):
        Pyramid("resnet18.cifar", "group", 16)


def test_bare_weights_of_a_small_stem_are_read_as_such(tmp_path):
    file = tmp_path / "weights.pth"
    torch.save(build_backbone("resnet18.cifar").state_dict(), file)
    assert "120 of 120 tensors matched" in convert(str(file), "resnet18.cifar")[2]
    with pytest.raises(UserError, match=r"conv1\.weight has the shape"):
        convert(str(file), "resnet18")
    with pytest.raises(UserError, match=r"--arch resnet18\.nobody"):
        convert(str(file), "resnet18.nobody")


@pytest.mark.parametrize("arch", ["efficientnet_lite0", "resnet18d"])
def test_the_small_stem_is_that_of_a_resnet(arch):
    with pytest.raises(UserError, match=rf"--arch {arch}\.cifar: the stem for small images is that of a Res"):
        build_backbone(f"{arch}.cifar")
    assert isinstance(build_backbone("resnet34.cifar").maxpool, nn.Identity)
