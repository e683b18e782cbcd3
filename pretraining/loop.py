"""The loop of pretraining. n: a rank's share of the global batch N; D: the embedding; S: a side in pixels."""

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from cluster.distributed import all_gather
from cluster.journal import Journal
from cluster.training import GuardedStep
from pretraining.probe import embedding_std, rank_me

Loss = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


def train(
    encoder: nn.Module,
    loss: Loss,
    guarded: GuardedStep,
    batches: Iterable[tuple[int, tuple[Tensor, Tensor]]],
    journal: Journal,
    boundary: Callable[[int], object],
) -> None:
    """One optimizer step for each (step, (view1, view2)), uint8 [n, 3, S, S] each.

    boundary: called after each step with the number of steps done; it saves, stops and draws.
    """
    for step, (view1, view2) in batches:
        with guarded.forward():
            z1, z2 = encoder(view1, view2)
        z1, z2 = all_gather(z1.float()), all_gather(z2.float())  # [N, D]
        value, terms = loss(z1, z2)
        norm = guarded.take(step, value)
        if journal.due(step):
            spread = {"embedding_std": embedding_std(z1), "rank_me": rank_me(z1)}
            journal.log(step, loss=value.detach(), **terms, **spread, grad_norm=norm, lr=guarded.lr(step))
        boundary(step + 1)
