"""In which arithmetic a network computes: float32, or bf16 under autocast where that is faster.

The choice depends on the machine and the network alone, and times nothing: a run that is started twice
computes alike.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from cluster import distributed
from cluster.distributed import World


def in_bf16(precision: str, device: torch.device, model: nn.Module) -> bool:
    """Whether the forward pass of `model` is in bf16; "auto" takes it where that is faster."""
    return _choose(precision, device, model)[0]


def settle(precision: str, world: World, model: nn.Module) -> tuple[Literal["fp32", "bf16"], str]:
    """What `precision` stands for in a run of `model`, and a line for the log that says why.

    Call it on every rank. Where one of them would rather compute in float32, all of them do.
    """
    bf16, reason = _choose(precision, world.device, model)
    (declined,) = distributed.agree(not bf16)
    if bf16 and declined:
        reason = "another rank has no fast bf16"
    return ("fp32", f"precision: fp32 ({reason})") if declined else ("bf16", f"precision: bf16 ({reason})")


def _choose(precision: str, device: torch.device, model: nn.Module) -> tuple[bool, str]:
    """Whether to compute in bf16, and why.

    A CPU without instructions for bf16 emulates it, as a GPU may. One that has them is still slower in
    depthwise convolutions, on which EfficientNets and ConvNeXts are built (docs/log.md).
    """
    if precision != "auto":
        return precision == "bf16", "given, or kept from the start of this run"
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return fast, "this GPU computes in it" if fast else "this GPU would emulate bf16"
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if any(1 < layer.groups == layer.in_channels for layer in convolutions):
        return False, "depthwise convolutions are slower in bf16 on a CPU"
    fast = torch.cpu._is_avx512_bf16_supported()
    return fast, "this CPU has instructions for it" if fast else "this CPU has no instructions for bf16"
