"""Pretraining a detector on ink: boxes stay on what they show, runs resume, finetuning takes all or none."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import Ranks
from small_finetuning import config_of, lines_of, weights_of

from cluster import checkpoint
from cluster.backbone import read_backbone, write_backbone
from cluster.errors import UserError
from detection.contrast import box_contrast
from detection.finetune import main as finetune
from detection.ink_views import JITTER, InkViews, collate, window_boxes
from detection.pretrain import main
from detection.pretrain_config import InkConfig
from detection.pretrained import PARTS
from schematics.store import WindowStore, build_store

ROOT = Path(__file__).parents[1]
FINETUNE = {"arch": None, "window": 128, "fpn_channels": 16, "norm": "group", "steps": 1}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def store(sheets, tmp_path_factory) -> WindowStore:
    return build_store(sheets / "unlabeled", tmp_path_factory.mktemp("pool") / "windows", side=192)


def ink_config(store: WindowStore, exp_dir: Path, **changes) -> InkConfig:
    """Three steps of two windows of the store, in this process, each with a checkpoint."""
    config = InkConfig(
        data_dir=store.folder,
        backbone="none",
        exp_dir=exp_dir,
        arch="test_resnet",
        fpn_channels=16,
        image_size=128,
        batch_size=2,
        steps=3,
        warmup_steps=0,
        checkpoint_every=0,
        keep=9,
        workers=0,
        log_every=1,
        device="cpu",
        precision="fp32",
    )
    return replace(config, **changes)


@pytest.fixture(scope="module")
def trained(one_thread, store, tmp_path_factory) -> Path:
    exp_dir = tmp_path_factory.mktemp("runs") / "ink"
    main(ink_config(store, exp_dir))
    return exp_dir


def patches(views, view):
    """What the boxes of a large view show, each as 256 numbers with mean 0 and length 1."""
    found = []
    for box in views.boxes[view][views.known].round().int().clamp(0, 128).tolist():
        cut = views.large[view, :, box[1] : box[3], box[0] : box[2]].float()
        cut = torch.nn.functional.interpolate(cut[None], (16, 16), mode="area").flatten()
        found.append(torch.nn.functional.normalize(cut - cut.mean(), dim=0))
    return torch.stack(found)


def test_a_box_shows_the_same_ink_in_every_view(store):
    """It looks more like itself in the other view than like the other boxes, and is halved in the third."""
    views = InkViews(store, 128, 0, scale=0.5, count=6, strength=1.0)
    itself, others = [], []
    for item in (views[0, 0, sample] for sample in range(len(store))):
        assert item.large.shape == (2, 1, 128, 128) and item.small.shape == (1, 64, 64)
        sides = item.boxes[:, item.known, 2:] - item.boxes[:, item.known, :2]
        halved = np.abs(np.log((sides[1] / sides[2] / 2).numpy()))
        assert (halved <= np.log((1 + 2 * JITTER) / (1 - 2 * JITTER)) + 1e-5).all(), "but for its jitter"
        if item.known.sum() > 1:
            alike = (patches(item, 0) @ patches(item, 1).T).abs()  # a view may be inverted
            itself.append(alike.diagonal().mean())
            others.append(alike[~torch.eye(len(alike), dtype=torch.bool)].mean())
    assert len(itself) > 10
    assert np.mean(itself) > np.mean(others) + 0.2


def test_views_carry_the_boxes_of_the_window_exactly(store):
    """The truth of a view is the window's boxes, moved and scaled alike; one view differs from the other."""
    views = InkViews(store, 128, 0, scale=0.5, count=6, strength=1.0)
    for sample in range(4):
        boxes, shown = window_boxes(store, sample, 64), views[3, 0, sample].truth
        for truth in (t.numpy() for t in shown):
            whole = truth[((truth > 0) & (truth < 128)).all(1)]
            ratios = (whole[:, 2:] - whole[:, :2]).reshape(-1)
            sides = boxes[:, 2:] - boxes[:, :2]
            scales = ratios[:, None] / sides.reshape(-1)[None]  # one scale explains every box
            if len(whole):
                best = min(scales[0].tolist(), key=lambda s: np.abs(scales / s - 1).min(axis=1).max())
                assert np.abs(scales / best - 1).min(axis=1).max() < 1e-4
                assert 1 / 1.5 - 0.01 <= best <= 1.5 + 0.01
        assert any(len(t) for t in shown)


def test_views_are_a_function_of_seed_epoch_and_sample(store):
    first, second = (InkViews(store, 128, 0, 0.5, 6, 1.0) for _ in range(2))
    forward = collate([first[1, n, n] for n in range(3)])
    back = collate([second[1, 9, n] for n in (2, 1, 0)][::-1])
    assert all(torch.equal(a, b) for a, b in zip(forward[:4], back[:4], strict=True))
    assert forward[5] == back[5] and all(map(torch.equal, forward[4], back[4]))
    other = collate([first[2, n, n] for n in range(3)])
    assert not torch.equal(forward[0], other[0])


def test_contrast_is_its_definition():
    z = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    known = torch.tensor([True, False, True, True])
    unit = torch.nn.functional.normalize(z, dim=2)
    rows = [(box, unit[box, view]) for box in (0, 2, 3) for view in range(3)]
    terms = []
    for i, (box, own) in enumerate(rows):
        others = [(b, own @ other / 0.2) for j, (b, other) in enumerate(rows) if j != i]
        total = torch.stack([s for _, s in others]).exp().sum()
        terms += [-(s - total.log()) for b, s in others if b == box]
    assert len(terms) == 9 * 2
    torch.testing.assert_close(box_contrast(z, known, 0.2), torch.stack(terms).mean())
    assert box_contrast(z, known & (torch.arange(4) == 0), 0.2) == 0
    same = box_contrast(torch.ones(5, 3, 8), torch.ones(5, dtype=torch.bool), 0.1)
    torch.testing.assert_close(same, torch.tensor(14.0).log()), "all alike: any of the other 14"


def test_a_run_signs_what_it_has_trained(store, trained):
    signed = checkpoint.check_final(trained)
    assert signed["step"] == 3 and set(signed["files"]) == {"pretrained.safetensors"}
    tensors, meta = read_backbone(trained / "pretrained.safetensors")
    assert all(any(key.startswith(prefix) for key in tensors) for prefix in PARTS.values())
    assert all(key.startswith(tuple(PARTS.values())) for key in tensors)
    assert meta["detector"]["norm"] == "group" and meta["detector"]["fpn_channels"] == 16
    begun = checkpoint.read(checkpoint.step_path(trained / "checkpoints", 0))["learner"]
    for name, prefix in PARTS.items():
        own = [key for key in tensors if key.startswith(prefix)]
        assert not all(torch.equal(tensors[key], begun[f"detector.{key}"]) for key in own), (
            f"nothing of the {name} has learnt"
        )
    losses = [line for line in lines_of(trained) if "loss" in line]
    assert len(losses) == 3 and all(line["contrast"] > 0 < line["loss_objectness"] for line in losses)


def test_a_resumed_run_is_the_same_to_the_last_bit(store, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for file in [run / "final.json", run / "pretrained.safetensors", *run.glob("checkpoints/step_*[23].pt*")]:
        file.unlink()
    main(ink_config(store, run, workers=1))
    whole, parts = (read_backbone(folder / "pretrained.safetensors") for folder in (trained, run))
    assert whole[1] == parts[1] and all(torch.equal(whole[0][key], parts[0][key]) for key in whole[0])
    assert lines_of(run) == lines_of(trained)


def test_two_processes_take_the_gradient_of_one(store, trained, tmp_path):
    config = ink_config(store, tmp_path / "run", steps=3)
    with Ranks(main, config, size=2, logs=tmp_path / "logs") as ranks:
        assert ranks.statuses(300) == [0, 0], ranks.log() + ranks.log(1)
    one, two = lines_of(trained)[0], lines_of(tmp_path / "run")[0]
    for name in ("grad_norm", "contrast"):
        assert two[name] == pytest.approx(one[name], rel=1e-4)


def test_finetuning_takes_every_part_and_says_so(sheets, trained, tmp_path, capsys):
    file = trained / "pretrained.safetensors"
    finetune(config_of(sheets, tmp_path / "run", backbone=str(file), **FINETUNE, lr=0.0))
    printed = capsys.readouterr().out
    tensors, _ = read_backbone(file)
    counts = {name: sum(k.startswith(prefix) for k in tensors) for name, prefix in PARTS.items()}
    audit = ", ".join(f"{name} {count} of {count}" for name, count in counts.items())
    assert f"{audit} tensors matched; new: box predictor\n" in printed
    weights = weights_of(tmp_path / "run" / "last.pt")
    assert all(torch.equal(weights[key], tensors[key]) for key in tensors), "a rate of 0 changes nothing"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"fpn_channels": 32}, "give --fpn-channels 16"),
        ({"norm": "sync", "head": "conv"}, "give --norm group --head mlp"),
    ],
)
def test_another_detector_is_refused_with_the_flags_to_give(flags, expected, sheets, trained, tmp_path):
    file = str(trained / "pretrained.safetensors")
    with pytest.raises(UserError, match=expected):
        finetune(config_of(sheets, tmp_path / "run", backbone=file, **{**FINETUNE, **flags}))
    assert not (tmp_path / "run").exists()


def without(key):
    return lambda tensors, meta: tensors.pop(key)


def one_ratio(tensors, meta):
    """As if its RPN had two anchors a location: layers that this detector can't take."""
    meta["detector"]["anchors"]["ratios"] = [1.0]
    for key in [k for k in tensors if "cls_logits" in k or "bbox_pred" in k]:
        tensors[key] = tensors[key][: len(tensors[key]) // 3].clone()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (without("rpn.head.conv.0.0.weight"), "RPN 5 of 6.*rpn.head.conv.0.0.weight is missing"),
        (without("backbone.fpn.inner_blocks.0.0.weight"), "FPN 23 of 24"),
        (lambda tensors, meta: tensors.update(stray=torch.ones(1)), "stray has no place"),
        (lambda tensors, meta: meta["detector"].pop("anchors"), "anchors is missing"),
    ],
)
def test_a_file_that_lacks_a_tensor_is_refused(change, expected, sheets, trained, tmp_path):
    tensors, meta = read_backbone(trained / "pretrained.safetensors")
    change(tensors, meta)
    other = tmp_path / "other.safetensors"
    write_backbone(other, tensors, meta)
    with pytest.raises(UserError, match=expected):
        finetune(config_of(sheets, tmp_path / "run", backbone=str(other), **FINETUNE))


def test_layers_for_other_anchors_are_new_and_said_to_be(sheets, trained, tmp_path, capsys):
    tensors, meta = read_backbone(trained / "pretrained.safetensors")
    one_ratio(tensors, meta)
    write_backbone(tmp_path / "other.safetensors", tensors, meta)
    dry = config_of(sheets, tmp_path / "run", backbone=str(tmp_path / "other.safetensors"), **FINETUNE)
    finetune(replace(dry, dry_run=True))
    told = "RPN 2 of 2, head 4 of 4 tensors matched; new: box predictor and 4 tensors of the RPN "
    assert told + "(6 anchors a location, 2 in the file)" in capsys.readouterr().out


def test_an_unfinished_run_is_refused(sheets, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "ink")
    (tmp_path / "ink" / "final.json").unlink()
    file = str(tmp_path / "ink" / "pretrained.safetensors")
    with pytest.raises(UserError, match="that stage has not finished"):
        finetune(config_of(sheets, tmp_path / "run", backbone=file, **FINETUNE))


def test_the_script_runs_under_plain_bash_and_speaks_of_unlabeled(sheets, store, tmp_path):
    """The flag is --unlabeled; the pool's windows are those of a folder of sheets."""
    flags = ["--unlabeled", sheets / "unlabeled", "--backbone", "none", "--arch", "test_resnet"]
    flags += ["--exp-dir", tmp_path / "ink", "--image-size", "128", "--fpn-channels", "16", "--steps", "1"]
    flags += ["--batch-size", "2", "--workers", "0", "--device", "cpu"]
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / "pretrain-detector.slurm"), *map(str, flags)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert checkpoint.check_final(tmp_path / "ink")["step"] == 1
    assert json.loads((tmp_path / "ink" / "config.json").read_text())["data_dir"] == str(sheets / "unlabeled")
