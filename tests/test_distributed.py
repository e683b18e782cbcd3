"""Ranks find each other, divide the batch, agree, and together give the gradient of one process."""

import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from processes import Ranks, until
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cluster import distributed, entry, rendezvous
from cluster.config import Config, setting
from cluster.distributed import World
from cluster.errors import GpuFault, UserError
from cluster.rendezvous import Place, place
from cluster.training import parallel

BATCH, DIM = 8, 5
STEP = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_NTASKS": "5",
}


def test_place_by_launcher():
    assert place({}) == Place()
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert place(torchrun | STEP) == Place(3, 4, 1, 2, "torchrun")
    assert place(STEP) == Place(3, 5, 1, 2, "slurm")
    assert place(STEP | {"SLURM_NODEID": "2", "SLURM_PROCID": "4", "SLURM_LOCALID": "0"}).local_size == 1


@pytest.mark.parametrize(
    "env",
    [
        {name: value for name, value in STEP.items() if name != "SLURM_STEP_ID"},  # the batch script
        STEP | {"SLURM_STEP_ID": str(0xFFFFFFFB)},  # the batch step
        STEP | {"SLURM_STEP_ID": str(0xFFFFFFFA)},  # salloc's interactive step
        STEP | {"SLURM_PTY_PORT": "4711"},  # srun --pty bash
    ],
)
def test_plain_python_inside_a_job_is_alone(env):
    assert place(env) == Place()


def device(name: str, visible: int, me: Place, **env: str) -> str:
    return str(distributed.pick_device(name, me, visible, env))


def test_device_of_a_rank():
    two = Place(1, 4, 1, 2, "slurm")
    assert device("auto", 0, Place()) == "cpu"
    assert device("cpu", 2, two, SLURM_GPUS_ON_NODE="4") == "cpu"
    assert device("auto", 2, two, SLURM_GPUS_ON_NODE="2") == "cuda:1"
    assert device("cuda", 1, two, SLURM_GPUS_ON_NODE="2") == "cuda:0"  # --gpus-per-task: each sees its own
    assert device("cuda:2", 4, Place()) == "cuda:2"
    assert device("auto", 4, Place()) == "cuda:0"


@pytest.mark.parametrize(
    ("visible", "env", "words"),
    [
        (4, {"SLURM_GPUS_ON_NODE": "4"}, "2 tasks but 4 GPUs"),
        (0, {"SLURM_GPUS_ON_NODE": "1"}, "2 tasks but 1 GPUs"),
        (0, {"SLURM_GPUS_ON_NODE": "2"}, "sees none"),
        (3, {}, "2 ranks but 3 GPUs"),
    ],
)
def test_tasks_that_do_not_match_the_gpus_are_one_line(visible, env, words):
    with pytest.raises(UserError, match=words) as error:
        device("auto", visible, Place(1, 4, 1, 2, "slurm"), **env)
    assert len(str(error.value).splitlines()) == 1
    assert "--device cpu" in str(error.value)


@pytest.mark.parametrize(
    ("name", "visible", "words"),
    [
        ("cuda:9", 2, "--device cuda:9: torch sees 2 GPUs here, the last is cuda:1"),
        ("cuda:9", 1, "the last is cuda:0"),
        ("cuda:0", 0, "sees no GPU here; give --device cpu"),
        ("cuda:-1", 2, "give auto, cpu, cuda or cuda:N"),
        ("cuda:x", 2, "give auto, cpu, cuda or cuda:N"),
        ("gpu", 2, "give auto, cpu, cuda or cuda:N"),
    ],
)
def test_a_device_that_is_not_there_is_one_line(name, visible, words):
    with pytest.raises(UserError, match=words) as error:
        device(name, visible, Place())
    assert error.value.exit_status == 1 and "\n" not in str(error.value)


def test_a_lost_gpu_is_a_fault_of_its_node_and_a_hidden_one_is_not():
    job = {"SLURM_GPUS_ON_NODE": "2", "SLURMD_NODENAME": "node7"}
    for visible, listed in ((1, "0,1"), (0, "0"), (0, "GPU-5ebe9f43,GPU-6c4c7d1e"), (0, "MIG-1f2e,MIG-3d4c")):
        with pytest.raises(GpuFault, match=r"^GPU fault on node7: ") as fault:
            device("auto", visible, Place(), CUDA_VISIBLE_DEVICES=listed, **job)
        assert fault.value.exit_status == 70
    assert device("auto", 1, Place(), CUDA_VISIBLE_DEVICES="MIG-1f2e,MIG-3d4c", **job) == "cuda:0"
    two = Place(1, 2, 1, 2, "slurm")
    assert device("auto", 1, two, CUDA_VISIBLE_DEVICES="GPU-6c4c7d1e", **job) == "cuda:0"
    for hidden in ("", "-1", "NoDevFiles"):  # by the user, in a job with GPUs
        assert device("auto", 0, two, CUDA_VISIBLE_DEVICES=hidden, **job) == "cpu"


def test_two_mig_instances_of_one_gpu_are_not_shared():
    first, second = ({"CUDA_VISIBLE_DEVICES": f"MIG-{name}"} for name in "ab")
    assert distributed.gpu_id("uuid", first) != distributed.gpu_id("uuid", second)
    assert distributed.gpu_id("uuid", {"CUDA_VISIBLE_DEVICES": "0"}) == distributed.gpu_id("uuid", {})


def test_global_batch_divides():
    world = World(size=4)
    assert distributed.per_rank(64, world) == 16
    with pytest.raises(UserError, match="--batch-size 66 is not divisible by 4 ranks; give 64 or 68"):
        distributed.per_rank(66, world)
    with pytest.raises(UserError, match="--bs 2 is not divisible by 4 ranks; give 4"):
        distributed.per_rank(2, world, "--bs")
    with pytest.raises(UserError):
        distributed.per_rank(0, World())


def test_alone_every_collective_is_the_identity():
    world = distributed.start("cpu")
    assert (world.rank, world.size, world.launcher, world.main) == (0, 1, "alone", True)
    z = torch.ones(2, 3, requires_grad=True)
    assert distributed.all_gather(z) is z
    assert distributed.agree(0, 3) == (0, 3)
    assert distributed.gather_objects("x") == ["x"]
    assert distributed.on_main(lambda: 4) == 4
    distributed.barrier()
    distributed.stop()


def gradient(world: World) -> list[float]:
    """The gradient, on this rank's share of the batch, of a loss that couples all rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh(), nn.Linear(DIM, DIM)).double()
    wrapped = DistributedDataParallel(model) if world.size > 1 else model
    share = distributed.per_rank(BATCH, world)
    x = torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(1)).double()
    z = distributed.all_gather(wrapped(x[world.rank * share :][:share]))
    (z @ z.T).softmax(dim=1).diagonal().log().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).tolist()


def slurm_rank(folder: Path, results: Path) -> None:
    """Run one rank with the environment variables of srun; it meets the others through a file."""
    os.environ |= {name: value for name, value in STEP.items() if name not in os.environ}
    os.environ["SLURM_STEP_NUM_TASKS"] = os.environ["SLURM_STEP_TASKS_PER_NODE"] = os.environ["WORLD_SIZE"]
    os.environ["SLURM_PROCID"] = os.environ["SLURM_LOCALID"] = os.environ["RANK"]
    os.environ["SLURM_NODEID"] = "0"
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    world = distributed.start("cpu", folder, timeout=60)
    assert world.launcher == "slurm"
    found = {
        "gradient": gradient(world),
        "agree": distributed.agree(world.rank, -world.rank, 7),
        "objects": distributed.gather_objects(list(range(world.rank))),
        "main": distributed.on_main(lambda: f"from {world.rank}"),
    }
    (results / f"{world.rank}.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.on_main(lambda: 1 / 0)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_meet_agree_and_give_the_gradient_of_one_process(size, tmp_path):
    meeting = tmp_path / "a run"
    meeting.mkdir()
    # Left by a launch that died: one with another key, one with the same, whose port nobody serves.
    stale = json.dumps({"hosts": ["127.0.0.1"], "port": 9, "token": "x"})
    for name in ("12-0-1-0", "12-0-0-0"):
        (meeting / f".rendezvous-{name}").write_text(stale)
    with Ranks(slurm_rank, meeting, tmp_path, size=size, logs=tmp_path / "logs") as ranks:
        # on_main: rank 0 fails and tells, the others leave quietly
        assert ranks.statuses() == [1] + [0] * (size - 1)
        assert "ZeroDivisionError" in ranks.log(0)
        assert all("Error" not in ranks.log(rank) for rank in range(1, size))
    expected = torch.tensor(gradient(World()))
    for rank in range(size):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        ratio = torch.tensor(found["gradient"]).norm() / expected.norm()
        assert f"{ratio:.4f}" == "1.0000"
        torch.testing.assert_close(torch.tensor(found["gradient"]), expected, rtol=1e-6, atol=1e-9)
        assert found["agree"] == [size - 1, 0, 7]
        assert found["objects"] == [list(range(other)) for other in range(size)]
        assert found["main"] == "from 0"
    assert [path.name for path in meeting.iterdir()] == [".rendezvous-12-0-1-0"]


def find_errors(found: dict[int, str], late: int) -> None:
    """Run one rank of a command whose ranks find these errors, rank `late` half a second after the others."""

    def work() -> None:
        world = distributed.start("cpu")
        time.sleep(0.5 * (world.rank == late))
        if world.rank in found:
            raise UserError(found[world.rank])
        raise SystemExit(0)

    entry.live(work)


ALL = dict.fromkeys(range(3), "a.png: truncated; copy it again")


@pytest.mark.parametrize(
    ("found", "late", "statuses"),
    [
        (ALL, -1, [1, 0, 0]),
        (ALL, 0, [1, 0, 0]),
        (ALL, 2, [1, 0, 0]),
        ({0: "full disk"}, 1, [1, 0, 0]),
        ({2: "no such GPU"}, -1, [0, 0, 1]),
        ({0: "full disk", 1: "no such GPU", 2: "full disk"}, 0, [1, 1, 0]),
    ],
)
def test_an_error_is_printed_once_however_many_ranks_find_it(found, late, statuses, tmp_path):
    began = time.monotonic()
    with Ranks(find_errors, found, late, size=3, logs=tmp_path) as ranks:
        assert ranks.statuses() == statuses
        assert sorted(ranks.errors()) == sorted(f"error: {text}" for text in set(found.values()))
    assert time.monotonic() - began < 30


@dataclass(frozen=True, kw_only=True)
class Options(Config):
    """The flags of a command."""

    # Side of a window in pixels.
    window: int = setting(64, least=1)


def wrong_flags(flags: list[str]) -> None:
    """Run one rank of a command with these flags; rank 0 comes to them later than the others."""
    time.sleep(1.0 * (os.environ["RANK"] == "0"))
    sys.argv = ["command", *flags]
    entry.run(Options, pytest.fail)


@pytest.mark.parametrize(
    ("flags", "status", "line"),
    [
        (["--windows", "3"], 2, "error: unknown flag --windows; the nearest is --window"),
        (["--window", "x"], 2, "error: "),
        (["--window", "0"], 1, "error: --window 0: give 1 or more"),
    ],
)
def test_a_wrong_flag_is_printed_by_rank_0_even_if_it_is_the_last(flags, status, line, tmp_path):
    with Ranks(wrong_flags, flags, size=3, logs=tmp_path) as ranks:
        assert ranks.statuses() == [status, 0, 0]
        (printed,) = ranks.errors()
        assert printed.startswith(line)


def refused_device() -> None:
    entry.live(lambda: distributed.start("cuda"))


def test_a_device_that_no_rank_has_is_one_line(tmp_path):
    with Ranks(refused_device, size=3, logs=tmp_path, env={"CUDA_VISIBLE_DEVICES": ""}) as ranks:
        assert ranks.statuses() == [1, 0, 0]
        (printed,) = ranks.errors()
        assert printed.startswith("error: --device cuda: torch") and "--device cpu" in printed


def find_error_late(error: BaseException, folder: Path) -> None:
    """Run one rank of a command; rank 1 finds an error when the test says so."""

    def work() -> None:
        world = distributed.start("cpu")
        (folder / f"here-{world.rank}").touch()
        until(lambda: world.rank and (folder / "go").exists(), 60)
        raise error

    entry.live(work)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("no such GPU"), 1, "error: no such GPU"),
        (SystemExit(75), 75, ""),
        (ZeroDivisionError("a bug"), 70, "ZeroDivisionError: a bug"),
    ],
)
def test_a_rank_ends_although_rank_0_no_longer_answers(error, status, line, tmp_path):
    with Ranks(find_error_late, error, tmp_path, size=2, logs=tmp_path / "logs") as ranks:
        until(lambda: all((tmp_path / f"here-{rank}").exists() for rank in range(2)))
        ranks.signal(signal.SIGSTOP, 0)
        (tmp_path / "go").touch()
        ranks.processes[1].join(30)
        assert ranks.processes[1].exitcode == status
        assert line in ranks.log(1)


def return_early(folder: Path) -> None:
    """Run one rank of a command that returns with its group open, and see that no thread of it is left."""

    def work() -> None:
        world = distributed.start("cpu")
        wrapped = parallel(nn.Linear(DIM, DIM), world)
        wrapped(torch.ones(BATCH, DIM)).sum().backward()
        distributed.barrier()
        (folder / f"here-{world.rank}").touch()
        until((folder / "go").exists, 60)

    entry.live(work)
    assert not torch.distributed.is_initialized()
    left = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in left), left


@pytest.mark.parametrize("faults", [[], [signal.SIGKILL, signal.SIGSTOP]])
def test_a_rank_that_returns_closes_its_group_whatever_the_others_do(faults, tmp_path):
    with Ranks(return_early, tmp_path, size=3, logs=tmp_path / "logs") as ranks:
        until(lambda: all((tmp_path / f"here-{rank}").exists() for rank in range(3)), 60)
        for rank, fault in enumerate(faults):
            ranks.signal(fault, rank)
        (tmp_path / "go").touch()
        for rank in range(len(faults), 3):
            ranks.processes[rank].join(30)
            assert ranks.processes[rank].exitcode == 0, ranks.log(rank)


def test_ranks_that_do_not_come_are_named(tmp_path, monkeypatch):
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    me = Place(0, 4, 0, 4, "slurm")
    failures: list[str] = []
    other = threading.Thread(target=lambda: failures.append(_meets(replace(me, rank=2), tmp_path, 30.0)))
    other.start()
    assert _meets(me, tmp_path, 1.0) == "rank 1, 3 of 4 did not come within 1 s"
    other.join()
    assert failures == ["rank 2: rank 0 left before all 4 ranks had come"]
    assert "did not reach rank 0 in 0 s (" in _meets(replace(me, rank=1), tmp_path, 0.3)
    with pytest.raises(UserError, match="--exp-dir"):
        rendezvous.meet(me, None, 1.0)


def _meets(me: Place, folder: Path, timeout: float) -> str:
    try:
        rendezvous.meet(me, folder, timeout)
    except UserError as error:
        return str(error)
    return ""


def start_where_there_is_no_such_interface(folder: Path) -> None:
    entry.live(lambda: distributed.start("cpu", folder))


def test_an_interface_that_does_not_exist_is_one_line_that_names_its_variable(tmp_path):
    env = {"GLOO_SOCKET_IFNAME": "nosuch0"}
    with Ranks(start_where_there_is_no_such_interface, tmp_path, size=2, logs=tmp_path, env=env) as ranks:
        assert ranks.statuses() == [70, 70]
        (line,) = ranks.errors()
    assert "nosuch0" in line and line.endswith("that joins the nodes in GLOO_SOCKET_IFNAME")


def come_but_do_not_answer(folder: Path) -> None:
    me = rendezvous.place()
    if me.rank:
        rendezvous.meet(me, folder, 60.0)
        time.sleep(60)
    entry.live(lambda: distributed.start("cpu", folder, timeout=3.0))


def test_ranks_that_met_but_do_not_reach_each_other_end_by_an_alarm(tmp_path):
    with Ranks(come_but_do_not_answer, tmp_path, size=2, logs=tmp_path) as ranks:
        until(lambda: ranks.processes[0].exitcode is not None)
        assert ranks.statuses(0) == [70, None]
        (line,) = ranks.errors()
    assert "no contact with all ranks by gloo in 3 s" in line and line.endswith("GLOO_SOCKET_IFNAME")
