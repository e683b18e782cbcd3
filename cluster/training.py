"""The optimizer step of every training loop, and the return to a checkpoint after non-finite gradients.

A loop computes its loss under `step.forward()` and hands it to `step.take`. This module does what the guard
decides: take the step, undo it, or go back to the newest checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from cluster import checkpoint
from cluster.batches import Batches
from cluster.checkpoint import State
from cluster.distributed import World
from cluster.errors import UserError
from cluster.guard import SKIPS, Guard
from cluster.journal import Journal
from cluster.lifecycle import Run


class NotFinite(Exception):
    """The gradients of `step` and of the steps before it were not finite, and skipping no longer helps."""

    def __init__(self, step: int) -> None:
        super().__init__(f"step {step}: the gradient is not finite")
        self.step = step


class GuardedStep:
    """An optimizer step that is undone if its gradient is not finite.

    lr: maps a step to its learning rate, which is multiplied by the "factor" of a parameter group that has
    one. clip_grad: largest norm of the gradient, None for no limit. precision: of the forward pass, auto
    (bf16 on a GPU that computes in it, and does not emulate it), fp32 or bf16.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr: Callable[[int], float],
        guard: Guard,
        device: torch.device,
        clip_grad: float | None = None,
        precision: str = "fp32",
    ) -> None:
        self.model, self.optimizer, self.lr, self.guard, self.device = model, optimizer, lr, guard, device
        self.clip_grad = math.inf if clip_grad is None else clip_grad
        self.bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda" and _fast_bf16())
        self._buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self._before: list[Tensor] = []

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Use around the forward pass: sets its precision and keeps BatchNorm's statistics for an undo."""
        self._before = [buffer.clone() for buffer in self._buffers]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            yield

    def take(self, step: int, loss: Tensor) -> Tensor:
        """Take step number `step` if its gradient is finite. Returns the gradient's norm before clipping, [].

        DDP has averaged the gradient, so the norm and thus the guard's verdict are the same on every rank.
        Raises NotFinite if skipping the step is not enough.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(step) * group.get("factor", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = clip_grad_norm_(self.model.parameters(), self.clip_grad)
        verdict = self.guard.judge(bool(torch.isfinite(norm)))
        if verdict == "ok":
            self.optimizer.step()
            return norm
        # Nothing of this step may remain, so its part in BatchNorm's running statistics is undone as well.
        for buffer, old in zip(self._buffers, self._before, strict=True):
            buffer.copy_(old)
        if verdict != "skip":
            raise NotFinite(step)
        return norm


def _fast_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


def begin(
    run: Run,
    saved: State | None,
    guard: Guard,
    state: Callable[[], State],
    restore: Callable[[State], None],
) -> int:
    """The step to start from, after restoring `saved`; without `saved` 0, and that state is saved at once.

    A new run thus has a checkpoint to go back to, and a full disk is found before the first step.
    """
    if saved is None:
        run.save(0, state, wait=True)
        return 0
    restore(saved)
    guard.restore(saved["guard"])
    return saved["step"]


def train_guarded(
    train: Callable[[Iterable[tuple[int, Any]]], None],
    batches: Batches,
    guard: Guard,
    run: Run,
    journal: Journal,
    restore: Callable[[State], None],
    start: int,
    total: int,
) -> None:
    """Call `train` on the batches of steps `start` to `total` - 1; go back while gradients stay non-finite.

    restore: loads the state of a checkpoint. The data that led to going back is not used again.
    Raises UserError, which names step, batch and checkpoint, if going back has not helped.
    """
    while True:
        try:
            return train(journal.timed(run.heart.waits(batches.between(start, total, guard.offset))))
        except RuntimeError as error:  # torch.OutOfMemoryError is one, and so is what a CPU raises
            if not any(words in str(error) for words in ("out of memory", "can't allocate memory")):
                raise
            reason = " ".join(str(error).split())[:200]
            cure = "lower --batch-size, or run on more ranks, which share it"
            raise UserError(f"{batches.world.device}: not enough memory ({reason}): {cure}") from None
        except NotFinite as bad:
            sources = batches.sources(bad.step + guard.offset)
            saved = run.resume()
            assert saved is not None, "a fresh run saves step 0"
            start = saved["step"]
            if guard.spent:
                last = checkpoint.step_path(run.folder, start)
                raise UserError(guard.last_words(bad.step, sources, str(last))) from None
            told = (
                f"step {bad.step}: the gradient was not finite {SKIPS} times in a row, last on {sources[0]}"
            )
            journal.message(f"{told}; going back to step {start}")
            restore(saved)
            guard.roll_back(bad.step, start)
            journal.rewind(start)


def parallel(model: nn.Module, world: World) -> nn.Module:
    """The model wrapped so that its gradients are averaged over ranks; with one rank, the model itself.

    Sums over three ranks or more depend on where a gradient lies in the buffers that are reduced. DDP lays
    them out anew after its first backward pass, by the order in which gradients came. That pass is spent here
    on a sum of the parameters, so that every step of every launch has the same layout, whatever its graph.
    """
    if world.size == 1:
        return model
    synced = any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    wrapped = DistributedDataParallel(
        model,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        broadcast_buffers=not synced,  # they are equal on all ranks already
        gradient_as_bucket_view=True,
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    model.forward = lambda zero: torch.stack([p.sum() for p in trained]).sum() * zero
    wrapped(torch.zeros((), device=world.device)).backward()
    del model.forward
    model.zero_grad(set_to_none=True)
    return wrapped
