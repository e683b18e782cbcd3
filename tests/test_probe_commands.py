"""The probes' commands: figures beside baselines in files, a page that opens, one line for what can't be."""

import csv
import importlib.util
import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from browser import Browser

from cluster.backbone import build_backbone, write_backbone
from cluster.entry import parse
from cluster.errors import UserError
from schematics.sheets import DataError

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parent.parent
GREAT, EVIL = "Ventil groß", '$x_1$ <img src=x onerror="document.title=1">'
NUMBERS = {  # crops of train, valid and test
    GREAT: (8, 4, 6),
    EVIL: (8, 4, 6),
    "_4": (8, 4, 6),
    "once": (1, 1, 1),
    "only in test": (0, 0, 1),
}


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """Crops of discs, bars and stripes, two of each class on a sheet; a class folder that is empty."""
    root, rng = tmp_path_factory.mktemp("a b") / "crops ü", np.random.default_rng(0)
    for split, numbers in zip(("train", "valid", "test"), zip(*NUMBERS.values(), strict=True), strict=True):
        (root / split / "never").mkdir(parents=True)
        for label, (name, number) in enumerate(zip(NUMBERS, numbers, strict=True)):
            for n in range(number):
                picture = np.full((20, 14 + 2 * label, 3), 255, np.uint8)
                if label == 0:
                    cv2.circle(picture, (7, 10), 5, (0, 0, 200), -1)
                else:
                    picture[3:17, 5 : 5 + 3 * label : 2 if label == 2 else 1] = 40 * label
                picture[rng.integers(20), rng.integers(14)] = 0
                (root / split / name.replace("/", "")).mkdir(exist_ok=True)
                file = (
                    root / split / name.replace("/", "") / f"{split} plan ö_{n // 2}_{1000 * label + n}.png"
                )
                file.write_bytes(cv2.imencode(".png", picture)[1].tobytes())
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The same weights as a backbone of Linework and as another project's file."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(1)
    tensors = build_backbone("test_resnet").state_dict()
    meta = {"arch": "test_resnet", "color_mode": "rgb", "mean": [0.5] * 3, "std": [0.5] * 3, "image_size": 32}
    write_backbone(folder / "backbone.safetensors", tensors, meta)
    moco = {f"module.encoder_q.{key}": tensor for key, tensor in tensors.items()}
    torch.save({"arch": "test_resnet", "state_dict": moco}, folder / "moco.pth")
    return folder


def run(name, *flags):
    """Call the command in this process."""
    spec = importlib.util.spec_from_file_location(f"probe_{name}", ROOT / "evaluate" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config_class = getattr(module, f"{name.capitalize()}Config")
    module.main(parse(config_class, [*map(str, flags), "--workers", "0", "--resamples", "50"]))


@pytest.mark.parametrize(
    "name, flags",
    [
        ("linear", ["--weight-decays", 1e-3, 1e-2]),
        ("linear", ["--train-split", "valid", "--valid-split", "valid", "--weight-decays", 1e-2, 1e-1]),
        ("knn", ["--k", 3]),
    ],
)
def test_figures_stand_beside_their_baselines(name, flags, crops, weights, tmp_path, capsys):
    checkpoint = weights / "backbone.safetensors"
    run(name, "--checkpoint", checkpoint, "--data-dir", crops, "--out", tmp_path / "o", *flags)
    text = capsys.readouterr().out
    document = json.loads((tmp_path / f"o/{name}.json").read_text())
    assert document["crops"] == 20 and document["sheets"] == 3
    assert set(document["classes"]) == set(NUMBERS) and document["classes"]["only in test"]["value"] == 0
    assert set(document["baselines"]) == {"raw", "random"} and document["settings"]["data_dir"] == str(crops)
    for one in (document, *document["baselines"].values()):
        for figure in ("top1", "top5", "mean_per_class"):
            assert (
                0 <= one[figure]["low"] <= one[figure]["high"] <= 1 and f"{one[figure]['value']:.3f}" in text
            )
    raw = document["baselines"]["raw"]
    assert raw["top1"]["value"] >= 0.85 and "raw 16 x 16 pixels" in text and "random test_resnet" in text
    gain = document["top1"]["value"] - raw["top1"]["value"]
    assert raw["difference"]["top1"]["value"] == pytest.approx(gain, abs=1e-5)
    assert "1 test crops are of classes that train lacks: only in test" in text
    assert (tmp_path / "o/confusion.png").read_bytes().startswith(b"\x89PNG")
    if "--train-split" in flags:
        assert "fitted to 13 crops of valid" in text and "by cross-validation over sheets" in text


def test_a_share_of_the_labelled_sheets_is_fitted_to(crops, weights, tmp_path, capsys):
    checkpoint, fitted = weights / "backbone.safetensors", {}
    for share in (0.3, 0.6, 1):
        out = tmp_path / str(share)
        flags = ["--train-share", share, "--resample", "crops", "--out", out]
        run("linear", "--checkpoint", checkpoint, "--data-dir", crops, *flags)
        text = capsys.readouterr().out
        fitted[share] = int(re.search(r"fitted to (\d+) crops of train", text)[1])
        assert ("sheets, drawn with seed 0; " in text) == (share < 1)
        document = json.loads((out / "linear.json").read_text())
        assert document["crops"] == 20 and document["settings"]["train_share"] == share
        assert len(document["draws"]["top1"]) == len(document["baselines"]["raw"]["draws"]["top1"]) == 50
    assert fitted[0.3] < fitted[0.6] < fitted[1]


def test_other_projects_weights_give_the_same_features(crops, weights, tmp_path, capsys):
    found = []
    for file in ("backbone.safetensors", "moco.pth"):
        flags = ["--image-size", 32, "--resample", "crops", "--out", tmp_path / file]
        run("knn", "--checkpoint", weights / file, "--data-dir", crops, *flags)
        found.append(json.loads((tmp_path / file / "knn.json").read_text()))
    assert "MoCo, under encoder_q." in capsys.readouterr().out
    # The file of MoCo says no mean, so its images are a little brighter.
    assert found[0]["top1"]["value"] == pytest.approx(found[1]["top1"]["value"], abs=0.11)
    assert found[0]["sheets"] == 20


def test_shots_draw_one_curve_for_each_backbone(crops, weights, tmp_path, capsys):
    files = [weights / "backbone.safetensors", weights / "moco.pth"]
    flags = ["--image-size", 32, "--shots", 1, 0, "--draws", 2, "--weight-decays", 0.001]
    run("shots", "--checkpoint", *files, "--data-dir", crops, *flags, "--out", tmp_path / "s")
    run("linear", "--checkpoint", files[0], "--data-dir", crops, *flags[:2], *flags[-2:], "--out", tmp_path)
    curves = json.loads((tmp_path / "s/shots.json").read_text())["curves"]
    assert list(curves) == [*map(str, files), "raw 16 x 16 pixels", "random test_resnet"]
    assert curves[str(files[0])]["all"]["top1"] == json.loads((tmp_path / "linear.json").read_text())["top1"]
    rows = list(csv.DictReader((tmp_path / "s/shots.csv").open()))
    assert len([row for row in rows if row["figure"] == "first_minus_this"]) == 2 * 3
    assert rows[0]["crops"] == "4.0" and "1 (4 crops)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, flags, line",
    [
        (
            "linear",
            ["--test-split", "train"],
            "--test-split train: it is also the --train-split; give another",
        ),
        (
            "linear",
            ["--valid-split", "test"],
            "--valid-split test: it is also the --test-split; give the --tr",
        ),
        ("shots", ["--valid-split", "none"], "none: no class folders there; cut them with: .* another split"),
        ("embedding", ["--train-split", "dev"], "dev: no class folders there; cut them with: "),
        ("knn", ["--test-split", "empty"], "empty: no drawings found; give png"),
        ("knn", ["--test-split", "loose"], "loose: no drawings in its class folders; cut them with"),
        ("knn", ["--checkpoint", "gone.pth"], "gone.pth: no such file; give a backbone.safetensors, a .pth"),
        ("knn", ["--arch", "resnet18"], "--arch resnet18: .* holds a test_resnet; give --arch test_resnet"),
    ],
)
def test_what_cannot_be_is_one_line(name, flags, line, crops, weights):
    for split in ("empty", "loose"):
        (crops / split / "a class").mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(crops / "loose/1.png"), np.full((8, 8), 255, np.uint8))
    given = [] if "--checkpoint" in flags else ["--checkpoint", weights / "backbone.safetensors"]
    with pytest.raises((UserError, DataError), match=line) as error:
        run(name, *given, "--data-dir", crops, *flags)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def page(crops, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("embedding")
    run(
        "embedding",
        "--checkpoint",
        weights / "moco.pth",
        "--data-dir",
        crops,
        "--image-size",
        32,
        "--out",
        out,
    )
    return out


def test_the_page_has_every_crop_once_and_opens_clean(page, crops, tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    try:
        browser.open(page / "neighbours.html")
        files = browser.run("[...document.querySelectorAll('.crop i')].map(e => e.title)")
        assert sorted(files) == sorted(path.name for path in (crops / "test").rglob("*.png"))
        thumbnails = "[...document.querySelectorAll('i')].map(e => getComputedStyle(e).backgroundImage)"
        assert all(uri.startswith('url("data:image/webp') for uri in browser.run(thumbnails))
        assert browser.run("document.querySelectorAll('.row').length * 9") == browser.run(
            "document.querySelectorAll('figure').length"
        )
        headings = browser.run(
            "[...document.querySelectorAll('h2')].map(e => e.firstChild.textContent.trim())"
        )
        assert headings == sorted(NUMBERS) and browser.run("document.title").startswith("Nearest neighbours")
        shown = "[...document.querySelectorAll('.row')].filter(e => e.offsetHeight).length"
        assert browser.run(shown) == 20
        browser.click("#wrong")
        right = json.loads((page / "embedding.json").read_text())["top1"]["value"]
        assert browser.run(shown) == round(20 * (1 - right)) > 0
        browser.open(page / "neighbours.html", width=400)
        assert browser.run("document.documentElement.scrollWidth") <= 400
        assert browser.problems == [] and all(url.startswith(("file:", "data:")) for url in browser.requests)
    finally:
        browser.close()
    assert (page / "embedding.png").read_bytes().startswith(b"\x89PNG")
