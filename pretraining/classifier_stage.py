"""The training of a classifier, from a configuration to its weights and its signed figures on test crops."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn

from cluster import checkpoint, distributed
from cluster import config as configuration
from cluster.backbone import BackboneFacts, Normalise, build_backbone
from cluster.batches import Batches, default_workers
from cluster.checkpoint import OTHER, Saved
from cluster.compiling import refuse_without_compiler, uncompiled
from cluster.distributed import World
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
    paced,
    parallel,
    refuse_shorter,
    seconds_per_step,
    tell_seconds,
    train_guarded,
)
from pretraining.classifier import (
    Boundary,
    Classifier,
    ClassifierFacts,
    Crops,
    Progress,
    TrainingCrops,
    colors,
    empty_tally,
    epoch_of_crops,
    train,
)
from pretraining.classifier_config import ClassifierConfig
from pretraining.classifier_results import RESULTS, write_results
from pretraining.features import ClassFolder, class_names, open_weights
from pretraining.probe_config import refuse_test_among
from pretraining.schedule import Schedule, build_optimizer
from pretraining.start import refuse_small_batch

JUDGING = 4 * 3600.0  # seconds that the test and its baseline may take before the run counts as hung


def train_classifier(config: ClassifierConfig) -> None:
    """Train a classifier from where an earlier launch of this run stopped, test it and sign what came out.

    Raises UserError or DataError for input that cannot be used, and UserError if gradients stay non-finite.
    """
    world = distributed.start(**config.joining)
    torch.backends.cudnn.benchmark = not config.deterministic  # crops have one size
    refuse_splits(*config.splits)
    refuse_small_batch(config.batch_size, False, world)
    config = configuration.recorded(config, config.exp_dir, world.device.type)
    configuration.refuse_changes(config, config.exp_dir)
    if config.compile:
        refuse_without_compiler(world.device)
    compiled = "" if config.compile else None
    classes = distributed.on_main(lambda: class_names(config.data_dir, list(config.splits)))
    with contextlib.nullcontext() if config.dry_run else Run(config.exp_dir, world, **config.saving) as run:
        saved = run.resume() if run else checkpoint.load_newest(config.exp_dir / "checkpoints")[1] or None
        classifier, sight, crops, story = begin_classifier(
            classes=classes, saved=saved, world=world, **config.beginning
        )
        workers = default_workers(world.device) if config.workers is None else config.workers
        samples = TrainingCrops(crops.train, config.seed, config.augment)
        per_epoch = max(1, len(samples) // config.batch_size)
        total = config.epochs * per_epoch if config.steps is None else config.steps
        if run and config.seconds is None and run.finished(total):
            return
        precision, in_words = settle(config.precision, world, classifier)
        config = replace(config, precision=precision)
        order = epoch_of_crops(config.seed, len(samples), config.batch_size)
        batches = Batches(samples, order, per_epoch, config.batch_size, world, config.workers)

        def build(model: nn.Module) -> torch.optim.Optimizer:
            return build_optimizer(model, config.optimizer, config.momentum, config.weight_decay)

        if config.seconds or config.dry_run:
            loop = partial(train, tally=empty_tally(classifier))
            with run.allow(TIMING) if run else contextlib.nullcontext():
                seconds = seconds_per_step(
                    loop, classifier, build, batches, world, config.precision, compiled
                )
            if config.seconds:
                total = max(1, int(config.seconds / seconds))
                config = replace(config, steps=total)
                if run and run.finished(total):
                    return
            if world.main:
                told = f"{tell_seconds(seconds)} a step, {tell_seconds(total * seconds)} for {total} steps"
                print(told, flush=True)
        if world.main:
            print(f"{story}\n{describe(config.freeze, crops, per_epoch, total)}\n{in_words}", flush=True)
        if not run:
            return

        schedule = Schedule(per_epoch, total, min(config.warmup_steps, total // 10), config.lr, 0.0)
        optimizer = build(classifier)
        progress = Progress(classifier, optimizer, Guard(), sight, classes)
        refuse_shorter(config.epochs, config.steps, total, saved, config.exp_dir)
        if world.main and not saved:  # the first checkpoint is of no use without it
            configuration.save(config, config.exp_dir / "config.json")
        start = begin(run, saved, progress.guard, progress.state, progress.restore)
        journal = Journal(
            config.exp_dir, world, total, start, config.log_every, config.batch_size, config.wandb_project
        )
        if world.main:
            configuration.save(config, config.exp_dir / "config.json")
        if changed := schedule.told_change(start, optimizer):
            journal.message(changed)
        boundary = Boundary(
            progress, run, journal, crops.valid, per_epoch, total, workers, compiled is not None
        )
        model = parallel(classifier, world, compiled)
        guarded = GuardedStep(
            model, optimizer, schedule.lr, progress.guard, world.device, config.clip_grad, config.precision
        )

        def train_on(rest: Iterable[tuple[int, Any]]) -> None:
            train(
                model, guarded, paced(rest, total, journal, world.device), journal, boundary, progress.tally
            )

        train_guarded(train_on, batches, progress.guard, run, journal, progress.restore, start, total)
        journal.close()
        # The test may take a while, and a run that is ended in it tests again.
        run.save(total, progress.state)
        results = partial(
            write_results, config.exp_dir, progress, crops, per_epoch, world.device, workers, **config.judging
        )
        with run.allow(JUDGING), uncompiled(config.compile):
            top1 = distributed.on_main(results)
        run.finish(total, progress.state, RESULTS, f"top-1 {top1} on {config.test_split}")
    distributed.stop()


def refuse_splits(train_split: str, valid_split: str, test_split: str) -> None:
    """Raise UserError if one split would serve two ends."""
    refuse_test_among(train_split, valid_split, test_split)
    if valid_split == train_split:
        raise UserError(
            f"--valid-split {valid_split}: it is also the --train-split; give another, on which the best "
            "epoch is chosen"
        )


def begin_classifier(
    checkpoint: str,
    arch: str | None,
    freeze: bool,
    image_size: int | None,
    data_dir: Path,
    splits: tuple[str, str, str],
    train_share: float,
    seed: int,
    classes: list[str],
    saved: Saved | None,
    world: World,
) -> tuple[Classifier, BackboneFacts, Crops, str]:
    """The classifier on this rank's device, equal on all ranks, the crops, and how its weights were read.

    A resumed one has what its checkpoint says, and its weights are still to be loaded. Raises UserError for
    weights or an architecture that do not exist, and where the classes are others than the run's.
    """
    torch.manual_seed(seed)
    backbone: Any
    if saved:
        facts = check_facts(ClassifierFacts, saved, str(saved.path), OTHER)
        sight, story = facts["sight"], f"going on at step {saved['step']}"
        if list(facts["classes"]) != classes:
            raise UserError(
                f"--data-dir {data_dir}: its classes are others than this run has; give its own data, or "
                "another --exp-dir"
            )
        backbone = build_backbone(sight.arch)
    elif checkpoint == "none":
        sight = BackboneFacts(arch or "resnet50", "rgb", image_size=image_size or 224)
        backbone, story = build_backbone(sight.arch), f"random weights of {sight.arch}"
    else:
        network, meta, story = open_weights(Path(checkpoint), arch)
        backbone = network.get_submodule("1")  # behind what normalises its images
        sight = BackboneFacts(**{field.name: meta[field.name] for field in fields(BackboneFacts)})
        sight = replace(sight, image_size=image_size or sight.image_size)
    folders = [ClassFolder(data_dir / name, classes, sight.image_size, sight.color_mode) for name in splits]
    story = "\n".join(filter(None, [story, folders[0].take_share(train_share, seed)]))
    crops = Crops(splits, classes, *folders)
    if not saved and checkpoint == "none":
        mean, std = distributed.on_main(lambda: colors(crops.train))
        sight = replace(sight, mean=tuple(mean), std=tuple(std))
    normalise = Normalise(sight.mean, sight.std, torch.channels_last)
    classifier = Classifier(normalise, backbone, len(classes), freeze)
    if world.size > 1 and world.device.type == "cuda":
        classifier = convert_sync_batchnorm(classifier)
    classifier.to(memory_format=torch.channels_last)
    return classifier.to(world.device), sight, crops, story


def describe(freeze: bool, crops: Crops, per_epoch: int, total: int) -> str:
    """A line for the log."""
    parts = "its head alone" if freeze else "backbone and head"
    sizes = ", ".join(
        f"{len(folder)} of {name}"
        for name, folder in zip(crops.names, (crops.train, crops.valid, crops.test), strict=True)
    )
    return (
        f"{parts}; crops: {sizes}; {len(crops.classes)} classes; {per_epoch} steps an epoch, {total} in all"
    )
