"""The optimizer step of every training loop, and the return to a checkpoint after non-finite gradients.

A loop computes its loss under `step.forward()` and hands it to `step.take`. This module does what the guard
decides: take the step, undo it, or go back to the newest checkpoint.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from cluster import checkpoint, distributed
from cluster.batches import Batches
from cluster.checkpoint import OTHER, Saved, State
from cluster.compiling import compile_part
from cluster.distributed import World
from cluster.errors import UserError
from cluster.facts import check_facts
from cluster.guard import SKIPS, Guard
from cluster.journal import Journal
from cluster.lifecycle import Run
from cluster.memory import peak_memory
from cluster.precision import in_bf16

ModuleType = TypeVar("ModuleType", bound=nn.Module)
TIMED = 4  # steps that are timed
TIMING = 3600.0  # seconds that this may take before the run counts as hung
LONG = 1 << 30  # steps, more than any run has
LONG_RUN = 2 * 3600.0  # seconds
SHORTER = (
    "that is long for a CPU: --minutes N fits the number of steps to the time, "
    "--preset laptop takes a smaller network"
)


class NotFinite(Exception):
    """The gradients of `step` and of the steps before it were not finite, and skipping no longer helps."""

    def __init__(self, step: int) -> None:
        super().__init__(f"step {step}: the gradient is not finite")
        self.step = step


class GuardedStep:
    """An optimizer step that is undone if its gradient is not finite.

    lr: maps a step to its learning rate, which is multiplied by the "factor" of a parameter group that has
    one. clip_grad: largest norm of the gradient, None for no limit. precision: of the forward pass, auto
    (see cluster/precision.py), fp32 or bf16.
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
        self.bf16 = in_bf16(precision, device, model)
        self._buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self._before: list[Tensor] = []

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Use around the forward pass: sets its precision and keeps BatchNorm's statistics for an undo."""
        self._before = [buffer.clone() for buffer in self._buffers]
        with self.autocast():
            yield

    def autocast(self) -> torch.autocast:
        """The precision of the forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def take(self, step: int, loss: Tensor, carry: Callable[[], None] | None = None) -> Tensor:
        """Take step number `step` if its gradient is finite. Returns the gradient's norm before clipping, [].

        carry: called after the backward pass of `loss`, where its graph ends before the weights, to carry the
        gradient on into them. DDP has averaged the gradient, so the norm and thus the guard's verdict are the
        same on every rank.
        Raises NotFinite if skipping the step is not enough.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(step) * group.get("factor", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if carry is not None:
            carry()
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


@contextmanager
def rehearsal(model: ModuleType, device: torch.device, precision: str) -> Iterator[ModuleType]:
    """Yield a copy of the model to try things on: the model and torch's generators stay as they are."""
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=in_bf16(precision, device, model))
    with torch.random.fork_rng([device] if device.type == "cuda" else []), autocast:
        yield copy.deepcopy(model)


def seconds_per_step(
    train: Callable[
        [nn.Module, GuardedStep, Iterable[tuple[int, Any]], Journal, Callable[[int], bool]], None
    ],
    model: ModuleType,
    build_optimizer: Callable[[ModuleType], torch.optim.Optimizer],
    batches: Batches,
    world: World,
    precision: str,
    compiled: str | None,
) -> float:
    """Seconds that a step takes on the slowest rank, by TIMED throw-away steps of a copy of the model.

    The first step is not timed, because it allocates memory, starts the loader and compiles. The loader goes
    on making batches meanwhile, as it will in the run. train: the loop of the stage. compiled: see
    `parallel`.
    """
    moments: list[float] = []

    def watched(made: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        for item in itertools.islice(made, 1 + TIMED):
            moments.append(time.monotonic())
            yield item

    device = world.device
    endless = closing(batches.between(0, LONG))  # as in `train_guarded`
    with rehearsal(model, device, "fp32") as copied, endless as made, suppress(NotFinite):
        wrapped = parallel(copied, world, compiled)
        optimizer = build_optimizer(copied)
        guarded = GuardedStep(wrapped, optimizer, lambda step: 0.0, Guard(), device, None, precision)
        # The journal of a rank other than the first records nothing.
        silent = Journal(Path(), replace(world, rank=1), LONG, every=LONG)
        train(wrapped, guarded, watched(made), silent, lambda step: True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = (time.monotonic() - moments[1]) / (len(moments) - 1)
    return distributed.agree(round(seconds * 1e6))[0] / 1e6


def paced(
    batches: Iterable[tuple[int, Any]], total: int, journal: Journal, device: torch.device
) -> Iterator[tuple[int, Any]]:
    """Pass the batches on, and after the first ones say how long the rest will take, and on how much memory.

    Where that is hours on a CPU, also say how it becomes shorter.
    """
    moments: list[float] = []
    for step, batch in batches:
        moments.append(time.monotonic())
        if len(moments) == 2 + TIMED:
            seconds = (moments[-1] - moments[1]) / TIMED
            left = seconds * (total - step)
            told = f"{tell_seconds(seconds)} a step, {peak_memory(device)}"
            journal.message(f"{told}; about {tell_seconds(left)} to go")
            if device.type == "cpu" and left > LONG_RUN:
                journal.message(SHORTER)
        yield step, batch


def tell_seconds(seconds: float) -> str:
    """A duration for a reader: 0.71 s, 45 s, 12 min, 37.0 h."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def length(windows: int, batch_size: int, epochs: int, steps: int | None) -> tuple[int, int]:
    """Steps of an epoch and of the whole run. Raises UserError if the pool is smaller than a batch."""
    per_epoch = windows // batch_size
    if per_epoch == 0:
        raise UserError(
            f"--batch-size {batch_size}: the pool has {windows} windows; "
            "take a smaller batch, or more windows by a smaller --stride"
        )
    return per_epoch, epochs * per_epoch if steps is None else steps


def refuse_shorter(epochs: int, steps: int | None, total: int, saved: State | None, exp_dir: Path) -> None:
    """Raise UserError if the checkpoint that is resumed has done more steps than the run is to have."""
    if saved and saved["step"] > total:
        raise UserError(
            f"{f'--epochs {epochs}' if steps is None else f'--steps {steps}'}: the newest checkpoint in "
            f"{exp_dir} has done {saved['step']} of now {total} steps; give as many, or another --exp-dir"
        )


def begin(
    run: Run,
    saved: Saved | None,
    guard: Guard,
    state: Callable[[], State],
    restore: Callable[[Saved], None],
) -> int:
    """The step to start from, after restoring `saved`; without `saved` 0, and that state is saved at once.

    A new run thus has a checkpoint to go back to, and a full disk is found before the first step.
    Raises UserError if `saved` has another layout than `state` returns, as another version may have written.
    """
    if saved:
        saved.refuse_other_tensors(state())
        counters = check_facts(Guard, saved["guard"], str(saved.path), OTHER)
        restore(saved)
        guard.restore(counters)
    if run.world.main:  # a shorter run may have signed files that will be replaced
        (run.exp_dir / "final.json").unlink(missing_ok=True)
    if not saved:
        run.save(0, state, wait=True)
    return saved["step"] if saved else 0


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Saved) -> None:
    """Put saved["optimizer"] into an optimizer.

    Raises UserError if that is the state of another kind of optimizer, or of other parameters. torch compares
    no more than their number, and the first step would crash.
    """
    content, before = saved["optimizer"], optimizer.state_dict()["param_groups"]
    if other := _other_parameters(optimizer, content):
        raise saved.refusal(other)
    optimizer.load_state_dict(content)
    for group, own in zip(optimizer.param_groups, before, strict=True):
        for name in own.keys() - {"params"}:
            if name not in group or not _alike(group[name], own[name]):
                raise saved.refusal(f"its optimizer has no {name}, or one of another kind than {own[name]}")


def _other_parameters(optimizer: torch.optim.Optimizer, content: Any) -> str:
    """Why `content` is no state of this optimizer's parameters; empty if it may be."""
    table = content if isinstance(content, dict) else {}
    state, groups = table.get("state"), table.get("param_groups")
    if not isinstance(state, dict) or not isinstance(groups, list):
        return "its optimizer is no state of one"
    numbers = [group.get("params") if isinstance(group, dict) else None for group in groups]
    if numbers != [group["params"] for group in optimizer.state_dict()["param_groups"]]:
        return "its optimizer has other parameters"
    weights = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for number, weight in enumerate(weights):
        kept = state.get(number, {})
        if not isinstance(kept, dict):
            return f"what its optimizer keeps for parameter {number} is no table"
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != weight.shape:
                return f"{name} of parameter {number} is {list(value.shape)}, not {list(weight.shape)}"
    return ""


def _alike(one: Any, other: Any) -> bool:
    """Whether a setting of an optimizer may take the place of another; None is a default of some."""
    numbers = isinstance(one, (int, float)) and isinstance(other, (int, float))
    return numbers or one is None or other is None or type(one) is type(other)


def train_guarded(
    train: Callable[[Iterable[tuple[int, Any]]], None],
    batches: Batches,
    guard: Guard,
    run: Run,
    journal: Journal,
    restore: Callable[[Saved], None],
    start: int,
    total: int,
) -> None:
    """Call `train` on the batches of steps `start` to `total` - 1; go back while gradients stay non-finite.

    restore: loads the state of a checkpoint. The data that led to going back is not used again.
    Raises UserError, which names step, batch and checkpoint, if going back has not helped.
    """
    while True:
        try:
            # Closed here, so that the workers end now. A cycle of garbage may hold a frame that holds the
            # batches until exit, where workers, which block SIGTERM, would be waited for without end.
            with closing(batches.between(start, total, guard.offset)) as rest:
                return train(run.heart.waits(rest, journal.waited))
        except RuntimeError as error:  # torch.OutOfMemoryError is one, and so is what a CPU raises
            if not any(words in str(error) for words in ("out of memory", "can't allocate memory")):
                raise
            reason = " ".join(str(error).split())[:200]
            cure = (
                "lower --batch-size or, in pretraining, --micro-batch, or run on more ranks, which share it"
            )
            raise UserError(f"{batches.world.device}: not enough memory ({reason}): {cure}") from None
        except NotFinite as bad:
            sources = batches.sources(bad.step + guard.offset)
            saved = run.resume()
            if saved is None:  # a fresh run saves step 0
                raise UserError(f"{run.folder}: its checkpoints are gone; bring the folder back") from None
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


def parallel(model: nn.Module, world: World, compiled: str | None = None) -> nn.Module:
    """The model wrapped so that its gradients are averaged over ranks; with one rank, the model itself.

    compiled: the name of the part that is to be compiled, "" for all of it; None compiles nothing.
    """
    wrapped = model if world.size == 1 else _wrap(model, world)
    if compiled is not None:
        compile_part(model, compiled)
    return wrapped


def _wrap(model: nn.Module, world: World) -> DistributedDataParallel:
    """The model in DDP, with the layout of its gradients settled.

    Sums over three ranks or more depend on where a gradient lies in the buffers that are reduced. DDP lays
    them out anew after its first backward pass, by the order in which gradients came. That pass is spent here
    on a sum of the parameters, so that every step of every launch has the same layout, whatever its graph.
    """
    synced = any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions of torch rename broadcast_buffers
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
