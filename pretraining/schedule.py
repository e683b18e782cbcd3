"""The optimizer of pretraining, with its parameter groups, and the learning rate of each step."""

import math
from dataclasses import dataclass

import torch
from timm.optim import Lars
from torch import nn


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
