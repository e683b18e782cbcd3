"""The training loop of pretraining.

Shapes: n is a rank's share of the global batch N, D the width of the embedding, S a view's side in pixels, C
its channels: 1 if all of the pool is gray, else 3.
"""

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from cluster.distributed import all_gather
from cluster.journal import Journal
from cluster.training import GuardedStep
from pretraining.dense import Loss
from pretraining.gradcache import GradCache
from pretraining.probe import embedding_std, pair_accuracy, rank_me


def train(
    encoder: nn.Module,
    guarded: GuardedStep,
    batches: Iterable[tuple[int, tuple[Tensor, ...]]],
    journal: Journal,
    boundary: Callable[[int], object],
    loss: Loss,
    micro_batch: int | None = None,
) -> None:
    """Take one optimizer step for each (step, (view1, view2)) of `batches`; views are uint8 [n, C, S, S].

    With a dense term a batch holds `across` [n, 2, 3] too (see `Encoder`), and the loss takes what it needs.
    boundary: called after each step with the number of steps done, to save, stop and draw the embedding.
    micro_batch: windows that go through the encoder at a time, a divisor of n; None for all n at once.
    """
    cache = None if micro_batch is None else GradCache(encoder, micro_batch, guarded.autocast)
    for step, (view1, view2, *across) in batches:
        with guarded.forward():
            z = (cache.embed if cache else encoder)(view1, view2, *across)
        g1, g2, *local = (all_gather(part.float()) for part in (*z, *across))  # [N, D]
        value, terms = loss(g1, g2, *local)
        norm = guarded.take(step, value, cache.carry if cache else None)
        if journal.main and journal.due(step):
            figures = {"accuracy": pair_accuracy(g1, g2)}
            figures |= {"embedding_std": embedding_std(g1), "rank_me": rank_me(g1)}
            journal.log(step, loss=value.detach(), **terms, **figures, grad_norm=norm, lr=guarded.lr(step))
        boundary(step + 1)
