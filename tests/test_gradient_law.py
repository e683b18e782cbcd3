"""Law 3: W ranks give the one-rank gradient of the global batch, for both losses, in micro-batches too."""

import itertools
import multiprocessing
import os
import socket
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cluster import distributed
from cluster.backbone import Normalise
from pretraining.encoder import Encoder
from pretraining.gradcache import GradCache
from simclr.loss import nt_xent
from vicreg.loss import vicreg_loss

LOSSES = {"simclr": partial(nt_xent, temperature=0.1), "vicreg": vicreg_loss}
BATCH = 24
MICRO = [None, 2, 6]  # windows of a micro-batch; with 4 ranks, the last is a rank's share


def encoder(joint: bool) -> Encoder:
    """Without BatchNorm, whose statistics on CPU are per rank."""
    torch.manual_seed(1)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 24), nn.Tanh())
    return Encoder(Normalise([0.5] * 3, [0.3] * 3), backbone, nn.Linear(24, 20, bias=False), joint)


def gradients(method: str, world: distributed.World, micro_batch: int | None = None) -> torch.Tensor:
    """The gradient of one step over this rank's share, flattened."""
    shape, generator = (2, BATCH, 3, 2, 2), torch.Generator().manual_seed(2)
    views = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    share = distributed.per_rank(BATCH, world)
    view1, view2 = views[:, world.rank * share : (world.rank + 1) * share]
    model = encoder(joint=method == "simclr")
    wrapped = DistributedDataParallel(model) if world.size > 1 else model
    cache = GradCache(wrapped, micro_batch, nullcontext) if micro_batch else None
    z1, z2 = cache.embed(view1, view2) if cache else wrapped(view1, view2)
    loss, _ = LOSSES[method](distributed.all_gather(z1), distributed.all_gather(z2))
    loss.backward()
    if cache:
        cache.carry()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def gather_sums_as_an_all_reduce_would(world: distributed.World) -> bool:
    """`all_gather` gives without a collective the sum over ranks of a gradient, to the last bit."""
    weight = torch.randn(world.size * 1000, 40, generator=torch.Generator().manual_seed(3))
    z = torch.zeros(1000, 40, requires_grad=True)
    (distributed.all_gather(z) * weight).sum().backward()
    if world.size > 1:
        torch.distributed.all_reduce(weight)
    return torch.equal(z.grad, weight.chunk(world.size)[world.rank])


def rank_main(rank: int, size: int, port: int, results) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = distributed.start("cpu")
    assert gather_sums_as_an_all_reduce_would(world)
    found = {(method, m): gradients(method, world, m).tolist() for method in LOSSES for m in MICRO}
    results.put((rank, found))
    distributed.stop()


@pytest.fixture(scope="module")
def alone():
    world = distributed.World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), launcher="alone")
    return {method: gradients(method, world) for method in LOSSES}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_gradient_does_not_depend_on_the_number_of_ranks(size, alone):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "pretraining.encoder", "cluster.distributed"])
    results = context.SimpleQueue()
    with socket.create_server(("127.0.0.1", 0)) as server:
        free_port = server.getsockname()[1]
    ranks = [context.Process(target=rank_main, args=(r, size, free_port, results)) for r in range(size)]
    for process in ranks:
        process.start()
    found = dict(results.get() for _ in ranks)
    for process in ranks:
        process.join(30)
        assert process.exitcode == 0
    for method, expected in alone.items():
        for rank, micro_batch in itertools.product(range(size), MICRO):
            gradient = torch.tensor(found[rank][method, micro_batch])
            assert f"{gradient.norm() / expected.norm():.4f}" == "1.0000", method
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())
