"""Packed sheets: every pixel as it was, whatever the sheet, and no byte changes unseen."""

import json

import cv2
import numpy as np
import pytest

from schematics import sheetstore, tiles
from schematics.drafting import draw_sheet
from schematics.sheets import DataError
from schematics.store import WindowStore, build_store
from schematics.windows import cut

RNG = np.random.default_rng(0)
DRAWN = draw_sheet(0, 0, 700, 400)[0]
SHEETS = {
    "drawn": DRAWN,
    "in color": np.dstack([DRAWN, DRAWN, 255 - DRAWN]),
    "noise": RNG.integers(0, 256, (300, 270, 3), np.uint8),
    "gray noise": RNG.integers(0, 256, (257, 256), np.uint8),
    "one color": np.full((300, 600, 3), (9, 8, 7), np.uint8),
    "a pixel": np.full((1, 1), 3, np.uint8),
    "three pixels": np.array([[1, 2, 3]], np.uint8),
    "a column": RNG.integers(0, 256, (700, 1, 3), np.uint8),
}


@pytest.mark.parametrize("image", SHEETS.values(), ids=SHEETS)
def test_windows_of_a_packed_sheet_are_those_of_the_sheet(image):
    data, sha256 = tiles.pack(image)
    sheet = tiles.PackedSheet(memoryview(data), image.shape, sha256, "")
    np.testing.assert_array_equal(sheet.whole(), image)
    paper = 7 if image.ndim == 2 else (7, 6, 5)
    height, width = image.shape[:2]
    for side in (1, 100, 256, 513):
        for x, y in RNG.integers((-side - 5, -side - 5), (width + 5, height + 5), (12, 2)).tolist():
            np.testing.assert_array_equal(sheet.cut(x, y, side, paper), cut(image, x, y, side, paper))


def test_drawings_take_less_than_as_png():
    for image in (SHEETS["drawn"], SHEETS["in color"]):
        assert len(tiles.pack(image)[0]) < 1.5 * len(cv2.imencode(".png", image)[1])
    assert len(tiles.pack(SHEETS["one color"])[0]) == 6 * 15  # bytes: the table, and a color a tile


def test_no_byte_of_a_packed_sheet_changes_unseen():
    image = SHEETS["drawn"][:200, :300]
    data, sha256 = tiles.pack(image)
    for place in [*range(24), *range(24, len(data), 97), len(data) - 1]:
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(DataError, match="told"):
            tiles.PackedSheet(memoryview(damaged), image.shape, sha256, "told").verify()


@pytest.fixture
def store(tmp_path):
    for name in ("drawn", "in color"):
        tmp_path.joinpath("pool").mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / "pool" / f"{name}.png"), SHEETS[name])
    return build_store(tmp_path / "pool", tmp_path / "store", side=128)


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def test_a_changed_pixel_is_an_error_where_it_is_read_and_names_store_and_cure(store):
    file = sheetstore.pixel_file(store.folder, store.index)
    flip(file, store.sheets[1]["offset"] + store.sheets[1]["bytes"] - 1)  # in the last tile of the second
    again = WindowStore(store.folder)
    np.testing.assert_array_equal(again.window(0), store.window(0))
    said = "store: its copy of .*in color.png is damaged; delete this folder"
    with pytest.raises(DataError, match=said):
        again.window(len(again) - 1)
    with pytest.raises(DataError, match=said):
        again.sheet(1)
    with pytest.raises(DataError, match=said):
        again.verify()


def test_windows_of_a_pool_that_fits_into_memory_are_the_same(store, monkeypatch):
    kept = WindowStore(store.folder).preload()
    expected = [store.window(i) for i in range(len(store))]
    monkeypatch.setattr(sheetstore, "KEEP", 700 * 400 * 4 - 1)
    large = WindowStore(store.folder).preload()
    sheetstore.pixel_file(store.folder, store.index).rename(store.folder / "away")
    with pytest.raises(ValueError, match="read-only"):  # what is kept is not touched
        kept.window(0)[:] = 0
    for i, window in enumerate(expected):
        np.testing.assert_array_equal(kept.window(i), window)
    with pytest.raises(DataError, match="removed or rebuilt"):
        large.window(0)


@pytest.mark.parametrize("name", ["index.json", "windows.npy"])
def test_a_changed_byte_of_a_small_file_is_no_whole_store_and_built_anew(store, tmp_path, name):
    expected = [store.window(i) for i in range(len(store))]
    path = store.folder / name
    size = path.stat().st_size
    for place in (size // 3, size // 2, size - 2):
        flip(path, place)
        with pytest.raises(DataError, match="no whole window store; build one"):
            WindowStore(store.folder)
        flip(path, place)
    assert WindowStore(store.folder).verify()
    flip(path, size // 2)
    anew = build_store(tmp_path / "pool", tmp_path / "store", side=128)
    for i, window in enumerate(expected):
        np.testing.assert_array_equal(anew.window(i), window)


def test_an_index_that_lies_about_its_hash_is_no_whole_store(store):
    index = json.loads((store.folder / "index.json").read_text())
    for change in ({"layout": 3}, {"sha256": 0}, {"mean": [0, 0, 0]}, {"files": {}}):
        (store.folder / "index.json").write_text(json.dumps({**index, **change}))
        with pytest.raises(DataError, match="no whole window store"):
            WindowStore(store.folder)
