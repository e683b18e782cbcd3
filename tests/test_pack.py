"""The store: same pixels as the sheets, built whole or not at all, reused when nothing changed."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from multiprocessing import get_context
from threading import Thread

import cv2
import numpy as np
import pytest

from schematics import sheetstore
from schematics.drafting import draw_sheet
from schematics.folders import resumable_folder
from schematics.sheets import DataError
from schematics.store import WindowStore, build_store
from schematics.windows import cut, ink_windows


@pytest.fixture
def pool(tmp_path):
    """Four sheets: gray, dark in color, small, and blank."""
    folder = tmp_path / "pool with ünïcode"
    folder.mkdir()
    gray = draw_sheet(0, 0, 700, 400)[0]
    color = np.full((300, 500, 3), (50, 30, 20), np.uint8)
    color[100:103, 20:480] = (60, 60, 220)
    small = np.full((90, 120), 250, np.uint8)
    small[40:44, 10:110] = 0
    for name, image in [("a", gray), ("b", color), ("c", small), ("d", np.full((600, 600), 255, np.uint8))]:
        (folder / f"{name}.png").write_bytes(cv2.imencode(".png", image)[1].tobytes())
    return folder


def test_windows_are_those_of_the_decoded_sheets(pool, tmp_path):
    store = build_store(pool, tmp_path / "store", side=128)
    gray, color = draw_sheet(0, 0, 700, 400)[0], cv2.imread(str(pool / "b.png"))[..., ::-1]
    want = [cut(gray, x, y, 128) for x, y in ink_windows(gray, 128, 64, 0.002)]
    want += [
        cut(np.ascontiguousarray(color), x, y, 128) for x, y in ink_windows(color.copy(), 128, 64, 0.002)
    ]
    assert len(store) == len(want) + 1 and not store.skipped
    for i, window in enumerate(want):
        np.testing.assert_array_equal(store.window(i), window)
    last = store.window(len(store) - 1)  # the small sheet, padded with its own paper
    assert last.shape == (128, 128) and (last[90:] == 250).all() and (last[40:44, 10:110] == 0).all()
    assert store.source(len(store) - 1).endswith("c.png @0,0")
    assert len(store.sheet_names) == 4 and store.color_mode == "rgb"
    last[:] = 0  # a copy: the store is not touched
    assert store.window(len(store) - 1).max() == 250


def test_mean_and_std_are_those_of_the_windows(pool, tmp_path):
    store = build_store(pool, tmp_path / "rgb", side=128)
    stack = np.stack(
        [w if w.ndim == 3 else np.stack([w] * 3, 2) for w in map(store.window, range(len(store)))]
    )
    np.testing.assert_allclose(store.mean, stack.mean(axis=(0, 1, 2)) / 255, atol=1e-6)
    np.testing.assert_allclose(store.std, stack.std(axis=(0, 1, 2)) / 255, atol=1e-6)
    gray = build_store(pool, tmp_path / "gray", side=128, color_mode="gray")
    assert gray.color_mode == "gray" and len(set(gray.mean)) == len(set(gray.std)) == 1
    assert all(gray.window(i).ndim == 2 for i in range(len(gray)))


def test_a_pool_without_color_is_gray(pool, tmp_path):
    (pool / "b.png").unlink()
    assert build_store(pool, tmp_path / "store", side=128).color_mode == "gray"


def built(store):
    return os.stat(store.folder / "index.json").st_mtime_ns


def test_a_matching_store_is_reused_and_any_change_builds_anew(pool, tmp_path):
    out = tmp_path / "store"
    first = build_store(pool, out, side=128)
    before = built(first)
    assert built(build_store(str(pool), out, side=128)) == before
    assert built(build_store(pool, out, side=128, min_ink=0.01)) != before
    assert built(build_store(pool, out, side=128, stride=32)) != before
    second = build_store(pool, out, side=128)
    os.utime(pool / "a.png", ns=(0, 0))
    third = build_store(pool, out, side=128)
    assert third.index["key"] != second.index["key"]
    (pool / "a.png").unlink()
    assert len(build_store(pool, out, side=128).sheet_names) == 3
    assert [path.name for path in tmp_path.iterdir() if path != pool] == ["store"]  # nothing left behind


def test_a_store_replaced_under_a_reader_is_an_error_not_other_pixels(pool, tmp_path):
    old = build_store(pool, tmp_path / "store", side=128)
    build_store(pool, tmp_path / "store", side=64)
    with pytest.raises(DataError, match="rebuilt"):
        old.window(0)


def test_a_store_travels_to_workers_without_its_map(pool, tmp_path):
    store = build_store(pool, tmp_path / "store", side=128)
    expected = store.window(3)
    packed = pickle.dumps(store)
    assert len(packed) < 100_000
    with get_context("fork").Pool(2) as workers:
        for window in workers.map(pickle.loads(packed).window, [3] * 4):
            np.testing.assert_array_equal(window, expected)


def test_two_builders_at_once_leave_one_whole_store(pool, tmp_path):
    out = tmp_path / "store"
    build_store(pool, out, side=64)  # a stale one, to be replaced by both
    context = get_context("fork")
    workers = [context.Process(target=build_store, args=(pool, out, 128)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert build_store(pool, out, side=128).window(0).shape == (128, 128)
    assert [path.name for path in tmp_path.iterdir() if path != pool] == ["store"]


def test_a_shared_store_is_built_by_one_and_has_its_own_folder_by_content(pool, tmp_path):
    out = tmp_path / "stores"
    store = build_store(pool, out, side=128, shared=True)
    other = build_store(pool, out, side=64, shared=True)
    assert other.folder != store.folder and store.window(0).shape == (128, 128)
    (pool / "new.png").write_bytes((pool / "d.png").read_bytes())
    assert build_store(pool, out, side=128, shared=True).folder not in (store.folder, other.folder)
    (pool / "new.png").unlink()
    shutil.rmtree(store.folder)
    with resumable_folder(store.folder, store.index["key"]):
        waiting = Thread(target=build_store, args=(pool, out, 128), kwargs={"shared": True})
        waiting.start()
        waiting.join(1)
        assert waiting.is_alive(), "it waits for the one that builds"
        build_store(pool, tmp_path / "elsewhere", side=128)
        os.rename(tmp_path / "elsewhere", store.folder)
        built = (store.folder / "index.json").stat().st_mtime_ns
    waiting.join()
    assert (store.folder / "index.json").stat().st_mtime_ns == built
    assert not list(out.glob(".*")), "nothing is left of the waiting"


@pytest.mark.parametrize("damage", ["tiles", "index.json", "windows.npy"])
def test_a_damaged_store_is_built_anew(pool, tmp_path, damage):
    store = build_store(pool, tmp_path / "store", side=128)
    (file,) = (path for path in store.folder.iterdir() if path.name.startswith(damage))
    for content in (b"", file.read_bytes()[:-100]):
        file.write_bytes(content)
        with pytest.raises(DataError, match="no whole window store"):
            WindowStore(store.folder)
    assert build_store(pool, tmp_path / "store", side=128).window(0).shape == (128, 128)


def test_unreadable_sheets_are_listed_and_skipped(pool, tmp_path):
    whole = (pool / "a.png").read_bytes()
    (pool / "broken.png").write_bytes(whole[: len(whole) // 2])
    store = build_store(pool, tmp_path / "store", side=128)
    assert len(store.sheet_names) == 4
    (line,) = store.skipped
    assert "broken.png" in line and "\n" not in line


def test_bad_pools_end_in_one_line_and_write_nothing(pool, tmp_path, monkeypatch):
    out = tmp_path / "store"

    def refused(match, folder=pool, **options):
        with pytest.raises(DataError, match=match) as error:
            build_store(folder, out, **options)
        assert "\n" not in str(error.value)
        assert [path.name for path in tmp_path.iterdir()] == [pool.name]

    refused("--min-ink", min_ink=0.9)
    refused("--color-mode", color_mode="cmyk")
    refused("at least 1", side=0)
    monkeypatch.setattr(sheetstore, "MARGIN", 1 << 60)
    refused("MB are free")
    monkeypatch.undo()
    for path in pool.iterdir():
        path.write_bytes(b"not a picture")
    refused("none of 4 sheets can be read")


def test_a_folder_of_someone_elses_is_never_replaced(pool, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="no window store"):
        build_store(pool, tmp_path / "mine", side=128)
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"


def test_uneven_sheets_are_noted(pool, tmp_path):
    shaded = (draw_sheet(0, 1, 700, 400)[0] * np.linspace(0.3, 1, 700)).astype(np.uint8)
    cv2.imwrite(str(pool / "e.png"), shaded)
    store = build_store(pool, tmp_path / "store", side=128)
    noted = {store.source(i).split(" @")[0][-5:]: store.tolerance(i) for i in range(len(store))}
    assert noted.pop("e.png") >= 40 and set(noted.values()) == {None} and 1 < store.line < 4


def test_a_store_of_before_tiles_is_used_as_it_is(pool, tmp_path):
    store = build_store(pool, tmp_path / "store", side=128)
    expected = [store.window(i) for i in range(len(store))]
    index = {
        name: store.index[name] for name in ("key", "parameters", "color_mode", "mean", "std", "skipped")
    }
    pixels, index["sheets"] = b"", []
    for number, entry in enumerate(store.sheets):
        kept = {name: entry[name] for name in ("name", "shape", "paper", "blank")}
        index["sheets"].append({**kept, "offset": len(pixels)})
        pixels += store.sheet(number).tobytes()
    sheetstore.pixel_file(store.folder, store.index).unlink()
    (store.folder / f"sheets-{index['key'][:16]}.bin").write_bytes(pixels)
    (store.folder / "index.json").write_text(json.dumps({**index, "bytes": len(pixels)}))
    before = (store.folder / "index.json").stat()
    older = build_store(pool, tmp_path / "store", side=128)
    assert (store.folder / "index.json").stat() == before  # not built anew
    assert older.line is None and {older.tolerance(i) for i in range(len(older))} == {None}
    assert not older.verify()
    for i, window in enumerate(expected):
        np.testing.assert_array_equal(older.window(i), window)
    (store.folder / "windows.npy").write_bytes(b"")
    with pytest.raises(DataError, match="no whole window store"):
        WindowStore(store.folder)


def test_command_prints_a_summary(pool, tmp_path):
    command = [sys.executable, "-m", "schematics.pack", str(pool), str(tmp_path / "s"), "--side", "128"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "4 sheets" in done.stdout and "rgb windows of 128 px" in done.stdout and "MB" in done.stdout


def test_command_verifies_a_store(pool, tmp_path):
    store = build_store(pool, tmp_path / "s", side=128)
    command = [sys.executable, "-m", "schematics.pack", "--verify", str(store.folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "4 sheets" in done.stdout and "as they were packed" in done.stdout
    file = sheetstore.pixel_file(store.folder, store.index)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "is damaged; delete this folder" in done.stderr
    assert len(done.stderr.splitlines()) == 1
