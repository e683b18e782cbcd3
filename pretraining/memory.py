"""How much memory a step of pretraining takes, and how many windows at a time fit into what is free."""

from dataclasses import dataclass

import torch

from cluster import distributed
from cluster.distributed import World
from cluster.errors import UserError
from cluster.memory import PEAK, SHARE, least_free, saved_bytes, tell_bytes
from cluster.training import rehearsal
from pretraining.encoder import Encoder

COPIES = 6  # of the embeddings of a batch, with their gradients, that a loss holds at its peak


@dataclass(frozen=True)
class Footprint:
    """What a step takes on a rank, in bytes, beside the weights themselves."""

    fixed: int  # gradients, momentum, views and embeddings of the batch
    window: float  # for each window that goes through the network at a time

    def need(self, windows: int) -> int:
        """Bytes for a step in which so many windows go through the network at a time."""
        return int(self.fixed + PEAK * self.window * windows)

    def fitting(self, share: int, free: float) -> int | None:
        """The largest divisor of a rank's share, of 2 windows at least, that fits; None if none does."""
        fitting = (m for m in range(share, 1, -1) if share % m == 0 and self.need(m) <= free)
        return next(fitting, None)


@dataclass(frozen=True)
class Fit:
    """How many windows go through the network at a time, and whether every rank has the memory for it.

    micro_batch: as given or chosen; None for whole batches. at_once: the same, but None as well where a rank
    has no more windows than that.
    """

    micro_batch: int | None
    at_once: int | None
    fits: bool


def fit_memory(
    encoder: Encoder,
    size: int,
    batch_size: int,
    micro_batch: int | None,
    new: bool,
    precision: str,
    world: World,
) -> Fit:
    """Print how much memory a step will take; choose a micro-batch for a new run whose batch doesn't fit.

    size: side of a view in pixels. new: whether the run has not begun, so that it may still choose. All ranks
    choose alike. Raises UserError for a micro-batch that doesn't divide a rank's share of the batch.
    """
    share = distributed.per_rank(batch_size, world)
    refuse_indivisible(micro_batch, share)
    footprint = measure_footprint(encoder, size, batch_size, precision, world)
    free = least_free(world)
    whole = footprint.need(share)
    if new and micro_batch is None and whole > free:
        micro_batch = footprint.fitting(share, SHARE * free)
        if micro_batch is not None and world.main:
            told = f"a whole batch takes about {tell_bytes(whole)} of memory, so --micro-batch {micro_batch}"
            print(f"{told}: same gradient, but BatchNorm's statistics are those of {micro_batch} windows")
    at_once = micro_batch if micro_batch and micro_batch < share else None
    need = footprint.need(at_once or share)
    if world.main:
        print(f"a step takes about {tell_bytes(need)} of memory; {tell_bytes(free)} are free", flush=True)
        if need > free:
            print(f"warning: {_tell_excess(batch_size, at_once, size)}", flush=True)
    return Fit(micro_batch, at_once, need <= free)


def measure_footprint(
    encoder: Encoder, size: int, batch_size: int, precision: str, world: World
) -> Footprint:
    """The footprint of a step, from what autograd keeps of two windows."""
    views = torch.zeros(2, 3, size, size, dtype=torch.uint8, device=world.device)
    across = [torch.eye(2, 3, device=world.device).expand(2, 2, 3)] if encoder.dense else []
    with rehearsal(encoder, world.device, precision) as copied:
        embeddings: list[torch.Tensor] = []
        kept = saved_bytes(lambda: embeddings.extend(copied(views, views, *across)), copied)
    weights = sum(p.nbytes for p in encoder.parameters())
    pixels = views.nbytes * batch_size // world.size  # two windows here are two views there
    values = sum(part[0].numel() for part in embeddings)
    return Footprint(2 * weights + pixels + COPIES * 4 * values * batch_size, kept / 2)


def refuse_indivisible(micro_batch: int | None, share: int) -> None:
    """Raise UserError for a micro-batch that leaves a rest of a rank's share of the batch."""
    if micro_batch is not None and micro_batch < share and share % micro_batch:
        near = sorted((m for m in range(2, share + 1) if share % m == 0), key=lambda m: abs(m - micro_batch))
        raise UserError(
            f"--micro-batch {micro_batch} does not divide the {share} windows of a rank; give {near[0]}"
        )


def _tell_excess(batch_size: int, at_once: int | None, size: int) -> str:
    what = f"--batch-size {batch_size}" if at_once is None else f"--micro-batch {at_once}"
    return f"{what} at --image-size {size} may not fit into it; give less of either, or --preset laptop"
