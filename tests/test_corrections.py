"""What a person corrected is counted: each box is kept, moved, renamed, removed or added, once."""

import json
from collections import Counter

import numpy as np
import pytest
from labelled_sources import sheet

from cluster.errors import UserError
from detection.corrections import CorrectionsConfig, Marked, corrections, main, read_marked, sheet_key
from schematics.coco import Category, write_split


def counted(before: list[tuple], after: list[tuple], size=(100, 100)) -> Counter:
    """Boxes are class, x0, y0, x1, y1. size: of the sheet in `after`."""
    sheets = [
        Marked(sides, np.array([row[1:] for row in rows], float).reshape(-1, 4), [row[0] for row in rows])
        for rows, sides in ((before, (100, 100)), (after, size))
    ]
    return Counter(corrections(*sheets, iou=0.5, tolerance=1.0))


A, B = ("a", 10, 10, 30, 30), ("b", 10, 10, 30, 30)


def test_each_box_is_counted_once():
    assert counted([A], [("a", 10.9, 10, 30, 29.2)]) == {("kept", "a"): 1}
    assert counted([A], [("a", 12, 10, 32, 30)]) == {("moved", "a"): 1}
    assert counted([A], [("b", 12, 10, 32, 30)]) == {("renamed", "b"): 1}
    assert counted([A], [("a", 25, 10, 45, 30)]) == {("removed", "a"): 1, ("added", "a"): 1}
    assert counted([A], []) == {("removed", "a"): 1} and counted([], [A]) == {("added", "a"): 1}
    assert counted([], []) == {}
    assert counted([A], [("a", 20, 20, 60, 60)], (200, 200)) == {("kept", "a"): 1}, "the sheet was enlarged"


def test_the_box_that_stayed_is_not_taken_for_one_nearby_or_of_another_class():
    assert counted([A, B], [B, A]) == {("kept", "a"): 1, ("kept", "b"): 1}
    near = ("a", 12, 10, 32, 30)
    assert counted([near, A], [A]) == {("kept", "a"): 1, ("removed", "a"): 1}
    assert counted([A, A], [A]) == {("kept", "a"): 1, ("removed", "a"): 1}, "a double was taken out"
    assert counted([B, near], [A]) == {("moved", "a"): 1, ("removed", "b"): 1}, (
        "its class outweighs its place"
    )


@pytest.mark.parametrize(
    "name",
    ["plans/a b.pdf#page=2", "a_b_page_2.png", "1a2b3c4d-a_b_page_2.png", "a_b_page_2_png.rf.0a1b.jpg"],
)
def test_a_sheet_keeps_its_key_in_the_tools(name):
    assert sheet_key(name) == "a_b_page_2"


@pytest.fixture
def places(tmp_path):
    """Predictions on two sheets and labels of one of these and of another."""
    sheet(tmp_path / "labels/train/deadbeef-a_1.png")
    sheet(tmp_path / "labels/train/c.png")
    images = [
        {"id": n, "file_name": name, "width": 100, "height": 80}
        for n, name in enumerate(("deadbeef-a_1.png", "c.png"), 1)
    ]
    boxes = [("valve", 10, 20, 20, 40), ("pump", 50, 20, 20, 40), ("pump", 70, 5, 9, 9)]
    rows = [{"image_id": 1, "category_id": 1 + (n == "pump"), "bbox": box} for n, *box in boxes]
    rows.append({"image_id": 2, "category_id": 1, "bbox": [1, 1, 9, 9]})
    write_split(tmp_path / "labels/train", images, [Category(1, "valve"), Category(2, "pump")], rows)
    images = [
        {**images[0], "file_name": "x/a 1.png", "labelled_as": "a_1.png"},
        {**images[1], "file_name": "b"},
    ]
    rows = [rows[0], {**rows[1], "category_id": 1}, {**rows[2], "bbox": [1, 70, 9, 9]}]
    categories = [{"id": 1, "name": "valve"}, {"id": 2, "name": "pump"}]
    document = {"images": images, "annotations": rows, "categories": categories}
    (tmp_path / "predictions.json").write_text(json.dumps(document))
    return tmp_path, tmp_path / "labels"


def test_predictions_are_held_against_the_labels_made_of_them(places, capsys):
    main(CorrectionsConfig(places=places, json=True))
    told = json.loads(capsys.readouterr().out)
    counts = {"kept": 1, "moved": 0, "renamed": 1, "removed": 1, "added": 1}
    assert told == {
        **{"sheets": 1, "boxes": 3, "corrections": 3, **counts},
        "classes": {"pump": {**counts, "kept": 0}, "valve": {**dict.fromkeys(counts, 0), "kept": 1}},
    }
    main(CorrectionsConfig(places=places))
    told = capsys.readouterr().out.splitlines()
    assert told[-4].split() == ["total", "1", "0", "1", "1", "1"]
    assert told[-3] == "1 sheets: 3 corrections; without proposals 3 boxes were to be drawn"
    assert told[-2:] == [
        f"in {place} only: 1 sheets, such as {name}" for place, name in zip(places, "bc", strict=True)
    ]


def test_what_cannot_be_compared_is_refused(places, tmp_path):
    with pytest.raises(UserError, match="name two"):
        main(CorrectionsConfig(places=places[:1]))
    (tmp_path / "predictions.json").write_text('{"images": [{"id": 1}], "categories": [], "annotations": []}')
    with pytest.raises(UserError, match=r"no predictions of detection.predict \(KeyError"):
        read_marked(tmp_path)
    images = [{"id": n, "file_name": f"{n}/a.png", "width": 9, "height": 9} for n in (1, 2)]
    document = {"images": images, "categories": [], "annotations": []}
    (tmp_path / "predictions.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="two sheets are called a; keep one"):
        read_marked(tmp_path)
    document["images"] = [{**images[0], "file_name": "other.png"}]
    (tmp_path / "predictions.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="no sheet in common, by name"):
        main(CorrectionsConfig(places=places))
