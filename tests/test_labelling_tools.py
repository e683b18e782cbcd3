"""What predict writes for a labelling tool comes back from it as it was: boxes, classes, empty sheets."""

import json
import os
import shutil
import unicodedata
from copy import deepcopy
from pathlib import Path

import cv2
import numpy as np
import pytest
from label_studio_converter import Converter
from label_studio_converter.imports.coco import convert_coco_to_ls
from label_studio_converter.imports.yolo import convert_yolo_to_ls
from labelled_sources import boxes_of, sheet
from PIL import Image
from pycocotools.coco import COCO

from schematics.convert import convert
from schematics.formats.source import read_xml
from schematics.labelling import TOOLS, Box, Labelled, lay_out, tool_names
from schematics.sheets import DataError, Sheet, read_sheet, sheet_size

GIVEN = Path(__file__).parent / "cases/datumaro/given.json"
NAMES = ("valve, gate", "pump/left", "Öl – 3 µm", 'a "b" & <c>', "NO")
SIZES = {"a b#1.png": (1234, 777), "sub/a_b_1.jpg": (640, 481), "bare.png": (50, 40)}
WANT = ("a_b_1.png", "a_b_1-2.jpg", "bare.png", "plan_page_2.png")  # their names in the tools


@pytest.fixture(scope="module")
def laid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four sheets with boxes drawn at random, two of them partly and one wholly outside, for each tool."""
    folder, rng = tmp_path_factory.mktemp("laid"), np.random.default_rng(0)
    for name, size in SIZES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(folder / name), rng.integers(0, 255, size[::-1], np.uint8))
    pages = [Image.new("L", (300, 200), tone) for tone in (255, 200)]
    pages[0].save(folder / "plan.pdf", save_all=True, append_images=pages[1:], resolution=100)
    sheets = []
    for drawing in (*(Sheet(folder / name) for name in SIZES), Sheet(folder / "plan.pdf", 2)):
        width, height = sheet_size(drawing)
        drawn = [(*(rng.random(2) * [width, height] * 0.8), *(rng.random(2) * 30 + 3)) for _ in range(10)]
        boxes = [Box(NAMES[k % 5], *sides, {"score": 0.05 + k / 20}) for k, sides in enumerate(drawn)]
        if drawing.path.name == "bare.png":
            boxes = []
        elif drawing.page:
            boxes += [Box("NO", -5, -6, 20, 20), Box("NO", width - 7, 9, 90.5, 20), Box("NO", -50, 9, 20, 20)]
        sheets.append(Labelled(drawing, "train", (width, height), boxes))
    lay_out(folder, list(TOOLS), sheets, dict(enumerate(NAMES, start=1)), "detector/model.pt")
    return folder


@pytest.fixture(scope="module")
def want(laid: Path) -> dict[str, list[tuple]]:
    """The boxes of each sheet, as our own COCO holds them."""
    document = json.loads((laid / "coco/_annotations.coco.json").read_text())
    names = {row["id"]: row["name"] for row in document["categories"]}
    boxes: dict[int, list[tuple]] = {row["id"]: [] for row in document["images"]}
    for row in document["annotations"]:
        x, y, width, height = row["bbox"]
        boxes[row["image_id"]].append((names[row["category_id"]], x, y, x + width, y + height))
    found = {row["file_name"]: boxes[row["id"]] for row in document["images"]}
    assert tuple(found) == WANT and [len(rows) for rows in found.values()] == [10, 10, 0, 12]
    assert found["plan_page_2.png"][10][1:] == (0, 0, 15, 14) and found["plan_page_2.png"][11][3] == 600
    return found


def assert_alike(folder: Path, want: dict[str, list[tuple]]) -> None:
    """Whether the splits in a folder hold the same sheets, classes and, within 0.01 px, boxes."""
    splits = boxes_of(folder).values()
    found = {Path(name).name: boxes for split in splits for name, boxes in split.items()}
    assert set(found) == set(want)
    for name, boxes in want.items():
        assert [box[0] for box in sorted(found[name])] == [box[0] for box in sorted(boxes)]
        sides = [[box[1:] for box in sorted(rows)] for rows in (found[name], boxes)]
        np.testing.assert_allclose(*sides, rtol=0, atol=0.01)


def submitted(laid: Path, file: Path) -> Path:
    """The tasks as Label Studio holds them once each prediction was submitted as it is."""
    tasks = json.loads((laid / "label-studio/tasks.json").read_text(encoding="utf-8"))
    for number, task in enumerate(tasks, start=1):
        result = deepcopy(task["predictions"][0]["result"])
        annotation = {"id": number, "created_at": "2026-01-01", "was_cancelled": False, "result": result}
        task |= {"id": number, "annotations": [annotation]}
    file.write_text(json.dumps(tasks))
    return file


def beside(laid: Path, folder: Path) -> Path:
    """The folder of an export, with the sheets put into it."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for image in (laid / "label-studio/images").iterdir():
        (folder / "images" / image.name).write_bytes(image.read_bytes())
    return folder


@pytest.mark.parametrize("form", ["JSON", "JSON_MIN", "COCO", "YOLO"])
def test_label_studios_own_exports_of_what_it_was_given_come_back(laid, want, tmp_path, form):
    """Percent are written with nine digits, and Label Studio hands them on."""
    interface = (laid / "label-studio/label_config.xml").read_text(encoding="utf-8")
    tool = Converter(interface, project_dir=str(tmp_path), download_resources=False)
    tool.convert(
        str(submitted(laid, tmp_path / "tasks.json")), str(tmp_path / "tool/export"), form, is_dir=False
    )
    source = beside(laid, tmp_path / "tool/export")
    if form == "COCO":  # which needs no converting
        assert_alike(source.parent, want)
    else:
        convert(source, tmp_path / "out")
        assert_alike(tmp_path / "out", want)


def test_predictions_that_nobody_submitted_are_no_labels(laid, tmp_path):
    with pytest.raises(DataError, match="no sheet with a labelled box: 1 x task without an annotation"):
        convert(laid / "label-studio", tmp_path / "out")
    tasks = json.loads((laid / "label-studio/tasks.json").read_text())
    [prediction] = tasks[0]["predictions"]
    assert prediction["model_version"] == "detector/model.pt" and prediction["score"] == 0.05
    assert tasks[2]["predictions"][0]["result"] == []


def test_an_export_put_beside_the_tasks_that_it_answers_is_read(laid, want, tmp_path):
    folder = beside(laid, tmp_path / "export")
    (folder / "tasks.json").write_bytes((laid / "label-studio/tasks.json").read_bytes())
    submitted(laid, folder / "export.json")
    convert(folder, tmp_path / "read")
    assert_alike(tmp_path / "read", want)


@pytest.mark.parametrize("tool", ["yolo", "coco"])
def test_label_studio_takes_our_yolo_and_coco(laid, want, tmp_path, tool):
    file = beside(laid, tmp_path / "export") / "tasks.json"
    if tool == "yolo":
        convert_yolo_to_ls(str(laid / "yolo"), str(file))
    else:
        convert_coco_to_ls(str(laid / "coco/_annotations.coco.json"), str(file))
    tasks = json.loads(file.read_text())
    assert {task["data"]["image"].rpartition("/")[2] for task in tasks} == set(WANT)
    convert(file.parent, tmp_path / "read")
    assert_alike(tmp_path / "read", want)


def test_pycocotools_takes_our_coco_and_we_take_our_own_yolo_and_cvat(laid, want, tmp_path):
    """CVAT's xml has four digits, of which CVAT keeps two in its exports."""
    index = COCO(str(laid / "coco/_annotations.coco.json"))
    assert len(index.getAnnIds()) == sum(map(len, want.values())) and len(index.getImgIds()) == 4
    for tool in ("yolo", "cvat"):
        convert(laid / tool, tmp_path / tool)
        assert_alike(tmp_path / tool, want)
    labels = json.loads((laid / "cvat/labels.json").read_text())
    assert [label["name"] for label in labels] == list(NAMES)
    listed = [label.findtext("name") for label in read_xml(laid / "cvat/annotations.xml").iter("label")]
    assert listed == list(NAMES)


@pytest.mark.parametrize("form", ["cvat", "yolo", "coco_instances"])
def test_what_datumaro_made_of_our_xml_for_cvat_comes_back(tmp_path, form):
    """CVAT imports and exports by Datumaro: 0.5.0's files, frozen by `python tests/tools/round_trip.py`."""
    want = {name: [tuple(box) for box in boxes] for name, boxes in json.loads(GIVEN.read_text()).items()}
    shutil.copytree(GIVEN.parent / form, tmp_path / "tool/export")
    place = {"cvat": "images", "yolo": "obj_annotations_data", "coco_instances": "images/annotations"}[form]
    for name, size in zip(want, ((1234, 777), (640, 481), (50, 40)), strict=True):
        sheet(tmp_path / "tool/export" / place / name, size)
    convert(tmp_path / "tool/export", tmp_path / "out", test=0.4 if form == "coco_instances" else 0)
    assert_alike(tmp_path / "out", want)


def test_sheets_are_what_we_see_under_names_that_no_tool_changes(laid):
    page = read_sheet(laid / "cvat/images/plan_page_2.png")
    assert page.shape == (400, 600) and page[9, 9] == 200, "page 2, at 200 dpi"
    assert (laid / "yolo/images/a_b_1.png").read_bytes() == (laid / "a b#1.png").read_bytes()
    decomposed = unicodedata.normalize("NFD", "ä")
    sheets = [Sheet(laid / name) for name in SIZES] + [Sheet(Path(f"{decomposed}/{decomposed}.TIF"), 1)]
    assert tool_names(sheets) == [*WANT[:3], "ä_page_1.png"]


def test_a_turned_photograph_is_turned_before_a_tool_sees_it(laid, tmp_path):
    turned = Image.new("L", (40, 20), 255)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "photo.jpg", exif=exif)
    photo = Labelled(Sheet(tmp_path / "photo.jpg"), "train", (20, 40), [Box("a", 1, 30, 9, 9)])
    lay_out(tmp_path, ["coco"], [photo], {1: "a"})
    assert Image.open(tmp_path / "coco/photo.png").size == (20, 40)


def test_a_folder_of_a_tool_in_which_corrections_may_lie_is_never_written_to(laid, tmp_path):
    (tmp_path / "cvat").mkdir()
    with pytest.raises(DataError, match=r"cvat: exists already; choose another folder"):
        lay_out(tmp_path, ["coco", "cvat"], [], {})
    assert os.listdir(tmp_path) == ["cvat"]
