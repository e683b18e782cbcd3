"""The learning rate is the published one at every step, and LARS treats weights and vectors as published."""

import math
from itertools import pairwise

import pytest
import timm
import torch
from torch import nn

from cluster.backbone import build_backbone
from pretraining.schedule import build_optimizer, choose_optimizer, lr_at, peak_lr
from pretraining.start import Method, plan_rate
from simclr import pretrain as simclr
from vicreg import pretrain as vicreg


def test_published_rates():
    # The authors' VICReg run: batch 2048, 1000 epochs, 1.6. SimCLR: batch 4096, 4.8 by either rule.
    assert peak_lr(vicreg.base_lr(2048, 1000), 2048, "linear") == pytest.approx(1.6)
    assert peak_lr(simclr.base_lr(4096, 100), 4096, "linear") == pytest.approx(4.8)
    assert peak_lr(simclr.base_lr(4096, 100), 4096, "sqrt") == pytest.approx(4.8)
    assert peak_lr(0.3, 256, "sqrt") == pytest.approx(0.075 * 16)
    table = {128: 0.8, 256: 0.5, 512: 0.4, 1024: 0.3, 2048: 0.3}
    assert {batch: vicreg.base_lr(batch, 300) for batch in table} == table
    assert vicreg.base_lr(512, 100) == 0.3


def test_warm_up_is_linear_and_the_cosine_ends_at_its_floor():
    rates = [lr_at(step, total=110, warmup=10, peak=2.0, floor=0.002) for step in range(111)]
    assert rates[:11] == pytest.approx([0.2 * step for step in range(11)])
    assert rates[60] == pytest.approx((2.0 + 0.002) / 2)
    assert rates[110] == pytest.approx(0.002)
    assert all(a > b for a, b in pairwise(rates[10:]))


def test_lars_equals_its_paper_for_weights_and_is_plain_momentum_for_vectors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    optimizer = build_optimizer(model, "lars", momentum=0.9, weight_decay=0.01)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.5
        optimizer.zero_grad()
        model(torch.randn(8, 5, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        for name, p in model.named_parameters():
            update = p.grad.clone()
            w = expected[name]
            if p.ndim > 1:  # You et al. 2017, equations (6) and (7)
                local = 1e-3 * w.norm() / (update.norm() + 0.01 * w.norm())
                update = local * (update + 0.01 * w)
            velocity[name] = 0.9 * velocity[name] + update
            expected[name] = w - 0.5 * velocity[name]
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-5, atol=1e-7)


def test_vectors_that_start_at_zero_are_trained():
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.bias)
    optimizer = build_optimizer(model, "lars", 0.9, 1e-6)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert torch.equal(model.bias, torch.full((2,), -0.1))


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_no_decay_for_a_downsample_norm_whatever_its_name(name):
    model = timm.create_model("resnet18", num_classes=0)
    decayed = {
        id(p)
        for g in build_optimizer(model, name, 0.9, 1e-4).param_groups
        if g["weight_decay"]
        for p in g["params"]
    }
    named = dict(model.named_parameters())
    assert id(named["layer2.0.downsample.0.weight"]) in decayed
    assert id(named["layer2.0.downsample.1.weight"]) not in decayed
    assert len(decayed) == 20  # the convolutions of a ResNet-18


@pytest.mark.parametrize(
    ("arch", "suited"),
    [
        ("resnet18", "lars"),
        ("resnet18.cifar", "lars"),
        ("efficientnet_lite0", "adamw"),
        ("convnext_atto", "adamw"),
        ("resnext50_32x4d", "adamw"),
        ("vit_tiny_patch16_224", "adamw"),
    ],
)
def test_lars_is_for_resnets_and_any_other_network_gets_adamw(arch, suited):
    with torch.device("meta"):
        backbone = timm.create_model(arch) if arch != "resnet18.cifar" else build_backbone(arch)
    chosen, told = choose_optimizer(backbone, None, None)
    assert chosen == {"optimizer": suited, "weight_decay": {"lars": 1e-6, "adamw": 0.1}[suited]}
    assert told.startswith(f"optimizer: {suited}, weight decay")
    assert choose_optimizer(backbone, "sgd", 0.0)[0] == {"optimizer": "sgd", "weight_decay": 0.0}


def test_weights_that_exist_get_a_third_of_the_rate_and_an_epoch_of_warm_up():
    method = Method(name="", loss=None, joint=True, last_norm=True, base_lr=simclr.base_lr)

    def plan(onward, optimizer, base_lr=None, warmup=None, kept=False):
        schedule = plan_rate(method, 512, 20, 2000, onward, kept, optimizer, base_lr, "linear", warmup, 0.0)
        return schedule.peak, schedule.warmup

    assert plan(False, "lars") == (pytest.approx(0.6), 200)
    assert plan(True, "lars") == (pytest.approx(0.2), 20)
    assert plan(False, "adamw") == (pytest.approx(3e-4), 200)
    assert plan(True, "adamw") == (pytest.approx(1e-4), 20)
    assert plan(True, "adamw", 0.01, 3) == (pytest.approx(0.02), 60)
    # BatchNorm's statistics are kept: AdamW's best rate of a sweep, LARS's as it is.
    assert plan(True, "adamw", kept=True) == (pytest.approx(1.2e-3), 20)
    assert plan(True, "adamw", 0.01, kept=True) == (pytest.approx(0.02), 20)
    assert plan(True, "lars", kept=True) == (pytest.approx(0.2), 20)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="--optimizer adam:"):
        build_optimizer(nn.Linear(2, 2), "adam", 0.9, 0)
    with pytest.raises(ValueError, match="--lr-scaling cubic:"):
        peak_lr(0.3, 256, "cubic")
    assert math.isfinite(lr_at(0, 1, 0, 1.0, 0.0))
