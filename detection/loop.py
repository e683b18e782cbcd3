"""The loop of finetuning, the state that a checkpoint holds, and what follows each step: save, validate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import nn

from cluster import distributed
from cluster.checkpoint import OTHER, Saved
from cluster.compiling import uncompiled
from cluster.facts import check_facts
from cluster.guard import Guard
from cluster.journal import Journal
from cluster.lifecycle import Run
from cluster.training import GuardedStep, load_optimizer
from detection.draw import annotate
from detection.inference import detect
from detection.metrics.coco import Figures
from detection.metrics.engines import Engine
from detection.model import Detector
from detection.schedule import Phase
from detection.sheets import SheetReader
from detection.teaching import Teaching
from detection.validation import VALIDATING, out_of_patience, validate, write_model
from schematics import draws
from schematics.coco import to_coco

DRAWN = 2  # validation sheets that are drawn for TensorBoard


def train(
    detector: nn.Module,
    guarded: GuardedStep,
    batches: Iterable[tuple[int, Any]],
    journal: Journal,
    boundary: Callable[[int], bool],
    teaching: Teaching | None = None,
) -> None:
    """Take one optimizer step for each (step, (windows uint8 [B, 3, S, S], targets, seeds)) of `batches`.

    boundary: called after each step with the number of steps done. It saves and validates when that is due,
    and returns False to end the training. teaching: used in the steps whose batch has a fourth part, which is
    one of unlabelled windows.
    """
    for step, (images, targets, seeds, *pool) in batches:
        with guarded.forward():
            if teaching and pool:
                losses = teaching.losses(detector, images, targets, seeds, *pool)
            else:
                losses = detector(images, targets, seeds)
        loss = torch.stack([value.float() for value in losses.values()]).sum()
        norm = guarded.take(step, loss)
        if journal.due(step):
            terms = {name: value.detach() for name, value in losses.items()}
            given = teaching.figures() if teaching and pool else {}
            journal.log(step, loss=loss.detach(), lr=guarded.lr(step), grad_norm=norm, **terms, **given)
        if not boundary(step + 1):
            return


@dataclass(frozen=True)
class Best:
    """The best validation so far."""

    AP: float
    step: int


@dataclass(frozen=True)
class ProgressFacts:
    """What a checkpoint says beside its tensors and its spec."""

    best: Best
    phases: tuple[Phase, ...]
    pending: bool = False  # an earlier version kept none


@dataclass
class Progress:
    """How far a run has come: what a checkpoint holds and a resumed run starts from.

    best: AP and step of the best validation so far.
    """

    detector: Detector
    optimizer: torch.optim.Optimizer
    guard: Guard
    ema: ModelEmaV3 | None = None
    teaching: Teaching | None = None
    phases: list[Phase] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=lambda: {"AP": -2.0, "step": 0})
    step: int = 0
    pending: bool = False  # whether the validation that is due after `step` is still to be made

    @property
    def judged(self) -> Detector:
        """The detector that is validated and written to model.pt: the averaged one, if one is kept."""
        return self.ema.module if self.ema else self.detector

    @property
    def verdict(self) -> str:
        """A line on how good the result is beside the end of the burn-in; "" without a teacher."""
        return self.teaching.verdict(self.best) if self.teaching else ""

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
            "validated_in": "bf16" if self.judged.bf16 else "fp32",
            "draws": draws.WINDOWS_VERSION,
            **({"teacher": self.teaching.state()} if self.teaching else {}),
        }

    def restore(self, saved: Saved) -> None:
        """Take weights, optimizer, averaged weights and step from a checkpoint.

        Guard and phases stay as they are, because a run that goes back to an earlier checkpoint must keep
        them. Raises UserError for facts that no finetuning writes.
        """
        facts = check_facts(ProgressFacts, saved, str(saved.path), OTHER)
        load_optimizer(self.optimizer, saved)
        self.detector.load_state_dict(saved["model"])
        if self.ema:
            self.ema.module.load_state_dict(saved["ema"])
        if self.teaching:
            self.teaching.restore(saved["teacher"], str(saved.path), OTHER)
        self.best = max(self.best, asdict(facts["best"]), key=lambda best: best["AP"])
        self.step = saved["step"]
        self.pending = facts.get("pending", False)


@dataclass
class Boundary:
    """What follows each step: save if that is due, validate at the end of an epoch, keep the best model."""

    progress: Progress
    run: Run
    journal: Journal
    reader: SheetReader  # of the validation split
    per_epoch: int
    total: int
    validate_every: int  # epochs
    train_boxes: dict[int, int]  # by category id, of the training split
    patience: int  # steps without a better validation AP that end the run; 0 never ends it early
    engine: Engine
    compiled: bool

    def __post_init__(self) -> None:
        self.truth = to_coco(self.reader.split)
        self.burn_in = self.progress.teaching.burn_in if self.progress.teaching else 0  # steps

    def __call__(self, step: int) -> bool:
        """Called when `step` steps are done. Returns False to end the run."""
        self.progress.step = step
        if self.progress.ema:
            self.progress.ema.update(self.progress.detector, step)
        due = step % (self.per_epoch * self.validate_every) == 0
        due |= step >= self.total or step == self.burn_in
        self.progress.pending, skipping = due, self.progress.guard.skipped > 0
        # Saved before a validation, so that a run that is killed in it loses the validation but no step.
        self.run.after_step(step, self.progress.state, save=due and not skipping, hold=skipping)
        return self.validate() if due else True

    def validate(self) -> bool:
        """Validate the detector and keep it if it is the best so far. Returns False to end the run."""
        progress = self.progress
        step = progress.step
        judged = None
        while judged is None:
            with self.run.allow(VALIDATING), uncompiled(self.compiled):
                judged = validate(
                    progress.judged,
                    self.reader,
                    self.truth,
                    self.run.world,
                    self.engine,
                    leave=lambda: self.run.stopping,
                )
            if judged is None:
                self.run.after_step(step, progress.state)  # a signal ended the validation: save and stop
        figures, thresholds, ranges = judged
        better = figures.fitted["AP"] > progress.best["AP"]
        if better:
            progress.best = {"AP": figures.fitted["AP"], "step": step}
        go_on = step < self.total and not out_of_patience(progress.best, step, self.patience)
        # A run that is made longer later repeats its last validation, which its last checkpoint doesn't know.
        progress.pending = not go_on
        for name in ["model.pt"] * better + ["last.pt"] * (not go_on):
            path = self.run.exp_dir / name
            write_model(path, progress.judged, step, figures, thresholds, ranges, self.train_boxes)
        if better:
            with self.run.allow(VALIDATING):
                distributed.on_main(lambda: self.draw(step, thresholds))  # the others wait here
        self.tell(step, figures, better)
        if progress.teaching:
            self.judge(progress.teaching, step, figures.fitted["AP"])
        if progress.verdict and not go_on:
            self.journal.message(progress.verdict)
        return go_on

    def judge(self, teaching: Teaching, step: int, AP: float) -> None:
        """Compare a validation with that at the end of the burn-in, and tell what the teacher has given."""
        if step == teaching.burn_in:
            teaching.burnt = AP
            self.journal.message("the burn-in ends: from here on the averaged detector teaches")
        elif step > teaching.burn_in:
            told = ", ".join(f"{name} {value:.3g}" for name, value in teaching.figures().items())
            self.journal.record(step, valid_AP_burn_in=teaching.burnt, **teaching.figures_by_class())
            self.journal.message(told)
            if teaching.burnt > AP:
                self.journal.message(
                    f"worse than at the end of the burn-in (AP {teaching.burnt:.3f}, step {teaching.burn_in})"
                )
        teaching.begin_tally()

    def draw(self, step: int, thresholds: dict[int, float]) -> None:
        """Draw what is found on the first sheets for TensorBoard."""
        detector = self.progress.judged
        training = detector.training
        names = [name for _, name in detector.spec.categories]
        least = np.array([thresholds[number] for number, _ in detector.spec.categories])
        detector.eval()
        for n, sheet in enumerate(self.reader.split.sheets[:DRAWN]):
            image = self.reader[n][0]
            found = detect(detector, image).above(least)
            picture = annotate(image, found.boxes, found.labels, names, found.scores, sheet.file_name)
            self.journal.picture(step, f"valid/{n + 1}", picture)
        detector.train(training)

    def tell(self, step: int, figures: Figures, better: bool) -> None:
        """Write the figures to the journal, and print them."""
        self.journal.record(step, **{f"valid_{name}": value for name, value in figures.fitted.items()})
        shown = ", ".join(f"{name} {value:.3f}" for name, value in figures.fitted.items())
        self.journal.message(f"epoch {step / self.per_epoch:g}: valid {shown}{' (best)' if better else ''}")
