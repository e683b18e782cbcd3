"""Where standard error is no terminal, a long loop says now and then how far it is."""

import time

import pytest

from detection.data import SheetReader
from schematics.coco import read_split
from schematics.progress import progress
from schematics.store import build_store


def test_lines_in_a_log(capsys, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert list(progress(range(8), "validation")) == list(range(8))
    out, err = capsys.readouterr()
    assert not out
    assert err.splitlines() == [
        "validation: 2 of 8 sheets, 30 s, about 90 s to go",
        "validation: 5 of 8 sheets, 60 s, about 36 s to go",
    ]


def test_a_short_loop_and_other_ranks_say_nothing(capsys, monkeypatch):
    assert list(progress("abc", "validation")) == [*"abc"]
    monkeypatch.setattr(time, "monotonic", iter(range(0, 10000, 100)).__next__)
    assert list(progress("abc", "validation", shown=False)) == [*"abc"]
    assert capsys.readouterr() == ("", "")
    assert list(progress("abc", "validation")) == [*"abc"] and "1 of 3" in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "told"), [("0", True), ("1", False)])
def test_sheets_that_are_read_before_training_are_counted_by_rank_0(rank, told, sheets, capsys, monkeypatch):
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    reader = SheetReader(read_split(sheets / "train"), "gray")
    monkeypatch.setattr(time, "monotonic", iter(range(0, 10000, 20)).__next__)
    reader.preload()
    out, err = capsys.readouterr()
    assert not out and ("reading train: 3 of 8 sheets" in err) == told


def test_sheets_that_are_packed_are_counted(sheets, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(time, "monotonic", iter(range(0, 10000, 20)).__next__)
    build_store(sheets / "train", tmp_path / "store", side=64)
    out, err = capsys.readouterr()
    assert not out and "packing: 3 of 8 sheets" in err
