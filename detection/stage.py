"""The finetuning stage, from a configuration to the signed detector in model.pt."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3

from cluster import checkpoint, distributed
from cluster import config as configuration
from cluster.batches import Batches
from cluster.checkpoint import OTHER, State
from cluster.compiling import refuse_without_compiler
from cluster.distributed import World
from cluster.errors import UserError
from cluster.guard import Guard
from cluster.journal import Journal
from cluster.lifecycle import Run
from cluster.precision import settle
from cluster.training import (
    LONG,
    TIMING,
    GuardedStep,
    begin,
    paced,
    parallel,
    seconds_per_step,
    tell_seconds,
    train_guarded,
)
from detection.classes import boxes_by_class
from detection.config import FinetuneConfig
from detection.data import Augment, TrainingWindows, collate, steps_per_epoch
from detection.loop import Boundary, Progress, train
from detection.memory import BATCHES
from detection.metrics.engines import check_engine
from detection.model import Detector
from detection.schedule import Phase, continue_phases, lr_at
from detection.spec import Spec
from detection.start import (
    Beginning,
    build_optimizer,
    choose_norm,
    length_of,
    open_sheets,
    put_on_device,
    read_splits,
    refuse_other_classes,
    refuse_unsynced,
    steps_in,
    validation_seconds,
)
from detection.teaching import Teaching
from detection.unlabeled import TaughtBatches, beside
from schematics import draws
from schematics.coco import Split, losses
from schematics.sheets import find_sheets
from schematics.splits import take_share

PACKING = 24 * 3600.0  # seconds that packing the sheets may take before the run counts as hung


def finetune(config: FinetuneConfig) -> None:
    """Finetune a detector from where an earlier launch of this run stopped, and sign model.pt and last.pt.

    Raises UserError or DataError for input that cannot be used, and UserError if gradients stay non-finite.
    """
    world = distributed.start(**config.joining)
    config = configuration.recorded(config, config.exp_dir, world.device.type)
    refuse_shares(config.batch_size or BATCHES[0], config.unlabelled, config.unlabeled, world)
    configuration.refuse_changes(config, config.exp_dir)
    check_engine(config.coco_engine)
    norm = choose_norm(config.norm, config.backbone, world)
    refuse_unsynced(norm, world)
    if config.compile:
        refuse_without_compiler(world.device)
    # Windows have one size, but proposals a varying number, and code would be made for each.
    compiled = "backbone" if config.compile else None
    splits = read_share(config.data_dir, config.train_share, config.seed, world)

    # A new detector is built before the exp-dir is touched, so that bad input leaves no folder behind.
    beginning = Beginning(splits=splits, norm=norm, world=world, **config.beginning)
    folder = config.exp_dir / "checkpoints"
    (there,) = distributed.agree(bool(checkpoint.listed(folder)))
    fresh = None if there else beginning.new()
    with contextlib.nullcontext() if config.dry_run else Run(config.exp_dir, world, **config.saving) as run:
        saved = run.resume() if run else checkpoint.load_newest(folder)[1] if there else None
        if saved:
            refuse_to_resume(saved, config.batch_size, config.unlabeled, config.exp_dir)
            detector = Detector(Spec.from_dict(saved["spec"], str(saved.path), OTHER))
            story, fit = f"going on at step {saved['step']}", beginning.fit(detector, detector.spec.window)
        else:
            detector, story, fit = fresh or beginning.new()
        spec, batch = detector.spec, fit.batch
        precision, in_words = settle(config.precision, world, detector)
        config = replace(config, batch_size=batch, precision=precision)
        refuse_other_classes(spec, splits[0], config.data_dir, config.exp_dir)
        refuse_unsynced(spec.norm, world)

        # Validation sees the sheets as `detect` gets them, which scales them itself.
        with run.allow(PACKING) if run else contextlib.nullcontext():
            of_train, of_valid = (
                open_sheets(split, spec.color_mode, scale, config.store, world)
                for split, scale in zip(splits, (spec.scale, 1.0), strict=True)
            )
        augment = Augment(shift=True, **config.augmenting)
        windows = TrainingWindows(
            of_train, spec.window, spec.overlap, config.seed, augment, config.negatives, config.repeat
        )
        per_epoch = steps_per_epoch(windows, batch)
        total = config.epochs * per_epoch if config.steps is None else config.steps
        patience = config.patience * per_epoch
        if run and config.seconds is None and run.finished(length_of(config.exp_dir, patience, total)):
            return

        told = [story, str(fit), in_words]
        # Earlier versions validated in float32, whatever they trained in.
        detector.bf16 = (saved.get("validated_in", "fp32") if saved else precision) == "bf16"
        detector = put_on_device(detector, world, config.freeze_stages)
        order = functools.partial(windows.order, at_least=batch)
        batches = Batches(windows, order, per_epoch, batch, world, config.workers, collate)
        if config.unlabeled:
            with run.allow(PACKING) if run else contextlib.nullcontext():
                batches, said = beside(batches, windows, spec, splits, **config.pool)
            told.append(said)

        def build(model: Detector) -> torch.optim.Optimizer:
            return build_optimizer(model, **config.optimizing)

        if config.seconds or (config.dry_run and fit.fits):
            if world.main:  # at once, as the steps that are timed may take minutes
                print("\n".join([*told, "timing a few steps"]), flush=True)
            with run.allow(TIMING) if run else contextlib.nullcontext():
                step = step_seconds(
                    detector, build, batches, world, config.precision, compiled, config.burn_in
                )
                validation = validation_seconds(detector, of_valid, world)
            between = per_epoch * config.validate_every
            if config.seconds:
                total = steps_in(config.seconds, step, validation, between, bool(config.unlabeled))
                config = replace(config, steps=total)
                if run and run.finished(length_of(config.exp_dir, patience, total)):
                    return
            told = [tell_length(step, validation, total, math.ceil(total / between))]
        told.append(f"{len(windows)} windows and {per_epoch} steps an epoch, {total} steps in all")
        if not run:
            if world.main:
                print("\n".join(told))
            return

        optimizer = build(detector)
        progress = new_progress(detector, optimizer, config.decay, config.teaching(total))
        if world.main and not saved:  # the first checkpoint is of no use without it
            configuration.save(config, config.exp_dir / "config.json")
        start = begin(run, saved, progress.guard, progress.state, progress.restore)
        if world.main:
            configuration.save(config, config.exp_dir / "config.json")
        if progress.teaching and isinstance(batches, TaughtBatches):
            batches = replace(batches, begin=progress.teaching.burn_in)  # may be that of a checkpoint
        begun = [Phase(**phase) for phase in saved["phases"]] if saved else []
        progress.phases = continue_phases(begun, config.phase(per_epoch, total), start)
        # A run that is resumed at its last step still has to validate, which writes model.pt and last.pt.
        progress.pending |= start >= total

        journal = Journal(config.exp_dir, world, total, start, config.log_every, batch, config.wandb_project)
        journal.message("\n".join(told))
        tell_changes(journal, saved, begun, progress.phases)
        # Windows have one size, but a head of convolutions sees a varying number of proposals.
        torch.backends.cudnn.benchmark = not config.deterministic and spec.head == "mlp"
        model = parallel(detector, world, compiled)
        lr = functools.partial(lr_at, phases=progress.phases, warmup=min(config.warmup_steps, total // 10))
        guarded = GuardedStep(
            model, optimizer, lr, progress.guard, world.device, config.clip_grad, config.precision
        )
        boundary = Boundary(
            progress,
            run,
            journal,
            of_valid,
            per_epoch,
            total,
            train_boxes=boxes_by_class(splits[0]),
            patience=patience,
            **config.validating,
        )

        def train_on(rest: Iterable[tuple[int, Any]]) -> None:
            if not progress.pending or boundary.validate():
                steps = paced(rest, total, journal, world.device)
                train(model, guarded, steps, journal, boundary, progress.teaching)

        train_guarded(train_on, batches, progress.guard, run, journal, progress.restore, start, total)
        run.finish(progress.step, progress.state, ["model.pt", "last.pt"], progress.verdict)
        journal.close()
    distributed.stop()


def refuse_shares(batch: int, unlabelled: Callable[[int], int], pool: Path | None, world: World) -> None:
    """Raise UserError for batches that the ranks can't share, and DataError for a pool without sheets.

    unlabelled: windows of the pool beside a batch of so many.
    """
    distributed.per_rank(batch, world)
    if pool:
        distributed.per_rank(unlabelled(batch), world, "--unlabeled-batch")
        find_sheets(pool)


def read_share(data_dir: Path, share: float, seed: int, world: World) -> tuple[Split, Split]:
    """The share of the training split, and the validation split; says what reading them left out."""
    train_split, valid_split = read_splits(data_dir)
    drawn, shared = take_share(train_split, share, seed)
    for line in filter(None, [*map(losses, (train_split, valid_split)), shared]):
        if world.main:
            print(line, flush=True)
    return drawn, valid_split


def refuse_to_resume(saved: State, batch: int | None, unlabeled: Path | None, exp_dir: Path) -> None:
    """Raise UserError if the batch is not known, or a run would go on with a teacher that had none."""
    if batch is None:
        raise UserError(f"{exp_dir}: config.json is gone; give the run's --batch-size")
    if ("teacher" in saved) != (unlabeled is not None):
        begun = "without" if unlabeled else "with"
        raise UserError(
            f"--unlabeled: {exp_dir} was begun {begun} it; do so again, or give another --exp-dir"
        )


def new_progress(
    detector: Detector, optimizer: torch.optim.Optimizer, decay: float, teaching: tuple[float, int] | None
) -> Progress:
    """A run before its first step. decay: of the average, or 0. teaching: its weight and its burn-in."""
    ema = ModelEmaV3(detector, decay, use_warmup=True) if decay else None
    teacher = Teaching(ema.module, *teaching) if ema and teaching else None
    return Progress(detector, optimizer, Guard(), ema, teacher)


def tell_length(step: float, validation: float, steps: int, validations: int) -> str:
    """Seconds in words, of a step, of a validation and of all."""
    length = tell_seconds(steps * step + validations * validation)
    return f"{tell_seconds(step)} a step, {tell_seconds(validation)} a validation: about {length} in all"


def step_seconds(
    detector: Detector,
    build: Callable[[Detector], torch.optim.Optimizer],
    batches: Batches,
    world: World,
    precision: str,
    compiled: str | None,
    burn_in: float,
) -> float:
    """Seconds that a step takes, see `seconds_per_step`; with a teacher, on average over burn-in and rest."""
    of = functools.partial(
        seconds_per_step,
        model=detector,
        build_optimizer=build,
        world=world,
        precision=precision,
        compiled=compiled,
    )
    if not isinstance(batches, TaughtBatches):
        return of(train, batches=batches)
    first = of(train, batches=replace(batches, begin=2 * LONG))
    teach = functools.partial(train, teaching=Teaching(copy.deepcopy(detector).eval(), 1.0, 1))
    return burn_in * first + (1 - burn_in) * of(teach, batches=batches)


def tell_changes(journal: Journal, saved: State | None, begun: list[Phase], phases: list[Phase]) -> None:
    """Say in the log what a resumed run does otherwise than the launch that saved its checkpoint.

    begun, phases: of the learning rate, until then and from now on.
    """
    if saved is None:
        return
    if saved.get("draws") != draws.WINDOWS_VERSION:
        journal.message(draws.CHANGED)
    if begun and phases != begun:
        step = saved["step"]
        before, now = (lr_at(step, course, 0) for course in (begun, phases))
        journal.message(
            f"a new phase of the learning rate begins at step {step}: {now:.4g} where it was {before:.4g}"
        )
