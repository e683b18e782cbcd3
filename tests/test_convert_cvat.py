"""CVAT's own xml becomes COCO splits: each shape its upright box, and what has none is named."""

import cmath
import math
from pathlib import Path

import pytest
from labelled_sources import boxes_of, converted, sheet, text

from schematics.coco import find_splits
from schematics.convert import convert
from schematics.sheets import DataError

VALVE = ("valve", 10, 20, 30, 60)  # x0 y0 x1 y1 on a sheet of 100 x 80
BOX = '<box label="valve" source="manual" occluded="0" xtl="10.00" ytl="20" xbr="30" ybr="60.0" z_order="0"/>'


def cvat(*images: str, subset: str = "") -> str:
    meta = f"<meta><task><id>7</id><mode>annotation</mode><subset>{subset}</subset></task></meta>"
    return (
        f'<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version>{meta}{"".join(images)}'
        + ("</annotations>")
    )


def image(name: str, *shapes: str, more: str = 'width="100" height="80"') -> str:
    return f'<image id="0" name="{name}" {more}>{"".join(shapes)}</image>'


def test_a_task_with_every_shape(tmp_path):
    src = tmp_path / "src"
    for name in ("images/a", "images/plant 1/b", "images/empty", "images/forgotten"):
        sheet(src / f"{name}.png", (50, 40) if name == "images/a" else (100, 80))
    shapes = [
        BOX.replace("/>", '><attribute name="hand">left</attribute></box>'),
        '<polygon label=" pump " points="50.00,5.00;90.00,15.00;70.00,25.00;" z_order="0"/>',
        '<ellipse label="gauge" cx="50" cy="40" rx="10" ry="5" rotation="90.00"/>',
        '<mask label="flange" rle="1, 2, 1" left="40" top="60" width="2" height="3"/>',
        '<polyline label="valve" points="1,2;3,4"/>',
        '<points label="valve" points="1,2"/>',
        '<skeleton label="valve"><points label="tip" points="1,2"/></skeleton>',
        '<box label="" xtl="1" ytl="2" xbr="3" ybr="4"/>',
        '<box label="valve" xtl="1" ytl="2" xbr="nan" ybr="4"/>',
        '<polygon label="valve" points=""/>',
        '<tag label="reviewed"/>',
    ]
    images = [image("a.png", *shapes), image("plant 1/b.png", BOX, more=""), image("empty.png")]
    text(src / "annotations.xml", cvat(*images, image("lost.png", BOX), image("../../etc/passwd", BOX)))
    tally = convert(src, tmp_path / "out")
    want = [VALVE, ("pump", 50, 5, 90, 25), ("gauge", 45, 30, 55, 50), ("flange", 40, 60, 42, 63)]
    halves = [(name, *(side / 2 for side in sides)) for name, *sides in want]  # the sheet was shrunk since
    assert boxes_of(tmp_path / "out") == {"train": {"a.png": halves, "b.png": [VALVE], "empty.png": []}}
    assert tally == {
        **{
            (f"shape without a label and an area ('{kind}')", "images/a.png", "dropped"): count
            for kind, count in (
                ("polyline", 1),
                ("points", 1),
                ("skeleton", 1),
                ("box", 2),
                ("polygon", 1),
                ("tag", 1),
            )
        },
        ("image that is not there (save the images with the export)", "lost.png", "dropped"): 1,
        ("image that is not there (save the images with the export)", "../../etc/passwd", "dropped"): 1,
        ("image that the xml does not name", "images/forgotten.png", "dropped"): 1,
    }


@pytest.mark.parametrize("angle", [0.5, 30, 90, 200.25, 359])
def test_a_turned_box_becomes_the_upright_box_around_it_and_is_said(tmp_path, angle):
    sheet(tmp_path / "src/val/a.png")
    shape = f'<box label="valve" xtl="40" ytl="30" xbr="70" ybr="40" rotation="{angle}"/>'
    text(tmp_path / "src/val/a.xml", cvat(image("a.png", shape)))
    tally = convert(tmp_path / "src", tmp_path / "out")
    middle = 55 + 35j
    corners = [middle + cmath.rect(1, math.radians(angle)) * (x + y * 1j) for x in (-15, 15) for y in (-5, 5)]
    xs, ys = [corner.real for corner in corners], [corner.imag for corner in corners]
    [found] = boxes_of(tmp_path / "out")["valid"]["a.png"]
    assert found[1:] == pytest.approx((min(xs), min(ys), max(xs), max(ys)), abs=1e-5)
    assert tally == {("valid: box turned by an angle: the upright box around it", "val/a.png", "repaired"): 1}


def test_subsets_are_splits_and_tell_images_of_one_name_apart(tmp_path):
    """A project's export, and a task's of which the subset stands in its head."""
    src = tmp_path / "project"
    for subset in ("Train", "Validation", "default"):
        sheet(src / f"images/{subset}/a.png")
    images = [
        image("a.png", BOX.replace("valve", name), more=f'subset="{subset}" task_id="1"')
        for subset, name in (("Validation", "pump"), ("Train", "valve"), ("default", "fan"))
    ]
    text(src / "annotations.xml", cvat(*images))
    tally = convert(src, tmp_path / "out")
    found = {split: sheets["a.png"][0][0] for split, sheets in boxes_of(tmp_path / "out").items()}
    assert found == {"train": "valve", "valid": "pump"}
    assert tally["sheet that no list of the splits names", "images/default/a.png", "dropped"] == 1
    for number, subset in enumerate(("Train", "Test")):
        sheet(tmp_path / f"tasks/job_{number}/images/a.png")
        text(tmp_path / f"tasks/job_{number}/annotations.xml", cvat(image("a.png", BOX), subset=subset))
    splits = converted(tmp_path / "tasks", tmp_path / "again")
    assert splits == {"test": {"a.png": [VALVE]}, "train": {"a.png": [VALVE]}}


def test_an_image_is_not_taken_from_another_split(tmp_path):
    for name in ("images/valid/a", "images/b"):
        sheet(tmp_path / f"src/{name}.png")
    more = 'subset="train"'
    text(tmp_path / "src/a.xml", cvat(image("a.png", BOX, more=more), image("b.png", BOX, more=more)))
    assert converted(tmp_path / "src", tmp_path / "out") == {"train": {"b.png": [VALVE]}}


def test_shapes_of_one_group_are_kept_apart_and_said(tmp_path):
    sheet(tmp_path / "src/a.png")
    part = '<polygon label="{}" points="1,2;9,2;9,8" group_id="{}"/>'
    shapes = [part.format("valve", group) for group in (3, 3, 0, 0, 4)] + [part.format("pump", 3)]
    text(tmp_path / "src/a.xml", cvat(image("a.png", *shapes[:4]), image("b.png", *shapes)))
    sheet(tmp_path / "src/b.png")
    tally = convert(tmp_path / "src", tmp_path / "out")
    kind = "shapes of one label and group: a box for each"
    assert tally == {(kind, "a.png", "kept"): 2, (kind, "b.png", "kept"): 2}


TRACK = '<track id="0" label="valve"><box frame="0" outside="0" xtl="1" ytl="2" xbr="3" ybr="4"/></track>'


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (cvat(TRACK), r'a\.xml: has tracks of a video .* export it as "CVAT for images 1\.1"'),
        (cvat(image("a.png", BOX), image("a.png", BOX)), r"a\.png: labelled twice, in a\.xml; keep one"),
        (cvat(image("a.png", BOX), image("old/A.PNG", BOX)), r"a\.png: labelled twice"),
        (cvat(image("a.png", BOX))[:-20], r"a\.xml: not valid XML"),
        (cvat(image("a.png")), "no sheet with a labelled box"),
        (
            cvat(image("b.png", BOX)),
            r"no sheet with a labelled box: 1 x image that is not there .* \(b\.png\)",
        ),
        ('<!DOCTYPE a [<!ENTITY a "lol">]>' + cvat(image("&a;", BOX))[38:], r"a\.xml: has a document type"),
        (("\ufeff<!DOCTYPE a []>" + cvat()[38:]).encode("utf-16-le"), r"a\.xml: has a document type"),
    ],
)
def test_what_is_no_set_of_labelled_images_is_refused_by_name(tmp_path, content, word):
    sheet(tmp_path / "src/a.png")
    text(tmp_path / "src/a.xml", content)
    with pytest.raises(DataError, match=word) as caught:
        convert(tmp_path / "src", tmp_path / "out")
    assert "\n" not in str(caught.value) and [path.name for path in tmp_path.iterdir()] == ["src"]


def test_two_files_that_label_one_image_are_refused_and_voc_beside_cvat_needs_a_flag(tmp_path):
    src: Path = tmp_path / "src"
    sheet(src / "a.png")
    for name in ("one.xml", "two.xml"):
        text(src / name, cvat(image("a.png", BOX)))
    with pytest.raises(DataError, match=r"labelled twice, in one\.xml and two\.xml"):
        convert(src, tmp_path / "out")
    text(src / "two.xml", "<annotation><filename>a.png</filename></annotation>")
    with pytest.raises(DataError, match="has labels of voc and cvat; give --format"):
        convert(src, tmp_path / "out")
    assert converted(src, tmp_path / "out", tool="cvat") == {"train": {"a.png": [VALVE]}}
    with pytest.raises(DataError, match=r"it looks like CVAT or Pascal VOC: python -m schematics\.convert"):
        find_splits(src)
