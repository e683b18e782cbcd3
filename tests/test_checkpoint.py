"""A checkpoint is complete or absent, it is verified by its hash, and code in it is never run."""

import contextlib
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cluster import atomic, backbone, checkpoint
from cluster.errors import UserError

STATE = {"model": {"w": torch.arange(1000.0)}, "lr": 0.1, "history": [1, (2, None)], "name": "toy"}


def state(step: int) -> checkpoint.State:
    return {"model": {"w": torch.full((1000,), float(step))}, "twice": 2 * step}


def check_folder(folder: Path, steps: list[int]) -> None:
    """Check that a complete checkpoint of one of `steps` is found."""
    path, content, rejected = checkpoint.load_newest(folder)
    assert rejected == []
    assert path and content["step"] in steps
    assert torch.equal(content["model"]["w"], state(content["step"])["model"]["w"])


def in_child(work) -> int:
    """Run work() in a forked child and return its wait status."""
    if (pid := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


def test_round_trip_keeps_types_and_bits(tmp_path):
    path = tmp_path / "model.pt"
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    content = {
        **STATE,
        "model": model.state_dict(),
        "f": np.float64(0.1),
        "state": {0: {"step": torch.ones(())}},
    }
    digest = checkpoint.write_file(path, content)
    again = checkpoint.read(path)
    assert again["history"] == [1, (2, None)]
    assert type(again["f"]) is float and again["f"] == 0.1
    for name, tensor in model.state_dict().items():
        assert torch.equal(again["model"][name], tensor)
    assert again["state"] == content["state"]
    assert subprocess.run(["sha256sum", "--quiet", "-c", "model.pt.sha256"], cwd=tmp_path).returncode == 0
    assert atomic.sidecar(path).read_text() == f"{digest}  model.pt\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pt", "model.pt.sha256"]


def test_equal_states_give_equal_bytes(tmp_path):
    """This holds even if equal strings in the states are separate objects, as after a resume."""

    def state(key):
        return {"groups": [{"rate": 0.1, "kind": "rate"}, {key: 0.2, "kind": key}], "w": torch.ones(3)}

    files = [
        checkpoint.write(tmp_path / name, 1, state(key), keep=1)
        for name, key in (("one", "rate"), ("several", "".join(["ra", "te"])))
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_slice_is_saved_without_its_storage(tmp_path):
    checkpoint.write_file(tmp_path / "slice.pt", {"row": torch.zeros(1000, 1000)[3]})
    assert (tmp_path / "slice.pt").stat().st_size < 10_000


@pytest.mark.parametrize("foreign", [np.zeros(3), Path("x"), {1, 2}, torch.float32, nn.Linear(1, 1)])
def test_what_cannot_be_read_back_is_refused_before_writing(foreign, tmp_path):
    with pytest.raises(TypeError, match=r"state\['deep'\]\[1\] is a "):
        checkpoint.write_file(tmp_path / "model.pt", {"deep": [0, foreign]})
    assert list(tmp_path.iterdir()) == []


def test_every_flipped_bit_and_every_cut_is_detected_and_the_one_before_is_taken(tmp_path):
    for step in (10, 20):
        checkpoint.write(tmp_path, step, state(step), keep=3)
    newest = checkpoint.step_path(tmp_path, 20)
    whole = newest.read_bytes()
    rng = random.Random(0)
    for _ in range(100):
        bit = rng.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        newest.write_bytes(damaged)
        path, _, rejected = checkpoint.load_newest(tmp_path)
        assert path == checkpoint.step_path(tmp_path, 10)
        assert len(rejected) == 1 and str(newest) in rejected[0]
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        newest.write_bytes(whole[:length])
        with pytest.raises(UserError, match="truncated or damaged"):
            checkpoint.read(newest)
    newest.write_bytes(whole)
    assert checkpoint.load_newest(tmp_path)[::2] == (newest, [])


def test_only_the_last_are_kept_and_bad_later_ones_do_not_push_them_out(tmp_path):
    for step in range(1, 6):
        checkpoint.write(tmp_path, step, state(step), keep=2)
    assert [step for step, _ in checkpoint.listed(tmp_path)] == [5, 4]
    for step in (4, 5):
        checkpoint.step_path(tmp_path, step).write_bytes(b"damaged")
    checkpoint.write(tmp_path, 2, state(2), keep=2)  # gone on from before the damage
    checkpoint.write(tmp_path, 3, state(3), keep=2)
    check_folder_path, _, rejected = checkpoint.load_newest(tmp_path)
    assert check_folder_path == checkpoint.step_path(tmp_path, 3)
    assert len(rejected) == 2
    assert not list(tmp_path.glob("step_00000001*"))


class RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("form", ["plain pickle", "torch.save"])
@pytest.mark.parametrize("vouched", [False, True])
def test_a_pickle_that_runs_code_is_refused_unexecuted(form, vouched, tmp_path):
    path, proof = tmp_path / "model.pt", tmp_path / "executed"
    if form == "torch.save":
        torch.save({"model": RunsCode(proof)}, path)
    else:
        path.write_bytes(pickle.dumps(RunsCode(proof)))
    if vouched:
        atomic.sidecar(path).write_text(f"{atomic.file_hash(path)}  model.pt\n")
    with pytest.raises(UserError) as error:
        checkpoint.read(path)
    assert not proof.exists()
    assert len(str(error.value).splitlines()) == 1
    assert str(path) in str(error.value)
    assert ("holds code" if vouched else "sha256sum") in str(error.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", pickle.dumps([1]), None])
def test_a_foreign_file_is_one_line(content, tmp_path):
    path = tmp_path / "model.pt"
    if content is None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", b"junk")
    else:
        path.write_bytes(content)
    atomic.sidecar(path).write_text(f"{atomic.file_hash(path)}  model.pt\n")
    with pytest.raises(UserError) as error:
        checkpoint.read(path)
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(UserError, match="no such file"):
        checkpoint.read(tmp_path / "absent.pt")


def die_at(count: int) -> None:
    """From here on, kill this process with SIGKILL just before its count-th change to the disk."""
    left = count

    def killing(call):
        def wrapped(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapped

    os.fsync, os.replace = killing(os.fsync), killing(os.replace)
    Path.unlink = killing(Path.unlink)  # type: ignore[method-assign]
    atomic.HashingFile.write = killing(atomic.HashingFile.write)  # type: ignore[method-assign]


def test_kill_at_every_change_of_the_disk_leaves_a_whole_file(tmp_path):
    count, status = 0, -1
    for step in (1, 2):
        checkpoint.write(tmp_path / "before", step, state(step), keep=2)
    checkpoint.write_file(tmp_path / "before" / "model.pt", state(1))
    while status != 0:
        count += 1
        folder = tmp_path / str(count)
        shutil.copytree(tmp_path / "before", folder)

        def work(count=count, folder=folder):
            die_at(count)
            checkpoint.write(folder, 3, state(3), keep=2)
            checkpoint.write_file(folder / "model.pt", state(2))  # in the place of another

        status = in_child(work)
        assert status in (0, signal.SIGKILL)
        check_folder(folder, [2, 3])
        assert checkpoint.read(folder / "model.pt")["twice"] in (2, 4)
        atomic.sweep(folder)
        assert not list(folder.glob(".*"))
        for listed in folder.glob("*.sha256"):
            assert listed.with_suffix("").exists()
        check_folder(folder, [2, 3])
    assert count > 30


def test_100_kills_at_random_moments_of_writing_lose_nothing_that_was_saved(tmp_path):
    checkpoint.write(tmp_path, 0, state(0), keep=3)
    rng = random.Random(1)
    reader, writer = os.pipe()
    saved = 0
    for _ in range(100):
        if (pid := os.fork()) == 0:
            step = saved
            while True:
                step += 1
                checkpoint.write(tmp_path, step, state(step), keep=3)
                os.write(writer, step.to_bytes(4, "big"))
        time.sleep(rng.uniform(0.0, 0.05))  # the moment of the kill is the random input
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.set_blocking(reader, False)
        with contextlib.suppress(BlockingIOError):
            saved = int.from_bytes(os.read(reader, 1 << 16)[-4:], "big")
        _, content, rejected = checkpoint.load_newest(tmp_path)
        assert rejected == []
        assert content["step"] in (saved, saved + 1)
        assert content["twice"] == 2 * content["step"]
        saved = content["step"]
    assert saved > 5
    os.close(reader)
    os.close(writer)


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 1 MiB if one can be mounted, otherwise a limit of 1 MiB on the size of a file."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    if mounted.returncode:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, old[1]))
    yield folder
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
    if not mounted.returncode:
        subprocess.run(["umount", folder], check=True)


def test_full_disk_is_one_line_and_leaves_the_last_good_one(small_disk):
    writer = checkpoint.Writer(small_disk, keep=3)
    writer.save(1, state(1))
    writer.wait()
    large = {"w": torch.zeros(1 << 19)}  # 2 MiB
    for step in (2, 3):
        writer.save(step, large)
        with pytest.raises(UserError) as error:
            writer.wait()
        assert "the disk is full" in str(error.value)
        assert str(checkpoint.step_path(small_disk, step)) in str(error.value)
        assert writer.newest == checkpoint.step_path(small_disk, 1)
    assert sorted(p.name for p in small_disk.iterdir()) == ["step_00000001.pt", "step_00000001.pt.sha256"]
    check_folder(small_disk, [1])
    with pytest.raises(UserError, match="the disk is full"):
        backbone.write_backbone(small_disk / "backbone.safetensors", large, {"arch": "x"})
    assert len(list(small_disk.iterdir())) == 2


def test_writer_saves_what_was_there_when_it_was_asked(tmp_path):
    writer = checkpoint.Writer(tmp_path, keep=2)
    weight = torch.zeros(1 << 20)
    for step in range(1, 5):
        weight.fill_(step)
        writer.save(step, {"w": weight})
        weight.fill_(-1.0)  # training goes on
        assert writer.newest in (
            None,
            checkpoint.step_path(tmp_path, step - 1),
            checkpoint.step_path(tmp_path, step),
        )
    writer.wait()
    assert writer.newest == checkpoint.step_path(tmp_path, 4)
    for step in (3, 4):
        assert (checkpoint.read(checkpoint.step_path(tmp_path, step))["w"] == step).all()


def test_a_crash_in_a_write_costs_no_more_than_the_interval(tmp_path):
    """On a slow disk a write starts earlier. Work lost: from one copied state until the next is on disk."""
    from cluster.distributed import World
    from cluster.lifecycle import Run

    taken: list[float] = []
    written: list[float] = []

    def slow_disk() -> None:
        time.sleep(0.5)
        written.append(time.monotonic())

    def now() -> checkpoint.State:
        taken.append(time.monotonic())
        return state(len(taken))

    with Run(tmp_path, World(), checkpoint_every=1.0) as run:
        run.writer.allowed = slow_disk
        step = 0
        while len(written) < 4:
            step += 1
            time.sleep(0.01)
            run.after_step(step, now)
        run.writer.wait()
    lost = [durable - before for before, durable in zip(taken[1:], written[2:], strict=False)]
    assert sorted(lost)[len(lost) // 2] < 1.4, (taken, written)  # 1.5 if it started when it is due


def test_a_commit_that_is_not_allowed_changes_nothing(tmp_path):
    def taken_over() -> None:
        raise UserError("owner.json: another run has taken over")

    checkpoint.write(tmp_path, 1, state(1), keep=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    writer = checkpoint.Writer(tmp_path, keep=1, allowed=taken_over)
    for step in (1, 2):
        writer.save(step, state(7))
        with pytest.raises(UserError, match="taken over"):
            writer.wait()
        assert writer.newest is None
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_backbone_carries_its_meta(tmp_path):
    path = tmp_path / "backbone.safetensors"
    tensors = {
        "conv1.weight": torch.randn(4, 3, 7, 7).to(memory_format=torch.channels_last),
        "n": torch.tensor(3),
    }
    meta = {"arch": "resnet18", "method": "simclr", "mean": [0.9] * 3, "std": [0.1] * 3, "step": 7}
    backbone.write_backbone(path, tensors, meta)
    digests = {backbone.write_backbone(path, tensors, meta) for _ in range(20)}
    assert len(digests) == 1  # the same bytes, whatever the order in which safetensors writes the meta
    again, found = backbone.read_backbone(path)
    assert found == meta
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated or damaged"):
        backbone.read_backbone(path)
    atomic.sidecar(path).write_text(f"{atomic.file_hash(path)}  x\n")
    with pytest.raises(UserError, match="not a backbone"):
        backbone.read_backbone(path)


def test_final_marker_vouches_for_the_files(tmp_path):
    with pytest.raises(UserError, match="has not finished"):
        checkpoint.check_final(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"weights")
    checkpoint.sign_final(tmp_path, 7, ["model.pt"])
    assert checkpoint.check_final(tmp_path)["step"] == 7
    (tmp_path / "model.pt").write_bytes(b"Weights")
    with pytest.raises(UserError, match="changed since"):
        checkpoint.check_final(tmp_path)
    (tmp_path / "model.pt").unlink()
    with pytest.raises(UserError, match="gone since"):
        checkpoint.check_final(tmp_path)
    signed = '{"step": 7, "files": {}}'
    for text in ("", "[]", '{"step": 7}', signed.replace("7", "Infinity"), signed.replace("{}", "[[1, 2]]")):
        (tmp_path / "final.json").write_text(text)
        with pytest.raises(UserError, match="unreadable"):
            checkpoint.check_final(tmp_path)
