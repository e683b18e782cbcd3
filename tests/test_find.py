"""One example is enough to find a symbol on other sheets, turned, mirrored and scaled."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from small_detector import small_spec

from cluster import checkpoint
from cluster.errors import UserError
from detection.find import FindConfig, main
from detection.labelling.chance import fit_chance
from detection.labelling.correlation import correlate, whitening
from detection.labelling.example import TURNS, example_from, turned
from detection.labelling.maps import look_at, network_of, open_eye, open_network
from detection.labelling.search import open_weights, templates_of
from detection.model import Detector
from detection.predict import PredictConfig
from detection.predict import main as predict
from schematics.sheets import DataError

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent
SIDE, PITCH = 34, 80  # px of the symbol, and from one place on a sheet to the next


def symbol():
    """A flag in a frame, uint8 [34, 34]: no turn or mirror image of it is like another."""
    image = np.full((SIDE, SIDE), 255, np.uint8)
    cv2.rectangle(image, (2, 2), (31, 31), 0, 2)
    cv2.line(image, (8, 6), (8, 28), 0, 2)
    cv2.fillPoly(image, [np.array([[8, 6], [24, 11], [8, 16]])], 0)
    return image


def other(number):
    """Other symbols in the same frame."""
    image = np.full((SIDE, SIDE), 255, np.uint8)
    cv2.rectangle(image, (2, 2), (31, 31), 0, 2)
    if number % 3 == 0:
        cv2.circle(image, (17, 17), 9, 0, 2)
    elif number % 3 == 1:
        cv2.line(image, (6, 6), (28, 28), 0, 2)
        cv2.line(image, (28, 6), (6, 28), 0, 2)
    else:
        cv2.line(image, (17, 4), (17, 30), 0, 2)
    return image


def draw(turns, scale=1.0):
    """A sheet of 4 x 4 symbols on wires, the flag in each of `turns`; the flags' boxes, float [N, 4]."""
    sheet, boxes = np.full((4 * PITCH, 4 * PITCH), 255, np.uint8), []
    for row in range(4):
        cv2.line(sheet, (0, PITCH * row + 40), (4 * PITCH, PITCH * row + 40), 0, 1)
    # The flags stand apart from each other, so that each has others of its kind beside it.
    flags = dict(zip((0, 5, 10, 15, 2, 7, 8, 13), turns, strict=False))
    for place in range(16):
        image = turned(symbol(), flags[place]) if place in flags else other(place)
        size = round(SIDE * scale)
        image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
        x, y = PITCH * (place % 4) + 40 - size // 2, PITCH * (place // 4) + 40 - size // 2
        sheet[y : y + size, x : x + size] = image
        if place in flags:
            boxes.append([x, y, x + size, y + size])
    return sheet, np.array(boxes, float)


def hits(found, truth):
    """bool [N, M]: which found boxes [N, 4] overlap which true ones [M, 4] by IoU 0.5 or more."""
    low, high = (f(found[:, None], truth[None]) for f in (np.maximum, np.minimum))
    both = (high[..., 2:] - low[..., :2]).clip(0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (found, truth)]
    return both >= 0.5 * (areas[0][:, None] + areas[1][None] - both)


@pytest.fixture(scope="module")
def eye():
    """Even random weights tell these symbols apart."""
    return open_eye(open_network(Path("none"), "test_resnet"))


@pytest.fixture
def drawings(tmp_path):
    """a.png shows the flag once, b.png in all orientations, c.png none."""
    folder = tmp_path / "drawings"
    folder.mkdir()
    for name, turns in (("a", [0]), ("b", range(TURNS)), ("c", [])):
        cv2.imwrite(str(folder / f"{name}.png"), draw(turns)[0])
    return folder


@pytest.fixture
def find(drawings, tmp_path):
    """A function that finds the flag of a.png and returns boxes and scores by file name, best first."""

    def run(out="found", **changes):
        example = (drawings / "a.png", 23.0, 23.0, 34.0, 34.0)
        flags = {"weights": Path("none"), "arch": "test_resnet", "example": (example,), "scales": (1.0,)}
        flags |= {"false_positives": 5.0, **changes}
        main(FindConfig(out=tmp_path / out, sheets=(drawings,), **flags))
        document = json.loads((tmp_path / out / "predictions.json").read_text())
        found = {}
        for image in document["images"]:
            rows = [row for row in document["annotations"] if row["image_id"] == image["id"]]
            boxes = np.array([row["bbox"] for row in rows]).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            found[image["file_name"]] = boxes, np.array([row["score"] for row in rows])
        return found

    run.out = tmp_path / "found"
    return run


def best(found, count):
    """The `count` best boxes of all sheets together, by file name."""
    ranked = sorted(((-s, name, n) for name, (_, scores) in found.items() for n, s in enumerate(scores)))
    boxes = {name: [] for name in found}
    for _, name, n in ranked[:count]:
        boxes[name].append(found[name][0][n])
    return {name: np.array(rows).reshape(-1, 4) for name, rows in boxes.items()}


def test_one_example_finds_all_eight_orientations_before_anything_else(find):
    """AP50 is 1: the nine best places on the three sheets are the nine flags."""
    first = best(find(), 9)
    assert [len(first[name]) for name in ("a.png", "b.png", "c.png")] == [1, 8, 0]
    assert hits(first["a.png"], draw([0])[1]).all()
    assert hits(first["b.png"], draw(range(TURNS))[1]).any(0).all()


def test_upright_finds_it_only_as_the_example_shows_it(find):
    boxes, scores = find(upright=True)["b.png"]
    upright, others = np.split(draw(range(TURNS))[1], [1])
    assert hits(boxes[:1], upright).all() and scores[0] > 0.9
    assert not (scores[hits(boxes, others).any(1)] > 0.5).any()


def test_other_sizes_are_found_at_other_scales(find, drawings):
    sheet, truth = draw([0, 3, 6], scale=2.0)
    cv2.imwrite(str(drawings / "d.png"), sheet)
    assert not hits(find(out="one")["d.png"][0], truth).any(0).all()
    boxes, _ = find(out="two", scales=(1.0, 2.0))["d.png"]
    assert hits(boxes[:3], truth).any(0).all()


def test_the_files_are_those_of_predict(find, drawings, tmp_path):
    found = find(name="flag")
    torch.manual_seed(0)
    spec = small_spec(categories=((1, "flag"),))
    state = {"spec": spec.to_dict(), "model": Detector(spec).state_dict(), "thresholds": {1: 0.0}}
    checkpoint.write_file(tmp_path / "model.pt", state)
    predict(PredictConfig(checkpoint=tmp_path / "model.pt", out=tmp_path / "predicted", sheets=(drawings,)))
    ours, theirs = find.out, tmp_path / "predicted"
    documents = [json.loads((folder / "predictions.json").read_text()) for folder in (ours, theirs)]
    assert documents[0]["images"] == documents[1]["images"]
    assert documents[0]["categories"] == documents[1]["categories"]
    assert documents[0]["annotations"][0].keys() == documents[1]["annotations"][0].keys()
    tables = [list(csv.reader((folder / "counts.csv").open())) for folder in (ours, theirs)]
    assert tables[0][0] == tables[1][0] == ["sheet", "flag", "total"]
    assert [int(row[1]) for row in tables[0][1:]] == [len(boxes) for boxes, _ in found.values()]
    names = [sorted(file.name for file in (folder / "pictures").iterdir()) for folder in (ours, theirs)]
    assert names[0] == names[1]


def test_kept_maps_change_nothing_and_damaged_ones_are_made_again(find, capsys):
    first = (find(), (find.out / "predictions.json").read_bytes())[1]
    maps = sorted((find.out / "maps").glob("*.safetensors"))
    assert len(maps) == 3
    before = {file: file.stat().st_mtime_ns for file in maps}
    find(overwrite=True)
    assert (find.out / "predictions.json").read_bytes() == first
    assert {file: file.stat().st_mtime_ns for file in maps} == before, "read, not made again"
    damaged = bytearray(maps[1].read_bytes())
    damaged[-9] ^= 1
    maps[1].write_bytes(damaged)
    capsys.readouterr()
    find(overwrite=True)
    said = capsys.readouterr().err
    assert f"made again: {maps[1]}: truncated or damaged" in said and said.count("made again") == 1
    assert (find.out / "predictions.json").read_bytes() == first


def test_a_map_belongs_to_its_weights_its_sheet_and_its_zoom(eye, tmp_path):
    sheet = draw([0])[0]
    torch.manual_seed(1)
    again = open_eye(open_network(Path("none"), "resnet18"))
    for one, image, zoom in ((eye, sheet, 1.0), (again, sheet, 1.0), (eye, sheet.T, 1.0), (eye, sheet, 2.0)):
        look_at(one, image, zoom, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    seen = look_at(eye, sheet, 1.0, tmp_path)
    assert torch.equal(seen.features, eye.look(sheet, 1.0))


def test_a_map_of_many_tiles_is_that_of_one(eye, monkeypatch):
    sheet = draw(range(TURNS))[0]
    whole = eye.look(sheet, 1.0)
    monkeypatch.setattr("detection.labelling.maps.TILE", 96)
    assert whole.shape == (32, 80, 80)
    assert (eye.look(sheet, 1.0) - whole).abs().max() < 0.01 * whole.abs().max()


def test_a_crop_of_its_own_is_an_example_too(find, tmp_path):
    cv2.imwrite(str(tmp_path / "flag.png"), symbol())
    first = best(find(example=(), crop=(tmp_path / "flag.png",)), 9)
    assert hits(first["b.png"], draw(range(TURNS))[1]).any(0).all()


def test_a_detector_looks_too_and_its_boxes_are_candidates(eye, tmp_path):
    torch.manual_seed(0)
    spec = small_spec(proposals=64)
    detector = Detector(spec).eval()
    state = {"spec": spec.to_dict(), "model": detector.state_dict(), "thresholds": {4: 0.0, 9: 0.0}}
    checkpoint.write_file(tmp_path / "model.pt", state)
    sheet = draw([0])[0]
    seen = look_at(open_weights(tmp_path / "model.pt"), sheet, 1.0, tmp_path)
    assert len(seen.boxes) > 20 and seen.features.shape[1:] == (80, 80)
    white = whitening([eye.look(sheet, 1.0)])
    example = example_from(sheet, (23, 23, 57, 57))
    one = templates_of(eye, [example], (1.0,), True, 1.0, white)
    features = white(eye.look(sheet, 1.0))
    box = np.array([[21.0, 22, 57, 58], [0, 0, 300, 300]])
    with_boxes = correlate(features, one, 1.0, box)
    kept = with_boxes.boxes.tolist()
    assert kept.count(box[0].tolist()) == len(one) and box[1].tolist() not in kept, (
        "of its size, or not at all"
    )
    assert with_boxes.scores[with_boxes.boxes[:, 0] == 21].max() > 0.9


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"example": ()}, "show what to find: --example SHEET X Y W H, or --crop FILE"),
        ({"box": (300, 300, 30, 30)}, "the box reaches beyond the sheet of 320 x 320 px; give another box"),
        ({"box": (2, 2, 20, 20)}, "there is nothing in the box but one color; give another box"),
        ({"box": (23, 23, 30, 3)}, "the box is smaller than 4 px; give another box"),
        ({"weights": Path("gone.pt")}, "gone.pt: no such file"),
        ({"scales": (0.01,)}, "--scales 0.01: give 0.1 or more"),
    ],
)
def test_what_shows_nothing_is_refused_in_one_line(find, drawings, flags, said):
    if box := flags.pop("box", None):
        flags["example"] = ((drawings / "a.png", *map(float, box)),)
    with pytest.raises(UserError, match=said):
        find(**flags)
    assert not find.out.exists()


def test_a_file_that_is_no_drawing_is_refused_as_example_and_skipped_as_sheet(find, drawings, capsys):
    (drawings / "broken.png").write_bytes(b"no png")
    with pytest.raises(DataError, match=r"broken\.png: truncated, or not a png"):
        find(example=((drawings / "broken.png", 0.0, 0.0, 9.0, 9.0),))
    with pytest.raises(SystemExit):
        find(out="other")
    assert "skipped: " in capsys.readouterr().err


def test_scores_say_how_many_places_a_sheet_would_have_by_chance():
    rng = np.random.default_rng(0)
    sheets = [0.2 + rng.exponential(0.05, 400) for _ in range(50)]
    chance = fit_chance(sheets, 400)
    for wanted in (10.0, 1.0, 0.1):
        least = 1 / (1 + wanted)
        came = np.mean([(chance.calibrated(scores) >= least).sum() for scores in sheets])
        assert 0.5 * wanted <= came <= 2 * wanted + 0.05
    assert fit_chance([], 0.0).places == 0


def test_a_network_without_mean_and_std_is_refused():
    with pytest.raises(UserError, match="net: lacks mean and std"):
        network_of(open_network(Path("none"), "test_resnet").body, {}, "net")


def test_the_trial_judges_pixels_and_networks_on_classes_drawn_as_novel(sheets, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("oneshot", ROOT / "evaluate" / "oneshot.py")
    oneshot = importlib.util.module_from_spec(spec)
    sys.modules["oneshot"] = oneshot
    spec.loader.exec_module(oneshot)
    flags = {"sheets": 2, "splits": 1, "draws": 2, "shots": (1,), "scales": (1.0,), "resamples": 20}
    arm = (("random", Path("none")),)
    oneshot.main(oneshot.OneshotConfig(data_dir=sheets, arm=arm, out=tmp_path, novel=0.2, **flags))
    said, results = capsys.readouterr().out, json.loads((tmp_path / "oneshot.json").read_text())
    assert list(results) == ["ncc, 1", "ncc, standardised, 1", "random, 1"]
    for figures in results.values():
        assert 0 <= figures["low"] <= figures["AP50"] <= figures["high"] <= 1
        assert figures["AP50"] <= figures["recall"] + 0.01 and set(figures["AP50_class"]) <= set(
            said.splitlines()[0].partition("novel: ")[2].split(", ")
        )
