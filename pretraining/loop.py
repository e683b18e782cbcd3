"""The training loop of pretraining.

Shapes: n is a rank's share of the global batch N, D the width of the embedding, S a view's side in pixels.
"""

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from cluster.distributed import all_gather
from cluster.journal import Journal
from cluster.training import GuardedStep
from pretraining.probe import embedding_std, rank_me

Loss = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


def train(
    encoder: nn.Module,
    guarded: GuardedStep,
    batches: Iterable[tuple[int, tuple[Tensor, Tensor]]],
    journal: Journal,
    boundary: Callable[[int], object],
    loss: Loss,
) -> None:
    """Take one optimizer step for each (step, (view1, view2)) of `batches`; views are uint8 [n, 3, S, S].

    boundary: called after each step with the number of steps done, to save, stop and draw the embedding.
    """
    for step, (view1, view2) in batches:
        with guarded.forward():
            z1, z2 = encoder(view1, view2)
        z1, z2 = all_gather(z1.float()), all_gather(z2.float())  # [N, D]
        value, terms = loss(z1, z2)
        norm = guarded.take(step, value)
        if journal.main and journal.due(step):
            spread = {"embedding_std": embedding_std(z1), "rank_me": rank_me(z1)}
            journal.log(step, loss=value.detach(), **terms, **spread, grad_norm=norm, lr=guarded.lr(step))
        boundary(step + 1)
