"""Whatever stands in an annotation file, the reader gives usable boxes or a finding."""

import numpy as np
from coco_documents import document, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schematics.coco import inspect_split, to_coco

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 200),
    st.floats(),
    st.text(max_size=3),
    st.just(10**400),
    st.lists(st.floats(-50, 200), max_size=5),
)
ROW = st.fixed_dictionaries(
    {},
    optional={
        "id": JUNK,
        "image_id": st.one_of(st.integers(1, 2), JUNK),
        "category_id": st.one_of(st.integers(0, 2), JUNK),
        "bbox": st.one_of(st.lists(st.one_of(st.floats(-50, 150), JUNK), min_size=4, max_size=4), JUNK),
        "area": JUNK,
        "iscrowd": JUNK,
        "file_name": JUNK,
        "name": JUNK,
        "width": JUNK,
        "height": JUNK,
        "supercategory": JUNK,
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(images=st.lists(ROW, max_size=3), categories=st.lists(ROW, max_size=3), rows=st.lists(ROW, max_size=6))
def test_no_content_breaks_the_reader_or_leaves_a_bad_box(tmp_path, images, categories, rows):
    content = document()
    for key, more in (("images", images), ("categories", categories), ("annotations", rows)):
        content[key] = content[key] + more
    split = inspect_split(write(tmp_path / "train", content))
    truth = to_coco(split)
    ids = [row["id"] for row in truth["annotations"]]
    assert len(set(ids)) == len(ids) and min(ids, default=1) >= 1
    for sheet in split.sheets:
        assert (sheet.boxes[:, :2] >= 0).all() and (sheet.boxes[:, 2:] <= [sheet.width, sheet.height]).all()
        assert (sheet.boxes[:, 2:].astype(np.float32) > sheet.boxes[:, :2].astype(np.float32)).all()
        assert ((sheet.labels >= 1) & (sheet.labels <= len(split.categories))).all()
        assert np.isfinite(sheet.area).all() and (sheet.area > 0).all()
