"""The loop of finetuning, what a run has reached, and what comes after each step: saving and validating."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from cluster.errors import UserError
from cluster.guard import Guard
from cluster.journal import Journal
from cluster.lifecycle import Run
from cluster.training import GuardedStep
from detection.data import SheetReader
from detection.metrics.coco import Engine, Figures
from detection.model import Detector
from detection.schedule import Phase
from detection.validation import VALIDATING, out_of_patience, validate, write_model
from schematics.coco import to_coco


def train(
    detector: nn.Module,
    guarded: GuardedStep,
    batches: Iterable[tuple[int, Any]],
    journal: Journal,
    boundary: Callable[[int], bool],
) -> None:
    """One optimizer step for each (step, (windows uint8 [B, 3, S, S], targets, seeds)).

    boundary: called after each step with the number of steps done; it saves, validates, and says whether to
    go on.
    """
    for step, (images, targets, seeds) in batches:
        with guarded.forward():
            losses = detector(images, targets, seeds)
        loss = torch.stack([value.float() for value in losses.values()]).sum()
        norm = guarded.take(step, loss)
        if journal.due(step):
            terms = {name: value.detach() for name, value in losses.items()}
            journal.log(step, loss=loss.detach(), lr=guarded.lr(step), grad_norm=norm, **terms)
        if not boundary(step + 1):
            return


@dataclass
class Progress:
    """What a checkpoint holds and a resumed run starts from."""

    detector: Detector
    optimizer: torch.optim.Optimizer
    guard: Guard
    ema: ModelEmaV3 | None = None
    phases: list[Phase] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=lambda: {"AP": -2.0, "step": 0})
    step: int = 0
    pending: bool = False  # the validation after `step` is still to come

    @property
    def judged(self) -> Detector:
        """The weights that are validated and handed on."""
        return self.ema.module if self.ema else self.detector

    def state(self) -> dict[str, Any]:
        return {
            "spec": self.detector.spec.to_dict(),
            "model": self.detector.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema and self.ema.module.state_dict(),
            "guard": self.guard.state(),
            "phases": [asdict(phase) for phase in self.phases],
            "best": self.best,
            "pending": self.pending,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Weights, averages and place; guard and phases outlive going back to a checkpoint.

        Raises UserError for a checkpoint of another version's detector.
        """
        try:
            self.detector.load_state_dict(state["model"])
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(
                f"--exp-dir: its checkpoint is not of this version's detector ({reason}); "
                "end the run with the code that began it, or take another folder"
            ) from None
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        self.best = max(self.best, dict(state["best"]), key=lambda best: best["AP"])
        self.step = state["step"]
        self.pending = state.get("pending", False)


@dataclass
class Boundary:
    """What comes after each step: at the end of an epoch validate and keep the best; save what is due."""

    progress: Progress
    run: Run
    journal: Journal
    reader: SheetReader  # of the validation split
    per_epoch: int
    total: int
    validate_every: int  # epochs
    patience: int  # steps; 0: never ends early
    engine: Engine

    def __post_init__(self) -> None:
        self.truth = to_coco(self.reader.split)

    def __call__(self, step: int) -> bool:
        """`step` steps are done. False ends the run."""
        self.progress.step = step
        if self.progress.ema:
            self.progress.ema.update(self.progress.detector, step)
        due = step % (self.per_epoch * self.validate_every) == 0 or step >= self.total
        self.progress.pending, skipping = due, self.progress.guard.skipped > 0
        # Saved before a validation: what ends the run there costs the validation, and no step.
        self.run.after_step(step, self.progress.state, save=due and not skipping, hold=skipping)
        return self.validate() if due else True

    def validate(self) -> bool:
        """Validate what the steps so far have made, keep the best. False ends the run."""
        progress = self.progress
        step = progress.step
        judged = None
        while judged is None:
            with self.run.allow(VALIDATING):
                judged = validate(
                    progress.judged,
                    self.reader,
                    self.truth,
                    self.run.world,
                    self.engine,
                    leave=lambda: self.run.stopping,
                )
            if judged is None:
                self.run.after_step(step, progress.state)  # the signal's: saves and stops
        figures, thresholds = judged
        better = figures.fitted["AP"] > progress.best["AP"]
        if better:
            progress.best = {"AP": figures.fitted["AP"], "step": step}
        go_on = step < self.total and not out_of_patience(progress.best, step, self.patience)
        progress.pending = not go_on  # of the last one a longer run makes sure again
        for name in ["model.pt"] * better + ["last.pt"] * (not go_on):
            write_model(self.run.exp_dir / name, progress.judged, step, figures, thresholds)
        self.tell(step, figures, better)
        return go_on

    def tell(self, step: int, figures: Figures, better: bool) -> None:
        """The figures, for the journal and for the reader."""
        self.journal.record(step, **{f"valid_{name}": value for name, value in figures.fitted.items()})
        shown = ", ".join(f"{name} {value:.3f}" for name, value in figures.fitted.items())
        self.journal.message(f"epoch {step / self.per_epoch:g}: valid {shown}{' (best)' if better else ''}")
