"""The loop of finetuning: steps, validation after each epoch, going back where gradients are not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from cluster import checkpoint, distributed
from cluster.distributed import World
from cluster.errors import UserError
from cluster.guard import Guard
from cluster.journal import Journal
from cluster.lifecycle import Run
from detection.data import SheetReader, TrainingWindows, batches, collate
from detection.metrics.analysis import fit_thresholds
from detection.metrics.coco import Engine, Figures, measure
from detection.model import Detector
from detection.predict import detect, to_results
from detection.schedule import Phase
from schematics.coco import to_coco

VALIDATING = 6 * 3600.0  # seconds that a validation may take before it counts as hung


def train(
    detector: nn.Module, optimizer: torch.optim.Optimizer, lr: Callable[[int], float],
    loader: Iterable, start: int, device: torch.device, bf16: bool, clip_grad: float,
    guard: Guard, journal: Journal, boundary: Callable[[int], bool],
) -> tuple[str, int] | None:  # fmt: skip
    """One optimizer step a batch (windows uint8 [B, 3, S, S], targets, seeds), numbered from `start`.

    `boundary` is called after each with the number of steps done; it validates, saves, and says whether to
    go on. Returns None at the end; (verdict, step) where the guard no longer skips.
    """
    buffers = [buffer for buffer in detector.buffers() if buffer.is_floating_point()]
    for step, (images, targets, seeds) in enumerate(loader, start):
        for group in optimizer.param_groups:
            group["lr"] = lr(step) * group["factor"]
        before = [buffer.clone() for buffer in buffers]
        images = images.to(device, non_blocking=True)
        targets = [
            {name: t.to(device, non_blocking=True) for name, t in target.items()} for target in targets
        ]
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            losses = detector(images, targets, seeds)
        loss = torch.stack([value.float() for value in losses.values()]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        # DDP has averaged the gradient: its norm, and so the verdict, is the same on every rank.
        norm = nn.utils.clip_grad_norm_(detector.parameters(), clip_grad)
        verdict = guard.judge(bool(torch.isfinite(norm)))
        if verdict == "ok":
            optimizer.step()
        else:  # nothing of this step may stay, its share of BatchNorm's running statistics neither
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(old)
            if verdict != "skip":
                return verdict, step
        if journal.due(step):
            terms = {name: value.detach() for name, value in losses.items()}
            journal.log(step, loss=loss.detach(), lr=lr(step), grad_norm=norm, **terms)
        if not boundary(step + 1):
            break
    return None


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
    world: World
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
            with self.run.patience(VALIDATING):
                judged = validate(
                    progress.judged, self.reader, self.truth, self.world, self.engine,
                    leave=lambda: self.run.stopping,
                )  # fmt: skip
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
        self.journal.record(step, **{f"valid_{name}": value for name, value in figures.fitted.items()})
        shown = ", ".join(f"{name} {value:.3f}" for name, value in figures.fitted.items())
        self.journal.message(f"epoch {step / self.per_epoch:g}: valid {shown}{' (best)' if better else ''}")


def out_of_patience(best: Mapping[str, float], step: int, patience: int) -> bool:
    """Whether validation AP has not risen for `patience` steps; 0 never is."""
    return 0 < patience <= step - best["step"]


def validate(
    detector: Detector, reader: SheetReader, truth: dict[str, Any], world: World,
    engine: Engine = "pycocotools", leave: Callable[[], bool] = lambda: False,
) -> tuple[Figures, dict[int, float]] | None:  # fmt: skip
    """COCO figures in sheet coordinates, and the score by category id at which F1 is highest.

    Each rank takes a share of the sheets; all get the same answer. None when `leave`, asked on each rank
    before each of its sheets, says so on any.
    """
    training = detector.training
    detector.eval()
    sheets, mine = reader.split.sheets, {}
    for n in range(world.rank, len(sheets), world.size):
        if leave():
            break
        mine[sheets[n].image_id] = detect(detector, reader[n][0])
    detector.train(training)
    if distributed.agree(leave())[0]:
        return None
    found = {image_id: d for share in distributed.gather_objects(mine) for image_id, d in share.items()}
    results = to_results(found, [category_id for category_id, _ in detector.spec.categories])

    def judge() -> tuple[Figures, dict[int, float]]:
        figures, matches = measure(truth, results, engine=engine)
        return figures, fit_thresholds(matches)

    return distributed.on_main(judge)


def write_model(
    path: Path, detector: Detector, step: int, figures: Figures, thresholds: dict[int, float]
) -> None:
    """The file that evaluate and predict take."""
    state = {
        "spec": detector.spec.to_dict(),
        "model": detector.state_dict(),
        "step": step,
        "valid": figures.to_dict(),
        "thresholds": thresholds,
    }
    distributed.on_main(lambda: checkpoint.write_file(path, state))


def train_to(
    total: int, windows: TrainingWindows, batch_size: int, workers: int, progress: Progress, world: World,
    boundary: Boundary, **options: Any,
) -> None:  # fmt: skip
    """`train` until `total` steps are done, going back to the last checkpoint where the guard says so.

    Raises UserError where that did not help either.
    """
    model, run, guard = parallel(progress.detector, world), boundary.run, progress.guard
    while True:
        if progress.pending and not boundary.validate():
            return
        start, offset = progress.step, guard.offset
        keys = list(batches(windows, batch_size, start + offset, total + offset, world.rank, world.size))
        loader = load(windows, keys, workers, world.device.type == "cuda")
        bad = train(
            model, progress.optimizer, loader=loader, start=start, device=world.device, guard=guard,
            journal=boundary.journal, boundary=boundary, **options,
        )  # fmt: skip
        if bad is None:
            return
        verdict, step = bad
        files = windows.files(keys[step - start])
        saved = run.resume()
        assert saved is not None, "a fresh run saves step 0"
        if verdict == "stop":
            last = checkpoint.step_path(run.folder, saved["step"])
            raise UserError(guard.last_words(step, files, str(last)))
        boundary.journal.message(f"step {step}: not finite, last on {files[0]}; back to {saved['step']}")
        progress.restore(saved)
        guard.roll_back(step, progress.step)  # the data up to `step` is passed over
        boundary.journal.rewind(progress.step)


def parallel(detector: Detector, world: World) -> nn.Module:
    """The detector with its gradients averaged over ranks."""
    if world.size == 1:
        return detector
    ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(detector, device_ids=ids)


def load(windows: TrainingWindows, keys: list, workers: int, pin_memory: bool) -> DataLoader:
    """A loader over the batches named by `keys`, in their order whatever the number of workers."""
    return DataLoader(
        windows,
        batch_sampler=keys,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # sheets in memory are shared, not copied
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_one_thread,
    )


def _one_thread(_: int) -> None:
    cv2.setNumThreads(0)  # one core per worker
