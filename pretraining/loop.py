"""The training loop of pretraining.

Shapes: n is a rank's share of the global batch N, D the width of the embedding, S a view's side in pixels, C
its channels: 1 if all of the pool is gray, else 3.
"""

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from cluster.distributed import all_gather
from cluster.journal import Journal
from cluster.training import GuardedStep
from pretraining.gradcache import GradCache
from pretraining.probe import embedding_std, pair_accuracy, rank_me

Loss = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


def train(
    encoder: nn.Module,
    guarded: GuardedStep,
    batches: Iterable[tuple[int, tuple[Tensor, Tensor]]],
    journal: Journal,
    boundary: Callable[[int], object],
    loss: Loss,
    micro_batch: int | None = None,
) -> None:
    """Take one optimizer step for each (step, (view1, view2)) of `batches`; views are uint8 [n, C, S, S].

    boundary: called after each step with the number of steps done, to save, stop and draw the embedding.
    micro_batch: windows that go through the encoder at a time, a divisor of n; None for all n at once.
    """
    cache = None if micro_batch is None else GradCache(encoder, micro_batch, guarded.autocast)
    for step, (view1, view2) in batches:
        with guarded.forward():
            z1, z2 = cache.embed(view1, view2) if cache else encoder(view1, view2)
        g1, g2 = all_gather(z1.float()), all_gather(z2.float())  # [N, D]
        value, terms = loss(g1, g2)
        norm = guarded.take(step, value, cache.carry if cache else None)
        if journal.main and journal.due(step):
            figures = {"accuracy": pair_accuracy(g1, g2)}
            figures |= {"embedding_std": embedding_std(g1), "rank_me": rank_me(g1)}
            journal.log(step, loss=value.detach(), **terms, **figures, grad_norm=norm, lr=guarded.lr(step))
        boundary(step + 1)
