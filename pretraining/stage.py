"""The pretraining stage, from a configuration to a signed backbone.safetensors."""

import math
from dataclasses import dataclass
from importlib.metadata import version

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cluster import checkpoint, distributed
from cluster import config as configuration
from cluster.distributed import World
from cluster.errors import UserError
from cluster.guard import Guard
from cluster.journal import Journal
from cluster.lifecycle import Run
from pretraining.config import PretrainConfig
from pretraining.data import Pairs, batch_keys, load
from pretraining.encoder import Encoder, build_backbone, build_projector
from pretraining.features import embed, square
from pretraining.loop import Loss, train
from pretraining.schedule import base_lr, build_optimizer, lr_at, peak_lr
from schematics.pack import WindowStore, build_store

# What may differ between a run and its continuation.
FREE = {
    "--data-dir", "--exp-dir", "--epochs", "--steps", "--clip-grad", "--workers", "--device", "--precision",
    "--checkpoint-every", "--checkpoint-epochs", "--keep", "--step-timeout", "--log-every", "--embed-every",
}  # fmt: skip


BACKBONE = "backbone.safetensors"


# Least, and for some the largest, that a number may be.
LIMITS = {
    "epochs": (1,), "steps": (1,), "projector": (1,), "base_lr": (0,), "warmup_epochs": (0,),
    "min_lr_ratio": (0,), "momentum": (0,), "weight_decay": (0,), "clip_grad": (1e-6,),
    "image_size": (1,), "window": (1,), "stride": (1,), "strength": (0,), "dpi": (1,), "workers": (0,),
    "seed": (0, configuration.LARGEST_SEED), "checkpoint_every": (0,), "keep": (1,),
    "checkpoint_epochs": (0,), "log_every": (1,), "embed_every": (0,), "step_timeout": (1,),
}  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """Length, in steps, and learning rate of a run."""

    per_epoch: int
    total: int
    warmup: int
    peak: float
    floor: float

    def lr(self, step: int) -> float:
        return lr_at(step, self.total, self.warmup, self.peak, self.floor)


@dataclass(frozen=True)
class Training:
    """What a checkpoint holds of a run: network, optimizer, guard; and how many windows the pool had."""

    encoder: Encoder
    optimizer: torch.optim.Optimizer
    guard: Guard
    windows: int

    def state(self) -> dict:
        return {
            "encoder": self.encoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "guard": self.guard.state(),
            "windows": self.windows,
        }

    def restore(self, saved: dict) -> None:
        self.encoder.load_state_dict(saved["encoder"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if saved["windows"] != self.windows:
            print(f"the pool had {saved['windows']} windows, has {self.windows}: their order changes here")


def pretrain(config: PretrainConfig, method: str, loss: Loss, joint: bool, last_norm: bool) -> None:
    """Pretrain by `loss`, going on where an earlier life of this run stopped; export and sign the backbone.

    joint: both views in one batch (see Encoder). last_norm: BatchNorm behind the projector's last layer.
    Raises UserError, DataError: input that can't be used, gradients that stay non-finite.
    """
    world = distributed.start(config.device, config.exp_dir)
    share = distributed.per_rank(config.batch_size, world)
    unsynced = world.device.type == "cpu" and not joint  # each rank and view by itself
    if config.batch_size < 2 or (unsynced and share < 2):
        raise UserError(f"--batch-size {config.batch_size}: BatchNorm needs 2 windows; give {2 * world.size}")
    configuration.refuse_outside(config, LIMITS)
    with Run(
        config.exp_dir, world,
        checkpoint_every=config.checkpoint_every, keep=config.keep, step_timeout=config.step_timeout,
    ) as run:  # fmt: skip
        configuration.refuse_changes(config, config.exp_dir, FREE)
        with run.patience(24 * 3600):
            store = open_store(config)
        schedule = plan(config, method, len(store))
        if run.finished(schedule.total):
            return
        training = build(config, joint, last_norm, world, len(store))
        saved = run.resume()
        if saved is None:  # something to roll back to, and a full disk is found before the first step
            run.save(0, training.state, wait=True)
        else:
            training.restore(saved)
            vars(training.guard).update(saved["guard"])
        start = saved["step"] if saved else 0
        if world.main:
            configuration.save(config, config.exp_dir / "config.json")
            print(describe(config, schedule, training.encoder, store, share, world), flush=True)
        journal = Journal(config.exp_dir, world, schedule.total, start, config.log_every)
        optimize(config, loss, training, schedule, store, world, run, journal, start)
        journal.close()
        backbone = training.encoder.backbone.state_dict()
        if world.main:
            about = meta(config, method, store, schedule.total)
            checkpoint.export_backbone(config.exp_dir / BACKBONE, backbone, about)
        run.finish(schedule.total, training.state, [BACKBONE])
        if world.main:
            print(f"{config.exp_dir / BACKBONE}: {len(backbone)} tensors of {config.arch} by {method}")
    distributed.stop()


def optimize(
    config: PretrainConfig, loss: Loss, training: Training, schedule: Schedule, store: WindowStore,
    world: World, run: Run, journal: Journal, start: int,
) -> None:  # fmt: skip
    """Train from step `start` to the end, and go back to the last checkpoint where gradients stay non-finite.

    Raises UserError when that does not help.
    """
    encoder, guard = training.encoder, training.guard
    wrapped = DistributedDataParallel(encoder) if world.size > 1 else encoder
    pairs = Pairs(store, config.recipe, config.image_size, config.seed, config.strength, config.orientation)
    mean, std = (torch.tensor(t, device=world.device, dtype=torch.float32) for t in (store.mean, store.std))
    bf16 = {"auto": world.device.type == "cuda", "bf16": True, "fp32": False}[config.precision]

    def boundary(done: int) -> None:
        epoch, rest = divmod(done, schedule.per_epoch)
        save = rest == 0 and config.checkpoint_epochs > 0 and epoch % config.checkpoint_epochs == 0
        run.after_step(done, training.state, save=save, hold=guard.skipped > 0)
        draw = rest == 0 and config.embed_every > 0 and epoch % config.embed_every == 0
        if world.main and (draw or done == schedule.total):
            with run.patience(1800):
                windows = gallery(store, config.image_size)
                journal.embeddings(done, embed(encoder.backbone, windows, mean, std), windows.float() / 255)

    while True:
        keys = batch_keys(
            config.seed, len(store), config.batch_size, start + guard.offset, schedule.total + guard.offset,
            world.rank, world.size,
        )  # fmt: skip
        batches = load(pairs, keys, config.workers, pin_memory=world.device.type == "cuda")
        bad = train(
            wrapped, loss, training.optimizer, schedule.lr, batches, start, mean, std,
            config.clip_grad or math.inf, bf16, world.device, guard, journal, boundary,
        )  # fmt: skip
        if bad is None:
            return
        verdict, step, samples = bad
        files = [store.source(sample) for sample in samples]
        saved = run.resume()
        assert saved is not None, "a fresh run saves step 0"
        start = saved["step"]
        if verdict == "stop":
            last = checkpoint.step_path(run.folder, start)
            raise UserError(guard.last_words(step, files, str(last)))
        journal.message(
            f"step {step}: not finite three times in a row, last on {files[0]}; back to step {start}"
        )
        training.restore(saved)
        guard.roll_back(step, start)  # the data up to `step` is passed over
        journal.rewind(start)


def open_store(config: PretrainConfig) -> WindowStore:
    """The packed windows of the pool: a store given as --data-dir, or one built in the exp-dir by rank 0."""
    folder = config.data_dir if (config.data_dir / "windows.npy").exists() else config.exp_dir / "windows"

    def build() -> None:
        store = build_store(
            config.data_dir, folder, config.window, config.stride,
            color_mode=config.color_mode, dpi=config.dpi,
        )  # fmt: skip
        for line in store.skipped:
            print(f"skipped {line}")

    if folder != config.data_dir:
        distributed.on_main(build)
    return WindowStore(folder)


def plan(config: PretrainConfig, method: str, windows: int) -> Schedule:
    """Steps and learning rate by the published rules.

    Raises UserError: the pool is smaller than a batch.
    """
    per_epoch = windows // config.batch_size
    if per_epoch == 0:
        raise UserError(
            f"--batch-size {config.batch_size}: the pool has {windows} windows; "
            "take a smaller batch, or more windows by a smaller --stride"
        )
    total = config.epochs * per_epoch if config.steps is None else config.steps
    published = base_lr(method, config.batch_size, total / per_epoch)
    base = published if config.base_lr is None else config.base_lr
    peak = peak_lr(base, config.batch_size, config.lr_scaling)
    warmup = min(round(config.warmup_epochs * per_epoch), total // 10)
    return Schedule(per_epoch, total, warmup, peak, peak * config.min_lr_ratio)


def build(config: PretrainConfig, joint: bool, last_norm: bool, world: World, windows: int) -> Training:
    """Network and optimizer on this rank's device, the same on every rank by --seed.

    Raises UserError: --arch or --optimizer does not exist.
    """
    torch.manual_seed(config.seed)
    try:
        backbone = build_backbone(config.arch)
        widths = [int(backbone.num_features), *config.projector]  # type: ignore[arg-type]
        encoder = Encoder(backbone, build_projector(widths, last_norm), joint)
        if world.size > 1 and world.device.type == "cuda":
            encoder = convert_sync_batchnorm(encoder)
        encoder.to(memory_format=torch.channels_last)
        encoder.to(world.device)
        optimizer = build_optimizer(encoder, config.optimizer, config.momentum, config.weight_decay)
    except ValueError as error:
        raise UserError(str(error)) from None
    return Training(encoder, optimizer, Guard(), windows)


def describe(
    config: PretrainConfig, schedule: Schedule, encoder: Encoder, store: WindowStore, share: int, world: World
) -> str:
    """What is about to run, for the log."""
    size = sum(p.numel() for p in encoder.parameters()) / 1e6
    lines = [
        f"{config.arch} with projector {'-'.join(map(str, config.projector))}, {size:.1f}M parameters",
        f"{len(store)} {store.color_mode} windows of {store.side} px from {len(store.sheet_names)} sheets, "
        f"recipe {config.recipe}",
        f"{schedule.total} steps, {schedule.per_epoch} an epoch, batch {config.batch_size} "
        f"= {world.size} x {share}, peak lr {schedule.peak:.4g} after {schedule.warmup} steps",
    ]
    if world.size > 1 and world.device.type == "cpu":
        lines.append("BatchNorm's statistics are per rank: torch's SyncBatchNorm takes no CPU tensor")
    return "\n".join(lines)


def gallery(store: WindowStore, size: int, windows: int = 256) -> Tensor:
    """A fixed set of windows, evenly spread over the pool: uint8 [min(windows, N), 3, size, size]."""
    count = min(windows, len(store))
    return torch.stack([square(store.window(i * len(store) // count), size) for i in range(count)])


def meta(config: PretrainConfig, method: str, store: WindowStore, step: int) -> dict:
    """What travels inside backbone.safetensors."""
    return {
        "arch": config.arch,
        "method": method,
        "color_mode": store.color_mode,
        "mean": store.mean,
        "std": store.std,
        "image_size": config.image_size,
        "step": step,
        "linework": version("linework"),
    }
