"""Detections of windows are merged to those of the sheet: cut ones are dropped, nested ones kept."""

import csv
import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from small_detector import small_spec

from cluster import checkpoint
from cluster.errors import UserError
from detection.detections import Detections, to_results
from detection.draw import annotate, color_of, side_by_side
from detection.inference import detect, load_detector, merge
from detection.metrics.ranges import Basis, Ranges
from detection.model import Detector
from detection.predict import PredictConfig, main, picture_name
from schematics.coco import read_split
from schematics.sheets import Sheet
from schematics.windows import tile_sheet

WIDTH, HEIGHT = 180, 100
TILES = tile_sheet(WIDTH, HEIGHT, side=100, overlap=20)  # two: x from 0 to 100 and from 80 to 180


def merged(*rows):
    """The indices of the detections that are kept, sorted. rows: (box, score, label, window) of each."""
    boxes, scores, labels, windows = (np.array(column) for column in zip(*rows, strict=True))
    return sorted(merge(boxes.astype(float), scores, labels, windows, TILES, WIDTH, HEIGHT).tolist())


def test_a_detection_cut_by_an_inner_edge_gives_way_to_the_whole_one():
    cut, whole = ([84, 40, 100, 60], 0.9, 1, 0), ([84, 40, 120, 60], 0.8, 1, 1)
    assert merged(cut, whole) == [1]
    assert merged(cut) == [0], "nobody sees it whole"
    assert merged(cut, ([84, 40, 120, 60], 0.8, 2, 1)) == [1], "half a symbol may look like another class"
    assert merged(cut, ([84, 40, 120, 60], 0.1, 1, 1)) == [0, 1], "the other is hardly sure"


def test_the_edge_of_the_sheet_cuts_nothing():
    assert merged(([0, 40, 30, 60], 0.9, 1, 0), ([0, 35, 60, 90], 0.9, 1, 0)) == [0, 1]
    at_edge, beside = ([150, 40, 180, 60], 0.9, 1, 1), ([140, 38, 180, 64], 0.9, 2, 1)
    assert merged(at_edge, beside) == [0, 1]


def test_nested_symbols_of_one_class_both_stay_and_doubles_go():
    outer, inner = ([10, 10, 70, 70], 0.9, 1, 0), ([20, 20, 40, 40], 0.8, 1, 0)
    assert merged(outer, inner) == [0, 1]
    assert merged(outer, ([11, 10, 70, 71], 0.7, 1, 0)) == [0]
    assert merged(outer, ([11, 10, 70, 71], 0.7, 2, 0)) == [0, 1], "another class"


def test_a_symbol_seen_whole_by_both_windows_is_found_once():
    assert merged(([85, 40, 95, 60], 0.7, 1, 0), ([85, 40, 95, 61], 0.8, 1, 1)) == [1]


def test_of_two_windows_that_both_cut_a_symbol_the_one_that_sees_more_is_right():
    halves = ([60, 40, 100, 60], 0.9, 1, 0), ([80, 40, 110, 60], 0.8, 1, 1)
    assert merged(*halves) == [0, 1], "neither sees most of it"
    assert merged(([84, 40, 100, 60], 0.9, 1, 0), ([81, 40, 120, 60], 0.8, 1, 1)) == [1]


def test_merging_thousands_needs_little_memory():
    import tracemalloc

    rng = np.random.default_rng(0)
    tiles = tile_sheet(10_000, 7_000, 1024, 128)
    windows = rng.integers(0, len(tiles), 20_000)
    corner = tiles[windows, :2] + rng.integers(0, 980, (20_000, 2))
    boxes = np.hstack([corner, corner + 44]).astype(float)
    tracemalloc.start()
    kept = merge(boxes, rng.random(20_000), rng.integers(1, 30, 20_000), windows, tiles, 10_000, 7_000)
    assert len(kept) > 10_000
    assert tracemalloc.get_traced_memory()[1] < 500e6
    tracemalloc.stop()


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    spec = small_spec(proposals=64)
    return Detector(spec).to(memory_format=torch.channels_last).eval()  # as `load_detector` gives it


def sheet(height, width):
    return np.random.default_rng(0).integers(0, 255, (height, width), dtype=np.uint8)


def test_detections_lie_on_the_sheet_best_first_and_do_not_depend_on_the_batch(detector):
    image = sheet(150, 290)
    found = detect(detector, image, batch_size=1)
    assert len(found) > 20
    assert (found.boxes >= 0).all() and (found.boxes <= [290, 150, 290, 150]).all()
    assert (found.boxes[:, 2:] > found.boxes[:, :2]).all() and found.boxes.dtype == np.float64
    assert (np.diff(found.scores) <= 0).all() and set(found.labels) <= {1, 2}
    together = detect(detector, image, batch_size=8)
    assert np.abs(found.boxes - together.boxes).max() < 1e-2
    assert len(found.above(found.scores[5])) == 6


def test_a_scaled_sheet_is_seen_smaller_and_its_boxes_are_in_its_own_pixels(detector):
    image = sheet(150, 290)
    half = cv2.resize(image, (145, 75), interpolation=cv2.INTER_AREA)
    found, seen = detect(detector, image, scale=0.5), detect(detector, half)
    np.testing.assert_allclose(found.boxes, 2 * seen.boxes)
    assert np.array_equal(found.scores, seen.scores)


@pytest.mark.parametrize("image", [np.zeros((9, 9)), np.zeros((9, 9, 4), np.uint8), np.zeros(9, np.uint8)])
def test_an_array_that_is_no_sheet_is_refused(detector, image):
    with pytest.raises(ValueError, match=r"a sheet is uint8 \[H, W\] or \[H, W, 3\], not"):
        detect(detector, image)


def test_gray_and_color_sheets_and_small_ones(detector):
    small = sheet(40, 50)
    gray, color = detect(detector, small), detect(detector, np.stack([small] * 3, 2))
    assert np.array_equal(gray.boxes, color.boxes)
    assert (gray.boxes <= [50, 40, 50, 40]).all()


def test_results_carry_the_ids_of_the_data_set():
    found = {7: Detections(np.array([[1.5, 2, 11, 22]]), np.array([0.5]), np.array([2]))}
    row = {"image_id": 7, "category_id": 9, "bbox": [1.5, 2, 9.5, 20], "score": 0.5}
    assert to_results(found, [4, 9]) == [row]


def test_a_model_file_gives_the_same_detector_back(detector, tmp_path):
    state = {
        "spec": detector.spec.to_dict(),
        "model": detector.state_dict(),
        "thresholds": {4: 0.25, 9: 0.75},
    }
    checkpoint.write_file(tmp_path / "model.pt", state)
    again = load_detector(tmp_path / "model.pt")
    one, other = detect(detector, sheet(150, 290)), detect(again, sheet(150, 290))
    assert again.spec == detector.spec and np.array_equal(one.boxes, other.boxes)
    assert again.thresholds == [0.25, 0.75], "in the order of the labels"


def test_detections_above_one_score_or_one_a_class():
    found = Detections(np.zeros((3, 4)), np.array([0.9, 0.5, 0.4]), np.array([2, 1, 2]))
    assert found.above(0.5).scores.tolist() == [0.9, 0.5]
    assert found.above(np.array([0.6, 0.3])).scores.tolist() == [0.9, 0.4]


def test_what_is_no_model_file_is_refused(detector, tmp_path):
    file = tmp_path / "model.pt"
    checkpoint.write_file(file, {"encoder": torch.zeros(1)})
    with pytest.raises(UserError, match="not a detector"):
        load_detector(file)
    whole = {"spec": detector.spec.to_dict(), "model": detector.state_dict(), "thresholds": {4: 0.5, 9: 0.5}}
    checkpoint.write_file(file, whole)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match="truncated or damaged"):
        load_detector(file)
    checkpoint.write_file(file, {**whole, "spec": {**whole["spec"], "fpn_channels": 32}})
    with pytest.raises(UserError, match="its weights and the detector that it describes do not fit together"):
        load_detector(file)


def test_pictures_show_every_box_in_its_place():
    image = np.full((200, 400), 255, np.uint8)
    boxes, labels = np.array([[100.0, 50, 140, 90], [300, 100, 340, 150]]), np.array([1, 2])
    picture = annotate(image, boxes, labels, ["relay", "lamp"], np.array([0.9, 0.8]), title="Found")
    assert picture.shape[1] == 1000 and picture.shape[2] == 3
    body = picture[-500:].astype(int)
    colored = (body.max(2) - body.min(2)) > 60
    for x0, y0, x1, y1 in (boxes * 2.5).astype(int):
        assert (
            colored[y0 : y0 + 2, x0:x1].mean() > 0.9 and colored[y0:y1, x1 - 1 : x1 + 1].any(1).mean() > 0.9
        )
    assert not colored[200:240, 500:600].any()
    both = side_by_side(picture, annotate(image, boxes[:0], labels[:0], ["relay", "lamp"]))
    assert both.shape[1] == 2 * 1000 + 12


def test_pictures_name_classes_in_other_scripts():
    image, box = np.full((200, 400), 255, np.uint8), np.array([[100.0, 50, 140, 90]])
    names = ["реле", "лист", "µ", "Ω", "继电器", "接触器", "\udcf6"]
    drawn = [annotate(image, box, np.array([1]), [name, *names])[:-500].tobytes() for name in names]
    assert len(set(drawn[:4])) == 4, "no two look alike"
    alone = [annotate(image, box, np.array([k + 1]), names)[:-500] for k in range(len(names))]
    glyphs = {(strip.min(2) < 60).tobytes() for strip in alone}
    assert len(glyphs) == len(names)


@pytest.fixture
def found_on(detector, tmp_path):
    """A function that predicts into drawings/found, a folder beside the drawings, and returns counts.csv."""
    state = {"spec": detector.spec.to_dict(), "model": detector.state_dict(), "thresholds": {4: 0.0, 9: 0.0}}
    checkpoint.write_file(tmp_path / "model.pt", state)
    drawings = tmp_path / "drawings"
    drawings.mkdir()
    cv2.imwrite(str(drawings / "a.png"), sheet(150, 290))

    def run(*sheets, **options):
        config = {"checkpoint": tmp_path / "model.pt", "out": drawings / "found", "device": "cpu", **options}
        main(PredictConfig(sheets=sheets or (drawings,), **config))
        return list(csv.reader((drawings / "found" / "counts.csv").read_text(errors="replace").splitlines()))

    run.drawings = drawings
    return run


def test_an_earlier_run_is_neither_overwritten_unasked_nor_read_as_drawings(found_on):
    first = found_on()
    assert len(first) == 2 and int(first[1][-1]) > 0
    with pytest.raises(UserError, match="holds predictions; name another folder, or give --overwrite"):
        found_on()
    assert found_on(overwrite=True) == first
    cv2.imwrite(str(found_on.drawings / "0.png"), sheet(150, 290))
    assert [row[0] for row in found_on(found_on.drawings / "0.png", overwrite=True)[1:]] == [
        str(found_on.drawings / "0.png")
    ]
    assert [file.name for file in (found_on.drawings / "found" / "pictures").iterdir()] == ["0001-0.png"]


def test_what_was_found_is_a_split_that_our_own_reader_takes(found_on):
    total = int(found_on()[1][-1])
    shutil.copy(
        found_on.drawings / "found" / "predictions.json", found_on.drawings / "_annotations.coco.json"
    )
    split = read_split(found_on.drawings)
    assert [one.file_name for one in split.sheets] == ["a.png"]
    assert [one.path.resolve() for one in split.sheets] == [(found_on.drawings / "a.png").resolve()]
    assert len(split.sheets[0].boxes) == total


def test_names_of_files_may_be_long_or_not_utf_8(found_on):
    long, latin = "图" * 80 + ".png", os.fsdecode(b"gr\xf6\xdfe.png")
    assert len(os.fsencode(picture_name(1, Sheet(Path(long))))) < 200
    (found_on.drawings / "a.png").rename(found_on.drawings / long)
    cv2.imwrite(str(found_on.drawings / "b.png"), sheet(150, 290))
    (found_on.drawings / "b.png").rename(found_on.drawings / latin)
    assert len(found_on()) == 3
    assert len(list((found_on.drawings / "found" / "pictures").iterdir())) == 2
    assert b"gr\xf6\xdfe.png" in (found_on.drawings / "found" / "counts.csv").read_bytes()


def test_counts_come_with_ranges_and_without_any_it_is_said_how_to_get_them(
    found_on, detector, tmp_path, capsys
):
    assert found_on()[0] == ["sheet", "relay", "lamp", "total"]
    said = capsys.readouterr().out
    assert "model.pt was written before there were any; `python evaluate/evaluate.py --checkpoint" in said
    bases = (Basis(1.0, 30), Basis(2.0, 30))
    ranges = Ranges(("relay", "lamp"), (0.0, 0.0), 1.0, (50, 9), 30, bases, bases, bases[1])
    (tmp_path / "ranges.json").write_text(json.dumps(ranges.to_dict()))
    head, row = found_on(overwrite=True, ranges=tmp_path / "ranges.json")
    assert head[:5] == ["sheet", "relay", "lamp", "total", "look at"]
    assert head[5:7] == ["total low", "total high"]
    assert head[7:] == ["relay low", "relay high", "lamp low", "lamp high"]
    relay, lamp, total, place, *ends = map(int, row[1:])
    assert place == 1 and total == relay + lamp
    for count, low, high in zip((total, relay, lamp), ends[::2], ends[1::2], strict=True):
        assert low <= count <= high and low < high
    said, doubt = capsys.readouterr().out, sum(ends[3::2]) - sum(ends[2::2])
    assert "with 90 % probability, on sheets like the 30 labelled ones behind them" in said
    assert f"the widest ranges (symbols in doubt): a.png ({doubt})" in said
    state = {"spec": detector.spec.to_dict(), "model": detector.state_dict(), "thresholds": {4: 0.0, 9: 0.0}}
    checkpoint.write_file(tmp_path / "model.pt", state | {"ranges": ranges.to_dict()})
    assert found_on(overwrite=True) == [head, row], "those of the detector itself"
    assert found_on(overwrite=True, threshold=0.3)[0] == head[:4]
    assert "they hold at other thresholds" in capsys.readouterr().out
    checkpoint.write_file(tmp_path / "model.pt", state | {"ranges": ranges.to_dict() | {"boxes": (1,)}})
    with pytest.raises(UserError, match=r"model.pt: ranges are not one for each class"):
        found_on(overwrite=True)


@pytest.mark.parametrize("threshold", [50.0, -0.1, float("nan")])
def test_a_threshold_is_a_score(found_on, threshold):
    with pytest.raises(UserError, match=r"--threshold .*: give [01] or"):
        found_on(threshold=threshold)
    assert not (found_on.drawings / "found").exists()


def test_the_colors_of_classes_differ():
    """Distances in CIELAB, where 2.3 is just noticeable side by side."""
    colors = np.array([color_of(label) for label in range(1, 42)], np.float32).reshape(-1, 1, 3) / 255
    lab = cv2.cvtColor(colors, cv2.COLOR_RGB2LAB)[:, 0]
    apart = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + 1000 * np.eye(len(lab))
    assert apart[:12, :12].min() > 40 and apart.min() > 15
