"""The learning rate as a pure function of the step and of the phases a run has gone through.

A run that is resumed with another --lr or --scheduler begins a new phase there, measured from its own start:
the optimizer's state is kept, and no scheduler object holds state that could bring back the old numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

WARMUP_FROM = 0.001  # share of the learning rate at the first step


@dataclass(frozen=True)
class Phase:
    """From step `start` on; kind: constant, step (gamma every `step_size` steps) or cosine (0 at `stop`)."""

    start: int
    lr: float
    kind: str
    step_size: int
    gamma: float
    stop: int


def lr_at(step: int, phases: Sequence[Phase], warmup: int) -> float:
    """Learning rate of `step` (from 0), after a linear rise over the run's first `warmup` steps."""
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
    """The phases of a run resumed at step `at` with the flags in `wanted`: changed ones begin a new phase.

    A longer run alone is no change, except for the cosine, whose end it moves.
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
