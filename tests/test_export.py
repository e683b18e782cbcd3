"""An exported detector finds what torch finds, on sheets large and small, or it is not written."""

import numpy as np
import pytest
import torch

from cluster import checkpoint
from cluster.config import UserError
from detection import export
from detection.anchors import fit_anchors
from detection.model import Detector, Spec
from detection.onnx_detector import OnnxDetector
from detection.predict import Detections, PredictConfig, detect, load_detector
from detection.predict import main as predict
from schematics.sheets import find_sheets, read_sheet


def save(folder, norm, seed=0):
    """A model.pt with random weights that finds something everywhere."""
    torch.manual_seed(seed)
    spec = Spec(
        arch="resnet10t", norm=norm, head="conv", fpn_channels=32, categories=((4, "relay"), (9, "lamp")),
        color_mode="gray", mean=(0.9,) * 3, std=(0.2,) * 3, window=128, overlap=32,
        anchors=fit_anchors(np.array([[0.0, 0, 30, 30]])), rois=16, proposals=64, detections=20,
        score_threshold=0.05,
    )  # fmt: skip
    detector = Detector(spec).train()
    for _ in range(3):  # running statistics worth the name
        image = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
        target = {"boxes": torch.tensor([[10.0, 10, 40, 40]]), "labels": torch.tensor([1])}
        detector(image, [target, target], [1, 2])
    file = folder / f"{norm}-{seed}.pt"
    state = {"spec": spec.to_dict(), "model": detector.state_dict(), "thresholds": {4: 0.1, 9: 0.2}}
    checkpoint.write_file(file, state)
    return file


def exported(file, sheets):
    out = file.with_suffix(".onnx")
    export.main(export.ExportConfig(checkpoint=file, out=out, sheets=(sheets / "test",)))
    return out


@pytest.mark.parametrize("norm", ["sync", "group"])
def test_onnxruntime_finds_what_torch_finds(norm, sheets, tmp_path, capsys):
    file = save(tmp_path, norm)
    out = exported(file, sheets)
    assert "agrees with torch on 4 sheets" in capsys.readouterr().out
    one, other = load_detector(file), load_detector(out)
    assert isinstance(other, OnnxDetector)
    assert (other.spec, other.thresholds) == (one.spec, one.thresholds)
    (sheet, *_) = find_sheets(sheets / "valid")
    large = read_sheet(sheet)
    for image in (large, large[:90, :70], np.full((300, 40), 255, np.uint8)):
        found, expected = detect(other, image), detect(one, image)
        assert len(expected) == len(found) > 5
        assert export.compare(expected, found)[0] == 0 == export.compare(found, expected)[0]
    assert not list(tmp_path.glob(".*"))


def test_predict_takes_the_file(sheets, tmp_path):
    out = exported(save(tmp_path, "group"), sheets)
    pages = (sheets / "valid",)
    for name in ("one", "other"):
        source = out if name == "one" else out.with_suffix(".pt")
        predict(PredictConfig(checkpoint=source, out=tmp_path / name, sheets=pages, device="cpu"))
    counts = [(tmp_path / name / "counts.csv").read_text() for name in ("one", "other")]
    assert counts[0] == counts[1] and "relay" in counts[0]


def test_a_file_that_disagrees_is_not_written(sheets, tmp_path, monkeypatch):
    file = save(tmp_path, "group")
    out = exported(file, sheets)
    before = out.read_bytes()
    stranger = load_detector(save(tmp_path, "group", seed=1))
    to_onnx = export.to_onnx
    monkeypatch.setattr(export, "to_onnx", lambda _: to_onnx(stranger))
    with pytest.raises(UserError, match=r"group-0\.onnx: not written, \d+ detections of 4 sheets"):
        exported(file, sheets)
    assert out.read_bytes() == before and not list(tmp_path.glob(".*"))


def test_what_is_compared():
    one = Detections(np.array([[0.0, 0, 9, 9], [50, 50, 60, 60]]), np.array([0.9, 0.04]), np.array([1, 2]))
    moved = Detections(one.boxes + 0.01, one.scores - 5e-4, one.labels)
    alone, pixels, score = export.compare(one, moved)
    assert alone == 0 and pixels == pytest.approx(0.01) and score == pytest.approx(5e-4)
    for other in (
        Detections(one.boxes + 0.1, one.scores, one.labels),
        Detections(one.boxes, one.scores - 0.01, one.labels),
        Detections(one.boxes, one.scores, one.labels[::-1]),
        Detections(one.boxes[1:], one.scores[1:], one.labels[1:]),
    ):
        assert export.compare(one, other)[0] == 1, "only what is from the least score up"


def test_bad_input_is_one_line(sheets, tmp_path):
    file = save(tmp_path, "group")
    with pytest.raises(UserError, match="name the sheets"):
        export.main(export.ExportConfig(checkpoint=file, out=tmp_path / "a.onnx"))
    out = exported(file, sheets)
    with pytest.raises(UserError, match=r"give a model\.pt"):
        export.main(export.ExportConfig(checkpoint=out, out=tmp_path / "a.onnx", sheets=(sheets,)))
    out.write_bytes(out.read_bytes()[:-9])
    with pytest.raises(UserError, match="truncated or damaged"):
        load_detector(out)
    checkpoint.atomic.replace(out, lambda target: target.write(b"no model"), hashed=True)
    with pytest.raises(UserError, match="not a file of"):
        load_detector(out)
