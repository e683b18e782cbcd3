"""A folder is there whole or not at all, whatever happens while it is written."""

import os
import stat

import pytest

from schematics.folders import STALE, refuse_existing, remove_stale, unfinished_folder, whole_folder
from schematics.sheets import DataError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_at_the_end_with_all_it_holds(tmp_path):
    out = tmp_path / "new parent" / "out"
    with whole_folder(out) as folder:
        assert not out.exists() and folder.parent == out.parent
        (folder / "sheet.txt").write_text("drawn")
        assert not out.exists()
    assert names(out) == ["sheet.txt"] and names(out.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, DataError, KeyboardInterrupt])
def test_any_error_leaves_nothing(tmp_path, error):
    with pytest.raises(error), whole_folder(tmp_path / "out") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "sheet.txt").write_text("half")
        raise error
    assert names(tmp_path) == []


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_permissions_are_those_of_a_plain_mkdir(tmp_path, umask):
    before = os.umask(umask)
    try:
        with whole_folder(tmp_path / "out"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask


def test_what_has_come_to_be_there_meanwhile_is_never_replaced(tmp_path):
    refused = pytest.raises(DataError, match="out: exists already; choose another folder")
    with refused, whole_folder(tmp_path / "out") as folder:
        (folder / "mine.txt").write_text("mine")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "yours.txt").write_text("yours")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["yours.txt"]
    with pytest.raises(DataError, match="exists already"), whole_folder(tmp_path / "file"):
        (tmp_path / "file").write_text("yours")
    assert (tmp_path / "file").read_text() == "yours"
    with pytest.raises(DataError, match="exists already"):
        refuse_existing(tmp_path / "file")


def test_an_unfinished_folder_of_a_killed_process_is_removed_after_a_day(tmp_path):
    out = tmp_path / "out [1]"  # brackets mean something to glob
    with (
        unfinished_folder(out) as old,
        unfinished_folder(out) as young,
        unfinished_folder(tmp_path / "b") as b,
    ):
        for folder in (old, b):
            (folder / "half.bin").touch()
            for path in (folder / "half.bin", folder):
                os.utime(path, (path.stat().st_mtime - STALE - 60,) * 2)
        remove_stale(out)
        assert not old.exists() and young.exists() and b.exists()
    assert names(tmp_path) == []
