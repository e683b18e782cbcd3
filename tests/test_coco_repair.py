"""A raw Roboflow export is read as it comes: each known fault is repaired or dropped, and said."""

import copy
import json

import numpy as np
import pytest
from coco_documents import box, document, write
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

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
from schematics.sheets import DataError


def findings(split) -> dict[str, tuple[str, int]]:
    return {finding.kind: (finding.action, finding.count) for finding in split.findings}


def test_clean_split(tmp_path):
    split = read_split(write(tmp_path / "train", document()))
    assert split.findings == []
    assert split.categories == [Category(1, "valve"), Category(2, "pump")]
    first, second = split.sheets
    assert (first.image_id, first.file_name, first.width, first.height) == (1, "1.png", 100, 80)
    assert first.boxes.tolist() == [[10, 10, 30, 40], [50, 5, 58, 14]]
    assert first.labels.tolist() == [1, 2] and first.annotation_ids.tolist() == [1, 2]
    assert second.area.tolist() == [600] and second.crowd.tolist() == [False]
    assert (first.boxes.dtype, first.labels.dtype, first.crowd.dtype) == (np.float64, np.int64, bool)


BAD_BOXES = {
    "box is not four finite numbers": [
        None,
        "10,10,5,5",
        [1, 2, 3],
        [1, 2, 3, 4, 5],
        [1, 2, float("nan"), 4],
        ["1", "2", "3", "4"],
        [1, 2, float("inf"), 4],
        [True, 1, 5, 5],
        {},
        [10**400, 0, 5, 5],
    ],
    "box without area": [[10, 10, 0, 5], [10, 10, 5, -5], [10, 10, 1e-9, 5]],
    "box wholly outside the sheet": [[100, 10, 5, 5], [-9, 10, 9, 5], [10, 500, 5, 5]],
}


@pytest.mark.parametrize(("kind", "bbox"), [(kind, b) for kind, boxes in BAD_BOXES.items() for b in boxes])
def test_a_useless_box_is_dropped(tmp_path, kind, bbox):
    content = document()
    content["annotations"].append({**box(4), "bbox": bbox, "area": 9, "iscrowd": 0})
    split = read_split(write(tmp_path / "train", content))
    assert findings(split) == {kind: ("dropped", 1)}
    assert split.findings[0].where == "1.png"
    assert [len(sheet.boxes) for sheet in split.sheets] == [2, 1]


def test_a_box_partly_outside_is_clipped(tmp_path):
    content = document()
    content["annotations"][0].update(bbox=[-10, -20, 30, 50], area=1500)
    content["annotations"][2].update(bbox=[95.5, 70, 10, 30], area=300)
    split = read_split(write(tmp_path / "train", content))
    assert findings(split) == {"box partly outside the sheet: clipped": ("repaired", 1)}
    assert [finding.where for finding in split.findings] == ["1.png", "2.png"]
    assert split.sheets[0].boxes[0].tolist() == [0, 0, 20, 30] and split.sheets[0].area[0] == 600
    assert split.sheets[1].boxes[0].tolist() == [95.5, 70, 100, 80] and split.sheets[1].area[0] == 45


@pytest.mark.parametrize(
    "ids", [[0, 1, 2], [7, 7, 8], [1, None, 2], ["a", "b", "c"], [-1, 5, 6], [1.5, 2, 3]], ids=str
)
def test_annotation_ids_are_numbered_anew(tmp_path, ids):
    content = document()
    for row, number in zip(content["annotations"], ids, strict=True):
        row["id"] = number
    split = read_split(write(tmp_path / "train", content))
    assert [number for sheet in split.sheets for number in sheet.annotation_ids] == [1, 2, 3]
    assert all("numbered anew" in kind for kind in findings(split)) and split.findings


def test_good_annotation_ids_stay(tmp_path):
    content = document()
    for row, number in zip(content["annotations"], (30, 10, "20"), strict=True):
        row["id"] = number
    split = read_split(write(tmp_path / "train", content))
    assert [number for sheet in split.sheets for number in sheet.annotation_ids] == [30, 10, 20]
    assert split.findings == []


def test_missing_area_and_iscrowd_and_kept_crowd(tmp_path):
    content = document()
    for row in content["annotations"]:
        del row["area"], row["iscrowd"]
    content["annotations"][1]["iscrowd"] = 1
    content["annotations"][2]["area"] = 123.5  # a mask's area is less than its box's
    split = read_split(write(tmp_path / "train", content))
    assert findings(split) == {
        "area missing: taken from the box": ("repaired", 2),
        "iscrowd missing: set to 0": ("repaired", 2),
    }
    assert split.sheets[0].area.tolist() == [600, 72] and split.sheets[0].crowd.tolist() == [False, True]
    assert split.sheets[1].area.tolist() == [123.5]
    rows = to_coco(split)["annotations"]
    assert [row["iscrowd"] for row in rows] == [0, 1, 0]


def test_unknown_ids_and_boxes_listed_twice_are_dropped(tmp_path):
    content = document()
    content["annotations"] += [box(4, image=99), box(5, category=99), box(6), box(7, image=None)]
    for row in content["annotations"]:
        row.update(area=1, iscrowd=0)
    split = read_split(write(tmp_path / "train", content))
    assert findings(split) == {
        "box of an image that is not listed": ("dropped", 2),
        "box of a class that is not listed": ("dropped", 1),
        "box listed twice": ("dropped", 1),
    }
    assert sum(len(sheet.boxes) for sheet in split.sheets) == 3


def test_missing_truncated_and_empty_sheets(tmp_path):
    content = document()
    for n, name in ((3, "gone.png"), (4, "cut.png"), (5, "text.png"), (6, "blank.png")):
        content["images"].append({"id": n, "file_name": name, "width": 100, "height": 80})
    content["annotations"] += [{**box(4, image=3), "area": 1, "iscrowd": 0}]
    folder = write(tmp_path / "train", content)
    data = (folder / "1.png").read_bytes()
    (folder / "cut.png").write_bytes(data[:-9])
    (folder / "text.png").write_text("not a picture")
    (folder / "blank.png").write_bytes(data)
    split = read_split(folder)
    assert {(f.kind, f.where): (f.action, f.count) for f in split.findings} == {
        ("image named but missing", "gone.png"): ("dropped", 1),
        ("image truncated or unreadable", "cut.png"): ("dropped", 1),
        ("image truncated or unreadable", "text.png"): ("dropped", 1),
        ("box of a dropped image", "_annotations.coco.json"): ("dropped", 1),
        ("sheet without boxes", "blank.png"): ("kept", 1),
    }
    assert [sheet.file_name for sheet in split.sheets] == ["1.png", "2.png", "blank.png"]
    assert split.sheets[2].boxes.shape == (0, 4)


def test_images_listed_twice(tmp_path):
    content = document()
    content["images"] += [dict(content["images"][0]), {**content["images"][0], "id": 9}]
    content["annotations"].append({**box(4, image=9, bbox=(1, 1, 5, 5)), "area": 25, "iscrowd": 0})
    split = read_split(write(tmp_path / "train", content))
    assert findings(split) == {
        "image listed twice": ("repaired", 1),
        "image listed under two ids: boxes joined": ("repaired", 1),
    }
    assert [len(sheet.boxes) for sheet in split.sheets] == [3, 1]
    content["images"].append({**content["images"][1], "id": 1})
    with pytest.raises(DataError, match=r"image id 1 stands for both 1\.png and 2\.png"):
        read_split(write(tmp_path / "clash", content))


@pytest.mark.parametrize("named", ["images/1.png", "sub\\1.png", "1.png"])
def test_sheets_in_subfolders(tmp_path, named):
    folder = write(tmp_path / "train", document(), sheets=2)
    content = document()
    content["images"][0]["file_name"] = named
    (folder / "_annotations.coco.json").write_text(json.dumps(content))
    home = folder / ("sub" if "sub" in named else "images")
    home.mkdir()
    (folder / "1.png").rename(home / "1.png")
    sheet = read_split(folder).sheets[0]
    assert sheet.path == home / "1.png" and sheet.file_name == named


SIZES = {  # size as labelled -> what becomes of box (10, 10, 20, 30) on the real 100 x 80, and a word of it
    (200, 160): ([5, 5, 15, 20], "boxes scaled"),
    (50, 40): ([20, 20, 60, 80], "boxes scaled"),
    (333, 267): ([10 * 100 / 333, 10 * 80 / 267, 30 * 100 / 333, 40 * 80 / 267], "boxes scaled"),
    (100, 90): ([10, 10, 30, 40], "look at its boxes"),
    (None, None): ([10, 10, 30, 40], "size missing"),
    (0, 80): ([10, 10, 30, 40], "size missing"),
    ("100", "80"): ([10, 10, 30, 40], "size missing"),
}


@pytest.mark.parametrize("labelled", SIZES, ids=str)
def test_the_size_of_the_file_counts(tmp_path, labelled):
    content = document()
    content["images"][0].update(width=labelled[0], height=labelled[1])
    del content["annotations"][1]
    split = read_split(write(tmp_path / "train", content))
    want, word = SIZES[labelled]
    np.testing.assert_allclose(split.sheets[0].boxes[0], want, rtol=1e-12)
    width, height = split.sheets[0].boxes[0, 2:] - split.sheets[0].boxes[0, :2]
    np.testing.assert_allclose(split.sheets[0].area[0], width * height)
    assert (split.sheets[0].width, split.sheets[0].height) == (100, 80)
    assert [(f.action, f.where, word in f.kind) for f in split.findings] == [("repaired", "1.png", True)]


def test_a_sheet_turned_since_it_was_labelled_is_dropped(tmp_path):
    content = document()
    content["images"][0].update(width=80, height=100)
    split = read_split(write(tmp_path / "train", content))
    assert [sheet.image_id for sheet in split.sheets] == [2]
    assert any("turned" in kind and action == "dropped" for kind, (action, _) in findings(split).items())


def roboflow(categories: list[tuple[int, str, str]], boxed: int) -> dict:
    content = document()
    content["categories"] = [
        {"id": n, "name": name, "supercategory": parent} for n, name, parent in categories
    ]
    for row in content["annotations"]:
        row["category_id"] = boxed
    return content


def test_the_placeholder_category_is_dropped(tmp_path):
    listed = [(0, "devices", "none"), (1, "valve", "devices"), (2, "pump", "devices")]
    split = read_split(write(tmp_path / "train", roboflow(listed, boxed=1)))
    assert split.categories == [Category(1, "valve"), Category(2, "pump")]
    assert findings(split) == {"placeholder category 0 'devices'": ("dropped", 1)}


@pytest.mark.parametrize(
    ("categories", "boxed"),
    [
        ([(0, "devices", "none"), (1, "valve", "devices")], 0),  # it has boxes
        ([(0, "valve", "devices"), (1, "pump", "devices")], 1),  # it is nobody's parent
    ],
)
def test_a_genuine_category_0_is_kept(tmp_path, categories, boxed):
    split = read_split(write(tmp_path / "train", roboflow(categories, boxed)))
    assert [category.id for category in split.categories] == [0, 1]
    assert to_coco(split)["annotations"][0]["category_id"] == boxed
    assert split.sheets[0].labels.tolist() == [boxed + 1] * 2


def test_labels_agree_between_splits_that_list_other_classes(tmp_path):
    """Category 0 has boxes only in train, valve only a row in test: the same labels all the same."""
    write(tmp_path / "train", roboflow([(0, "devices", "none"), (2, "pump", "devices")], boxed=0))
    write(
        tmp_path / "test",
        roboflow([(0, "devices", "none"), (1, "valve", "devices"), (2, "pump", "devices")], 2),
    )
    splits = [read_split(tmp_path / name) for name in ("train", "test")]
    assert splits[0].categories == splits[1].categories
    assert [category.id for category in splits[0].categories] == [0, 1, 2]
    assert splits[1].sheets[0].labels.tolist() == [3, 3]
    assert findings(splits[0]) == {"class 'valve' is listed only in another split": ("kept", 1)}


def test_one_id_for_two_classes_is_fatal_and_one_name_for_two_ids_is_said(tmp_path):
    write(tmp_path / "train", roboflow([(1, "valve", "x"), (2, "pump", "x")], boxed=1))
    write(tmp_path / "valid", roboflow([(1, "valve", "x"), (2, "fan", "x")], boxed=1))
    with pytest.raises(DataError, match="category id 2 is 'pump' in train but 'fan' in valid") as caught:
        read_split(tmp_path / "train")
    assert "\n" not in str(caught.value)
    assert [f.action for f in inspect_split(tmp_path / "train").findings] == ["fatal"]
    split = read_split(write(tmp_path / "alone", roboflow([(1, "valve", "x"), (4, "valve", "x")], boxed=4)))
    assert findings(split) == {"class name 'valve' stands under ids 1, 4": ("kept", 1)}
    assert split.sheets[0].labels.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "not valid JSON"),
        ("[]", 'no list "images"'),
        ('{"images": [], "categories": []}', 'no list "annotations"'),
        ('{"images": [1], "annotations": [], "categories": []}', 'no list "images"'),
        ('{"images": [], "annotations": [], "categories": []}', "no usable box"),
    ],
)
def test_a_file_that_is_no_coco_file_is_one_line(tmp_path, text, word):
    (tmp_path / "_annotations.coco.json").write_text(text)
    with pytest.raises(DataError, match=word) as caught:
        read_split(tmp_path)
    assert "_annotations.coco.json" in str(caught.value) and "\n" not in str(caught.value)


def test_finding_the_split_and_its_file(tmp_path):
    write(tmp_path / "val", document())
    (tmp_path / "val/_annotations.coco.json").rename(tmp_path / "val/export.json")
    assert find_split(tmp_path, "valid") == find_split(tmp_path, "val") == tmp_path / "val"
    assert len(read_split(tmp_path / "val").sheets) == 2
    assert find_splits(tmp_path) == find_splits(tmp_path / "val") == [tmp_path / "val"]
    (tmp_path / "val/other.json").write_text("{}")
    with pytest.raises(DataError, match=r"2 json files; name the right one _annotations\.coco\.json"):
        find_split(tmp_path, "valid")
    with pytest.raises(DataError, match=r"no train/_annotations\.coco\.json"):
        find_split(tmp_path, "train")
    for name, word in (
        ("voc/a.xml", "VOC: python -m schematics.convert"),
        ("yolo/data.yaml", "YOLO: python -m"),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("<annotation/>")
        with pytest.raises(DataError, match=word):
            find_split((tmp_path / name).parent, "train")


def figures(truth: dict, detections: list[dict]) -> list[float]:
    coco = COCO()
    coco.dataset = copy.deepcopy(truth)
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(detections)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats.tolist()


def random_split(rng: np.random.Generator) -> tuple[dict, list[dict]]:
    content = document(annotations=[])
    content["info"] = {}
    for number in range(1, 41):
        bbox = [*rng.uniform(0, 60, 2).tolist(), *rng.uniform(3, 20, 2).tolist()]
        row = box(number, image=1 + number % 2, category=1 + number % 2, bbox=bbox)
        content["annotations"].append({**row, "area": bbox[2] * bbox[3], "iscrowd": int(number == 7)})
    detections = [
        {**row, "bbox": (np.array(row["bbox"]) + rng.normal(0, 1, 4)).tolist(), "score": float(rng.uniform())}
        for row in content["annotations"]
    ]
    return content, detections


def test_a_clean_set_gives_the_figures_of_plain_pycocotools_to_the_last_bit(tmp_path):
    content, detections = random_split(np.random.default_rng(5))
    split = read_split(write(tmp_path / "train", content))
    truth = to_coco(split)
    assert [row["bbox"] for row in truth["annotations"]] == [
        row["bbox"] for image in (1, 2) for row in content["annotations"] if row["image_id"] == image
    ]
    assert figures(truth, detections) == figures(content, detections)


def test_perfect_detections_score_1_where_the_raw_export_scores_less(tmp_path):
    content, _ = random_split(np.random.default_rng(6))
    for row in content["annotations"]:
        row.update(id=row["id"] - 1, iscrowd=0)
    perfect = [{**row, "score": 0.9} for row in content["annotations"]]
    assert figures(content, perfect)[0] < 0.999  # id 0 counts as "no match"
    assert figures(to_coco(read_split(write(tmp_path / "train", content))), perfect)[0] == 1.0


def test_what_is_written_is_read_back(tmp_path):
    folder = write(tmp_path / "train", document())
    (folder / "_annotations.coco.json").unlink()
    images = document()["images"]
    write_split(
        folder, images, [Category(5, "ventil é")], [{"image_id": 1, "category_id": 5, "bbox": [1, 2, 3, 4]}]
    )
    split = read_split(folder)
    assert split.categories == [Category(5, "ventil é")] and split.sheets[0].boxes.tolist() == [[1, 2, 4, 6]]
    assert [finding.kind for finding in split.findings] == ["sheet without boxes"]
    with pytest.raises(DataError, match="exists already"):
        write_split(folder, images, [], [])
    assert [path.name for path in folder.iterdir() if path.suffix == ".json"] == ["_annotations.coco.json"]


def test_one_line_says_what_a_split_lost(tmp_path):
    content = document()
    content["annotations"] += [box(4, bbox=()), box(5, bbox=(50, 10, -1, 9)), box(6, bbox=(90, 70, 20, 20))]
    content["images"].append({"id": 3, "file_name": "gone.png", "width": 9, "height": 9})
    content["annotations"].append(box(7, image=3))
    split = read_split(write(tmp_path / "train", content))
    said = "train: 3 boxes and 1 sheet dropped, 1 box repaired; see python -m schematics.check"
    assert losses(split) == f"{said} {tmp_path / 'train'}"
    assert losses(read_split(write(tmp_path / "clean", document()))) == ""
