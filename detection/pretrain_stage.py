"""Pretraining a detector on unlabelled drawings, from a configuration to a signed pretrained.safetensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from cluster import checkpoint, distributed
from cluster import config as configuration
from cluster.batches import Batches
from cluster.checkpoint import OTHER, Saved, State
from cluster.compiling import refuse_without_compiler
from cluster.errors import UserError
from cluster.facts import check_facts
from cluster.guard import Guard
from cluster.journal import Journal
from cluster.lifecycle import Run
from cluster.precision import settle
from cluster.training import (
    TIMING,
    GuardedStep,
    begin,
    length,
    load_optimizer,
    paced,
    parallel,
    refuse_shorter,
    seconds_per_step,
    tell_seconds,
    train_guarded,
)
from detection.ink_learner import InkLearner, train
from detection.ink_views import InkViews, collate, epoch_order
from detection.model import Detector
from detection.pretrain_config import InkConfig
from detection.pretrain_start import (
    build,
    build_optimizer,
    describe,
    export,
    on_device,
    tell_memory,
)
from detection.schedule import Phase, lr_at
from detection.spec import Spec
from detection.start import choose_norm, refuse_unsynced
from schematics import draws
from schematics.store import WindowStore, pack

PRETRAINED = "pretrained.safetensors"
PACKING = 24 * 3600.0  # seconds that packing a pool may take before the run counts as hung


@dataclass(frozen=True)
class InkFacts:
    """What a checkpoint says beside its tensors and its spec."""

    windows: int
    began_with: str


@dataclass(frozen=True)
class Training:
    """What a checkpoint contains."""

    learner: InkLearner
    optimizer: torch.optim.Optimizer
    guard: Guard
    windows: int
    began_with: str  # method of the backbone, or "none"

    def state(self) -> State:
        return {
            "spec": self.learner.detector.spec.to_dict(),
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "guard": self.guard.state(),
            "windows": self.windows,
            "began_with": self.began_with,
            "draws": draws.VIEWS_VERSION,
        }

    def restore(self, saved: Saved) -> None:
        windows = check_facts(InkFacts, saved, str(saved.path), OTHER)["windows"]
        load_optimizer(self.optimizer, saved)
        self.learner.load_state_dict(saved["learner"])
        if windows != self.windows:
            print(f"the pool had {windows} windows and now has {self.windows}; their order changes")


def pretrain_detector(config: InkConfig) -> None:
    """Pretrain from where an earlier launch of this run stopped, and sign pretrained.safetensors.

    Raises UserError or DataError for input that cannot be used, and UserError if gradients stay non-finite.
    """
    world = distributed.start(**config.joining)
    config = configuration.recorded(config, config.exp_dir, world.device.type)
    distributed.per_rank(config.batch_size, world)
    norm = choose_norm(config.norm, config.backbone, world)
    refuse_unsynced(norm, world)
    if config.compile:
        refuse_without_compiler(world.device)
    compiled = "detector.backbone" if config.compile else None  # the number of boxes varies
    with contextlib.nullcontext() if config.dry_run else Run(config.exp_dir, world, **config.saving) as run:
        configuration.refuse_changes(config, config.exp_dir)
        with run.allow(PACKING) if run else contextlib.nullcontext():
            store = WindowStore(distributed.on_main(lambda: pack(**config.pool))).preload()
        if store.side < config.image_size:
            raise UserError(f"--image-size {config.image_size}: the pool's windows have {store.side} px")
        per_epoch, total = length(len(store), config.batch_size, config.epochs, config.steps)
        if run and config.seconds is None and run.finished(total):
            return

        folder = config.exp_dir / "checkpoints"
        saved = run.resume() if run else checkpoint.load_newest(folder)[1] or None
        if saved:
            refuse_shorter(config.epochs, config.steps, total, saved, config.exp_dir)
            detector = Detector(Spec.from_dict(saved["spec"], str(saved.path), OTHER))
            began_with = check_facts(InkFacts, saved, str(saved.path), OTHER)["began_with"]
            story = f"going on at step {saved['step']}"
            refuse_unsynced(detector.spec.norm, world)
        else:
            detector, began_with, story = build(store, norm, **config.network)
        learner = on_device(detector, config.seed, world)
        precision, in_words = settle(config.precision, world, learner)
        config = replace(config, precision=precision)
        views = InkViews(store, **config.views)
        order = epoch_order(config.seed, len(store))
        batches = Batches(views, order, per_epoch, config.batch_size, world, config.workers, collate)
        told = [story, describe(detector.spec, store), in_words]
        told.append(tell_memory(learner, views, config.batch_size, precision, world))
        weights = (config.contrast, config.propose)
        loop = partial(train, temperature=config.temperature, weights=weights)
        build_sgd = partial(build_optimizer, momentum=config.momentum, weight_decay=config.weight_decay)
        if config.seconds or config.dry_run:
            with run.allow(TIMING) if run else contextlib.nullcontext():
                seconds = seconds_per_step(loop, learner, build_sgd, batches, world, precision, compiled)
            if config.seconds:
                total = max(1, int(config.seconds / seconds))
                config = replace(config, steps=total)
                if run and run.finished(total):
                    return
            told.append(f"{tell_seconds(seconds)} a step, {tell_seconds(total * seconds)} in all")
        told.append(f"{len(store)} windows and {per_epoch} steps an epoch, {total} steps in all")
        if not run:
            if world.main:
                print("\n".join(told))
            return

        training = Training(learner, build_sgd(learner), Guard(), len(store), began_with)
        if world.main and not saved:  # the first checkpoint is of no use without it
            configuration.save(config, config.exp_dir / "config.json")
        start = begin(run, saved, training.guard, training.state, training.restore)
        if world.main:
            configuration.save(config, config.exp_dir / "config.json")
        journal = Journal(
            config.exp_dir, world, total, start, config.log_every, config.batch_size, config.wandb_project
        )
        journal.message("\n".join(told))
        if saved and saved.get("draws") != draws.VIEWS_VERSION:
            journal.message(draws.CHANGED)
        phase = Phase(0, config.lr, "cosine", 1, 1.0, total)
        lr = partial(lr_at, phases=[phase], warmup=min(config.warmup_steps, total // 10))
        model = parallel(learner, world, compiled)
        guarded = GuardedStep(
            model, training.optimizer, lr, training.guard, world.device, config.clip_grad, precision
        )

        def boundary(step: int) -> None:
            run.after_step(step, training.state, hold=training.guard.skipped > 0)

        def train_on(rest: Iterable[tuple[int, Any]]) -> None:
            loop(model, guarded, paced(rest, total, journal, world.device), journal, boundary)

        train_guarded(train_on, batches, training.guard, run, journal, training.restore, start, total)
        journal.close()
        if world.main:
            export(config.exp_dir / PRETRAINED, learner.detector, total, began_with)
        run.finish(total, training.state, [PRETRAINED])
    distributed.stop()
