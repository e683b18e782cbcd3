"""The optimizer of pretraining, with its parameter groups, and the learning rate of each step."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import Lars
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

LARS_DECAY = 1e-6  # of SimCLR and VICReg
# AdamW's rate per 256 windows and its decoupled weight decay are MoCo v3's (arXiv 2104.02057, section 4).
ADAMW_LR, ADAMW_DECAY = 1.5e-4, 0.1
# Weights that exist are changed by a third of the rate for random ones, after one epoch of warm-up. HPT
# (arXiv 2103.12718) goes on at the full rate of its method without a warm-up, 4 to 400 times shorter.
ONWARD_RATE, ONWARD_WARMUP, WARMUP = 1 / 3, 1.0, 10.0
# The best of a sweep over ImageNet's EfficientNet-lite0 with its BatchNorm statistics kept (docs/results.md).
ADAMW_KEPT_LR = 6e-4


def peak_lr(base: float, batch_size: int, scaling: str) -> float:
    """Learning rate at the end of the warm-up: base * B / 256 (`linear`) or base * sqrt(B) / 4 (`sqrt`).

    With SimCLR's base of 0.3 these are the rates of its section 2.2 and of its appendix B.1 (0.075 sqrt(B),
    for small batches). The two are equal at batch size B = 4096.

    Raises:
        ValueError: `scaling` is neither of the two.
    """
    if scaling == "linear":
        return base * batch_size / 256
    if scaling == "sqrt":
        return base * math.sqrt(batch_size) / 4
    raise ValueError(f"--lr-scaling {scaling}: use linear or sqrt")


def lr_at(step: int, total: int, warmup: int, peak: float, floor: float) -> float:
    """Linear warm-up from 0 over `warmup` steps, then a half cosine from `peak` to `floor` at step `total`.

    It is a pure function, so a resumed run needs no scheduler state.
    """
    if step < warmup:
        return peak * step / warmup
    turn = math.pi * (step - warmup) / max(1, total - warmup)
    return floor + (peak - floor) * (1 + math.cos(turn)) / 2


@dataclass(frozen=True)
class Schedule:
    """Lengths (in steps) and learning rates of a run."""

    per_epoch: int
    total: int
    warmup: int
    peak: float
    floor: float

    def lr(self, step: int) -> float:
        return lr_at(step, self.total, self.warmup, self.peak, self.floor)

    def told_change(self, start: int, optimizer: torch.optim.Optimizer) -> str:
        """A line if a run that is resumed at step `start` had another schedule before, else nothing.

        optimizer: as it was saved, with the learning rate of the step before.
        """
        last = optimizer.param_groups[0]["lr"]
        if start == 0 or last == self.lr(start - 1):
            return ""
        now = f"{self.lr(start):.4g} where it was {last:.4g}"
        return f"the length of this run has changed: from step {start} on, the learning rate is {now}"


def choose_optimizer(
    backbone: nn.Module, optimizer: str | None, weight_decay: float | None
) -> tuple[dict[str, Any], str]:
    """The flags optimizer and weight_decay, as given or else by the architecture, and a line that says so.

    LARS is for ResNets: it made an EfficientNet worse than its start, from random and from ImageNet's weights
    (docs/results.md). AdamW harms ImageNet's weights least, and is no better for random ones in short runs.
    So a network with any norm but BatchNorm, or with convolutions that aren't dense, as depthwise ones, gets
    AdamW.
    """
    convolutions = [module for module in backbone.modules() if isinstance(module, nn.Conv2d)]
    dense = all(convolution.groups == 1 for convolution in convolutions)
    norms = [m for m in backbone.modules() if isinstance(m, (_BatchNorm, nn.LayerNorm, nn.GroupNorm))]
    plain = dense and bool(norms) and all(isinstance(norm, _BatchNorm) for norm in norms)
    name = optimizer or ("lars" if plain else "adamw")
    decay = {"adamw": ADAMW_DECAY}.get(name, LARS_DECAY) if weight_decay is None else weight_decay
    suited = "dense convolutions and BatchNorm" if plain else "other layers than a ResNet's"
    reason = "given, or kept from the start of this run" if optimizer else f"the network has {suited}"
    told = f"optimizer: {name}, weight decay {decay:g} ({reason})"
    return {"optimizer": name, "weight_decay": decay}, told


def build_optimizer(
    model: nn.Module, name: str, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Build `lars`, `sgd` or `adamw` over two parameter groups; the caller sets the rate of each step.

    Biases and the weights of norm layers have no weight decay, and with LARS no adaptation: they take the
    learning rate as it is. They are recognised by having one dimension, not by their names (a ResNet's
    downsample norm is called `downsample.1`). LARS has eta 1e-3 (You et al., arXiv 1708.03888).

    Raises:
        ValueError: `name` is none of the three.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay}
    vectors = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
    groups = [group for group in (weights, vectors) if group["params"]]
    if name == "lars":
        weights["always_adapt"] = True  # even if --weight-decay is 0
        return Lars(groups, lr=0.0, momentum=momentum, trust_coeff=1e-3)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=momentum)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0)
    raise ValueError(f"--optimizer {name}: use lars, sgd or adamw")
