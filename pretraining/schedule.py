"""What the optimizer sees: parameter groups, the base learning rate of a batch, and lr(step)."""

import math

import torch
from timm.optim import Lars
from torch import nn


def base_lr(method: str, batch_size: int, epochs: float) -> float:
    """The published learning rate per 256 samples of the global batch.

    VICReg: the table in the authors' README, by batch size and length of training. SimCLR: 0.3 (section 2.2).
    """
    if method == "simclr":
        return 0.3
    if epochs >= 1000 and batch_size >= 2048:
        return 0.2
    if batch_size >= 1024:
        return 0.3
    if batch_size >= 512:
        return 0.3 if epochs <= 100 else 0.4
    return 0.5 if batch_size >= 256 else 0.8


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
