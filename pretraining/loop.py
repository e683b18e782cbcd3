"""The loop of pretraining. n: a rank's share of the global batch N; D: the embedding; S: a side in pixels."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from cluster.distributed import all_gather
from cluster.guard import Guard
from cluster.journal import Journal
from pretraining.features import normalise
from pretraining.probe import embedding_std, rank_me

Loss = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


def train(
    encoder: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, lr: Callable[[int], float],
    batches: Iterable, start: int, mean: Tensor, std: Tensor, clip_grad: float, bf16: bool,
    device: torch.device, guard: Guard, journal: Journal, boundary: Callable[[int], None],
) -> tuple[str, int, list[int]] | None:  # fmt: skip
    """One optimizer step a batch (view1, view2 uint8 [n, 3, S, S], samples int64 [n]), numbered from `start`.

    `boundary` is called after each with the number of steps done: it saves, stops, draws.
    Returns None at the end of the batches; (verdict, step, samples) where the guard did.
    """
    buffers = [b for b in encoder.buffers() if b.is_floating_point()]
    for step, (view1, view2, samples) in enumerate(batches, start):
        for group in optimizer.param_groups:
            group["lr"] = lr(step)
        before = [b.clone() for b in buffers]
        view1, view2 = (normalise(v.to(device, non_blocking=True), mean, std) for v in (view1, view2))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            z1, z2 = encoder(view1, view2)
        z1, z2 = all_gather(z1.float()), all_gather(z2.float())  # [N, D]
        value, terms = loss(z1, z2)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        norm = clip_grad_norm_(encoder.parameters(), clip_grad)
        verdict = guard.judge(bool(torch.isfinite(norm)))
        if verdict == "ok":
            optimizer.step()
        else:  # nothing of this step may stay, its share of BatchNorm's running statistics neither
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(old)
            if verdict != "skip":
                return verdict, step, samples.tolist()
        if journal.due(step):
            spread = {"embedding_std": embedding_std(z1), "rank_me": rank_me(z1)}
            journal.log(step, loss=value.detach(), **terms, **spread, grad_norm=norm, lr=lr(step))
        boundary(step + 1)
    return None
