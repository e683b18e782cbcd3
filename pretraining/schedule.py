"""What the optimizer sees: parameter groups, and the learning rate of a step."""

import math
from dataclasses import dataclass

import torch
from timm.optim import Lars
from torch import nn


def peak_lr(base: float, batch_size: int, scaling: str) -> float:
    """lr at the end of the warm-up: `linear` base * B / 256, or `sqrt` base * sqrt(B) / 4.

    With SimCLR's base of 0.3 they are its section 2.2 and its appendix B.1 (0.075 sqrt(B), for small
    batches); the two are equal at B = 4096.

    Raises:
        ValueError: another scaling.
    """
    if scaling == "linear":
        return base * batch_size / 256
    if scaling == "sqrt":
        return base * math.sqrt(batch_size) / 4
    raise ValueError(f"--lr-scaling {scaling}: use linear or sqrt")


def lr_at(step: int, total: int, warmup: int, peak: float, floor: float) -> float:
    """Linear warm-up from 0 over `warmup` steps, then a half cosine from `peak` to `floor` at step `total`.

    A pure function, so a resumed run needs no state of a scheduler.
    """
    if step < warmup:
        return peak * step / warmup
    turn = math.pi * (step - warmup) / max(1, total - warmup)
    return floor + (peak - floor) * (1 + math.cos(turn)) / 2


@dataclass(frozen=True)
class Schedule:
    """Length in steps and learning rate of a run."""

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
    """`lars`, `sgd` or `adamw` over two groups; the learning rate is set at every step from lr_at.

    Biases and the weights of norm layers are excluded from the decay, and with LARS from the adaptation: they
    take the raw lr. They are told by having one dimension, not by their names (a ResNet's downsample norm is
    called `downsample.1`). LARS has eta 1e-3 (You et al., arXiv 1708.03888).

    Raises:
        ValueError: another name.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay}
    vectors = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
    groups = [group for group in (weights, vectors) if group["params"]]
    if name == "lars":
        weights["always_adapt"] = True  # also where --weight-decay is 0
        return Lars(groups, lr=0.0, momentum=momentum, trust_coeff=1e-3)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=momentum)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0)
    raise ValueError(f"--optimizer {name}: use lars, sgd or adamw")
