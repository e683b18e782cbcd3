"""Labelled sheets as other tools leave them: names, classes, sizes and layouts that don't quite fit.

Each is read right, or refused by name. The inputs are in tests/cases/ where they aren't made here.
"""

import json
import os
import shutil
import sys
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pytest
from coco_documents import box, document, write
from PIL import Image

from schematics.coco import (
    Category,
    find_split,
    find_splits,
    inspect_split,
    losses,
    read_split,
    to_coco,
    write_split,
)
from schematics.sheets import DataError, read_sheet
from schematics.windows import ink_mask

CASES = Path(__file__).parent / "cases"


def said(split) -> set[tuple[str, str]]:
    return {(finding.action, finding.kind) for finding in split.findings}


def named(*names: str, **changes) -> dict:
    """A document with a box on each of the images of these names, 100 x 80 px."""
    images = [{"id": n, "file_name": name, "width": 100, "height": 80} for n, name in enumerate(names, 1)]
    rows = [{**box(n, image=n), "area": 600, "iscrowd": 0} for n in range(1, len(names) + 1)]
    return document(images=images, annotations=rows, **changes)


def all_on_ink(split) -> bool:
    """Whether each box of a split holds ink."""
    for sheet in split.sheets:
        ink = ink_mask(read_sheet(sheet.file))
        for x0, y0, x1, y1 in sheet.boxes.round().astype(int):
            if not ink[y0:y1, x0:x1].any():
                return False
    return True


def test_two_rows_that_would_share_a_file_are_both_dropped_by_name():
    split = inspect_split(CASES / "01-two-rows-one-file/input/train")
    assert split.sheets == []
    lost = {f.where for f in split.findings if f.action == "dropped" and f.kind.startswith("image")}
    assert lost == {"jobA/1.png", "jobB/1.png"}
    why = r"no usable box on any usable sheet: dropped 2 x image has no file but one .*\(jobA/1\.png\)"
    with pytest.raises(DataError, match=why):
        read_split(CASES / "01-two-rows-one-file/input/train")


@pytest.mark.parametrize("names", [("images/1.png", "jobA/1.png"), ("2.png", "other/2.PNG")])
def test_a_file_that_one_row_names_is_no_other_row_s(tmp_path, names):
    folder = write(tmp_path / "train", named(*names))
    (folder / "images").mkdir()
    (folder / "1.png").rename(folder / "images/1.png")
    split = read_split(folder)
    assert [sheet.file_name for sheet in split.sheets] == [names[0]]
    assert ("dropped", "image named but missing") in said(split)


def test_two_rows_that_name_one_file_by_two_paths_are_dropped(tmp_path):
    folder = write(tmp_path / "train", named("images/1.png", "1.png", "2.png"))
    (folder / "images").mkdir()
    (folder / "1.png").rename(folder / "images/1.png")
    split = read_split(folder)
    assert [sheet.file_name for sheet in split.sheets] == ["2.png"]
    assert losses(split).startswith("train: 2 boxes and 2 sheets dropped;")


@pytest.mark.parametrize("image_id", [2, 1])
def test_one_name_with_two_sizes_is_fatal(tmp_path, image_id):
    with pytest.raises(DataError, match=r"frame_000066\.png: image listed with two sizes, 300 x 200 and 600"):
        read_split(CASES / "02-one-name-two-sizes/input/train")
    content = named("1.png")
    content["images"].append({"id": image_id, "file_name": "./1.png", "width": 50, "height": 40})
    with pytest.raises(DataError, match="two sizes, 100 x 80 and 50 x 40"):
        read_split(write(tmp_path / "train", content))


def test_a_class_with_other_ids_in_another_split_is_one_class():
    splits = {
        path.name: read_split(path) for path in find_splits(CASES / "03-class-ids-differ-by-split/input")
    }
    assert splits["train"].categories == [Category(1, "symbol")] and splits["train"].findings == []
    assert splits["valid"].categories == [Category(0, "symbol")]
    assert said(splits["valid"]) == {
        ("repaired", "class 'symbol' has id 0 here and 1 in train: matched by name")
    }
    assert {row["category_id"] for row in to_coco(splits["valid"])["annotations"]} == {0}
    assert splits["valid"].sheets[0].labels.tolist() == [1] * 4


def categories(*pairs: tuple[int, str]) -> list[dict]:
    return [{"id": number, "name": name} for number, name in pairs]


def test_ids_that_are_shuffled_between_splits_give_one_order_of_labels(tmp_path):
    """Whichever split is read, label k has the same name, and each box goes out under its own file's id."""
    listed = {
        "train": [(1, "valve"), (2, "pump")],
        "valid": [(2, "valve"), (1, "pump"), (3, "fan")],
        "test": [(1, "pump"), (7, unicodedata.normalize("NFD", "Kühler"))],
    }
    for name, pairs in listed.items():
        content = document(annotations=[], categories=categories(*pairs))
        for n, (number, _) in enumerate(pairs, 1):
            content["annotations"].append({**box(n, category=number), "area": 600, "iscrowd": 0})
        write(tmp_path / name, content)
    splits = {path.name: read_split(path) for path in find_splits(tmp_path)}
    order = ["valve", "pump", "fan", "Kühler"]
    for name, split in splits.items():
        assert [category.name for category in split.categories] == order
        ids = [category.id for category in split.categories]
        assert len(set(ids)) == 4
        boxes = {row["category_id"]: row["id"] for row in to_coco(split)["annotations"]}
        assert boxes == {number: n for n, (number, _) in enumerate(listed[name], 1)}
        labels = dict(zip(split.sheets[0].annotation_ids.tolist(), split.sheets[0].labels, strict=True))
        want = {
            n: 1 + order.index(unicodedata.normalize("NFC", text))
            for n, (_, text) in enumerate(listed[name], 1)
        }
        assert labels == want


def test_one_name_under_two_ids_of_a_file_is_one_class(tmp_path):
    content = document(categories=categories((1, "valve"), (2, "pump"), (4, "valve")))
    content["annotations"][2]["category_id"] = 4
    content["annotations"].append({**box(4, category=4), "area": 600, "iscrowd": 0})  # box 1 again
    split = read_split(write(tmp_path / "train", content))
    assert split.categories == [Category(1, "valve"), Category(2, "pump")]
    assert said(split) == {
        ("repaired", "class name 'valve' stands under ids 1, 4: one class"),
        ("dropped", "box listed twice"),
    }
    assert [sheet.labels.tolist() for sheet in split.sheets] == [[1, 2], [1]]
    assert {row["category_id"] for row in to_coco(split)["annotations"]} == {1, 2}


def test_names_that_differ_in_case_only_are_said(tmp_path):
    content = document(categories=categories((1, "valve"), (2, "Valve")))
    split = read_split(write(tmp_path / "train", content))
    assert said(split) == {("kept", "classes 'valve' and 'Valve' differ in case only: kept apart")}


@pytest.mark.parametrize("dense", [False, True])
def test_boxes_of_a_stretched_sheet_are_scaled_where_the_ink_shows_it(tmp_path, dense):
    shutil.copytree(CASES / "05-stretched-since-labelled/input", tmp_path / "data")
    path = tmp_path / "data/train/a.png"
    if dense:
        image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        image[::4] = 0
        cv2.imwrite(str(path), image)
    split = read_split(path.parent)
    assert len(split.sheets[0].boxes) == 6 and all_on_ink(split)
    np.testing.assert_allclose(split.sheets[0].xywh[0], [250 / 2, 219 / 1.5, 24 / 2, 24 / 1.5])
    assert losses(split).startswith("train: 1 sheet repaired;")


@pytest.mark.parametrize("how", ["noise", "padded", "two boxes"])
def test_a_sheet_of_another_shape_is_refused_where_the_ink_does_not_show_how(tmp_path, how):
    shutil.copytree(CASES / "05-stretched-since-labelled/input", tmp_path / "data")
    folder = tmp_path / "data/train"
    image = cv2.imread(str(folder / "a.png"), cv2.IMREAD_GRAYSCALE)
    content = json.loads((folder / "_annotations.coco.json").read_text())
    if how == "noise":
        image = np.random.default_rng(1).integers(0, 256, image.shape, np.uint8)
    elif how == "padded":  # the boxes as scaled along each axis miss the symbols
        image = np.pad(cv2.resize(image, (400, 300)), ((150, 0), (0, 60)), constant_values=255)
    else:
        del content["annotations"][2:]
    cv2.imwrite(str(folder / "a.png"), image)
    (folder / "_annotations.coco.json").write_text(json.dumps(content))
    split = inspect_split(folder)
    assert split.sheets == []
    assert any(
        f.where == "a.png" and f.action == "dropped" and "another shape" in f.kind for f in split.findings
    )


def test_swapped_sides_are_swapped_back_where_the_boxes_show_it(tmp_path):
    case = CASES / "10-exif-and-swapped-sides/swapped"
    split = read_split(case / "train")
    assert len(split.sheets[0].boxes) == 6 and all_on_ink(split)
    assert said(split) == {
        ("repaired", "image labelled at 300 x 400 px, the file has 400 x 300: sides swapped")
    }
    shutil.copytree(case, tmp_path / "data")  # the same with the picture turned: then the boxes are off
    path = tmp_path / "data/train/a.png"
    content = json.loads((tmp_path / "data/train/_annotations.coco.json").read_text())
    content["images"][0].update(width=400, height=300)
    (tmp_path / "data/train/_annotations.coco.json").write_text(json.dumps(content))
    cv2.imwrite(str(path), cv2.rotate(cv2.imread(str(path)), cv2.ROTATE_90_CLOCKWISE))
    with pytest.raises(DataError, match=r"turned \(by EXIF\?\) or its sides swapped.*a\.png"):
        read_split(tmp_path / "data/train")


@pytest.mark.parametrize("case", ["exif-180", "exif-90-square"])
def test_an_exif_turn_that_the_size_does_not_show_is_said(case):
    split = read_split(CASES / "10-exif-and-swapped-sides" / case / "train")
    assert said(split) == {("kept", "image carries an EXIF turn: look at its boxes")}


@pytest.mark.parametrize("bbox", [None, [], [0, 0, 0, 0], [float("nan")] * 4])
def test_a_box_is_taken_from_its_outline(tmp_path, bbox):
    split = read_split(CASES / "11-polygons-without-bbox/input/train")
    assert [len(sheet.boxes) for sheet in split.sheets] == [4, 4, 4] and all_on_ink(split)
    content = named("1.png")
    content["annotations"][0].update(bbox=bbox, segmentation=[[5, 6, 9, 6, 9, 20], [30, 8, 31, 8, 31, 9]])
    split = read_split(write(tmp_path / "train", content))
    assert split.sheets[0].boxes.tolist() == [[5, 6, 31, 20]] and split.sheets[0].area.tolist() == [600]
    assert said(split) == {("repaired", "box missing: taken from its outline")}


def test_a_box_drawn_backwards_is_turned_about(tmp_path):
    split = read_split(CASES / "18-negative-sides/input/train")
    assert len(split.sheets[0].boxes) == 6 and all_on_ink(split)
    assert said(split) == {("repaired", "box drawn backwards: turned about")}
    content = named("1.png")
    content["annotations"][0]["bbox"] = [30, 10, -20, 5]
    assert read_split(write(tmp_path / "train", content)).sheets[0].boxes.tolist() == [[10, 10, 30, 15]]


NAMES = {  # as listed -> as it is on disk
    unicodedata.normalize("NFC", "Übersicht é.png"): unicodedata.normalize("NFD", "Übersicht é.png"),
    "Plan.PNG": "plan.png",
    "P%26ID%20200.png": "P&ID 200.png",
    "/data/local-files/?d=images/a b.png": "images/a b.png",
    "C:\\Users\\me\\sheets\\a.png": "a.png",
    "/home/me/jobA/a.png": "jobA/a.png",
}


@pytest.mark.parametrize("listed", NAMES)
def test_a_name_in_another_form_is_found_where_one_file_fits_and_said(tmp_path, listed):
    folder = write(tmp_path / "train", named(listed), sheets=1)
    file = folder / NAMES[listed]
    file.parent.mkdir(exist_ok=True)
    (folder / "1.png").rename(file)
    split = read_split(folder)
    assert split.sheets[0].path == file and split.sheets[0].file_name == listed
    ((action, kind),) = said(split)
    assert action == "repaired" and kind.startswith("image found ")
    if file.parent == folder:
        other = file.with_name(file.name.upper())
        shutil.copy(file, other)
        assert ("dropped", "image named but missing, and 2 files fit") in said(inspect_split(folder))


def test_labels_on_pages_are_read_from_their_pages(tmp_path):
    (tmp_path / "train").mkdir()
    pages = [Image.fromarray(np.full((80, 100), level, np.uint8)) for level in (250, 60)]
    pages[0].save(tmp_path / "train/scan.tif", save_all=True, append_images=pages[1:])
    pages[1].save(tmp_path / "train/plan.pdf", resolution=200)
    content = named(
        "scan.tif#page=1", "scan.tif#page=2", "plan.pdf#page=1", "plan.pdf#page=2", "scan.tif#page=0"
    )
    (tmp_path / "train/predictions.json").write_text(json.dumps(content))
    split = read_split(tmp_path / "train")
    assert [sheet.page for sheet in split.sheets] == [1, 2, 1]
    assert [int(read_sheet(sheet.file).mean() > 128) for sheet in split.sheets] == [1, 0, 0]
    assert [sheet["file_name"] for sheet in to_coco(split)["images"]][:2] == [
        "scan.tif#page=1",
        "scan.tif#page=2",
    ]
    lost = {f.where for f in split.findings if f.action == "dropped" and f.kind.startswith("image")}
    assert lost == {"plan.pdf#page=2", "scan.tif#page=0"}


def test_files_outside_the_folder_are_said_or_not_opened(tmp_path):
    elsewhere = write(tmp_path / "elsewhere", named("1.png"))
    absolute = (elsewhere / "2.png").as_posix()
    folder = write(
        tmp_path / "data/train", named("../../elsewhere/1.png", absolute, "link.png", "1.png"), sheets=1
    )
    os.symlink(elsewhere / "1.png", folder / "link.png")
    split = read_split(folder)
    assert [sheet.file_name for sheet in split.sheets] == ["../../elsewhere/1.png", "link.png", "1.png"]
    assert {(f.where, f.kind) for f in split.findings if not f.kind.startswith("box")} == {
        ("../../elsewhere/1.png", "image outside data/: read all the same"),
        ("link.png", "image outside data/: read all the same"),
        (absolute, "image named but missing"),
    }
    (folder / "_annotations.coco.json").write_text(json.dumps(named("../images/1.png")))  # within DATA
    (tmp_path / "data/images").mkdir()
    (folder / "1.png").rename(tmp_path / "data/images/1.png")
    assert read_split(folder).findings == []
    os.symlink(elsewhere, tmp_path / "data/valid")  # folders may be links, as those of a set on a larger disk
    assert read_split(tmp_path / "data/valid").findings == []


LAYOUTS = {  # annotation file, folder of the sheets
    "COCO": ("annotations/instances_{}2017.json", "{}2017"),
    "CVAT": ("annotations/instances_{}.json", "images/{}"),
    "shared folder": ("annotations/{}.json", "images"),
    "beside": ("{}.json", "images"),
    "other names": ("{}ing/labels.json", "{}ing"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_other_tools(tmp_path, layout):
    for name, number in (("train", 1), ("val", 2)):
        if layout == "other names" and name == "val":
            file, folder = tmp_path / "Validation/labels.json", tmp_path / "Validation"
        else:
            file, folder = (tmp_path / place.format(name) for place in LAYOUTS[layout])
        folder.mkdir(parents=True, exist_ok=True)
        file.parent.mkdir(exist_ok=True)
        content = named(f"{number}.png", categories=categories((number, "valve")))
        content["annotations"][0]["category_id"] = number
        file.write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
        cv2.imwrite(str(folder / f"{number}.png"), np.full((80, 100), 255, np.uint8))
    train, valid = (read_split(find_split(tmp_path, name)) for name in ("train", "valid"))
    assert [read_split(place).name for place in find_splits(tmp_path)] == ["train", "valid"]
    assert [sheet.file_name for split in (train, valid) for sheet in split.sheets] == ["1.png", "2.png"]
    assert (train.categories, valid.categories) == ([Category(1, "valve")], [Category(2, "valve")])
    assert said(train) == set() and {action for action, _ in said(valid)} == {"repaired"}
    with pytest.raises(DataError, match=r"no test/_annotations.* schematics\.convert .* OUT --test 0\.2"):
        find_split(tmp_path, "test")


def test_a_lone_export_of_cvat(tmp_path):
    write(tmp_path / "images", document())
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images/_annotations.coco.json").rename(tmp_path / "annotations/instances_default.json")
    (place,) = find_splits(tmp_path)
    split = read_split(place)
    assert (split.name, split.folder, len(split.sheets)) == ("default", tmp_path / "images", 2)
    (tmp_path / "annotations/instances_default.json").write_text("{")
    with pytest.raises(DataError, match=r"annotations/instances_default\.json: not valid JSON"):
        read_split(place)


@pytest.mark.parametrize(("deep", "word"), [("[" * 100_000, "deeply"), ('{"images":' * 50_000, "deeply")])
def test_a_deeply_nested_file_is_one_line(tmp_path, deep, word):
    (tmp_path / "_annotations.coco.json").write_text(deep)
    with pytest.raises(DataError, match=word) as caught:
        read_split(tmp_path)
    assert "\n" not in str(caught.value)


def test_names_and_ids_that_no_system_takes(tmp_path):
    names = (
        "1.png",
        "x" * 256 + ".png",
        "a/" * 3000 + "1.png",
        "nul\0.png",
        "half\ud800.png",
        "two\nlines.png",
    )
    content = named(*names, categories=categories((1, "half \udc80 name"), (2, "two\nlines"), (2**63, "far")))
    content["images"][0]["id"] = content["annotations"][0]["image_id"] = 2**60 + 1  # beyond a float
    content["annotations"][0]["id"] = 2**62 + 1
    content["annotations"] += [box(7, image=2**70), box(2**70, image=2**60 + 1), box(9, category=10**400)]
    folder = write(tmp_path / "train", content, sheets=1)
    split = read_split(folder)
    assert [sheet.image_id for sheet in split.sheets] == [2**60 + 1]
    assert [category.name for category in split.categories] == ["half \\udc80 name", "two\\nlines"]
    for finding in split.findings:
        assert finding.where.isprintable() and finding.kind.isprintable()
    out = write_split(tmp_path / "again", to_coco(split)["images"], split.categories, [])
    assert "\\\\udc80" in out.read_text(encoding="utf-8")
    print(losses(split), [finding.where for finding in split.findings], file=sys.stderr)


def test_a_file_of_another_encoding_is_read_or_one_line(tmp_path):
    folder = write(tmp_path / "train", document())
    path = folder / "_annotations.coco.json"
    text = json.dumps(document(categories=categories((1, "Kühler"), (2, "pump"))), ensure_ascii=False)
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        path.write_bytes(text.encode(encoding))
        assert read_split(folder).categories[0].name == "Kühler"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match="not valid JSON"):
        read_split(folder)
