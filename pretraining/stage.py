"""The pretraining stage, from a configuration to a signed backbone.safetensors."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from cluster import atomic, distributed
from cluster import config as configuration
from cluster.batches import Batches
from cluster.checkpoint import State
from cluster.distributed import World
from cluster.errors import UserError
from cluster.guard import Guard
from cluster.journal import Journal
from cluster.lifecycle import Run
from cluster.memory import PEAK, free_memory, saved_bytes
from cluster.rendezvous import place
from cluster.training import (
    TIMING,
    GuardedStep,
    begin,
    paced,
    parallel,
    rehearsal,
    seconds_per_step,
    tell_seconds,
    train_guarded,
)
from cluster.weights import Normalise, build_backbone, write_backbone
from pretraining.config import PretrainConfig
from pretraining.data import Pairs, collate, describe_views, epoch_order
from pretraining.encoder import Encoder, build_projector
from pretraining.features import embed, square
from pretraining.loop import Loss, train
from pretraining.schedule import Schedule, build_optimizer, peak_lr
from schematics import draws
from schematics.recipes import default_extent
from schematics.store import WindowStore, build_store

BACKBONE = "backbone.safetensors"
PACKING = 24 * 3600.0  # seconds that packing a pool may take before the run counts as hung
DRAWING = 1800.0  # seconds that a picture of the embedding may take


@dataclass(frozen=True, kw_only=True)
class Method:
    """The facts in which methods differ; everything else is shared.

    base_lr: the published learning rate per 256 windows, as a function of global batch size and length in
    epochs. joint: whether both views go through the network as one batch (see Encoder). last_norm: whether a
    BatchNorm follows the projector's last layer.
    """

    name: str
    loss: Loss
    joint: bool
    last_norm: bool
    base_lr: Callable[[int, float], float]


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
            "draws": draws.VERSION,
        }

    def restore(self, saved: State) -> None:
        self.encoder.load_state_dict(saved["encoder"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if saved["windows"] != self.windows:
            print(f"the pool had {saved['windows']} windows and now has {self.windows}; their order changes")


@dataclass
class Boundary:
    """Called after each step, to save a checkpoint and to draw the embedding when they are due."""

    training: Training
    run: Run
    journal: Journal
    store: WindowStore
    schedule: Schedule
    image_size: int  # pixels
    checkpoint_epochs: int
    embed_every: int  # epochs

    def __call__(self, step: int) -> None:
        """step: the number of steps done."""
        epoch, rest = divmod(step, self.schedule.per_epoch)
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
    config = configuration.recorded(config, config.exp_dir)
    with contextlib.nullcontext() if config.dry_run else Run(config.exp_dir, world, **config.saving) as run:
        configuration.refuse_changes(config, config.exp_dir)
        with run.allow(PACKING) if run else contextlib.nullcontext():
            store = WindowStore(
                distributed.on_main(
                    lambda: pack(
                        config.data_dir,
                        config.exp_dir,
                        config.store_dir,
                        config.window,
                        config.stride,
                        config.color_mode,
                        config.dpi,
                    )
                )
            )
        extent = view_extent(config.view, config.recipe, config.image_size, store)
        per_epoch, total = length(len(store), config.batch_size, config.epochs, config.steps)
        to_time = config.minutes is not None and config.steps is None
        if run and not to_time and run.finished(total):
            return
        encoder = build_encoder(config.arch, config.projector, method, store, world, config.seed)
        build = partial(
            build_optimizer, name=config.optimizer, momentum=config.momentum, weight_decay=config.weight_decay
        )
        pairs = Pairs(
            store,
            config.recipe,
            config.image_size,
            extent,
            config.seed,
            config.strength,
            config.orientation,
        )
        order = epoch_order(config.seed, len(store))
        batches = Batches(pairs, order, per_epoch, config.batch_size, world, config.workers, collate)
        fits = tell_memory(encoder, config.image_size, config.batch_size, config.precision, world)
        if to_time or (config.dry_run and fits):

            def attempt(model: nn.Module, guarded: GuardedStep, rest: Iterable, journal: Journal) -> None:
                train(model, method.loss, guarded, rest, journal, lambda step: None)

            with run.allow(TIMING) if run else contextlib.nullcontext():
                seconds = seconds_per_step(encoder, build, batches, world, config.precision, attempt)
            if config.minutes is not None and config.steps is None:
                total = max(1, int(60 * config.minutes / seconds))
                config = replace(config, steps=total)
                if run and run.finished(total):
                    return
            if world.main:
                print(f"{tell_seconds(seconds)} a step, {tell_seconds(total * seconds)} for {total} steps")
        published = method.base_lr(config.batch_size, total / per_epoch)
        base = published if config.base_lr is None else config.base_lr
        peak = peak_lr(base, config.batch_size, config.lr_scaling)
        warmup = min(round(config.warmup_epochs * per_epoch), total // 10)
        schedule = Schedule(per_epoch, total, warmup, peak, peak * config.min_lr_ratio)
        if world.main:
            print(describe(config.arch, config.batch_size, encoder, store, schedule, world))
            print(describe_views(config.recipe, config.image_size, extent), flush=True)
        if not run:
            return

        optimizer = build(encoder)
        training = Training(encoder, optimizer, Guard(), len(store))
        saved = run.resume()
        refuse_shorter(config.epochs, config.steps, total, saved, config.exp_dir)
        start = begin(run, saved, training.guard, training.state, training.restore)
        if world.main:
            configuration.save(config, config.exp_dir / "config.json")
            atomic.write_text(config.exp_dir / "store.txt", str(store.folder.absolute()))

        journal = Journal(config.exp_dir, world, total, start, config.log_every, config.batch_size)
        if saved and saved.get("draws") != draws.VERSION:
            journal.message(draws.CHANGED)
        last = optimizer.param_groups[0]["lr"]  # of the step before `start`, by the launch that took it
        if start and last != schedule.lr(start - 1):
            journal.message(
                f"the length of this run has changed: from step {start} on, the learning rate is "
                f"{schedule.lr(start):.4g} where it was {last:.4g}"
            )
        boundary = Boundary(
            training,
            run,
            journal,
            store,
            schedule,
            config.image_size,
            checkpoint_epochs=config.checkpoint_epochs,
            embed_every=config.embed_every,
        )
        if world.main:
            journal.picture(start, "views", views(pairs))
        wrapped = parallel(encoder, world)
        guarded = GuardedStep(
            wrapped, optimizer, schedule.lr, training.guard, world.device, config.clip_grad, config.precision
        )

        def train_on(rest: Iterable[tuple[int, Any]]) -> None:
            train(wrapped, method.loss, guarded, paced(rest, total, journal, world.device), journal, boundary)

        train_guarded(train_on, batches, training.guard, run, journal, training.restore, start, total)
        journal.close()
        if world.main:
            about = {
                "arch": config.arch,
                "method": method.name,
                "image_size": config.image_size,
                "step": total,
            }
            export(config.exp_dir / BACKBONE, encoder, store, about)
        run.finish(total, training.state, [BACKBONE])
        if world.main:
            tensors = len(encoder.backbone.state_dict())
            print(f"{config.exp_dir / BACKBONE}: {tensors} tensors of {config.arch} by {method.name}")
    distributed.stop()


def refuse_small_batch(batch_size: int, joint: bool, world: World) -> None:
    """Raise UserError if BatchNorm would see only one sample, or if the ranks do not divide the batch."""
    share = distributed.per_rank(batch_size, world)
    unsynced = world.device.type == "cpu" and not joint  # each rank then normalises each view by itself
    if batch_size < 2 or (unsynced and share < 2):
        raise UserError(
            f"--batch-size {batch_size}: BatchNorm needs 2 windows on each rank; give {2 * world.size}"
        )


def pack(
    data_dir: Path,
    exp_dir: Path,
    store_dir: Path | None,
    window: int,
    stride: int | None,
    color_mode: str,
    dpi: int,
) -> Path:
    """The folder of the pool's packed windows, built unless one that matches exists.

    It is --data-dir itself if that is a packed store, the folder of this run if an earlier version made one,
    else a folder of `store_dir`, by default beside the exp-dir, that all runs on the same sheets and windows
    share. Prints the sheets that cannot be read.
    """
    if (data_dir / "windows.npy").exists():
        return data_dir
    own = exp_dir / "windows"
    shared = not own.exists()
    out = (store_dir or exp_dir.parent) if shared else own
    store = build_store(data_dir, out, window, stride, color_mode=color_mode, dpi=dpi, shared=shared)
    for line in store.skipped:
        print(f"skipped {line}")
    print(f"windows in {store.folder}, {store.index['bytes'] / 1e6:.0f} MB", flush=True)
    return store.folder


def tell_memory(encoder: Encoder, size: int, batch_size: int, precision: str, world: World) -> bool:
    """Print how much memory a step will take. Returns whether every rank has it."""
    views = torch.zeros(2, 3, size, size, dtype=torch.uint8, device=world.device)
    with rehearsal(encoder, world.device, precision) as copied:
        kept = saved_bytes(lambda: copied(views, views), copied) // 2
    weights = sum(p.nbytes for p in encoder.parameters())
    need = int(2 * weights + PEAK * kept * batch_size / world.size)
    free = free_memory(world.device, place().local_size)
    if world.main:
        print(f"a step takes about {need / 1e9:.1f} GB of memory; {free / 1e9:.1f} GB are free", flush=True)
    (short,) = distributed.agree(need > free)
    if short and world.main:
        print(
            f"warning: --batch-size {batch_size} at --image-size {size} may not fit into it; give less of "
            "either, or --preset laptop",
            flush=True,
        )
    return not short


def view_extent(view: int | None, recipe: str, size: int, store: WindowStore) -> int:
    """Side of what a view shows at most, in px of the sheet. Raises UserError for one that can't be had."""
    if view and recipe != "drawing":
        raise UserError(
            f"--view {view}: the recipe {recipe} crops the whole window; leave it out, or give --window"
        )
    if view and view > store.side:
        raise UserError(
            f"--view {view}: a window has {store.side} px; give at most that, or a larger --window"
        )
    return view or min(store.side, default_extent(size, store.line))


def length(windows: int, batch_size: int, epochs: int, steps: int | None) -> tuple[int, int]:
    """Steps of an epoch and of the whole run. Raises UserError if the pool is smaller than a batch."""
    per_epoch = windows // batch_size
    if per_epoch == 0:
        raise UserError(
            f"--batch-size {batch_size}: the pool has {windows} windows; "
            "take a smaller batch, or more windows by a smaller --stride"
        )
    return per_epoch, epochs * per_epoch if steps is None else steps


def refuse_shorter(epochs: int, steps: int | None, total: int, saved: State | None, exp_dir: Path) -> None:
    """Raise UserError if the checkpoint that is resumed has done more steps than the run is to have."""
    if saved and saved["step"] > total:
        raise UserError(
            f"{f'--epochs {epochs}' if steps is None else f'--steps {steps}'}: the newest checkpoint in "
            f"{exp_dir} has done {saved['step']} of now {total} steps; give as many, or another --exp-dir"
        )


def build_encoder(
    arch: str, projector: tuple[int, ...], method: Method, store: WindowStore, world: World, seed: int
) -> Encoder:
    """The network on this rank's device, equal on all ranks. Raises UserError if `arch` does not exist."""
    torch.manual_seed(seed)
    backbone = build_backbone(arch)
    widths = [int(backbone.num_features), *projector]
    normalise = Normalise(store.mean, store.std, torch.channels_last)
    encoder = Encoder(normalise, backbone, build_projector(widths, method.last_norm), method.joint)
    if world.size > 1 and world.device.type == "cuda":
        encoder = convert_sync_batchnorm(encoder)
    encoder.to(memory_format=torch.channels_last)
    return encoder.to(world.device)


def describe(
    arch: str, batch_size: int, encoder: Encoder, store: WindowStore, schedule: Schedule, world: World
) -> str:
    """A description of the run for the log, in several lines."""
    size = sum(p.numel() for p in encoder.parameters()) / 1e6
    widths = [layer.out_features for layer in encoder.projector.modules() if isinstance(layer, nn.Linear)]
    lines = [
        f"{arch} with projector {'-'.join(map(str, widths))}, {size:.1f}M parameters",
        f"{len(store)} {store.color_mode} windows of {store.side} px from {len(store.sheet_names)} sheets",
        f"{schedule.total} steps, {schedule.per_epoch} an epoch, batch {batch_size} = {world.size} x "
        f"{batch_size // world.size}, peak lr {schedule.peak:.4g} after {schedule.warmup} steps",
    ]
    if world.size > 1 and world.device.type == "cpu":
        lines.append("BatchNorm's statistics are per rank: torch's SyncBatchNorm takes no CPU tensor")
    return "\n".join(lines)


def export(path: Path, encoder: Encoder, store: WindowStore, about: dict[str, Any]) -> None:
    """Write the backbone, with `about` and with what its images were normalised by."""
    colors = {"color_mode": store.color_mode, "mean": store.mean, "std": store.std}
    meta = {**about, **colors, "linework": version("linework")}
    write_backbone(path, encoder.backbone.state_dict(), meta)


def spread(pool: int, count: int) -> list[int]:
    """At most so many windows of the pool, evenly spread over it and always the same."""
    count = min(count, pool)
    return [i * pool // count for i in range(count)]


def gallery(store: WindowStore, size: int, chosen: list[int]) -> Tensor:
    """The chosen windows: uint8 [N, 3, size, size]."""
    return torch.stack([square(store.window(i), size) for i in chosen])


def views(pairs: Pairs, count: int = 8) -> np.ndarray:
    """A picture of the views of some windows in the first epoch, a column each: uint8 [2 S, count * S, 3]."""
    columns = [torch.cat(pairs[0, 0, i], 1) for i in spread(len(pairs), count)]
    picture = torch.cat(columns, 2)
    return picture.expand(3, *picture.shape[1:]).permute(1, 2, 0).numpy()
