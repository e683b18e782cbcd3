"""Label Studio's json becomes COCO splits: what counts of each task, each region its box, images found."""

import json
import math
from pathlib import Path

import pytest
from labelled_sources import boxes_of, converted, sheet, text

from schematics.coco import read_split
from schematics.convert import convert
from schematics.sheets import DataError
from schematics.uploads import before_upload, served_path, upload_form

VALVE = ("valve", 10, 20, 30, 60)  # x0 y0 x1 y1 on a sheet of 100 x 80
BOX = {"x": 10, "y": 25, "width": 20, "height": 50}  # the same in percent


def region(kind: str = "rectanglelabels", labels=("valve",), **value) -> dict:
    return {
        "id": "r1",
        "type": kind,
        "from_name": "label",
        "to_name": "image",
        "original_width": 100,
        "original_height": 80,
        "image_rotation": 0,
        "value": {**(value or BOX), kind: list(labels)},
    }


def task(image: str, *results: dict, **more) -> dict:
    return {"data": {"image": image}, "annotations": [{"id": 1, "result": list(results)}], **more}


def tasks(path: Path, *rows: dict) -> None:
    text(path, json.dumps(rows, ensure_ascii=False))


def test_regions_of_every_kind(tmp_path):
    for name in ("a", "half", "empty", "waiting", "forgotten"):
        sheet(tmp_path / f"src/images/{name}.png", (50, 40) if name == "half" else (100, 80))
    bare = {**region(), "type": "rectangle", "value": BOX, "id": "r9"}
    regions = [
        region(),
        region("polygonlabels", [" pump "], points=[[50, 12.5], [90, 25], [70, 37.5]]),
        region("ellipselabels", ["gauge"], x=50, y=50, radiusX=10, radiusY=6.25, rotation=90),
        bare,
        {**region("labels", ["fan"]), "id": "r9"},  # <Rectangle> with <Labels>
        {**bare, "id": "r10"},
        region(labels=["valve", "pump"]),
        region("brushlabels", rle=[0, 1], format="rle"),
        region("keypointlabels", x=1, y=2, width=0.4),
        region(labels=[]),
        region(x=1, y=2, width=float("nan"), height=3),
        {"type": "choices", "value": {"choices": ["reviewed"]}},
        "no region",
    ]
    rows = [
        task("/data/local-files/?d=images/a.png", *regions),
        task("/data/local-files/?d=images/half.png", region()),
        task("/data/local-files/?d=images/empty.png"),
        {"data": {"image": "images/waiting.png"}, "annotations": [], "predictions": [{"result": [region()]}]},
        task("/data/local-files/?d=images/lost.png", region()),
        task("/data/local-files/?d=../../etc/passwd.png", region()),
    ]
    tasks(tmp_path / "src/export.json", *rows)
    tally = convert(tmp_path / "src", tmp_path / "out")
    halves = ("valve", 5, 10, 15, 30)  # the sheet was shrunk since
    pump, gauge, fan = ("pump", 50, 10, 90, 30), ("gauge", 45, 30, 55, 50), ("fan", *VALVE[1:])
    found = boxes_of(tmp_path / "out")["train"]
    assert found == {"a.png": [VALVE, pump, gauge, fan], "half.png": [halves], "empty.png": []}
    no_area = "region without a label and an area ('{}')"
    missing = "image that is not there (put the sheets beside the export)"
    counts = {"rectangle": 1, "brushlabels": 1, "keypointlabels": 1, "rectanglelabels": 2, "choices": 1}
    assert tally == {
        **{(no_area.format(kind), "images/a.png", "dropped"): count for kind, count in counts.items()},
        ("region with several labels: the first taken", "images/a.png", "repaired"): 1,
        ("train: box turned by an angle: the upright box around it", "images/a.png", "repaired"): 1,
        (
            "task without an annotation (a prediction is no label: submit it)",
            "images/waiting.png",
            "dropped",
        ): 1,
        (missing, "images/lost.png", "dropped"): 1,
        (missing, "../../etc/passwd.png", "dropped"): 1,
        ("image that no task names", "images/forgotten.png", "dropped"): 1,
    }


@pytest.mark.parametrize("angle", [30, 90, 200.25, 359])
def test_a_turned_rectangle_turns_about_its_first_corner_in_pixels(tmp_path, angle):
    """Label Studio keeps x and y of the corner that was at the upper left before the turn."""
    sheet(tmp_path / "src/valid/a.png")
    tasks(
        tmp_path / "src/valid/a.json", task("a.png", region(x=50, y=50, width=20, height=10, rotation=angle))
    )
    convert(tmp_path / "src", tmp_path / "out")
    turn = math.radians(angle)
    across, down = (math.cos(turn), math.sin(turn)), (-math.sin(turn), math.cos(turn))
    corners = [
        (50 + a * across[0] + b * down[0], 40 + a * across[1] + b * down[1]) for a in (0, 20) for b in (0, 8)
    ]
    xs, ys = zip(*corners, strict=True)
    [found] = boxes_of(tmp_path / "out")["valid"]["a.png"]
    assert found[1:] == pytest.approx((min(xs), min(ys), max(xs), max(ys)), abs=1e-5)


def test_what_counts_of_a_task_is_its_newest_annotation_or_its_ground_truth(tmp_path):
    for name in "abcd":
        sheet(tmp_path / f"src/{name}.png")
    old, new = ({"updated_at": f"2026-01-0{day}", "id": 9 - day} for day in (1, 2))
    pump = region(labels=["pump"])
    versions = {
        "a": [{**new, "result": [region()]}, {**old, "result": [pump]}],
        "b": [{**new, "result": [pump]}, {**old, "result": [region()], "ground_truth": True}],
        "c": [{**new, "result": [pump], "was_cancelled": True}, {**old, "result": [region()]}],
        "d": [{**new, "result": [pump], "was_cancelled": True}],
    }
    rows = [{"data": {"image": f"{name}.png"}, "annotations": rows} for name, rows in versions.items()]
    tasks(tmp_path / "src/export.json", *rows)
    tally = convert(tmp_path / "src", tmp_path / "out")
    assert boxes_of(tmp_path / "out") == {"train": {f"{name}.png": [VALVE] for name in "abc"}}
    assert tally == {
        ("several annotations of a task: the newest", "a.png", "repaired"): 1,
        ("several annotations of a task: the ground truth", "b.png", "repaired"): 1,
        ("task that was skipped", "d.png", "dropped"): 1,
    }


@pytest.mark.parametrize(
    ("named", "lies"),
    [
        ("/data/upload/3/1a2b3c4d-plan_a_1.png", "plan a (1).png"),
        ("/data/upload/3/1a2b3c4d-plan.png", "images/plan.png"),
        ("/data/upload/3/1a2b3c4d-plan.png", "images/1a2b3c4d-plan.png"),
        ("/data/local-files/?d=found%2Flabel-studio/images/%C3%A4%20b.png", "label-studio/images/ä b.png"),
        ("s3://drawings/unit%207/plan.png", "unit 7/plan.png"),
        ("https://host/x/plan.png?X-Amz-Signature=1/2.png", "plan.png"),
        ("1a2b3c4d-plan.png", "deadbeef-plan.png"),
    ],
)
def test_images_are_found_by_the_names_that_tasks_give_them(tmp_path, named, lies):
    """The last one is a file whose own name looks like an upload's: it is not the one that was meant."""
    sheet(tmp_path / f"src/{lies}")
    sheet(tmp_path / "src/other.png")
    tasks(tmp_path / "src/export.json", task(named, region()), task("other.png", region()))
    want = {"other.png": [VALVE]} | ({} if "deadbeef" in lies else {Path(lies).name: [VALVE]})
    assert converted(tmp_path / "src", tmp_path / "out") == {"train": want}


def test_of_two_images_that_an_upload_may_have_been_none_is_taken(tmp_path):
    for name in ("one/plan", "two/plan", "three"):
        sheet(tmp_path / f"src/{name}.png")
    rows = [task("/data/upload/3/1a2b3c4d-plan.png", region()), task("three.png", region())]
    tasks(tmp_path / "src/export.json", *rows)
    assert converted(tmp_path / "src", tmp_path / "out") == {"train": {"three.png": [VALVE]}}


def test_coco_and_yolo_of_uploaded_sheets_find_them_under_their_own_names(tmp_path):
    """Such as Label Studio 1.10 and later export them without the images."""
    sheet(tmp_path / "coco/images/plan a.png")
    sheet(tmp_path / "yolo/images/plan a.png")
    row = {"id": 0, "file_name": "images\\1a2b3c4d-plan a.png", "width": 100, "height": 80}
    box = {"id": 0, "image_id": 0, "category_id": 0, "bbox": [10, 20, 20, 40]}
    document = {"images": [row], "categories": [{"id": 0, "name": "valve"}], "annotations": [box]}
    text(tmp_path / "coco/result.json", json.dumps(document))
    [found] = read_split(tmp_path / "coco").sheets
    assert found.path == tmp_path / "coco/images/plan a.png" and found.boxes.tolist() == [[10, 20, 30, 60]]
    text(tmp_path / "yolo/classes.txt", "valve\n")
    text(tmp_path / "yolo/notes.json", '{"categories": [{"id": 0, "name": "valve"}], "info": {}}')
    text(tmp_path / "yolo/labels/1a2b3c4d-plan_a.txt", "0 0.2 0.5 0.2 0.5\n")
    tally = convert(tmp_path / "yolo", tmp_path / "out")
    assert boxes_of(tmp_path / "out") == {"train": {"plan a.png": [VALVE]}}
    place = "images/plan a.png for 1a2b3c4d-plan_a"
    assert tally == {("image found by its name before the upload", place, "repaired"): 1}


def test_names_of_uploads():
    assert served_path("plans/a.png") == "plans/a.png" and served_path("c:/plans/a.png") == "c:/plans/a.png"
    assert served_path("/data/local-files/?other=1") == ""
    assert before_upload("x/12345678-12345678-a.png") == "x/12345678-a.png"
    assert before_upload("1234567-a.png") == "1234567-a.png" and before_upload("12345678-") == "12345678-"
    assert upload_form(" P&ID a (2).PNG") == "pid_a_2.png"


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ('[{"data": {"image": "a.png"}, "annotations": [', r"a\.json: not valid JSON .*; export it again"),
        (json.dumps([task("a.png", region())] * 2), r"a\.png: labelled by two tasks, in a\.json; keep one"),
        (json.dumps([task("a.png")]), "no sheet with a labelled box$"),
        (json.dumps([task("a.png", region(), annotations=[])]), "1 x task without an annotation"),
        (
            json.dumps([{"data": {}, "annotations": []}]),
            r"1 x task without an annotation .* \(a task without",
        ),
        (json.dumps([{"data": 3, "annotations": 4}, 5, None, {"labels": [[]]}]), "neither VOC or CVAT"),
    ],
)
def test_what_is_no_set_of_annotated_tasks_is_refused_by_name(tmp_path, content, word):
    sheet(tmp_path / "src/a.png")
    text(tmp_path / "src/a.json", content)
    with pytest.raises(DataError, match=word) as caught:
        convert(tmp_path / "src", tmp_path / "out")
    assert "\n" not in str(caught.value) and [path.name for path in tmp_path.iterdir()] == ["src"]
