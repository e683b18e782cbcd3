"""Decide what to do about a non-finite gradient: skip the step, go back to a checkpoint, or end the run.

The decision depends on the norm of the gradient after DDP has averaged it. That norm is the same on every
rank, so the ranks decide alike without communication. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

SKIPS = 3  # after so many non-finite steps in a row the run goes back to the last verified checkpoint
ROLLBACKS = 2  # the run ends when it would have to go back for the second time


@dataclass
class Guard:
    """Counters of a run; its checkpoints contain them.

    offset: step s takes the data of batch s + offset, so that data which led to a rollback is not used again.
    """

    skipped: int = 0  # steps in a row
    rollbacks: int = 0
    offset: int = 0

    def judge(self, finite: bool) -> str:
        """'ok': take the step. 'skip': do not take it. 'rollback': go back. 'stop': end the run."""
        self.skipped = 0 if finite else self.skipped + 1
        if self.skipped < SKIPS:
            return "ok" if finite else "skip"
        return "stop" if self.spent else "rollback"

    @property
    def spent(self) -> bool:
        """Whether the run has gone back as often as it may, so that it must end the next time."""
        return self.rollbacks + 1 >= ROLLBACKS

    def roll_back(self, step: int, to_step: int) -> None:
        """The bad step was `step`: continue at `to_step`, with the data that follows the bad batch."""
        self.offset += step + 1 - to_step
        self.rollbacks += 1
        self.skipped = 0

    def last_words(self, step: int, files: Sequence[str], checkpoint: str) -> str:
        """The error line with which the run ends when the verdict is 'stop'."""
        shown = ", ".join(files[:4]) + (f" and {len(files) - 4} more" if len(files) > 4 else "")
        after = f", after {self.rollbacks} return to a checkpoint" if self.rollbacks else ""
        return (
            f"step {step}: the gradient was not finite {SKIPS} times in a row{after}; "
            f"batch: {shown or 'unknown'}; last good checkpoint: {checkpoint or 'none'}; "
            "lower the learning rate or look at those files"
        )

    def state(self) -> dict[str, int]:
        return asdict(self)

    def restore(self, state: Mapping[str, int]) -> None:
        """Set the counters to those that `state` returned in an earlier launch of the run."""
        vars(self).update(Guard(**state).state())
