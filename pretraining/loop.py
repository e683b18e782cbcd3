"""The loop of self-supervised pretraining. n is a rank's share of the global batch N, D the embedding, S the side."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from cluster.distributed import World, all_gather
from cluster.journal import Journal
from cluster.lifecycle import Guard, Run
from pretraining.features import normalise
from pretraining.probe import embedding_std, rank_me

Loss = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


def train(
    encoder: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, lr: Callable[[int], float],
    batches: Iterable, start: int, mean: Tensor, std: Tensor, clip_grad: float, bf16: bool,
    world: World, run: Run, guard: Guard, journal: Journal, state: Callable[[int], dict],
) -> None:  # fmt: skip
    """One optimizer step a batch (view1, view2 uint8 [n, 3, S, S], samples int64 [n]), numbered from `start`."""
    buffers = [b for b in encoder.buffers() if b.is_floating_point()]
    for step, (view1, view2, samples) in enumerate(batches, start):
        for group in optimizer.param_groups:
            group["lr"] = lr(step)
        before = [b.clone() for b in buffers]
        view1, view2 = (normalise(v.to(world.device, non_blocking=True), mean, std) for v in (view1, view2))
        with torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
            z1, z2 = encoder(view1, view2)
        z1, z2 = all_gather(z1.float()), all_gather(z2.float())  # [N, D]
        value, terms = loss(z1, z2)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        norm = clip_grad_norm_(encoder.parameters(), clip_grad)
        # The gradient is the same on all ranks, and so is what the guard says of it.
        if guard.allows(step, bool(torch.isfinite(norm)), samples):
            optimizer.step()
        else:  # nothing of this step may stay, its share of BatchNorm's running statistics neither
            torch._foreach_copy_(buffers, before)
        if journal.due(step):
            figures = {"embedding_std": embedding_std(z1), "rank_me": rank_me(z1.detach()), "lr": lr(step)}
            journal.log(step, loss=value.detach(), **terms, **figures, grad_norm=norm)
        run.after_step(step + 1, state)
