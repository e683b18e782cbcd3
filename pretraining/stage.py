"""The pretraining stage, from a configuration to a signed backbone.safetensors; methods differ in what they pass."""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cluster import checkpoint, distributed
from cluster import config as configuration
from cluster.config import UserError
from cluster.distributed import World
from cluster.journal import Journal
from cluster.lifecycle import Guard, Rollback, Run
from pretraining.config import PretrainConfig
from pretraining.data import Pairs, batch_keys, load
from pretraining.encoder import Encoder, build_backbone, build_projector
from pretraining.features import embed
from pretraining.loop import Loss, train
from pretraining.schedule import base_lr, build_optimizer, lr_at, peak_lr
from schematics.pack import WindowStore, build_store


@dataclass(frozen=True)
class Schedule:
    """Length and learning rate of a run, in steps."""

    per_epoch: int
    total: int
    warmup: int
    peak: float
    floor: float

    def lr(self, step: int) -> float:
        return lr_at(step, self.total, self.warmup, self.peak, self.floor)


def plan(config: PretrainConfig, method: str, windows: int) -> Schedule:
    """Steps and learning rate by the published rules.

    Raises:
        UserError: the pool is smaller than a batch.
    """
    per_epoch = windows // config.batch_size
    if per_epoch == 0:
        raise UserError(
            f"--batch-size {config.batch_size}: the pool has {windows} windows; "
            "take a smaller batch, or more windows by a smaller --stride"
        )
    total = config.steps or config.epochs * per_epoch
    base = config.base_lr or base_lr(method, config.batch_size, total / per_epoch)
    peak = peak_lr(base, config.batch_size, config.lr_scaling)
    warmup = min(round(config.warmup_epochs * per_epoch), total // 10)
    return Schedule(per_epoch, total, warmup, peak, peak * config.min_lr_ratio)
