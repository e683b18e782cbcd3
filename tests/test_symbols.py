"""Every labelled symbol is cut out pixel for pixel into OUT/split/class/."""

import json

import cv2
import numpy as np
import pytest

from schematics.coco import Category, write_split
from schematics.sheets import DataError, read_sheet
from schematics.symbols import cut_symbols


@pytest.fixture
def data(tmp_path):
    """One sheet of random colors in train, a gray one in val; class names that no file system likes."""
    rng = np.random.default_rng(0)
    categories = [Category(1, "valve"), Category(2, "a/b"), Category(3, "A:B"), Category(4, "..")]
    for split, shape in (("train", (80, 100, 3)), ("val", (80, 100))):
        (tmp_path / "data" / split / "images").mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "data" / split / "images/1.png"), rng.integers(0, 256, shape, np.uint8))
        rows = [
            {"image_id": 1, "category_id": 1, "bbox": [10.4, 20, 30, 15.2]},
            {"image_id": 1, "category_id": 2, "bbox": [90, 70, 10, 10]},
            {"image_id": 1, "category_id": 3, "bbox": [0, 0, 5, 5]},
            {"image_id": 1, "category_id": 4, "bbox": [50, 50, 5, 5]},
            {"image_id": 1, "category_id": 1, "bbox": [40, 40, 20, 20], "iscrowd": 1},
        ]
        images = [{"id": 1, "file_name": "images/1.png", "width": 100, "height": 80}]
        write_split(tmp_path / "data" / split, images, categories, rows)
    return tmp_path / "data"


def test_symbols_are_cut_pixel_for_pixel(tmp_path, data):
    counts = cut_symbols(data, tmp_path / "out")
    assert counts["train", "valve"] == 1 and sum(counts.values()) == 8  # the crowd box is no symbol
    files = {path.relative_to(tmp_path / "out").as_posix() for path in tmp_path.glob("out/**/*.png")}
    names = {"valve/images_1_1.png", "a_b_2/images_1_2.png", "A_B_3/images_1_3.png", "_4/images_1_4.png"}
    assert files == {f"{split}/{name}" for split in ("train", "valid") for name in names}
    for split, home in (("train", "train"), ("val", "valid")):
        image = read_sheet(data / split / "images/1.png")
        symbol = read_sheet(tmp_path / "out" / home / "valve/images_1_1.png")
        np.testing.assert_array_equal(symbol, image[20:36, 10:41])
        corner = read_sheet(tmp_path / "out" / home / "a_b_2/images_1_2.png")
        np.testing.assert_array_equal(corner, image[70:, 90:])


def test_a_margin_shows_the_surroundings_and_ends_at_the_edge(tmp_path, data):
    cut_symbols(data / "train", tmp_path / "out", margin=0.5)
    image = read_sheet(data / "train/images/1.png")
    corner = read_sheet(tmp_path / "out/train/a_b_2/images_1_2.png")
    np.testing.assert_array_equal(corner, image[65:, 85:])


def test_nothing_is_written_over_or_left_half_done(tmp_path, data):
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="exists already"):
        cut_symbols(data, tmp_path / "out")
    sheet = data / "val/images/1.png"
    content = bytearray(sheet.read_bytes())
    content[len(content) // 2] ^= 255
    sheet.write_bytes(content)
    with pytest.raises(DataError, match=r"1\.png"):
        cut_symbols(data, tmp_path / "new")
    with pytest.raises(DataError, match="no train"):
        cut_symbols(tmp_path, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out"]


def test_a_class_without_a_symbol_in_a_split_has_no_folder_there(tmp_path, data):
    annotations = data / "val/_annotations.coco.json"
    document = json.loads(annotations.read_text())
    document["annotations"] = [row for row in document["annotations"] if row["category_id"] != 1]
    annotations.write_text(json.dumps(document))
    cut_symbols(data, tmp_path / "out")
    assert {folder.name for folder in (tmp_path / "out/valid").iterdir()} == {"a_b_2", "A_B_3", "_4"}
    assert (tmp_path / "out/train/valve").is_dir()
