"""Other tools' folders, lists and names are found; what is in doubt is refused or named."""

import json
import os
import shutil
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from labelled_sources import boxes_of, converted, sheet, text
from PIL import Image

from schematics.coco import find_splits
from schematics.convert import _write, convert
from schematics.formats.source import Box, Labelled
from schematics.sheets import DataError, Sheet

CASES = Path(__file__).parent / "cases"
VALVE = ("valve", 10, 20, 30, 60)  # x0 y0 x1 y1 on a sheet of 100 x 80
LINE = "0 0.2 0.5 0.2 0.5"  # the same in YOLO's shares
SHAPE = {"label": "valve", "points": [[10, 20], [30, 60]], "shape_type": "rectangle"}
HEAD = "filename,width,height,class,xmin,ymin,xmax,ymax"


def xml(file_name: str = "", corners=(10, 20, 30, 60), name: str = "valve") -> str:
    sides = "".join(f"<{s}>{c}</{s}>" for s, c in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
    item = f"<object><name>{name}</name><bndbox>{sides}</bndbox></object>"
    return f"<annotation><filename>{file_name}</filename>{item}</annotation>"


def names_of(out: Path) -> dict[str, set[str]]:
    return {split: set(sheets) for split, sheets in boxes_of(out).items()}


@pytest.mark.parametrize(
    ("case", "want"),
    [
        ("07-voc-outdated-filename/input", {"train": {"a.png", "b.png"}}),
        (
            "08-set-list-names-with-spaces/input",
            {"train": {f"P&ID 100-{n}.png" for n in range(3)}, "valid": {"P&ID 200-0.png"}},
        ),
        ("09-yolo-split-names/c1_ultra", {"train": {"t0.png", "t1.png"}, "valid": {"v0.png"}}),
        ("13-voc-subfolders/input", {"train": {"1.png"}, "valid": {"1.png"}}),
        ("19-yolo-folder-names/c7_yaml", {"train": {"a.png"}}),
        ("19-yolo-folder-names/c10", {"train": {"a.png"}}),
        ("19-yolo-folder-names/c11", {"train": {"a.png"}}),
    ],
)
def test_cases(tmp_path, case, want):
    convert(CASES / case, tmp_path / "out")
    assert names_of(tmp_path / "out") == want
    assert all(boxes for sheets in boxes_of(tmp_path / "out").values() for boxes in sheets.values())


def test_an_outdated_file_name_is_said_and_the_boxes_are_those_of_the_own_xml(tmp_path):
    tally = convert(CASES / "07-voc-outdated-filename/input", tmp_path / "out")
    kind = "label file that names another sheet: that of its own name taken"
    assert tally == {(kind, "b.xml", "repaired"): 1}
    assert boxes_of(tmp_path / "out")["train"]["b.png"][0] == ("valve", 228, 47, 252, 71)


@pytest.mark.parametrize("case", ["c9_tt", "e8"])
def test_only_one_split(tmp_path, case):
    src = CASES / "14-only-one-split" / case
    splits = converted(src, tmp_path / "out", valid=0.3)
    assert {name: len(sheets) for name, sheets in splits.items()} == (
        {"test": 1, "train": 3, "valid": 1} if case == "c9_tt" else {"train": 2, "valid": 1}
    )
    everything = [boxes for sheets in splits.values() for boxes in sheets.values()]
    assert all(len(boxes) == 4 for boxes in everything)


def test_all_columns_of_coco_survive(tmp_path):
    src, outline = tmp_path / "src/train", [[10, 20, 30, 20, 10, 60]]
    own = {
        "bbox": [10, 20, 20, 40],
        "area": 400.5,
        "segmentation": outline,
        "attributes": {"hand": "x\ud800"},
    }
    rows = [
        {"id": 1, "image_id": 0, "category_id": 5, "iscrowd": 0, **own},
        {"id": 2, "image_id": 1, "category_id": 9, "iscrowd": 1, "bbox": [1, 2, 3, 4], "area": 5},
        {"id": 3, "image_id": 2, "category_id": 9, "bbox": [90, 70, 20, 20], "segmentation": outline},
    ]
    images = [
        {"id": n, "file_name": f"images/{n}.png", "width": 100, "height": 80, "license": 7} for n in range(3)
    ]
    for image in images:
        sheet(src / image["file_name"])
    categories = [{"id": 5, "name": "valve"}, {"id": 9, "name": "pump"}]
    document = {"images": images, "annotations": rows, "categories": categories}
    text(src / "_annotations.coco.json", json.dumps(document))
    tally = convert(tmp_path / "src", tmp_path / "out", valid=0.4)
    found = {}
    for folder in find_splits(tmp_path / "out"):
        written = json.loads((folder / "_annotations.coco.json").read_text())
        assert [(c["id"], c["name"]) for c in written["categories"]] == [(5, "valve"), (9, "pump")]
        assert all(image["license"] == 7 for image in written["images"])
        name_of = {image["id"]: image["file_name"] for image in written["images"]}
        found |= {name_of[row["image_id"]]: row for row in written["annotations"]}
    assert {**found["0.png"], **own, "attributes": {"hand": "x?"}} == found["0.png"]
    assert found["1.png"]["iscrowd"] == 1 and found["1.png"]["area"] == 5
    assert found["2.png"]["bbox"] == [90, 70, 10, 10] and "segmentation" not in found["2.png"]
    assert tally["changed box: its columns but area and iscrowd", "train", "dropped"] == 1


def test_what_is_there_is_not_drawn_again(tmp_path):
    src = CASES / "14-only-one-split"
    with pytest.raises(DataError, match="has a test split of its own; leave out --test"):
        convert(src / "c9_tt", tmp_path / "out", test=0.3)
    with pytest.raises(DataError, match="is COCO already"):
        convert(src / "e8", tmp_path / "out")
    with pytest.raises(DataError, match="shares"):
        convert(src / "e8", tmp_path / "out", valid=0.6, test=0.4)
    with pytest.raises(DataError, match="shares"):
        convert(src / "e8", tmp_path / "out", valid=float("nan"))
    assert not (tmp_path / "out").exists()


DARKNET = "classes = 1\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\n"


@pytest.mark.parametrize(
    ("files", "images"),
    [
        (  # CVAT's YOLO 1.1
            {
                "obj.data": DARKNET,
                "obj.names": "valve\n",
                "train.txt": "data/obj_train_data/a.png\n",
                "valid.txt": "data/obj_valid_data/b.png\n",
            },
            ("obj_train_data/a", "obj_valid_data/b"),
        ),
        ({"obj.names": "valve"}, ("obj_train_data/a", "obj_Validation_data/b")),
        (  # CVAT's Ultralytics export
            {
                "data.yaml": "path: .\nnames: {0: valve}\ntrain: train.txt\nval: val.txt\n",
                "train.txt": "data/images/job 1/a.png\n",
                "val.txt": "data/images/job 2/b.png",
            },
            ("images/job 1/a", "images/job 2/b"),
        ),
        (
            {"classes.txt": b"\xef\xbb\xbfvalve\r\n", "train.txt": "./a.png\n", "val.txt": "./b.png"},
            ("a", "b"),
        ),
        (
            {"x.yaml": "names: [valve]\ntrain: [images/one, images/two]\nval: images/three"},
            ("images/one/a", "images/three/b"),
        ),
        ({"data.yaml": "names: [valve]\ntrain: ../train/images\nval: ../val/images\n"}, ("train/a", "val/b")),
        (
            {"data.yaml": "names: [valve]\ntrain: /content/set/one/images\nval: /content/set/two/images\n"},
            ("one/images/a", "two/images/b"),
        ),
        (
            {"data.yaml": "path: D:\\set\nnames: [valve]\ntrain: images\\one\nval: images\\two\n"},
            ("images/one/a", "images/two/b"),
        ),
        ({"data.yaml": "names: [valve]\ntrain: .\nval: held_out\n"}, ("a", "held_out/b")),
    ],
)
def test_splits_of_yolo(tmp_path, files, images):
    src = tmp_path / "src"
    for name, content in files.items():
        text(src / name, content)
    for image in images:
        sheet(src / f"{image}.png")
        text(src / f"{image.replace('images', 'labels')}.txt", LINE)
    splits = converted(src, tmp_path / "out")
    assert splits == {"train": {"a.png": [VALVE]}, "valid": {"b.png": [VALVE]}}


def test_what_data_yaml_names_and_is_not_there_is_said_and_what_it_does_not_name_left_out(tmp_path):
    src = tmp_path / "src"
    for name in ("train/a", "unlabelled/b", "test/c"):
        sheet(src / "images" / f"{name}.png")
    text(src / "labels/train/a.txt", LINE)
    text(src / "data.yaml", "names: [valve]\ntrain: images/train\nval: images/val\n")
    tally = convert(src, tmp_path / "out")
    assert tally["valid: 'images/val' is not in the folder", "data.yaml", "kept"] == 1
    assert tally["sheet that no list of the splits names", "images/unlabelled/b.png", "dropped"] == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test", "train"]


@pytest.mark.parametrize(
    ("yaml", "word"),
    [
        ("train: images\nval: images", "in train and in valid by data.yaml"),
        ("kpt_shape: 7", "kpt_shape must be"),
    ],
)
def test_a_data_yaml_in_doubt_is_refused(tmp_path, yaml, word):
    sheet(tmp_path / "src/images/a.png")
    text(tmp_path / "src/labels/a.txt", LINE)
    text(tmp_path / "src/data.yaml", f"names: [valve]\n{yaml}\n")
    with pytest.raises(DataError, match=word):
        convert(tmp_path / "src", tmp_path / "out")


POSE = "0 0.2 0.5 0.2 0.5 0.15 0.4 2 0.25 0.6 1"  # the box and two points with their states
TURNED = "0 0.2 0.25 0.3 0.5 0.2 0.75 0.1 0.5"  # four corners


def test_poses_and_turned_boxes(tmp_path):
    for name, lines in {"a": POSE, "b": f"{LINE}\n{POSE}"}.items():
        sheet(tmp_path / f"pose/images/{name}.png")
        text(tmp_path / f"pose/labels/{name}.txt", lines)
    text(tmp_path / "pose/data.yaml", "names: [valve]\nkpt_shape: [2, 3]\n")
    assert converted(tmp_path / "pose", tmp_path / "out")["train"] == {"a.png": [VALVE], "b.png": [VALVE]}
    text(tmp_path / "pose/data.yaml", "names: [valve]\n")
    with pytest.raises(DataError, match=r"lines of 11 numbers may be outlines or poses; write kpt_shape"):
        convert(tmp_path / "pose", tmp_path / "again")
    text(tmp_path / "pose/data.yaml", "names: [valve]\nkpt_shape: []\n")  # then they are outlines
    with pytest.raises(DataError, match="no shares of the sheet's sides"):
        (tmp_path / "pose/labels/b.txt").unlink()
        convert(tmp_path / "pose", tmp_path / "again")
    sheet(tmp_path / "obb/images/a.png")
    text(tmp_path / "obb/labels/a.txt", TURNED)
    text(tmp_path / "obb/data.yaml", "names: [valve]\n")
    assert converted(tmp_path / "obb", tmp_path / "turned")["train"] == {"a.png": [VALVE]}


def test_class_names_are_what_stands_there(tmp_path):
    """In YAML NO, on and 1.0 could be other things than texts. A valve may be normally open."""
    sheet(tmp_path / "src/a.png")
    text(tmp_path / "src/a.txt", "\n".join(f"{n} 0.{n + 1} 0.5 0.1 0.1" for n in range(5)))
    text(tmp_path / "src/data.yaml", "names: [NO, on, 1.0, ~, NO]\n")
    tally = convert(tmp_path / "src", tmp_path / "out")
    assert [box[0] for box in boxes_of(tmp_path / "out")["train"]["a.png"]] == ["NO", "on", "1.0", "~", "NO"]
    assert tally["class name 'NO' stands at 0 and 4: joined", "data.yaml", "repaired"] == 1
    text(tmp_path / "src/data.yaml", "names: [valve, Valve, ' valve', b, c]\n")
    tally = convert(tmp_path / "src", tmp_path / "alike")
    assert (
        tally["classes whose names differ in case or blanks only: 'Valve', 'valve'", "all sheets", "kept"]
        == 1
    )


@pytest.mark.parametrize(
    "content",
    [
        "names: [valve, &a pump, *a]",
        "names: [valve]\nnames: [pump]",
        "names: {0: valve, 0: pump}",
        "names: {9999999999: valve}",
        "names: {-1: valve}",
        "names: {one: valve}",
        "names: [[valve]]",
        "names: ['']",
        "names: []",
        "names: valve",
        "names: " + "[" * 5000,
        "names: " + "{a: " * 5000,
        "names: [" + "1" * 5000 + "]\nx: [",
        "names: [valve]\n" + "#" * 2**18,
        b"names: [v\xe4lve]",
        'names: ["\\ud800"]',
        "? [names]\n: valve",
    ],
)
def test_hostile_yaml_is_refused_in_one_line(tmp_path, content):
    sheet(tmp_path / "src/a.png")
    text(tmp_path / "src/a.txt", LINE)
    text(tmp_path / "src/data.yaml", content)
    with pytest.raises(DataError) as caught:
        convert(tmp_path / "src", tmp_path / "out")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


BOMB = '<!DOCTYPE a [<!ENTITY a "lol">' + "".join(
    f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (f"{BOMB}]><annotation><filename>&i;</filename></annotation>", "document type"),
        (f"{BOMB}]><annotation><filename>&i;</filename></annotation>".encode("utf-16"), "document type"),
        ("<annotation>" + "<object>" * 100_000, "not valid XML"),
        ("<annotation>" + "<a>" * 100_000 + "</a>" * 100_000 + "</annotation>", "no sheet with a labelled"),
        ('<?xml version="1.0" encoding="no-such"?><annotation/>', "not valid XML"),
        ('<?xml version="1.0" encoding="punycode"?><annotation/>', "not valid XML"),
    ],
)
def test_hostile_xml_is_refused_in_one_line(tmp_path, content, word):
    sheet(tmp_path / "src/a.png")
    text(tmp_path / "src/a.xml", content)
    with pytest.raises(DataError, match=word) as caught:
        convert(tmp_path / "src", tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb2312", "windows-1252"])
def test_voc_in_other_encodings(tmp_path, encoding):
    declared = encoding.removesuffix("-sig")
    name = {"gb2312": "阀门", "utf-16": "阀门"}.get(encoding, "Böler")
    sheet(tmp_path / "src/a.png")
    head = f'<?xml version="1.0" encoding="{declared}"?>\n'
    text(tmp_path / "src/a.xml", (head + xml("a.png", name=name)).encode(encoding))
    splits = converted(tmp_path / "src", tmp_path / "out")
    assert splits == {"train": {"a.png": [(name, *VALVE[1:])]}}


def test_boxes_drawn_backwards_are_turned_about_and_those_without_numbers_left_out(tmp_path):
    src = tmp_path / "src"
    sheet(src / "voc/a.png")
    text(src / "voc/a.xml", xml("a.png", (30, 60, 10, 20)))
    sheet(src / "voc/b.png")
    text(src / "voc/b.xml", xml("b.png", ("nan", 1, 2, 3)))
    sheet(src / "voc/c.png")
    text(src / "voc/c.xml", xml("c.png", (80, 60, 130, 120)))
    tally = convert(src / "voc", tmp_path / "voc")
    assert boxes_of(tmp_path / "voc")["train"]["a.png"] == [VALVE]
    assert boxes_of(tmp_path / "voc")["train"]["c.png"] == [("valve", 80, 60, 100, 80)]
    assert tally == {
        ("box drawn backwards: turned about", "a.xml", "repaired"): 1,
        ("object without a name and four numbers", "b.xml", "dropped"): 1,
    }
    sheet(src / "yolo/a.png")
    text(src / "yolo/a.txt", f"0 0.2 0.5 -0.2 0.5\n0 inf 0 0 0\n0 20 40 20 40\n{LINE} 1e999\n0.5 .1 .1 .1 .1")
    text(src / "yolo/classes.txt", "valve")
    tally = convert(src / "yolo", tmp_path / "yolo")
    assert boxes_of(tmp_path / "yolo")["train"]["a.png"] == [VALVE]
    assert tally == {
        ("box drawn backwards: turned about", "a.txt", "repaired"): 1,
        ("line that is not all numbers", "a.txt", "dropped"): 2,
        ("line whose numbers are no shares of the sheet's sides", "a.txt", "dropped"): 1,
        ("line of a class that is not listed", "a.txt", "dropped"): 1,
    }


def test_names_in_another_form(tmp_path):
    """Normal form, case and percent-encoding; and only where one file fits."""
    src = tmp_path / "src"
    pairs = {"Übersicht": unicodedata.normalize("NFD", "übersicht"), "PLAN": "plan", "P%26ID 1": "P&ID 1"}
    for label, image in pairs.items():
        sheet(src / "images" / f"{image}.png")
        text(src / "labels" / f"{label}.txt", LINE)
    for name in ("two", "TWO"):
        sheet(src / "images" / f"{name}.png")
    text(src / "labels/Two.txt", LINE)
    text(src / "classes.txt", "valve")
    tally = convert(src, tmp_path / "out")
    boxes = boxes_of(tmp_path / "out")["train"]
    assert {name: len(found) for name, found in boxes.items()} == {
        **{f"{image}.png": 1 for image in pairs.values()},
        "TWO.png": 0,
        next(name for name in boxes if name.startswith("two")): 0,
    }
    assert tally["label file without its image", "labels/Two.txt", "dropped"] == 1


def test_two_label_files_of_one_image_are_refused(tmp_path):
    sheet(tmp_path / "src/JPEGImages/a.png")
    for folder in ("Annotations", "xml"):
        text(tmp_path / "src" / folder / "a.xml", xml("a.png"))
    with pytest.raises(DataError, match=r"a\.png: labelled by Annotations/a\.xml and xml/a\.xml; keep one"):
        convert(tmp_path / "src", tmp_path / "out")


def test_an_image_is_not_taken_from_another_split_or_job(tmp_path):
    """1.xml of train lacks its image. The 1.png of valid, and that of job B, are others."""
    src = tmp_path / "src"
    for name in ("valid/2", "jobB/1", "valid/1"):
        sheet(src / f"{name}.png")
    text(src / "valid/2.xml", xml("2.png"))
    text(src / "train/1.xml", xml("1.png"))
    text(src / "jobA/1.xml", xml("C:\\jobA\\1.png"))
    tally = convert(src, tmp_path / "out")
    assert names_of(tmp_path / "out") == {"valid": {"2.png"}}
    missing = {where for kind, where, _ in tally if kind == "label file without its image"}
    assert missing == {"train/1.xml", "jobA/1.xml"}


def test_set_lists_with_states_subfolders_and_an_image_in_two(tmp_path):
    src = tmp_path / "src"
    for name in (
        "VOC2007/JPEGImages/a",
        "VOC2012/JPEGImages/a",
        "VOC2012/JPEGImages/b",
        "VOC2012/JPEGImages/c",
    ):
        sheet(src / f"{name}.png")
        text(src / f"{name.replace('JPEGImages', 'Annotations')}.xml", xml(Path(name).name + ".png"))
    text(src / "VOC2007/ImageSets/Main/train.txt", "a  1\n")
    text(src / "VOC2007/ImageSets/Segmentation/test.txt", "a")
    text(src / "VOC2012/ImageSets/Main/val.txt", b"\xef\xbb\xbfa\r\nb.png\r\nlost\r\n")
    tally = convert(src, tmp_path / "out")
    assert names_of(tmp_path / "out") == {"train": {"a.png"}, "valid": {"a.png", "b.png"}}
    assert tally == {
        (
            "name in a list of the splits without a labelled sheet",
            "VOC2012/ImageSets/Main/val.txt",
            "kept",
        ): 1,
        ("sheet that no list of the splits names", "VOC2012/JPEGImages/c.png", "dropped"): 1,
    }
    text(src / "VOC2007/ImageSets/Main/test.txt", "a")
    with pytest.raises(DataError, match="is listed in test too"):
        convert(src, tmp_path / "again")


def test_labelme(tmp_path):
    src = tmp_path / "src"
    polygon = {"label": "pump", "points": [[50, 5], [90, 15], [70, 25]]}
    circle = {"label": "gauge", "points": [[50, 40], [50, 50]], "shape_type": "circle", "group_id": None}
    point = {"label": "x", "points": [[1, 2]], "shape_type": "point"}
    parts = [{**SHAPE, "points": [[x, 30], [x + 5, 40]], "group_id": 3} for x in (60, 80)]
    document = {"version": "5", "imagePath": "..\\other\\b.png", "imageData": "A" * 100}
    sides = {"imageWidth": 100, "imageHeight": 80}
    shapes = [
        {**SHAPE, "points": [[30, 60], [10, 20]]},
        polygon,
        circle,
        point,
        *parts,
        None,
        {**SHAPE, "label": "\ud800"},
    ]
    text(src / "train/a.json", json.dumps({**document, **sides, "shapes": shapes}))
    text(src / "val/b.json", json.dumps({**document, "shapes": [SHAPE]}))
    text(src / "val/c.json", json.dumps({**document, "imagePath": "../drawings/c 2.png", "shapes": []}))
    for name in ("train/a", "val/b", "val/drawings/c 2"):
        sheet(src / f"{name}.png", (50, 40) if name == "train/a" else (100, 80))
    tally = convert(src, tmp_path / "out")
    splits = boxes_of(tmp_path / "out")
    want = [VALVE, ("pump", 50, 5, 90, 25), ("gauge", 40, 30, 60, 50), ("valve", 60, 30, 85, 40)]
    assert splits["train"] == {"a.png": [(name, *np.array(box) / 2) for name, *box in want]}
    assert splits["valid"] == {"b.png": [VALVE], "c 2.png": []}
    assert tally == {
        ("shape without a label and an area ('point')", "train/a.json", "dropped"): 1,
        ("shape without a label and an area ('not an object')", "train/a.json", "dropped"): 1,
        ("shape without a label and an area ('rectangle')", "train/a.json", "dropped"): 1,
        ("shapes of one label and group: one box", "train/a.json", "repaired"): 2,
    }


def test_a_table(tmp_path):
    src = tmp_path / "src"
    for name in ("train/a", "train/b", "train/c", "valid/a"):
        sheet(src / f"{name}.png")
    rows = [HEAD, "a.png,100,80,valve,10,20,30,60", "a.png,100,80,,1,2,3,4", "lost.png,1,1,valve,1,2,3,4"]
    text(src / "train/_annotations.csv", "\n".join([*rows, "b.png,100,80,,,,,"]))
    text(
        src / "valid/_annotations.csv", f'{HEAD.replace(",", ";")}\r\n"a.png";200;160;valve;60;120;20;40\r\n'
    )
    tally = convert(src, tmp_path / "out")
    assert boxes_of(tmp_path / "out") == {
        "train": {"a.png": [VALVE], "b.png": []},
        "valid": {"a.png": [VALVE]},
    }
    assert tally == {
        ("row without a class and four numbers", "train/_annotations.csv", "dropped"): 1,
        ("row of an image that is not there", "train/_annotations.csv", "dropped"): 1,
        ("image that no row names", "train/c.png", "dropped"): 1,
        ("box drawn backwards: turned about", "valid/_annotations.csv", "repaired"): 1,
    }
    text(src / "valid/_annotations.csv", f"{HEAD}\na.png,9,9,valve,1,2,3,4\na.png,8,9,valve,1,2,3,4\n")
    with pytest.raises(DataError, match=r"a\.png has two sizes"):
        convert(src, tmp_path / "again")


def test_an_empty_line_between_classes_would_shift_them(tmp_path):
    sheet(tmp_path / "src/a.png")
    text(tmp_path / "src/a.txt", "1 0.2 0.5 0.2 0.5")
    text(tmp_path / "src/classes.txt", "valve\n\npump\n")
    with pytest.raises(DataError, match=r"classes\.txt: line 2 is empty"):
        convert(tmp_path / "src", tmp_path / "out")
    text(tmp_path / "src/classes.txt", "pump\nvalve\n\n")
    text(tmp_path / "src/a.txt", f"\xff\n1 {LINE[2:]}".encode("latin-1"))
    tally = convert(tmp_path / "src", tmp_path / "out")
    assert boxes_of(tmp_path / "out")["train"]["a.png"] == [VALVE]
    assert tally == {("line that is not all numbers", "a.txt", "dropped"): 1}


def test_labels_of_two_tools_need_a_flag(tmp_path):
    sheet(tmp_path / "src/a.png")
    text(tmp_path / "src/a.xml", xml("a.png"))
    text(tmp_path / "src/a.json", json.dumps({"shapes": [{**SHAPE, "label": "pump"}], "imagePath": ""}))
    with pytest.raises(DataError, match="has labels of voc and labelme; give --format"):
        convert(tmp_path / "src", tmp_path / "out")
    with pytest.raises(DataError, match="no labels of yolo"):
        convert(tmp_path / "src", tmp_path / "out", tool="yolo")
    splits = converted(tmp_path / "src", tmp_path / "out", tool="labelme")
    assert splits["train"]["a.png"] == [("pump", *VALVE[1:])]


def test_links_out_of_the_folder_are_told_and_pipes_are_not_opened(tmp_path):
    sheet(tmp_path / "elsewhere/a.png")
    text(tmp_path / "src/labels/a.txt", LINE)
    text(tmp_path / "src/classes.txt", "valve")
    (tmp_path / "src/images").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "src/round").symlink_to(tmp_path / "src")
    os.mkfifo(tmp_path / "src/labels/b.txt")
    tally = convert(tmp_path / "src", tmp_path / "out")
    assert boxes_of(tmp_path / "out") == {"train": {"a.png": [VALVE]}}
    assert tally == {("file behind a link that leads out of the folder", "images/a.png", "kept"): 1}


def test_long_and_undecodable_names(tmp_path):
    src = tmp_path / "src"
    for folder in ("a", "b"):
        sheet(src / folder / f"{'x' * 251}.png")
        text(src / folder / f"{'x' * 251}.xml", xml("y" * 300 + ".png"))
    sheet(src / b"\xff\xfe.png".decode(errors="surrogateescape"))
    text(src / b"\xff\xfe.xml".decode(errors="surrogateescape"), xml("../../../../etc/passwd"))
    convert(src, tmp_path / "out")
    assert sorted(map(len, boxes_of(tmp_path / "out")["train"])) == [6, 86, 255]


def test_pages_keep_their_names(tmp_path):
    scans = [Image.new("L", (100, 80), tone) for tone in (10, 200)]
    scans[0].save(tmp_path / "scan.tif", save_all=True, append_images=scans[1:])
    pages = [
        Labelled(Sheet(tmp_path / "scan.tif", page), "train", (100, 80), [Box("valve", 10, 20, 20, 40)])
        for page in (1, 2)
    ]
    (tmp_path / "out").mkdir()
    _write(tmp_path / "out", pages, {1: "valve"}, Counter())
    written = json.loads((tmp_path / "out/train/_annotations.coco.json").read_text())
    assert [image["file_name"] for image in written["images"]] == ["scan.tif#page=1", "scan.tif#page=2"]
    assert sorted(path.name for path in (tmp_path / "out/train").iterdir()) == [
        "_annotations.coco.json",
        "scan.tif",
    ]
    shutil.copyfile(tmp_path / "scan.tif", tmp_path / "out/a.tif")
    text(tmp_path / "out/a.xml", xml("a.tif"))
    with pytest.raises(DataError, match="several pages"):
        convert(tmp_path / "out", tmp_path / "again", tool="voc")
