"""The learning rate as a pure function of the step and of the phases that a run has gone through.

A run that is resumed with another --lr or --scheduler begins a new phase at that step, and the steps of a
phase count from its start. The optimizer keeps its state. There is no scheduler object, whose saved state
would bring the old rate back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

WARMUP_FROM = 0.001  # share of the learning rate with which the warm-up begins


@dataclass(frozen=True)
class Phase:
    """A course of the learning rate, which begins at step `start` with the rate `lr`.

    kind: "constant"; "step", which multiplies the rate by `gamma` every `step_size` steps; or "cosine", which
    takes it to 0 at step `stop`.
    """

    start: int
    lr: float
    kind: str
    step_size: int
    gamma: float
    stop: int


def lr_at(step: int, phases: Sequence[Phase], warmup: int) -> float:
    """The learning rate of `step`, counted from 0. Over the run's first `warmup` steps it rises linearly."""
    phase = next(p for p in reversed(phases) if p.start <= step)
    passed = step - phase.start
    factor = 1.0
    if phase.kind == "step":
        factor = phase.gamma ** (passed // phase.step_size)
    elif phase.kind == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * min(1.0, passed / max(1, phase.stop - phase.start))))
    if step < warmup:
        factor *= WARMUP_FROM + (1 - WARMUP_FROM) * step / warmup
    return phase.lr * factor


def continue_phases(phases: Sequence[Phase], wanted: Phase, at: int) -> list[Phase]:
    """The phases of a run that is resumed at step `at` with the flags in `wanted`.

    Other flags than those of the last phase begin a new one at step `at`. If the run is merely longer, the
    last phase goes on, unless it is a cosine, whose end has moved.
    """
    if not phases:
        return [replace(wanted, start=0)]
    last = phases[-1]
    same = replace(wanted, start=last.start)
    if same.kind != "cosine":
        same = replace(same, stop=last.stop)
    if same.kind == "constant":
        same = replace(same, step_size=last.step_size, gamma=last.gamma)
    if same == last:
        return list(phases)
    return [*(p for p in phases if p.start < at), replace(wanted, start=at)]
