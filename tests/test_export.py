"""An exported detector finds what torch finds on large and on small sheets, or else it is not written."""

import cv2
import numpy as np
import pytest
import torch
from small_detector import small_spec

from cluster import checkpoint
from cluster.errors import UserError
from detection import export, onnx_export
from detection.detections import Detections
from detection.inference import detect, load_detector
from detection.metrics.ranges import Basis, Ranges
from detection.model import Detector
from detection.onnx_detector import OnnxDetector
from detection.predict import PredictConfig
from detection.predict import main as predict

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """Two sheets of noise. On blank paper a random network would give many places the same score."""
    folder = tmp_path_factory.mktemp("noise")
    for n, shape in enumerate([(150, 260), (128, 120)]):
        image = np.random.default_rng(n).integers(0, 256, shape, dtype=np.uint8)
        cv2.imwrite(str(folder / f"{n}.png"), image)
    return folder


def save(folder, norm, seed=0):
    """Write a model.pt with random weights and with the running statistics of one batch of noise."""
    torch.manual_seed(seed)
    spec = small_spec(norm=norm, head="conv", mean=(0.5,) * 3, std=(0.3,) * 3, score_threshold=0.05)
    detector = Detector(spec).train()
    image = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    target = {"boxes": torch.tensor([[10.0, 10, 40, 40]]), "labels": torch.tensor([1])}
    detector(image, [target, target], [1, 2])
    bases = (Basis(1.5, 30), Basis(2.0, 12, pooled=True))
    ranges = Ranges(("relay", "lamp"), (0.1, 0.2), 1.0, (50, 9), 30, bases, bases, Basis(2.5, 30))
    state = {
        "spec": spec.to_dict(),
        "model": detector.state_dict(),
        "thresholds": {4: 0.1, 9: 0.2},
        "ranges": ranges.to_dict(),
    }
    checkpoint.write_file(folder / "model.pt", state)
    return folder / "model.pt"


def export_to(out, file, *sheets):
    export.main(export.ExportConfig(checkpoint=file, out=out, sheets=sheets))
    return out


@pytest.fixture(scope="module")
def grouped(one_thread, noise, tmp_path_factory):
    """A detector.onnx with GroupNorm, beside the model.pt of which it was made."""
    folder = tmp_path_factory.mktemp("grouped")
    return export_to(folder / "detector.onnx", save(folder, "group"), noise)


def agrees(out, file, image):
    found, expected = detect(load_detector(out), image), detect(load_detector(file), image)
    assert len(expected) > 5
    return onnx_export.compare(expected, found)[0] == onnx_export.compare(found, expected)[0] == 0


def test_onnxruntime_finds_what_torch_finds(grouped, noise):
    one, other = load_detector(grouped.with_name("model.pt")), load_detector(grouped)
    assert isinstance(one, Detector) and isinstance(other, OnnxDetector)
    assert (other.spec, other.thresholds, other.ranges) == (one.spec, one.thresholds, one.ranges)
    image = np.random.default_rng(7).integers(0, 256, (200, 300), dtype=np.uint8)
    assert agrees(grouped, grouped.with_name("model.pt"), image)
    assert agrees(grouped, grouped.with_name("model.pt"), image[:100, :90])


def test_a_detector_with_batch_norm(noise, tmp_path, capsys):
    out = export_to(tmp_path / "new" / "detector.onnx", save(tmp_path, "sync"), noise)
    assert "agrees with torch on 2 sheets" in capsys.readouterr().out
    assert sorted(file.name for file in out.parent.iterdir()) == ["detector.onnx", "detector.onnx.sha256"]


def test_predict_takes_the_file(grouped, noise, tmp_path):
    for file in (grouped, grouped.with_name("model.pt")):
        predict(PredictConfig(checkpoint=file, out=tmp_path / file.name, sheets=(noise,), device="cpu"))
    one, other = ((tmp_path / name / "counts.csv").read_text() for name in ("detector.onnx", "model.pt"))
    assert one == other and "relay low" in one


def test_a_file_that_disagrees_is_not_written(grouped, noise, tmp_path, monkeypatch):
    before = grouped.read_bytes()
    stranger = load_detector(save(tmp_path, "group", seed=1))
    to_onnx = onnx_export.to_onnx
    monkeypatch.setattr(onnx_export, "to_onnx", lambda _: to_onnx(stranger))
    with pytest.raises(UserError, match=r"detector\.onnx: not written, \d+ detections of 2 sheets"):
        export_to(grouped, grouped.with_name("model.pt"), noise)
    assert grouped.read_bytes() == before and not list(grouped.parent.glob(".*"))


def test_what_counts_as_agreement():
    one = Detections(np.array([[0.0, 0, 9, 9], [50, 50, 60, 60]]), np.array([0.9, 0.04]), np.array([1, 2]))
    moved = Detections(one.boxes + 0.01, one.scores - 5e-4, one.labels)
    alone, pixels, score = onnx_export.compare(one, moved)
    assert alone == 0 and pixels == pytest.approx(0.01) and score == pytest.approx(5e-4)
    for other in (
        Detections(one.boxes + 0.1, one.scores, one.labels),
        Detections(one.boxes, one.scores - 0.01, one.labels),
        Detections(one.boxes, one.scores, one.labels[::-1]),
        Detections(one.boxes[1:], one.scores[1:], one.labels[1:]),
    ):
        assert onnx_export.compare(one, other)[0] == 1, "only what is from the least score up"


def test_bad_input_is_one_line(grouped, noise, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="name the sheets"):
        export_to(tmp_path / "a.onnx", grouped.with_name("model.pt"))
    with pytest.raises(UserError, match=r"give a model\.pt"):
        export_to(tmp_path / "a.onnx", grouped, noise)
    with pytest.raises(UserError, match=r"ends in \.onnx"):
        export_to(grouped.with_name("model.pt"), grouped.with_name("model.pt"), noise)
    cv2.imwrite(str(tmp_path / "blank.png"), np.full((40, 40), 255, np.uint8))
    monkeypatch.setattr(onnx_export, "LEAST_SCORE", 1.0)
    with pytest.raises(UserError, match=r"torch finds nothing on the sheets with a score of 1\.0 or more"):
        export_to(tmp_path / "a.onnx", grouped.with_name("model.pt"), tmp_path / "blank.png")
    out = tmp_path / "b.onnx"
    checkpoint.atomic.replace(out, lambda file: file.write(b"no model"), hashed=True)
    with pytest.raises(UserError, match="not a file of"):
        load_detector(out)
    out.write_bytes(b"no mode")
    with pytest.raises(UserError, match="truncated or damaged"):
        load_detector(out)
