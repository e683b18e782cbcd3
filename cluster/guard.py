"""What to do about a gradient that is not finite: skip the step, go back, or end. No torch here.

The verdict rests on the norm of the gradient after DDP has averaged it. That norm is the same on every rank,
so the ranks need not ask each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

SKIPS = 3  # in a row: back to the last verified checkpoint
ROLLBACKS = 2  # the second time, the run ends in place of going back


@dataclass
class Guard:
    """Counters of a run, which its checkpoints keep.

    offset: step s takes the data of batch s + offset, so that data which led to a rollback is passed over.
    """

    skipped: int = 0  # in a row
    rollbacks: int = 0
    offset: int = 0

    def judge(self, finite: bool) -> str:
        """'ok': take the step. 'skip': leave the weights alone. 'rollback': go back. 'stop': end the run."""
        self.skipped = 0 if finite else self.skipped + 1
        if self.skipped < SKIPS:
            return "ok" if finite else "skip"
        return "stop" if self.spent else "rollback"

    @property
    def spent(self) -> bool:
        """Whether the run has gone back as often as it may."""
        return self.rollbacks + 1 >= ROLLBACKS

    def roll_back(self, step: int, to_step: int) -> None:
        """The bad step was `step`: the run goes on at `to_step`, with the data after that of the bad step."""
        self.offset += step + 1 - to_step
        self.rollbacks += 1
        self.skipped = 0

    def last_words(self, step: int, files: Sequence[str], checkpoint: str) -> str:
        """The one line that ends the run, where the verdict is 'stop'."""
        shown = ", ".join(files[:4]) + (f" and {len(files) - 4} more" if len(files) > 4 else "")
        after = f", and already went back {self.rollbacks} time" if self.rollbacks else ""
        return (
            f"step {step}: the gradient was not finite {SKIPS} times in a row{after}; "
            f"batch: {shown or 'unknown'}; last good checkpoint: {checkpoint or 'none'}; "
            "lower the learning rate or look at those files"
        )

    def state(self) -> dict[str, int]:
        return asdict(self)

    def restore(self, state: Mapping[str, int]) -> None:
        """What `state` gave, in another life of the run."""
        vars(self).update(Guard(**state).state())
