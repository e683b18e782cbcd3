"""The guarded step is torch's own, or leaves no trace; batches start anywhere, and ranks share them."""

import copy
import dataclasses
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cluster.batches import Batches, default_workers, to_device
from cluster.distributed import World
from cluster.errors import UserError
from cluster.guard import Guard
from cluster.journal import Journal
from cluster.lifecycle import Run
from cluster.training import GuardedStep, NotFinite, train_guarded

CPU = torch.device("cpu")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1))


def take(guarded: GuardedStep, step: int, factor: float = 1.0) -> Tensor:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    with guarded.forward():
        loss = guarded.model(x).square().mean()
    return guarded.take(step, loss * factor)


def guarded_step(lr: Callable[[int], float] = lambda _: 0.1, **options) -> GuardedStep:
    model = network()
    return GuardedStep(model, torch.optim.SGD(model.parameters(), 1.0, 0.9), lr, Guard(), CPU, **options)


def floats(guarded: GuardedStep) -> list[Tensor]:
    """Weights, running statistics and momentum; the count of batches, an integer, goes on."""
    held = list(guarded.model.state_dict().values())
    held += [state["momentum_buffer"] for state in guarded.optimizer.state.values()]
    return [tensor.clone() for tensor in held if tensor.is_floating_point()]


def test_a_finite_step_is_torchs_own_with_the_rate_of_its_number_and_a_clipped_gradient():
    ours = guarded_step(lambda step: 0.1 * (step + 1), clip_grad=0.05)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 1.0, 0.9)
    for step in range(3):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.param_groups[0]["lr"] = 0.1 * (step + 1)
        optimizer.step()
        assert take(ours, step) == norm > 0.05
    assert all(map(torch.equal, ours.model.state_dict().values(), model.state_dict().values()))


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_leaves_no_trace(factor):
    guarded = guarded_step()
    take(guarded, 0)
    before, count = floats(guarded), copy.deepcopy(guarded.guard)
    assert not torch.isfinite(take(guarded, 1, factor))
    assert all(map(torch.equal, floats(guarded), before)) and guarded.guard.skipped == count.skipped + 1
    take(guarded, 2)
    assert guarded.guard.skipped == 0 and not all(map(torch.equal, floats(guarded), before))


def test_the_third_in_a_row_leaves_no_trace_either_and_says_which_step_it_was():
    guarded = guarded_step()
    take(guarded, 0)
    before = floats(guarded)
    take(guarded, 1, float("nan"))
    take(guarded, 2, float("nan"))
    with pytest.raises(NotFinite) as raised:
        take(guarded, 3, float("nan"))
    assert raised.value.step == 3 and all(map(torch.equal, floats(guarded), before))


def test_a_group_takes_its_share_of_the_rate():
    model = network()
    groups = [{"params": model[0].parameters(), "factor": 2.0}, {"params": model[3].parameters()}]
    guarded = GuardedStep(model, torch.optim.SGD(groups, 1.0), lambda _: 0.25, Guard(), CPU)
    take(guarded, 0)
    assert [group["lr"] for group in guarded.optimizer.param_groups] == [0.5, 0.25]


class Huge:
    """Samples of 4 TB that take no memory until they are copied."""

    def __getitem__(self, key):
        return {"boxes": torch.zeros(1).expand(1 << 40)}


@pytest.mark.parametrize("size", [1, 2])
def test_workers_whose_batches_do_not_fit_into_shared_memory_are_refused(size):
    batches = Batches(
        Huge(), lambda _: np.arange(6), 3, 2, World(size=size), 3, collate=lambda items: items[0]
    )
    need = (2 * 3 + 1) * (2 // size) * 4 * 2**40 / 1e6
    words = (
        rf"^/dev/shm has \d+ MB of room, and 3 workers need {need:.0f} MB .*--workers 0, .*--shm-size=\d+m\)$"
    )
    with pytest.raises(UserError, match=words):
        next(batches.between(0, 3))
    assert next(dataclasses.replace(batches, workers=0).between(0, 3))[0] == 0


def test_workers_by_default_are_as_many_as_shared_memory_holds(monkeypatch):
    room = os.statvfs("/dev/shm").f_bavail * os.statvfs("/dev/shm").f_frsize

    class Large:
        def __getitem__(self, key):
            return torch.zeros(1).expand(room // 4 // 9)  # 4 workers need 9 batches of it

    world = World(device=torch.device("cuda"))
    batches = Batches(Large(), lambda _: np.arange(6), 6, 1, world, None, collate=lambda items: items[0])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)))
    assert 2 <= batches._measure(0) <= 4 < default_workers(torch.device("cuda"), {})


@pytest.mark.parametrize(
    ("cpus", "env", "device", "workers"),
    [
        (8, {}, "cpu", 2),
        (8, {}, "cuda", 7),
        (1, {}, "cuda", 1),
        (128, {}, "cuda", 16),
        (64, {"SLURM_CPUS_PER_TASK": "6"}, "cuda", 5),  # a plain python in a batch script
        (64, {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"}, "cuda", 7),
        (64, {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}, "cuda", 15),
        (
            64,
            {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"},
            "cuda",
            15,
        ),
        (
            6,
            {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
            | {"SLURM_CPUS_PER_TASK": "6"},
            "cuda",
            5,
        ),
    ],
)
def test_workers_by_default_come_from_the_cpus_of_the_rank(cpus, env, device, workers, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
    assert default_workers(torch.device(device), env) == workers


class Numbers:
    """Sample n is the number n, in the shapes that batches have."""

    def __getitem__(self, key):
        return torch.tensor(key[2]), {"epoch": torch.tensor(key[0])}

    def source(self, key):
        return f"file {key[2] // 2}"


def collate(items):
    return torch.stack([number for number, _ in items]), [target for _, target in items]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [1, 3])
def test_batches_start_anywhere_and_ranks_share_them(workers, size):
    def batches(rank: int) -> Batches:
        def order(epoch: int) -> np.ndarray:
            return np.random.default_rng(epoch).permutation(20)

        return Batches(Numbers(), order, 3, 6, World(rank=rank, size=size), workers, collate)

    def numbers(rank: int, *span: int) -> list[tuple[int, list[int], list[int]]]:
        return [
            (step, found.tolist(), [int(target["epoch"]) for target in targets])
            for step, (found, targets) in batches(rank).between(*span)
        ]

    shares = [[found for _, found, _ in numbers(rank, 0, 8)] for rank in range(size)]
    whole = [list(itertools.chain(*parts)) for parts in zip(*shares, strict=True)]
    orders = [np.random.default_rng(epoch).permutation(20)[:18].reshape(3, 6).tolist() for epoch in range(3)]
    assert whole == list(itertools.chain(*orders))[:8]
    late = numbers(0, 4, 6)
    assert [step for step, _, _ in late] == [4, 5] and late == numbers(0, 0, 6)[4:]
    passed_over = numbers(0, 4, 6, 2)
    assert [found for _, found, _ in passed_over] == [found for _, found, _ in numbers(0, 6, 8)]
    assert passed_over[0][2] == [2] * (6 // size)
    assert batches(0).sources(1) == list(dict.fromkeys(f"file {n // 2}" for n in numbers(0, 1, 2)[0][1]))


def test_workers_end_with_training_though_garbage_holds_a_frame_of_it(tmp_path):
    """Else they are waited for at exit, and SIGTERM, by which multiprocessing ends them there, is blocked."""
    batches, held = Batches(Numbers(), lambda _: np.arange(20), 3, 6, World(), 2, collate), []

    def train(rest):
        for _ in rest:
            held.append(sys._getframe())
            return

    with Run(tmp_path, World(), checkpoint_every=600, keep=3, step_timeout=600) as run:
        journal = Journal(tmp_path, World(), 3)
        train_guarded(train, batches, Guard(), run, journal, lambda saved: None, 0, 3)
        journal.close()
        assert held and not multiprocessing.active_children()


def test_every_tensor_of_a_batch_goes_to_the_device():
    batch = [torch.zeros(2), ({"boxes": torch.ones(1)}, 7, "name")]
    (plain, (target, number, name)) = to_device(batch, torch.device("meta"))
    assert plain.is_meta and target["boxes"].is_meta and (number, name) == (7, "name")
