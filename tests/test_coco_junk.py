"""Whatever stands in an annotation file, the reader gives usable boxes or a finding."""

import json

import numpy as np
import pytest
from bounds import bounded
from coco_documents import document, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schematics.coco import inspect_split, losses, read_split, to_coco
from schematics.sheets import DataError

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 200),
    st.sampled_from([10**400, 2**63, -(2**63) - 1, 2**53 + 1]),
    st.floats(),
    st.text(st.characters(), max_size=3),
    st.lists(st.floats(-50, 200), max_size=5),
    st.dictionaries(st.text(max_size=3), st.floats(), max_size=2),
)
NAMES = ["1.png", "2.PNG", "./1.png", "images/1.png", "..", "/", ".", "../x/1.png", "a\\2.png", "C:\\1.png"]
NAMES += ["x" * 300, "%31.png", "%", "nul\0", "\ud800.png", "\n1.png", "", "1.png#page=2", "cut.tif#page=9"]
ROW = st.fixed_dictionaries(
    {},
    optional={
        "id": JUNK,
        "image_id": st.one_of(st.integers(1, 2), JUNK),
        "category_id": st.one_of(st.integers(0, 2), JUNK),
        "bbox": st.one_of(st.lists(st.one_of(st.floats(-50, 150), JUNK), min_size=4, max_size=4), JUNK),
        "area": JUNK,
        "iscrowd": JUNK,
        "file_name": st.one_of(st.sampled_from(NAMES), JUNK),
        "name": st.one_of(st.sampled_from(["valve", "VALVE", "pump"]), JUNK),
        "width": st.one_of(st.sampled_from([100, 80, 50]), JUNK),
        "height": st.one_of(st.sampled_from([100, 80, 40]), JUNK),
        "segmentation": st.one_of(st.lists(st.lists(st.floats(-50, 150), max_size=8), max_size=2), JUNK),
        "supercategory": JUNK,
    },
)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(images=st.lists(ROW, max_size=3), categories=st.lists(ROW, max_size=3), rows=st.lists(ROW, max_size=6))
def test_no_content_breaks_the_reader_or_leaves_a_bad_box(tmp_path, images, categories, rows):
    content = document()
    for key, more in (("images", images), ("categories", categories), ("annotations", rows)):
        content[key] = content[key] + more
    (tmp_path / "valid").mkdir(exist_ok=True)
    (tmp_path / "valid/_annotations.coco.json").write_text(json.dumps(content))  # the same classes, by name
    write(tmp_path / "train", content)
    (tmp_path / "train/cut.tif").write_bytes(b"II*\0\x08\0\0\0\xff")
    with bounded():
        split = inspect_split(tmp_path / "train")
    losses(split).encode()
    truth = to_coco(split)
    json.dumps(truth, ensure_ascii=False).encode()
    assert len({category.id for category in split.categories}) == len(split.categories)
    ids = [row["id"] for row in truth["annotations"]]
    assert len(set(ids)) == len(ids) and min(ids, default=1) >= 1
    for sheet in split.sheets:
        assert (sheet.boxes[:, :2] >= 0).all() and (sheet.boxes[:, 2:] <= [sheet.width, sheet.height]).all()
        assert (sheet.boxes[:, 2:].astype(np.float32) > sheet.boxes[:, :2].astype(np.float32)).all()
        assert ((sheet.labels >= 1) & (sheet.labels <= len(split.categories))).all()
        assert np.isfinite(sheet.area).all() and (sheet.area > 0).all()


TEXT = st.one_of(
    st.binary(max_size=60),
    st.text('{}[]":,0e\\u\ud800', max_size=60).map(lambda text: text.encode(errors="surrogatepass")),
    st.recursive(
        st.none() | st.floats() | st.text(max_size=2), lambda inner: st.lists(inner, max_size=3)
    ).map(lambda value: json.dumps({"images": value, "annotations": [], "categories": [{"id": 1}]}).encode()),
)


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=TEXT)
def test_no_bytes_are_more_than_one_line(tmp_path, data):
    (tmp_path / "_annotations.coco.json").write_bytes(data)
    with pytest.raises(DataError) as caught, bounded():
        read_split(tmp_path)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()
