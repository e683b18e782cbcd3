"""Packing: the same bytes whatever the number of processes, and a build that was killed goes on."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest

from schematics import sheetstore, workers
from schematics.folders import STALE
from schematics.sheets import DataError
from schematics.store import WindowStore, build_store


@pytest.fixture
def pool(tmp_path):
    """Forty sheets of a line each, every other one in color, and one that is damaged."""
    folder = tmp_path / "pool"
    folder.mkdir()
    for n in range(40):
        sheet = np.full((300, 400, 3), 250, np.uint8)
        cv2.line(sheet, (5 * n, 10), (399 - 3 * n, 290), (60, 60, 60 + 100 * (n % 2)), 2)
        (folder / f"{n:02}.png").write_bytes(cv2.imencode(".png", sheet)[1].tobytes())
    (folder / "17.png").write_bytes((folder / "17.png").read_bytes()[:-30])
    return folder


def content(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_number_of_processes_changes_no_byte(pool, tmp_path, monkeypatch):
    alone = build_store(pool, tmp_path / "one", side=128, workers=1)
    monkeypatch.setattr(workers, "WORTH", 1)
    monkeypatch.setattr(workers, "ROOM", 400_000)  # two sheets at a time
    build_store(pool, tmp_path / "three", side=128, workers=3)
    assert content(tmp_path / "one") == content(tmp_path / "three")
    assert len(alone.sheets) == 39 and "17.png" in alone.skipped[0]


def start(pool, out):
    """A build in a process of its own, that has packed some sheets and is not at its end."""
    slow = "import time, schematics.tiles as t; p = t.pack; t.pack = lambda i: (time.sleep(0.03), p(i))[1];"
    code = f"{slow} from schematics.store import build_store; build_store({str(pool)!r}, {str(out)!r}, 128)"
    build = subprocess.Popen([sys.executable, "-c", code])
    while not (journal := list(out.parent.glob(f".{out.name}.*.tmp/{sheetstore.JOURNAL}"))):
        time.sleep(0.005)
    while len(journal[0].read_bytes().splitlines()) < 8:
        time.sleep(0.005)
    return build, journal[0]


def test_a_killed_build_goes_on_and_uses_no_half_written_sheet(pool, tmp_path, monkeypatch):
    whole = content(build_store(pool, tmp_path / "whole", side=128).folder)
    out = tmp_path / "store"
    build, journal = start(pool, out)
    build.send_signal(signal.SIGKILL)
    build.wait()
    with pytest.raises(DataError, match="no whole window store"):
        WindowStore(out)
    with pytest.raises(DataError, match="no whole window store"):
        WindowStore(journal.parent)
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines) + lines[-1][:-9])  # a line of which the end is missing
    (pixels,) = journal.parent.glob("tiles-*.bin")
    with open(pixels, "r+b") as file:  # the sixth sheet did not reach the disk
        file.seek(json.loads(lines[5])["offset"] + 9)
        file.write(b"\0\0\0")
    for path in [*journal.parent.iterdir(), journal.parent]:
        os.utime(path, (time.time() - STALE - 60,) * 2)  # even after a day
    decoded = []
    read = sheetstore.tiles.pack
    monkeypatch.setattr(sheetstore.tiles, "pack", lambda image: decoded.append(1) or read(image))
    assert content(build_store(pool, out, side=128).folder) == whole
    assert len(decoded) == 39 - 5
    assert not list(tmp_path.glob(".*"))


def test_the_next_build_of_other_windows_clears_away_what_is_a_day_old(pool, tmp_path):
    build, journal = start(pool, tmp_path / "store")
    build.send_signal(signal.SIGKILL)
    build.wait()
    build_store(pool, tmp_path / "store", side=64)
    assert journal.exists()
    for path in [*journal.parent.iterdir(), journal.parent]:
        os.utime(path, (0, 0))
    build_store(pool, tmp_path / "store", side=96)
    assert not journal.parent.exists()


def test_a_process_that_is_killed_is_a_line_that_names_its_sheet(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "WORTH", 1)
    with pytest.raises(DataError, match=r"02: the process that read it was killed; give it more memory"):
        list(workers.in_order(die_at_two, ["01", "02"], [1, 1], 2))
    with pytest.raises(ValueError, match="of ours"):
        list(workers.in_order(fail, ["01", "02"], [1, 1], 2))


def die_at_two(job):
    if job == "02":
        os.kill(os.getpid(), signal.SIGKILL)
    return job


def fail(job):
    raise ValueError("a bug of ours")
