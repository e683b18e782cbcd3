"""The pretraining stage, from a configuration to a signed backbone.safetensors."""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cluster import atomic, distributed
from cluster import config as configuration
from cluster.backbone import write_backbone
from cluster.batches import Batches
from cluster.checkpoint import OTHER, Saved, State
from cluster.compiling import refuse_without_compiler
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
from pretraining.benefit import Benefit
from pretraining.config import PretrainConfig
from pretraining.data import Pairs, collate, describe_views, epoch_order, spread
from pretraining.dense import describe_dense
from pretraining.encoder import Encoder
from pretraining.features import embed, square
from pretraining.loop import train
from pretraining.memory import fit_memory
from pretraining.schedule import Schedule, build_optimizer, choose_optimizer
from pretraining.start import (
    Method,
    begin_from,
    build_encoder,
    describe,
    plan_rate,
    refuse_small_batch,
    view_extent,
    with_stem,
)
from schematics import draws
from schematics.store import WindowStore, pack

BACKBONE = "backbone.safetensors"
INIT = "init.safetensors"  # what a run with --init began from
PACKING = 24 * 3600.0  # seconds that packing a pool may take before the run counts as hung
# Flags that a run without them decides when it begins, and keeps.
DECIDED = ("micro_batch", "arch", "optimizer", "weight_decay", "warmup_epochs", "statistics")
DRAWING = 1800.0  # seconds that a picture of the embedding may take


@dataclass(frozen=True)
class PoolFacts:
    """What a checkpoint says of the pool."""

    windows: int


@dataclass(frozen=True)
class Training:
    """What a checkpoint contains: network, optimizer, guard, and the number of windows in the pool."""

    encoder: Encoder
    optimizer: torch.optim.Optimizer
    guard: Guard
    windows: int

    def state(self) -> State:
        return {
            "encoder": self.encoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "guard": self.guard.state(),
            "windows": self.windows,
            "draws": draws.VIEWS_VERSION,
        }

    def restore(self, saved: Saved) -> None:
        windows = check_facts(PoolFacts, saved, str(saved.path), OTHER)["windows"]
        load_optimizer(self.optimizer, saved)
        self.encoder.load_state_dict(saved["encoder"])
        if windows != self.windows:
            print(f"the pool had {windows} windows and now has {self.windows}; their order changes")


@dataclass
class Boundary:
    """Called after each step, to save a checkpoint and to draw the embedding when they are due."""

    training: Training
    run: Run
    journal: Journal
    store: WindowStore
    schedule: Schedule
    image_size: int  # pixels
    benefit: Benefit
    checkpoint_epochs: int
    embed_every: int  # epochs
    probe_every: int  # epochs

    def __call__(self, step: int) -> None:
        """step: the number of steps done."""
        epoch, rest = divmod(step, self.schedule.per_epoch)
        if step == self.schedule.total or (rest == 0 and epoch % self.probe_every == 0):
            # Before the checkpoint is saved: a run that goes on from it has this line.
            self.benefit.measure(self.journal, step - 1)
        save = rest == 0 and self.checkpoint_epochs > 0 and epoch % self.checkpoint_epochs == 0
        self.run.after_step(step, self.training.state, save=save, hold=self.training.guard.skipped > 0)
        draw = rest == 0 and self.embed_every > 0 and epoch % self.embed_every == 0
        if draw or step == self.schedule.total:
            with self.run.allow(DRAWING):
                distributed.on_main(lambda: self.draw(step))  # the others wait here, not in the next step

    def draw(self, step: int) -> None:
        """Draw the embedding of a fixed set of windows for TensorBoard."""
        chosen = spread(len(self.store), 256)
        encoder, windows = self.training.encoder, gallery(self.store, self.image_size, chosen)
        features = embed(nn.Sequential(encoder.normalise, encoder.backbone), windows)
        names = [Path(self.store.source(i)).name for i in chosen]
        self.journal.embeddings(step, features, windows.float() / 255, names)


def pretrain(config: PretrainConfig, method: Method) -> None:
    """Pretrain by `method`, from where an earlier launch of this run stopped; export and sign the backbone.

    Raises UserError or DataError for input that cannot be used, and UserError if gradients stay non-finite.
    """
    world = distributed.start(**config.joining)
    torch.backends.cudnn.benchmark = not config.deterministic  # views have one size
    refuse_small_batch(config.batch_size, method.joint, world)
    loss = method.whole_loss(config.dense_weight)
    new = not (config.exp_dir / "config.json").exists()
    config = configuration.recorded(config, config.exp_dir, world.device.type, *DECIDED)
    config = replace(config, arch=with_stem(config.arch, config.stem, config.init))
    if config.compile:
        refuse_without_compiler(world.device)
    compiled = "" if config.compile else None
    with contextlib.nullcontext() if config.dry_run else Run(config.exp_dir, world, **config.saving) as run:
        configuration.refuse_changes(config, config.exp_dir)
        with run.allow(PACKING) if run else contextlib.nullcontext():
            store = WindowStore(distributed.on_main(lambda: pack(**config.pool))).preload()
        per_epoch, total = length(len(store), config.batch_size, config.epochs, config.steps)
        if run and config.seconds is None and run.finished(total):
            return

        beginning = begin_from(config.init, config.arch, config.exp_dir / INIT, new, config.dry_run)
        # A run that has none is of an earlier version, which knew the statistics of batches alone.
        statistics = config.statistics or ("init" if config.init and new else "batch")
        config = replace(config, arch=beginning.arch, statistics=statistics)
        kept = statistics == "init"
        encoder = build_encoder(
            beginning, config.projector, method, store, world, config.seed, kept, config.dense
        )
        precision, in_words = settle(config.precision, world, encoder)
        chosen, by = choose_optimizer(encoder.backbone, config.optimizer, config.weight_decay)
        config = replace(config, precision=precision, **chosen)
        extent = view_extent(config.view, config.recipe, config.image_size, store)
        pairs = Pairs(store, extent=extent, **config.views)
        benefit = Benefit(config.probe_dir, pairs, encoder, run, new)
        order = epoch_order(config.seed, len(store))
        batches = Batches(pairs, order, per_epoch, config.batch_size, world, config.workers, collate)

        def build(model: nn.Module) -> torch.optim.Optimizer:
            return build_optimizer(model, **config.optimizing)

        fit = fit_memory(
            encoder, config.image_size, config.batch_size, config.micro_batch, new, config.precision, world
        )
        config = replace(config, micro_batch=fit.micro_batch)
        loop = partial(train, loss=loss, micro_batch=fit.at_once)
        if config.seconds or (config.dry_run and fit.fits):
            with run.allow(TIMING) if run else contextlib.nullcontext():
                seconds = seconds_per_step(loop, encoder, build, batches, world, config.precision, compiled)
            if config.seconds:
                total = max(1, int(config.seconds / seconds))
                config = replace(config, steps=total)
                if run and run.finished(total):
                    return
            if world.main:
                print(f"{tell_seconds(seconds)} a step, {tell_seconds(total * seconds)} for {total} steps")
        schedule = plan_rate(method, config.batch_size, per_epoch, total, **config.rates)
        if world.main:
            print(describe(beginning.arch, config.batch_size, encoder, store, schedule, world))
            print(describe_views(config.recipe, config.image_size, extent, config.without))
            if encoder.dense:
                print(describe_dense(encoder.dense, config.dense_weight))
            print(f"{by}\n{in_words}", flush=True)
        if not run:
            return

        optimizer = build(encoder)
        training = Training(encoder, optimizer, Guard(), len(store))
        saved = run.resume()
        refuse_shorter(config.epochs, config.steps, total, saved, config.exp_dir)
        if world.main and not saved:  # the first checkpoint is of no use without it
            configuration.save(config, config.exp_dir / "config.json")
        start = begin(run, saved, training.guard, training.state, training.restore)
        journal = Journal(
            config.exp_dir, world, total, start, config.log_every, config.batch_size, config.wandb_project
        )
        if world.main:
            configuration.save(config, config.exp_dir / "config.json")
            atomic.write_text(config.exp_dir / "store.txt", str(store.folder.absolute()))
            journal.picture(start, "views", views(pairs))
        tell_changes(journal, saved, schedule, optimizer)

        boundary = Boundary(training, run, journal, store, schedule, config.image_size, benefit, **config.due)
        model = parallel(encoder, world, compiled)
        guarded = GuardedStep(
            model, optimizer, schedule.lr, training.guard, world.device, config.clip_grad, config.precision
        )

        def train_on(rest: Iterable[tuple[int, Any]]) -> None:
            loop(model, guarded, paced(rest, total, journal, world.device), journal, boundary)

        train_guarded(train_on, batches, training.guard, run, journal, training.restore, start, total)
        journal.close()
        judged = benefit.judgement()
        if world.main:
            about = {"arch": beginning.arch, "method": method.name, "image_size": config.image_size}
            about |= {"step": total, **beginning.origin, "judged": asdict(judged)}
            if config.dense:
                about |= {"dense_weight": config.dense_weight, "dense_stride": config.dense_stride}
            export(config.exp_dir / BACKBONE, encoder, store, about, *beginning.colors(store))
        run.finish(total, training.state, [BACKBONE], judged.told)
        if world.main:
            tensors = len(encoder.backbone.state_dict())
            print(f"{config.exp_dir / BACKBONE}: {tensors} tensors of {beginning.arch} by {method.name}")
            print(judged.told, flush=True)
    distributed.stop()


def tell_changes(
    journal: Journal, saved: State | None, schedule: Schedule, optimizer: torch.optim.Optimizer
) -> None:
    """Say in the log what a resumed run does otherwise than the launch that saved its checkpoint."""
    if saved is None:
        return
    if saved.get("draws") != draws.VIEWS_VERSION:
        journal.message(draws.CHANGED)
    if line := schedule.told_change(saved["step"], optimizer):
        journal.message(line)


def export(
    path: Path,
    encoder: Encoder,
    store: WindowStore,
    about: dict[str, Any],
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Write the backbone, with `about` and with what its images were normalised by."""
    colors = {"color_mode": store.color_mode, "mean": mean, "std": std}
    meta = {**about, **colors, "linework": version("linework")}
    write_backbone(path, encoder.backbone.state_dict(), meta)


def gallery(store: WindowStore, size: int, chosen: list[int]) -> Tensor:
    """The chosen windows: uint8 [N, 3, size, size]."""
    return torch.stack([square(store.window(i), size) for i in chosen])


def views(pairs: Pairs, count: int = 8) -> np.ndarray:
    """A picture of the views of some windows in the first epoch, a column each: uint8 [2 S, count * S, 3]."""
    columns = [torch.cat(pairs[0, 0, i][:2], 1) for i in spread(len(pairs), count)]
    picture = torch.cat(columns, 2)
    return picture.expand(3, *picture.shape[1:]).permute(1, 2, 0).numpy()
