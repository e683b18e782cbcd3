"""Micro-batches give the gradient of their whole batch, move running statistics once, and leave no trace."""

import copy
import json
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cluster.backbone import Normalise
from cluster.errors import UserError
from cluster.guard import Guard
from cluster.training import GuardedStep
from pretraining.encoder import Encoder
from pretraining.gradcache import GradCache
from pretraining.memory import Footprint
from simclr.loss import nt_xent
from vicreg import pretrain as vicreg
from vicreg.loss import vicreg_loss
from vicreg.pretrain import VICRegConfig

pytestmark = pytest.mark.usefixtures("one_thread")
LOSSES = {True: nt_xent, False: vicreg_loss}


def encoder(joint: bool, *layers: nn.Module) -> Encoder:
    torch.manual_seed(1)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 24), *layers, nn.Tanh())
    return Encoder(Normalise([0.5] * 3, [0.3] * 3), backbone, nn.Linear(24, 20, bias=False), joint)


def views(windows: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (2, windows, 3, 2, 2), dtype=torch.uint8, generator=generator)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("joint", [True, False])
def test_what_is_random_and_what_is_normalised_is_alike_in_both_passes(joint):
    """The gradient is that of the micro-batches with all their graphs kept."""
    model = encoder(joint, nn.BatchNorm1d(24), nn.Dropout(0.5))
    plain = copy.deepcopy(model)
    parts = list(zip(*(view.split(4) for view in views()), strict=True))
    torch.manual_seed(3)
    z1, z2 = (torch.cat(z) for z in zip(*(plain(*part) for part in parts), strict=True))
    LOSSES[joint](z1, z2)[0].backward()
    drawn = torch.rand(())

    cache = GradCache(model, 4, nullcontext)
    torch.manual_seed(3)
    LOSSES[joint](*cache.embed(*views()))[0].backward()
    cache.carry()
    torch.testing.assert_close(gradients(model), gradients(plain))
    assert torch.rand(()) == drawn, "the draws of a step are those of one pass"


@pytest.mark.parametrize("joint", [True, False])
def test_running_statistics_move_once_a_step(joint):
    model = encoder(joint, nn.BatchNorm1d(24))
    before = copy.deepcopy(model)
    cache = GradCache(model, 4, nullcontext)
    LOSSES[joint](*cache.embed(*views()))[0].backward()
    cache.carry()
    moved = []
    for part in zip(*(view.split(4) for view in views()), strict=True):
        alone = copy.deepcopy(before)
        alone(*part)
        moved.append(alone.state_dict())
    for name, value in model.state_dict().items():
        expected = torch.stack([state[name].double() for state in moved]).mean(0)
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
    assert model.backbone[2].num_batches_tracked == (1 if joint else 2)
    assert all(
        torch.equal(a, b) for a, b in zip(model.normalise.buffers(), before.normalise.buffers(), strict=True)
    )


@pytest.mark.parametrize("joint", [True, False])
def test_under_autocast_the_weights_get_the_gradient_of_the_whole_batch(joint):
    def step(model, micro_batch):
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        guarded = GuardedStep(model, optimizer, lambda _: 0.0, Guard(), torch.device("cpu"), precision="bf16")
        cache = GradCache(model, micro_batch, guarded.autocast) if micro_batch else None
        with guarded.forward():
            z1, z2 = cache.embed(*views()) if cache else model(*views())
        assert z1.dtype == torch.bfloat16
        guarded.take(0, LOSSES[joint](z1.float(), z2.float())[0], cache.carry if cache else None)
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole, parts = (step(encoder(joint), micro_batch) for micro_batch in (None, 4))
    assert (whole - parts).norm() < 0.01 * whole.norm() > 0


def test_a_step_that_is_not_finite_leaves_no_trace():
    model = encoder(True, nn.BatchNorm1d(24))
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    guarded = GuardedStep(model, optimizer, lambda _: 1.0, Guard(), torch.device("cpu"))
    cache = GradCache(model, 4, guarded.autocast)
    before = copy.deepcopy(model.state_dict())
    with guarded.forward():
        z1, z2 = cache.embed(*views())
    norm = guarded.take(0, nt_xent(z1, z2)[0] * math.nan, cache.carry)
    assert norm.isnan() and guarded.guard.skipped == 1
    kept = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    assert all(torch.equal(value, before[name]) for name, value in kept.items())


@pytest.fixture
def config(sheets, tmp_path):
    return VICRegConfig(
        data_dir=sheets / "unlabeled",
        exp_dir=tmp_path / "run",
        arch="test_resnet",
        projector=(16, 16),
        batch_size=8,
        steps=4,
        image_size=32,
        window=96,
        workers=0,
        log_every=1,
        device="cpu",
        micro_batch=2,
        warmup_epochs=0.0,
        min_lr_ratio=1.0,
    )


def outcome(config):
    lines = (config.exp_dir / "metrics.jsonl").read_text()
    return lines, load_file(config.exp_dir / "backbone.safetensors")


def test_a_resumed_run_equals_an_uninterrupted_one(config):
    vicreg.main(config)
    parts = replace(config, exp_dir=config.exp_dir.with_name("parts"))
    vicreg.main(replace(parts, steps=2))
    vicreg.main(parts)
    (lines, weights), (resumed, others) = outcome(config), outcome(parts)
    assert lines == resumed and all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_micro_batch_of_the_whole_share_is_the_run_without_one(config):
    vicreg.main(replace(config, micro_batch=8, steps=2))
    plain = replace(config, micro_batch=None, steps=2, exp_dir=config.exp_dir.with_name("plain"))
    vicreg.main(plain)
    assert outcome(config)[0] == outcome(plain)[0]


def test_a_micro_batch_that_leaves_a_rest_is_one_line(config):
    with pytest.raises(UserError, match="--micro-batch 3 does not divide the 8 windows of a rank; give 2"):
        vicreg.main(replace(config, micro_batch=3))
    with pytest.raises(UserError, match="--micro-batch 1: give 2 or more"):
        replace(config, micro_batch=1)


def test_the_largest_divisor_that_fits_is_chosen():
    footprint = Footprint(fixed=1000, window=10)  # 13 bytes a window at the peak
    assert [footprint.fitting(48, 1000 + 13 * free) for free in (48, 47, 23, 3, 2, 1)] == [
        48,
        24,
        16,
        3,
        2,
        None,
    ]


def test_a_new_run_is_fitted_to_the_memory_and_a_resumed_one_keeps_that(config, monkeypatch, capfd):
    """Slurm grants 30 MB. A whole batch would take 41 MB, half of it 22 MB."""
    small = replace(config, micro_batch=None, image_size=64, steps=1, batch_size=16)
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "30")
    vicreg.main(small)
    told = capfd.readouterr().out
    assert "so --micro-batch 8: same gradient, but BatchNorm's statistics are those of 8 windows" in told
    assert json.loads((small.exp_dir / "config.json").read_text())["micro_batch"] == 8
    monkeypatch.delenv("SLURM_MEM_PER_NODE")
    vicreg.main(replace(small, steps=2))
    assert "so --micro-batch" not in capfd.readouterr().out
    assert json.loads((small.exp_dir / "config.json").read_text())["micro_batch"] == 8
    with pytest.raises(UserError, match=r"--micro-batch 4: the run in .* has 8"):
        vicreg.main(replace(small, steps=3, micro_batch=4))


def test_a_run_that_began_with_whole_batches_keeps_them(config, monkeypatch, capfd):
    whole = replace(config, micro_batch=None, steps=1)
    vicreg.main(whole)
    older = json.loads((whole.exp_dir / "config.json").read_text())
    assert older.pop("micro_batch") is None  # as a version without the flag has left it
    (whole.exp_dir / "config.json").write_text(json.dumps(older))
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1")
    capfd.readouterr()
    vicreg.main(replace(whole, steps=2))
    assert "warning: --batch-size 8 at --image-size 32 may not fit" in capfd.readouterr().out
