"""A table without column names is read where its order is beyond doubt, and refused by name where not."""

import pytest
from labelled_sources import boxes_of, converted, sheet, text

from schematics.convert import convert
from schematics.sheets import DataError

VALVE = ("valve", 10, 20, 30, 60)  # x0 y0 x1 y1 on a sheet of 100 x 80
ROW = "images/a.png,10,20,30,60,valve\n"
NAMES = "filename,xmin,ymin,xmax,ymax,class"


def test_a_table_as_retinanet_reads_it(tmp_path):
    """Paths from the table's folder and of another machine; a sheet without boxes; rows that say nothing."""
    src = tmp_path / "src"
    for name in ("a", "b", "empty", "forgotten"):
        sheet(src / f"images/{name}.png")
    rows = [
        ROW.strip(),
        '/data/set/images/b.png,10,20,30,60.0,"valve, DN 50"',
        "images/empty.png,,,,,",
        "images/a.png,50,5,90,25,valve, DN 50",
        "images/a.png,50,5,90,,valve",
        "images/a.png,50,5,90,25,",
        "images/empty.png,,,,,,valve",
        "images/a.png,50",
        "lost.png,1,2,3,4,valve",
        "../../etc/passwd.png,1,2,3,4,valve",
        "",
    ]
    text(src / "annotations.csv", "\r\n".join(rows))
    text(src / "classes.csv", "valve,0\npump,1\n")
    tally = convert(src, tmp_path / "out")
    want = {"a.png": [VALVE], "b.png": [("valve, DN 50", *VALVE[1:])], "empty.png": []}
    assert boxes_of(tmp_path / "out") == {"train": want}
    assert tally == {
        ("row without a class and four numbers", "annotations.csv", "dropped"): 5,
        ("row of an image that is not there", "annotations.csv", "dropped"): 2,
        ("image that no row names", "images/forgotten.png", "dropped"): 1,
    }


@pytest.mark.parametrize(
    "content",
    [
        ROW.encode("utf-8-sig"),
        ROW.encode("utf-16"),
        ROW.replace(",", ";").encode(),
        ("images/a.png,,,,,\n" + ROW).encode(),
        f"{NAMES}\n{ROW}".encode("utf-16"),
        f'"FileName";"XMin";"YMin";"XMax";"YMax";"Class"\n{ROW.replace(",", ";")}'.encode(),
    ],
)
def test_encodings_and_separators(tmp_path, content):
    sheet(tmp_path / "src/images/a.png")
    text(tmp_path / "src/labels.csv", content)
    assert converted(tmp_path / "src", tmp_path / "out") == {"train": {"a.png": [VALVE]}}


VIA2 = (
    "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes\n"
    'a.png,9,"{}",1,0,"{""name"":""rect"",""x"":10,""y"":20,""width"":20,""height"":40}","{}"\n'
)
VIA3 = (
    "# Exported using VGG Image Annotator\n"
    "# CSV_HEADER = metadata_id,file_list,flags,temporal_coordinates,spatial_coordinates,metadata\n"
    '"1_x","[""a.png""]",0,"[]","[2,10,20,20,40]","{""1"":""valve""}"\n'
)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("a.png,3,10,20,30,60\n", "neither column names nor path,x1,y1,x2,y2,class; name the columns"),
        ("a.png,valve,10,20,30,60\n", "neither column names nor path"),
        ("a.png,100,80,valve,10,20,30,60\n", "neither column names nor path"),
        ("10,20,30,60,valve,a.png\n", "neither column names nor path"),
        ("a.png,10,20,30,60\n", "neither column names nor path"),
        ("a.png,,,,,\na.png,3,10,20,30,60\n", "line 2 is neither column names nor path"),
        ("a.png,,,,,\n\na.png,valve,10,20,30,60\n", "line 3 is neither column names nor path"),
        ("a.png,10,20,20,40,valve\na.png,50,20,20,40,valve\n", r"a\.png has x2 below x1 .* Name the columns"),
        ("a.png,0.1,0.2,0.5,1.0,valve\n", r"above 1: shares of a sheet's sides\? Give pixels"),
        (NAMES + "\na.png,0.1,0.2,0.5,1,valve\n", "no coordinate is above 1"),
        (VIA2, "VGG Image Annotator's csv, which is not read; export its annotations in COCO format"),
        ("#" + VIA2, "VGG Image Annotator's csv"),
        (VIA3, "VGG Image Annotator's csv"),
        (
            "image,x1,y1,x2,y2,label\na.png,10,20,30,60,valve\n",
            "a csv table .with columns filename, class, xmin",
        ),
    ],
)
def test_a_table_in_doubt_is_refused_in_one_line_with_the_cure(tmp_path, content, word):
    sheet(tmp_path / "src/a.png")
    text(tmp_path / "src/labels.csv", content)
    with pytest.raises(DataError, match=word) as caught:
        convert(tmp_path / "src", tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("head", ["", NAMES + "\n"])
def test_a_tables_own_name_is_that_of_its_split(tmp_path, head):
    src = tmp_path / "src"
    for name in "abc":
        sheet(src / f"images/{name}.png")
    for table, name in (("train", "a"), ("val_labels", "b"), ("rest", "c")):
        text(src / f"{table}.csv", head + ROW.replace("a.png", f"{name}.png"))
    tally = convert(src, tmp_path / "out")
    assert boxes_of(tmp_path / "out") == {"train": {"a.png": [VALVE]}, "valid": {"b.png": [VALVE]}}
    assert tally == {("sheet that no list of the splits names", "images/c.png", "dropped"): 1}
    text(src / "test.csv", head + ROW)
    with pytest.raises(DataError, match=r"a\.png is in the tables of (test and train|train and test)"):
        convert(src, tmp_path / "again")
