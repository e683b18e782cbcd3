"""Whatever labels hold, converting them ends with splits that can be read, or with one line."""

import html
import json
import re
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from bounds import bounded
from hypothesis import example, given, settings
from hypothesis import strategies as st

from schematics.coco import inspect_split
from schematics.convert import convert
from schematics.sheets import DataError

NOISE = np.random.default_rng(0).integers(0, 255, (2, 80, 100), np.uint8)
PNG, OTHER = (cv2.imencode(".png", image)[1].tobytes() for image in NOISE)
XML = (
    '<?xml version="1.0" encoding="utf-8"?><annotation><filename>a.png</filename><size><width>100</width>'
    "<height>80</height></size><object><name>valve</name><bndbox><xmin>10</xmin><ymin>20</ymin><xmax>30</xmax>"
    "<ymax>60</ymax></bndbox></object></annotation>"
)
CVAT = (
    '<?xml version="1.0" encoding="utf-8"?><annotations><meta><task><subset>train</subset></task></meta>'
    '<image name="a.png" width="100" height="80" subset="train">'
    '<box label="valve" xtl="10" ytl="20" xbr="30" ybr="60" rotation="3"/>'
    '<polygon label="pump" points="1,2;3,4;5,0" group_id="1"/>'
    '<ellipse label="pump" cx="9" cy="9" rx="3" ry="4"/>'
    '<mask label="fan" rle="1, 2" left="1" top="2" width="3" height="4"/></image></annotations>'
)
YAML = "path: ../x\ntrain: images/train\nval: [images/val, v.txt]\nnames: {0: valve, 1: pump}\n"
YAML += "kpt_shape: [1, 2]\n"
LABELME = json.dumps(
    {
        "shapes": [{"label": "valve", "points": [[10, 20], [30, 60]], "shape_type": "circle", "group_id": 1}],
        "imagePath": "a.png",
        "imageHeight": 80,
        "imageWidth": 100,
    }
)
COCO = json.dumps(
    {
        "images": [
            {"id": 1, "file_name": "a.png", "width": 100, "height": 80, "license": 3},
            {"id": 2, "file_name": "b.png", "width": 100, "height": 80},
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 20, 30, 40], "area": 9, "iscrowd": 0},
            {"id": 2, "image_id": 2, "category_id": 2, "segmentation": [[1, 2, 30, 4, 5, 60]]},
        ],
        "categories": [{"id": 1, "name": "valve"}, {"id": 2, "name": "pump"}],
    }
)
CSV = 'filename,width,height,class,xmin,ymin,xmax,ymax\na.png,100,80,valve,10,20,30,60\n"a.png",,,,,,,\n'
UNNAMED = "images/train/a.png,10,20,30,60,valve\nimages/train/a.png,,,,,\n/x/a.png,1,2,3,4,pump\n"
YOLO = "0 .5 .5 .2 .2\n1 .1 .1 .3 .1 .2 .5\n0 .5 .5 .2 .2 .9\n0 .5 .5 .2 .2 .5 .5\n"
WORDS = r"-1 0 1e308 -1e309 nan \ud800 ../../a.png [[ {} null true <a> &a; *a !!python/name:os %2e%2e%2f é"
VALUES = WORDS.split()
VALUES += ["٣", "\ud800", "\0", "", "9" * 5000, "/etc/x" * 60, "\N{BYTE ORDER MARK}", "e\u0301", "#page=2"]
VALUES += [*"\"',:|%\n\t", "&a ", "- ", "? ", "[[]]", "NaN", "9e299", "45"]


@st.composite
def spoiled(draw: st.DrawFn, whole: str) -> bytes:
    """A file in which words were exchanged for others or hostile values, cut, doubled, in any encoding."""
    words = [word for word in re.split(r"(\w+|\W)", whole) if word]
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(words) - 1))
        words[place] = draw(st.sampled_from([*VALUES, *words]) | st.text(max_size=5))
    if draw(st.booleans()):
        start, end = sorted(draw(st.tuples(*[st.integers(0, len(words))] * 2)))
        words = words[:start] + words[end:] if draw(st.booleans()) else words[:end] + words[start:]
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-be", "latin-1"]))
    return "".join(words).encode(encoding, errors="replace" if encoding == "latin-1" else "surrogatepass")


# Where values stand in XML, in quotes or between tags, and in JSON, not before a colon.
IN_XML, IN_JSON = r'="([^"]*)"|>([^<>]+)<', r'"[^"]*":|("[^"]*")|(\b\d+\b)'


@st.composite
def revalued(draw: st.DrawFn, whole: str) -> bytes:
    """A file of XML or JSON that can be parsed, so that the reader is reached, with hostile values in it."""
    found = re.finditer(IN_XML if "<" in whole else IN_JSON, whole)
    places = [match.span(match.lastindex) for match in found if match.lastindex]
    values = st.sampled_from(VALUES) | st.text(max_size=5) | (st.integers() | st.floats()).map(str)
    changes = draw(st.dictionaries(st.sampled_from(places), values, min_size=1, max_size=4))
    for (start, end), value in sorted(changes.items(), reverse=True):
        if "<" in whole[:start]:
            value = html.escape(value)
        elif not (draw(st.booleans()) and is_json(value)):
            value = json.dumps(value)
        whole = whole[:start] + value + whole[end:]
    return whole.encode(errors="surrogatepass")


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def fault(valid: float = 0.0, **files: bytes) -> str:
    """What is wrong with how a folder with images/train/a.png and labels is converted, "" if nothing is.

    It should succeed, with boxes or a finding, or raise DataError of one line and leave nothing.
    """
    with tempfile.TemporaryDirectory() as name:
        src, out = Path(name, "src"), Path(name, "out")
        for path, content in {"images/train/a.png": PNG, **files}.items():
            (src / path).parent.mkdir(parents=True, exist_ok=True)
            (src / path).write_bytes(content)
        with bounded():
            try:
                convert(src, out, valid)
            except DataError as error:
                return f"{out} is left after {error}" if out.exists() or "\n" in str(error) else ""
            splits = [inspect_split(folder) for folder in out.iterdir()]
            found = any(len(sheet.boxes) for split in splits for sheet in split.sheets)
            return "" if found or splits[0].findings else "no box, and no finding says why"


JUNK = st.binary(max_size=60)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(revalued(XML) | revalued(XML) | spoiled(XML) | JUNK.map(lambda junk: b"<annotation>" + junk))
@example(XML.replace("10", "1e400").encode())
def test_voc(content):
    assert not fault(**{"labels/train/a.xml": content})


@settings(deadline=None, max_examples=150, derandomize=True)
@given(spoiled(YAML) | JUNK.map(lambda junk: b"names: " + junk))
@example(b"names: {9999999999: x}")
@example(b"names: &a [*a]")
def test_yaml(content):
    assert not fault(**{"data.yaml": content, "labels/train/a.txt": YOLO.encode()})


@settings(deadline=None, max_examples=150, derandomize=True)
@given(spoiled(YOLO) | JUNK, spoiled("images/train/a.png\n./a.png\n"))
@example(b"0 1e308 1e308 1e308 1e308", b"")
def test_yolo(content, listed):
    assert not fault(**{"classes.txt": b"valve\npump", "labels/train/a.txt": content, "train.txt": listed})


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    revalued(LABELME) | revalued(LABELME) | spoiled(LABELME) | JUNK.map(lambda junk: b'{"shapes": [' + junk)
)
@example(b'{"shapes": ' + b"[" * 100_000)
@example(LABELME.replace("10", "1e308").replace("30", "-1e308").encode())
def test_labelme(content):
    assert not fault(**{"labels/train/a.json": content})


@settings(deadline=None, max_examples=100, derandomize=True)
@given(revalued(COCO) | revalued(COCO) | spoiled(COCO) | JUNK.map(lambda junk: b'{"annotations": [' + junk))
@example(b'{"images": [], "annotations": ' + b"[" * 100_000)
def test_coco_from_which_a_split_is_drawn(content):
    assert not fault(valid=0.4, **{"images/train/b.png": OTHER, "annotations/instances_train.json": content})


@settings(deadline=None, max_examples=60, derandomize=True)
@given(spoiled("a 1\na.png\ntrain/a -1\n"), spoiled("classes = 2\ntrain = train.txt\nnames = obj.names\n"))
def test_lists(listed, described):
    assert not fault(**{"labels/train/a.xml": XML.encode(), "ImageSets/Main/val.txt": listed})
    assert not fault(**{"obj.data": described, "obj.names": listed, "images/train/a.txt": YOLO.encode()})


@settings(deadline=None, max_examples=150, derandomize=True)
@given(spoiled(CSV) | JUNK.map(lambda junk: CSV.encode() + junk))
@example((CSV + '"' + "a" * 200_000).encode())
def test_table(content):
    assert not fault(**{"images/train/_annotations.csv": content})


@settings(deadline=None, max_examples=100, derandomize=True)
@given(spoiled(UNNAMED) | JUNK.map(lambda junk: UNNAMED.encode() + junk))
@example(UNNAMED.replace("10", "1e308").replace("30", "-1e308").encode())
@example(b"a.png,,,,," + b"," * 100_000)
def test_table_without_names(content):
    assert not fault(**{"train.csv": content})


@settings(deadline=None, max_examples=150, derandomize=True)
@given(revalued(CVAT) | revalued(CVAT) | spoiled(CVAT) | JUNK.map(lambda junk: b"<annotations>" + junk))
@example(CVAT.replace('"10"', '"9e299"').replace('"3"', '"45"').encode())
@example(CVAT.replace("1,2;3,4", "1,2;" * 100_000 + "3,4").encode())
@example(CVAT.replace('100"', f'{"9" * 300}"').encode())
@example(b"<annotations>" + b"<image>" * 100_000 + b"</image>" * 100_000 + b"</annotations>")
def test_cvat(content):
    assert not fault(**{"annotations.xml": content})


@pytest.mark.parametrize("name", ["a.xml", "data.yaml", "_annotations.csv", "cvat.xml"])
def test_a_file_that_is_too_large_is_named_and_not_read(tmp_path, name):
    """A sparse file of 8 GB."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src/a.png").write_bytes(PNG)
    head = {"a.xml": XML, "_annotations.csv": CSV, "cvat.xml": CVAT}.get(name, "")
    (tmp_path / "src" / name).write_text(head)
    with open(tmp_path / "src" / name, "r+b") as file:
        file.truncate(2**33)
    with pytest.raises(DataError, match=rf"{name}: above .* this can't be a file of labels"):
        convert(tmp_path / "src", tmp_path / "out")
