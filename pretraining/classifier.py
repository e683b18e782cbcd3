"""A classifier of symbols: backbone and linear head, its training crops, its loop and its state.

Shapes: B is a rank's share of the global batch, S a crop's side in pixels and K the number of classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from cluster import distributed
from cluster.backbone import BackboneFacts, Normalise
from cluster.batches import Key
from cluster.checkpoint import OTHER, Saved, State
from cluster.compiling import uncompiled
from cluster.facts import LEAST_STD, check_facts
from cluster.guard import Guard
from cluster.journal import Journal
from cluster.lifecycle import Run
from cluster.training import GuardedStep, load_optimizer
from pretraining.data import spread
from pretraining.features import ClassFolder, class_features, square
from schematics.draws import Use, draw
from schematics.windows import cut, paper_color

VALIDATING = 3600.0  # seconds that a validation may take before the run counts as hung
SEEN = 1024  # crops from which mean and std are taken for random weights, at most


class Classifier(nn.Module):
    """Backbone and linear head. A frozen backbone stays in eval mode, and its features are standardised."""

    def __init__(self, normalise: Normalise, backbone: Any, classes: int, freeze: bool) -> None:
        super().__init__()
        self.normalise, self.backbone, self.frozen = normalise, backbone, freeze
        width = int(backbone.num_features)
        self.norm = nn.BatchNorm1d(width, affine=False) if freeze else nn.Identity()
        self.head = nn.Linear(width, classes)
        backbone.requires_grad_(not freeze)
        self.train()

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, crops: Tensor) -> Tensor:
        """Crops uint8 [B, 3, S, S] -> scores of the classes, float [B, K]."""
        return self.head(self.norm(self.backbone(self.normalise(crops))))


@dataclass(frozen=True)
class Crops:
    """The labelled crops of the three splits, as the network sees them. names: of the splits."""

    names: tuple[str, str, str]
    classes: list[str]
    train: ClassFolder
    valid: ClassFolder
    test: ClassFolder


class TrainingCrops(Dataset):
    """Item (epoch, place, sample) -> crop number `sample` with changes, uint8 [3, S, S], and its label.

    A crop may have several places in an epoch, so the changes are a function of (seed, epoch, place, sample).
    strength: see `moved`.
    """

    def __init__(self, folder: ClassFolder, seed: int, strength: float) -> None:
        self.folder, self.seed, self.strength = folder, seed, strength

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        epoch, place, sample = key
        crop, label = self.folder.read(sample)
        if self.strength:
            crop = moved(crop, self.strength, draw(Use.CROP_CHANGES, self.seed, epoch, place, sample))
        return square(crop, self.folder.size), label

    def source(self, key: Key) -> str:
        """The file of the crop, for error messages."""
        return str(self.folder.files[key[2]][0].path)


def moved(crop: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """A crop uint8 [H, W] or [H, W, 3] at another place and size in a square, on the color of its paper.

    It is moved by up to `strength` of its longer side, and that side becomes 1 / (1 + strength) to
    1 + strength of the square's.
    """
    height, width = crop.shape[:2]
    longer = max(height, width)
    scale = (1 + strength) ** rng.uniform(-1, 1)
    right, down = rng.uniform(-strength, strength, 2) * longer
    side = max(1, round(longer / scale))
    return cut(
        crop, round((width - side) / 2 - right), round((height - side) / 2 - down), side, paper_color(crop)
    )


def epoch_of_crops(seed: int, crops: int, batch_size: int) -> Callable[[int], np.ndarray]:
    """A function from an epoch to the order of its crops, repeated until they fill a batch: int64 [N]."""
    times = -(-batch_size // crops)
    return lambda epoch: np.tile(draw(Use.CROP_ORDER, seed, epoch).permutation(crops), times)


def colors(folder: ClassFolder) -> tuple[list[float], list[float]]:
    """Mean and std of the three channels over crops that are evenly spread over the folder, in 0..1."""
    pixels = torch.stack([folder[i][0].double().flatten(1) / 255 for i in spread(len(folder), SEEN)])
    mean = pixels.mean(dim=(0, 2))
    std = (pixels - mean[:, None]).square().mean(dim=(0, 2)).sqrt().clamp_min(LEAST_STD)
    return mean.tolist(), std.tolist()


def empty_tally(classifier: nn.Module) -> Tensor:
    """What `train` adds to, float64 [3] on the device of the classifier."""
    return torch.zeros(3, dtype=torch.float64, device=next(classifier.parameters()).device)


def train(
    classifier: nn.Module,
    guarded: GuardedStep,
    batches: Iterable[tuple[int, tuple[Tensor, Tensor]]],
    journal: Journal,
    boundary: Callable[[int], object],
    tally: Tensor,
) -> None:
    """Take one optimizer step for each (step, (crops uint8 [B, 3, S, S], labels int64 [B])) of `batches`.

    boundary: called after each step with the number of steps done. tally: float64 [3], to which the loss and
    the top-1 of each step are added, over all ranks, and 1; a step that is undone adds nothing.
    """
    for step, (crops, labels) in batches:
        with guarded.forward():
            scores = classifier(crops)
        loss = F.cross_entropy(scores.float(), labels)
        norm = guarded.take(step, loss)
        right = (scores.argmax(dim=1) == labels).double().mean()
        own = torch.stack([loss.detach().double(), right])[None]
        seen = distributed.all_gather(own).mean(dim=0)
        if not guarded.guard.skipped:
            tally[:2] += seen
            tally[2] += 1
        if journal.main and journal.due(step):
            journal.log(step, loss=seen[0], top1=seen[1], lr=guarded.lr(step), grad_norm=norm)
        boundary(step + 1)


@dataclass(frozen=True)
class Best:
    """The best validation so far. Of equal top-1 the lower loss is better."""

    top1: float = -1.0
    loss: float = 0.0
    step: int = 0


@dataclass(frozen=True)
class ClassifierFacts:
    """What a checkpoint says beside its tensors: how crops are to be seen, and by which classes."""

    sight: BackboneFacts
    classes: tuple[str, ...]
    best: Best


@dataclass
class Progress:
    """How far a run has come: what a checkpoint holds and a resumed run starts from.

    sight: architecture, mean, std, color mode and image size. kept: the weights of the best epoch, on the
    CPU. tally: see `train`, since the epoch's start.
    """

    classifier: Classifier
    optimizer: torch.optim.Optimizer
    guard: Guard
    sight: BackboneFacts
    classes: list[str]
    best: Best = Best()
    kept: dict[str, Tensor] = field(init=False)
    tally: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.tally = empty_tally(self.classifier)
        self.keep()

    def keep(self) -> None:
        """Keep the weights as they are now."""
        self.kept = {name: tensor.cpu().clone() for name, tensor in self.classifier.state_dict().items()}

    def facts(self) -> State:
        return {"sight": vars(self.sight), "classes": self.classes, "best": vars(self.best)}

    def state(self) -> State:
        return {
            "classifier": self.classifier.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "guard": self.guard.state(),
            "kept": self.kept,
            "tally": self.tally,
            **self.facts(),
        }

    def restore(self, saved: Saved) -> None:
        """Take all but the guard's counters. Raises UserError for facts that no run writes."""
        facts = check_facts(ClassifierFacts, saved, str(saved.path), OTHER)
        load_optimizer(self.optimizer, saved)
        self.classifier.load_state_dict(saved["classifier"])
        self.best, self.kept = facts["best"], saved["kept"]
        self.tally.copy_(saved["tally"])


@dataclass
class Boundary:
    """What follows each step: validate at the end of an epoch, keep the best weights, save when it is due."""

    progress: Progress
    run: Run
    journal: Journal
    valid: ClassFolder
    per_epoch: int  # steps
    total: int  # steps
    workers: int
    compiled: bool

    def __call__(self, step: int) -> None:
        """step: the number of steps done."""
        if step % self.per_epoch == 0 or step == self.total:
            # Before a checkpoint is saved: a run that goes on from it has the lines of this epoch.
            self.validate(step)
        self.run.after_step(step, self.progress.state, hold=self.progress.guard.skipped > 0)

    def validate(self, step: int) -> None:
        """Classify the crops of valid, and keep the weights if they are the best so far."""
        progress = self.progress
        with self.run.allow(VALIDATING), uncompiled(self.compiled):
            loss, top1 = distributed.on_main(self.judge)
        better = (top1, -loss) > (progress.best.top1, -progress.best.loss)
        if better:
            progress.best = Best(top1, loss, step)
            progress.keep()
        train_loss, train_top1 = (progress.tally[:2] / progress.tally[2].clamp_min(1)).tolist()
        progress.tally.zero_()
        figures = {"train_loss": train_loss, "train_top1": train_top1, "valid_loss": loss, "valid_top1": top1}
        self.journal.record(step - 1, **figures)
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in figures.items())
        self.journal.message(f"epoch {step / self.per_epoch:g}: {shown}{' (best)' if better else ''}")

    def judge(self) -> tuple[float, float]:
        """Loss and top-1 on the crops of valid."""
        device = self.run.world.device
        scores, labels = class_features(self.progress.classifier, self.valid, device, self.workers)
        return F.cross_entropy(scores, labels).item(), (scores.argmax(dim=1) == labels).double().mean().item()
