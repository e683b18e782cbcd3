"""The loop of self-supervised pretraining. Shapes: n a rank's share of the batch N, D embedding, S side."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from cluster.distributed import World, all_gather
from cluster.journal import Journal
from cluster.lifecycle import Guard, Run
from pretraining.probe import embedding_std, rank_me

Loss = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


def normalise(view: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [n, 3, S, S] -> float32 of the pool's mean 0 and std 1, channels last; mean and std [1, 3, 1, 1] in 0..1."""
    return ((view.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def train(
    encoder: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, lr: Callable[[int], float],
    batches: Iterable, start: int, clip_grad: float | None, precision: torch.dtype,
    mean: Tensor, std: Tensor, world: World, run: Run, guard: Guard, journal: Journal,
    state: Callable[[int], dict],
) -> None:  # fmt: skip
    """Steps `start`, `start` + 1, ... one for each batch (view1, view2 uint8 [n, 3, S, S], samples [n])."""
    ...
