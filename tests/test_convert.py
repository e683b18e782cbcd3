"""VOC and YOLO folders become COCO splits with the same boxes; nothing is written over or left half done."""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from schematics.coco import read_split
from schematics.convert import convert, main
from schematics.sheets import DataError

BOXES = [("valve", 10, 20, 30, 60), ("pump", 50, 5, 90, 25)]  # x0 y0 x1 y1 on a sheet of 100 x 80


def sheet(path: Path, size: tuple[int, int] = (100, 80)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((size[1], size[0]), 255, np.uint8))


def voc(path: Path, file_name: str, size: tuple[int, int] = (100, 80), boxes=BOXES) -> None:
    objects = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax>"
        f"<ymax>{y1}</ymax></bndbox></object>"
        for name, x0, y0, x1, y1 in boxes
    )
    width, height = size
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"<annotation><filename>{file_name}</filename><size><width>{width}</width><height>{height}</height>"
        f"<depth>3</depth></size>{objects}</annotation>"
    )


def yolo(path: Path, names: list[str], boxes=BOXES, extra: str = "") -> None:
    lines = [
        f"{names.index(name)} {(x0 + x1) / 200} {(y0 + y1) / 160} {(x1 - x0) / 100} {(y1 - y0) / 80}"
        for name, x0, y0, x1, y1 in boxes
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n" + extra)


def boxes_of(folder: Path) -> dict[str, list[tuple]]:
    split = read_split(folder)
    return {
        sheet.file_name: [
            (split.categories[label - 1].name, *np.round(box, 6))
            for label, box in zip(sheet.labels, sheet.boxes, strict=True)
        ]
        for sheet in split.sheets
    }


def test_voc_with_imagesets(tmp_path):
    for name in ("a", "b", "c"):
        sheet(tmp_path / f"src/JPEGImages/{name}.jpg")
        voc(tmp_path / f"src/Annotations/{name}.xml", f"C:\\drawings\\{name}.jpg")
    sets = tmp_path / "src/ImageSets/Main"
    sets.mkdir(parents=True)
    for split, names in (("train", "a"), ("val", "b"), ("test", "c 1")):
        (sets / f"{split}.txt").write_text(names + "\n")
    assert convert(tmp_path / "src", tmp_path / "out") == {}
    for split, name in (("train", "a.jpg"), ("valid", "b.jpg"), ("test", "c.jpg")):
        assert boxes_of(tmp_path / "out" / split) == {name: BOXES}
        assert read_split(tmp_path / "out" / split).findings == []


def test_voc_beside_the_sheets_with_flaws(tmp_path):
    """Roboflow's VOC export: xml and sheet side by side. The file name is wrong, the sheet was shrunk."""
    src = tmp_path / "src"
    sheet(src / "train/a.png")
    voc(
        src / "train/a.xml",
        "elsewhere.png",
        size=(0, 0),
        boxes=[*BOXES, ("", 1, 1, 2, 2), ("fan", "x", 1, 2, 2)],
    )
    sheet(src / "valid/b.png", (50, 40))
    voc(src / "valid/b.xml", "b.png", size=(100, 80))
    voc(src / "valid/lost.xml", "lost.png")
    sheet(src / "valid/cut.png")
    (src / "valid/cut.png").write_bytes((src / "valid/cut.png").read_bytes()[:-20])
    voc(src / "valid/cut.xml", "cut.png")
    assert convert(src, tmp_path / "out") == {
        ("object without a name and four numbers", "train/a.xml", "dropped"): 2,
        ("label file without its image", "valid/lost.xml", "dropped"): 1,
        ("image truncated or unreadable", "valid/cut.png", "dropped"): 1,
    }
    assert boxes_of(tmp_path / "out/train") == {"a.png": BOXES}
    assert boxes_of(tmp_path / "out/valid") == {"b.png": [(name, *np.array(box) / 2) for name, *box in BOXES]}


@pytest.mark.parametrize("layout", ["train/{}/a", "{}/train/a", "{}/val/a"])
@pytest.mark.parametrize("names", ["names: [pump, valve]", "names: {0: pump, 1: valve}"])
def test_yolo_layouts(tmp_path, layout, names):
    src = tmp_path / "src"
    sheet(src / (layout.format("images") + ".png"))
    yolo(src / (layout.format("labels") + ".txt"), ["pump", "valve"])
    sheet(src / (layout.format("images") + "_empty.png"))
    (src / "data.yaml").write_text(f"path: /nowhere\nnc: 2\n{names}\n")
    empty = layout.format("images") + "_empty.png"
    kept = ("sheet without a label file: taken as one without boxes", empty, "kept")
    assert convert(src, tmp_path / "out") == {kept: 1}
    split = "valid" if "val" in layout else "train"
    assert boxes_of(tmp_path / "out" / split) == {"a.png": BOXES, "a_empty.png": []}
    assert [category.name for category in read_split(tmp_path / "out" / split).categories] == [
        "pump",
        "valve",
    ]


def test_yolo_side_by_side_with_outlines_scores_and_broken_lines(tmp_path):
    src = tmp_path / "src"
    sheet(src / "a.png")
    extra = (
        "0 0.1 0.1 0.3 0.1 0.2 0.5\n1 0.5 0.5 0.2 0.2 0.93\n\n7 .5 .5 .1 .1\nvalve .5 .5 .1 .1\n0 .5 .5 .1\n"
    )
    yolo(src / "a.txt", ["valve", "pump"], extra=extra)
    (src / "classes.txt").write_text("valve\npump\n")
    assert convert(src, tmp_path / "out") == {
        ("line of a class that is not listed", "a.txt", "dropped"): 1,
        ("line that is not all numbers", "a.txt", "dropped"): 1,
        ("line of 3 numbers is neither a box nor an outline (poses need kpt_shape)", "a.txt", "dropped"): 1,
    }
    want = [*BOXES, ("valve", 10, 8, 30, 40), ("pump", 40, 32, 60, 48)]
    assert boxes_of(tmp_path / "out/train") == {"a.png": want}


def test_sheets_of_one_name_in_two_folders_both_arrive(tmp_path):
    src = tmp_path / "src"
    for folder in ("plant", "hall"):
        sheet(src / folder / "a.png")
        voc(src / folder / "a.xml", "a.png")
    convert(src, tmp_path / "out")
    assert list(boxes_of(tmp_path / "out/train").values()) == [BOXES, BOXES]


@pytest.mark.parametrize(
    ("prepare", "word"),
    [
        (lambda src: None, "neither VOC"),
        (lambda src: (src / "data.yaml").write_text("names: 3"), "data.yaml: no class names"),
        (lambda src: (src / "data.yaml").write_text("[:"), "data.yaml: no class names"),
        (lambda src: (src / "data.yaml").write_text("names: [valve]"), "no sheet with a labelled box"),
        (lambda src: (src / "a.xml").write_text("<annotation><object>"), "a.xml: not valid XML"),
    ],
)
def test_a_source_that_cannot_be_converted_leaves_nothing(tmp_path, prepare, word):
    sheet(tmp_path / "src/a.png")
    prepare(tmp_path / "src")
    with pytest.raises(DataError, match=word) as caught:
        convert(tmp_path / "src", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_nothing_is_written_over(tmp_path):
    sheet(tmp_path / "src/a.png")
    voc(tmp_path / "src/a.xml", "a.png")
    convert(tmp_path / "src", tmp_path / "out")
    before = json.loads((tmp_path / "out/train/_annotations.coco.json").read_text())
    with pytest.raises(DataError, match="exists already"):
        convert(tmp_path / "src", tmp_path / "out")
    assert json.loads((tmp_path / "out/train/_annotations.coco.json").read_text()) == before


def test_what_was_left_out_is_printed_by_its_kind(tmp_path, capsys):
    src = tmp_path / "src"
    for number in range(5):
        sheet(src / f"{number}.png")
        yolo(src / f"{number}.txt", ["valve", "pump"], extra="9 .5 .5 .1 .1\n")
    (src / "classes.txt").write_text("valve\npump\n")
    main(argparse.Namespace(src=src, out=tmp_path / "out", valid=0.0, test=0.0, seed=0, format=None))
    assert capsys.readouterr().out.splitlines() == [
        "dropped: 5 line of a class that is not listed: 0.txt, 1.txt, 2.txt and 2 more",
        f"wrote {tmp_path / 'out/train'}",
        "no valid split, which finetuning needs: give --valid 0.2 to draw one",
        f"next: python -m schematics.check {tmp_path / 'out'}",
    ]
