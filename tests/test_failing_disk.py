"""A disk that is full, read-only or gone under a run is one line and status 1. The disks are real."""

import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
from processes import Ranks, until

from cluster import checkpoint, entry
from cluster.config import save
from cluster.distributed import World
from cluster.errors import GONE
from cluster.journal import Journal
from cluster.owner import Owner
from schematics.sheets import DataError
from schematics.store import build_store
from simclr.pretrain import SimCLRConfig, main

FLAGS = """
    --arch resnet10t --projector 16 16 --window 96 --image-size 32 --batch-size 4 --workers 0 --log-every 1
    --steps 100000 --embed-every 0 --checkpoint-every 1000 --device cpu
"""


@pytest.fixture
def disk(tmp_path):
    """Mount a small disk at a folder; where that is not allowed the test is skipped, as in `site`."""
    mounted = []

    def mount(folder, size="1m"):
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder])
        if done.returncode and os.environ.get("LINEWORK_REQUIRE_SLURM") != "1":
            pytest.skip("only root may mount a disk")
        assert done.returncode == 0
        mounted.append(folder)
        return folder

    yield mount
    for folder in reversed(mounted):
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder):
    """Leave no room on the disk of a folder."""
    with open(folder / "filler", "ab", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(1 << 12))


def make_read_only(folder):
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)


def run(work, log):
    """Status and standard error of a process that ends as every command does."""
    with Ranks(entry.live, work, logs=log) as ranks:
        (status,) = ranks.statuses()
        return status, ranks.log().splitlines()


def keep_logging(folder, full):
    """Log until the disk that is filled after 20 steps says no."""
    record = Journal(folder, World(), 10**9, every=10**9)
    for step in range(20_000):
        if step == 20:
            fill(full)
        record.record(step, loss=0.5)


def write_owner(folder):
    Owner(folder)


@pytest.mark.parametrize("spoil", [fill, make_read_only])
def test_the_owner_file_and_the_config(spoil, disk, tmp_path):
    folder = disk(tmp_path / "exp")
    spoil(folder)
    config = partial(save, SimCLRConfig(data_dir=tmp_path), folder / "config.json")
    cure = (
        "the disk is full (No space left on device)" if spoil is fill else "Read-only file system; make the "
    )
    for number, (work, name) in enumerate([(partial(write_owner, folder), "owner"), (config, "config.json")]):
        status, lines = run(work, tmp_path / str(number))
        assert status == 1 and len(lines) == 1, lines
        assert lines[0].startswith(f"error: {folder}/") and name in lines[0] and cure in lines[0], lines


def test_metrics_and_board_on_a_full_disk(disk, tmp_path):
    metrics, board = disk(tmp_path / "metrics"), disk(tmp_path / "board/tensorboard")
    (tmp_path / "elsewhere").mkdir()
    (metrics / "tensorboard").symlink_to(tmp_path / "elsewhere")
    for folder, full, file in ((metrics, metrics, "metrics.jsonl"), (board.parent, board, "tensorboard")):
        status, lines = run(partial(keep_logging, folder, full), tmp_path / file)
        assert status == 1, lines
        cure = "make the disk writable, with room, and run the command again"
        assert lines == [f"error: {folder}/{file}: No space left on device; {cure}"]


def test_metrics_and_board_on_a_read_only_disk(disk, tmp_path):
    metrics, board = disk(tmp_path / "metrics"), disk(tmp_path / "board/tensorboard")
    (metrics / "tensorboard").mkdir()
    (metrics / "metrics.jsonl").write_text('{"step": 0}\n')
    for folder, ro, file in ((metrics, metrics, "metrics.jsonl"), (board.parent, board, "tensorboard")):
        make_read_only(ro)
        status, lines = run(partial(Journal, folder, World(), 5), tmp_path / file)
        assert status == 1 and len(lines) == 1, lines
        assert (
            lines[0].startswith(f"error: {folder}/{file}") and "Read-only file system; make the" in lines[0]
        )


def test_packing_onto_a_read_only_disk_is_told_to_go_elsewhere(disk, sheets, tmp_path):
    folder = disk(tmp_path / "store")
    make_read_only(folder)
    with pytest.raises(DataError, match=r"store/s: Read-only file system; choose another folder$"):
        build_store(sheets / "unlabeled", folder / "s", side=64)


def flags(sheets, exp_dir):
    where = ["--data-dir", str(sheets / "unlabeled"), "--exp-dir", str(exp_dir)]
    return [*where, "--store-dir", str(exp_dir.parent / "windows"), *FLAGS.split()]


def lines_of(exp_dir):
    path = exp_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_pretraining_on_a_disk_that_fills_says_one_line(disk, sheets, tmp_path):
    """As a process of its own: Python closes what is open when it ends, and would tell of it too."""
    exp_dir = disk(tmp_path / "exp", "100m")
    command = [sys.executable, "-m", "simclr.pretrain", *flags(sheets, exp_dir)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: lines_of(exp_dir) > 2 or process.poll() is not None, 120)
        fill(exp_dir)
        _, told = process.communicate(timeout=120)
    assert process.returncode == 1, told
    (line,) = told.splitlines()
    assert line.startswith(f"error: {exp_dir}/") and "No space left on device; make the disk" in line
    assert checkpoint.load_newest(exp_dir / "checkpoints")[1]["step"] == 0


def pretraining(*words):
    sys.argv = ["simclr.pretrain", *words]
    entry.run(SimCLRConfig, main)


def test_a_run_whose_folder_is_removed_ends_with_one_line_and_begins_nothing_anew(sheets, tmp_path):
    exp_dir = tmp_path / "exp"
    with Ranks(pretraining, *flags(sheets, exp_dir), logs=tmp_path / "logs") as ranks:
        until(lambda: lines_of(exp_dir) > 2 or ranks.statuses(0) != [None], 120)
        shutil.rmtree(exp_dir.rename(tmp_path / "gone"))  # at once, as the run writes into it
        assert ranks.statuses(60) == [1], ranks.log()
        (line,) = ranks.errors()
    assert line.startswith(f"error: {exp_dir}/") and f": {GONE}" in line, line
    assert not exp_dir.exists()
