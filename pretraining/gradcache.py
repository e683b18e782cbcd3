"""The gradient of a whole batch on the memory of a part of it: GradCache (Gao et al. 2021, arXiv 2101.06983).

A loss that compares all embeddings of a batch has no gradient that is a sum over parts of the batch, so
accumulating gradients is wrong for it. But the embeddings can be computed part by part without a graph, the
loss gives their gradient, and a second pass takes that gradient back through each part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class GradCache:
    """Embeds a batch in micro-batches, and carries the gradient of the embeddings into the weights.

    The result is the gradient of the whole batch, exactly, if the network computes a sample independently of
    the others. BatchNorm does not: its statistics are those of each micro-batch, the same in both passes. Its
    running statistics move once a step, by the mean over the micro-batches. Random numbers, as of dropout,
    are the same in both passes.

    encoder: two views uint8 [n, 3, S, S] -> z1, z2 [n, D], itself or wrapped by DDP; with a dense term as
    `Encoder` says.
    size: windows of a micro-batch, a divisor of n. autocast: gives the precision of the forward pass.
    """

    def __init__(self, encoder: nn.Module, size: int, autocast: Callable[[], torch.autocast]) -> None:
        self.encoder, self.size, self.autocast = encoder, size, autocast
        self.plain = encoder.module if isinstance(encoder, DistributedDataParallel) else encoder
        self._buffers = list(encoder.buffers())

    def embed(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """What the encoder makes of a batch. It ends the graph of a loss; then call `carry`."""
        self._views = list(zip(*(part.split(self.size) for part in batch), strict=True))
        self._draws = []
        before = [buffer.clone() for buffer in self._buffers]
        moved = [torch.zeros_like(buffer) for buffer in before]
        parts = []
        for views in self._views:
            self._set_buffers(before)
            self._draws.append(_random_state(batch[0].device))
            # The weights that autocast rounds without a graph must not be reused with one.
            with torch.no_grad(), self.autocast():
                parts.append(self.plain(*views))
            for total, buffer, old in zip(moved, self._buffers, before, strict=True):
                total += buffer - old
        # A difference of zero leaves constants as they are, and a mean of equal counts is that count.
        for buffer, old, total in zip(self._buffers, before, moved, strict=True):
            buffer.copy_(old + total / len(parts))
        self._z = [torch.cat(z).requires_grad_() for z in zip(*parts, strict=True)]
        return tuple(self._z)

    def carry(self) -> None:
        """Add the gradient of the weights to theirs, from the gradient that the embeddings now have.

        DDP averages over ranks once, in the last micro-batch.
        """
        after = [buffer.clone() for buffer in self._buffers]
        grads = zip(*(z.grad.split(self.size) for z in self._z), strict=True)  # type: ignore[union-attr]
        for number, (views, state, grad) in enumerate(zip(self._views, self._draws, grads, strict=True), 1):
            last = number == len(self._views)
            _set_random_state(state, views[0].device)
            with self._local(not last):
                with self.autocast():
                    z = self.encoder(*views)
                torch.autograd.backward(z, grad)
        self._set_buffers(after)

    def _local(self, local: bool) -> contextlib.AbstractContextManager[None]:
        """Whether gradients stay on this rank for now."""
        if local and isinstance(self.encoder, DistributedDataParallel):
            return self.encoder.no_sync()
        return contextlib.nullcontext()

    def _set_buffers(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for buffer, value in zip(self._buffers, values, strict=True):
                buffer.copy_(value)


def _random_state(device: torch.device) -> list[Tensor]:
    """The state of the generators that a forward pass draws from: the CPU's, and that of a GPU."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
