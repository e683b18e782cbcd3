"""A file that its hash vouches for, with a wrong fact or a weight that is NaN: it loads or is one line."""

import json
import math

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from small_detector import small_spec

from cluster import atomic, checkpoint
from cluster.backbone import build_backbone, write_backbone
from cluster.errors import UserError
from cluster.foreign import read_weights
from detection.inference import NO_FIT, detect, load_detector
from detection.model import Detector
from detection.onnx_detector import INPUT, OUTPUTS, PROPERTY
from pretraining.features import open_backbone

pytestmark = pytest.mark.usefixtures("one_thread")

SHEET = np.random.default_rng(0).integers(0, 255, (90, 100), dtype=np.uint8)
NAN = math.nan
WRONG = (None, "text", True, -1, 0, 0.5, 10**30, 1e300, NAN, math.inf, [], {}, [[]], [NAN] * 3, [0] * 3)
SPEC = small_spec()
COLORS = {"color_mode": "gray", "mean": [0.9] * 3, "std": [0.2] * 3}
META = {"arch": "resnet10t", "image_size": 32, **COLORS}


def mutants(value):
    """The value with one field or item wrong, gone, new or doubled, at any depth."""
    if isinstance(value, dict):
        yield {**value, "foreign": 1}
        for key in value:
            yield {k: v for k, v in value.items() if k != key}
        for key in value:
            yield from ({**value, key: wrong} for wrong in (*WRONG, *mutants(value[key])))
    elif isinstance(value, (list, tuple)):
        yield from ([*value, *value], list(value[1:]))
        yield from ([wrong, *value[1:]] for wrong in (*WRONG, *mutants(value[0])))


def vouch(path):
    """Write the .sha256, as `sha256sum` does, without the fsyncs of `atomic.replace`, for many files."""
    atomic.sidecar(path).write_text(f"{atomic.file_hash(path)}  {path.name}\n")
    return path


def load_all(contents, write, load):
    """The contents that load, and the lines of the others; any other exception than a UserError escapes."""
    loaded, lines = [], []
    for content in contents:
        path = write(content)
        try:
            load(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error), content
            lines.append(str(error))
            if NO_FIT in lines[-1] or "tensors of" in lines[-1]:  # its facts are fine: give it weights
                loaded.append(content)
        else:
            loaded.append(content)
    return loaded, lines


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return Detector(SPEC).state_dict()


def test_a_wrong_fact_in_model_pt(weights, tmp_path):
    both = {"thresholds": {4: 0.1, 9: 0.2}, "train_boxes": {4: 3, 9: 5}}
    facts = {"spec": SPEC.to_dict(), **both}

    def write(content, model=None):
        torch.save({"model": {} if model is None else model, **content}, tmp_path / "model.pt")
        return vouch(tmp_path / "model.pt")

    loaded, lines = load_all(mutants(facts), write, load_detector)
    assert len(lines) > 300 and len(loaded) > 10
    assert any("model.pt: window is -1, not from 64 to 32768; copy the file again" in line for line in lines)
    old = {"spec": {k: v for k, v in facts["spec"].items() if k != "scale"}, "thresholds": {4: 0.1, 9: 0.2}}
    for content in (facts, old):
        assert len(detect(load_detector(write(content, weights)), SHEET))
    # Those whose facts are accepted do find symbols, unless their weights belong to another network.
    for content in loaded:
        try:
            detect(load_detector(write(content, weights)), SHEET)
        except UserError as error:
            assert NO_FIT in str(error)
    for bad in ([], {"a": 1}, {4: torch.zeros(1)}, 3, dict.fromkeys(weights)):
        with pytest.raises(UserError, match=NO_FIT):
            load_detector(write(facts, bad))


def test_a_wrong_fact_in_a_backbone(tmp_path):
    path = tmp_path / "backbone.safetensors"
    tensors = build_backbone("resnet10t").state_dict()

    def load(path):
        read_weights(str(path))
        network, _ = open_backbone(path)
        assert network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).isfinite().all()

    def write(meta, content=None):
        write_backbone(path, {"conv1.weight": torch.zeros(1)} if content is None else content, meta)
        return path

    loaded, lines = load_all(mutants(META), write, load)
    assert len(lines) > 60
    load(write(META, tensors))
    for meta in loaded:
        load(write(meta, tensors))
    with pytest.raises(UserError, match=r"backbone\.safetensors: mean is 'text', not a list"):
        read_weights(str(write({**META, "mean": "text"})))


def write_onnx(path, about, weight=1.0):
    """A network that always finds one box, with the property of an exported detector."""
    kinds = (TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT64)
    shapes, values = ([1, 4], [1], [1]), ([0.0, 0, 9, 9], [0.5 * weight], [1])
    shown = zip(OUTPUTS, kinds, shapes, values, strict=True)
    held = [helper.make_tensor(f"{name}.weight", kind, shape, value) for name, kind, shape, value in shown]
    graph = helper.make_graph(
        [helper.make_node("Identity", [f"{name}.weight"], [name]) for name in OUTPUTS],
        "detector",
        [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, [3, 128, 128])],
        [helper.make_tensor_value_info(*one) for one in zip(OUTPUTS, kinds, shapes, strict=True)],
        held,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.helper.set_model_props(model, {PROPERTY: json.dumps(about)})
    path.write_bytes(model.SerializeToString())
    return vouch(path)


def test_a_wrong_fact_in_an_onnx_file(tmp_path):
    about = {"spec": SPEC.to_dict(), "thresholds": [0.1, 0.2], "train_boxes": [3, 5]}

    def load(path):
        detector = load_detector(path)
        found = detect(detector, SHEET)
        assert len(found.above(np.array(detector.thresholds))) <= 1

    loaded, lines = load_all(mutants(about), lambda one: write_onnx(tmp_path / "d.onnx", one), load)
    assert len(lines) > 300 and len(loaded) > 10
    load(write_onnx(tmp_path / "d.onnx", about))
    load(write_onnx(tmp_path / "d.onnx", {key: about[key] for key in ("spec", "thresholds")}))
    with pytest.raises(UserError, match=r"takes no windows of 192 px; export it again"):
        load(write_onnx(tmp_path / "d.onnx", {**about, "spec": {**about["spec"], "window": 192}}))


@pytest.mark.parametrize("number", [NAN, math.inf])
def test_weights_that_are_not_finite(weights, tmp_path, number):
    def said(file, name):
        return pytest.raises(UserError, match=rf"{file}: {name} holds numbers that are NaN or infinite; ")

    name = "backbone.body.conv1.0.weight"
    broken = weights[name].clone()
    broken.view(-1)[7] = number
    state = {"spec": SPEC.to_dict(), "thresholds": {4: 0.1, 9: 0.2}, "model": {**weights, name: broken}}
    checkpoint.write_file(tmp_path / "model.pt", state)
    with said(r"model\.pt", name):
        load_detector(tmp_path / "model.pt")
    tensors = {"conv1.0.weight": broken}
    write_backbone(tmp_path / "b.safetensors", tensors, META)
    torch.save(tensors, tmp_path / "b.pth")
    with said(r"b\.safetensors", "conv1.0.weight"):
        open_backbone(tmp_path / "b.safetensors")
    for file in ("b.safetensors", "b.pth"):
        with said(file, "conv1.0.weight"):
            read_weights(str(tmp_path / file))
    about = {"spec": SPEC.to_dict(), "thresholds": [0.1, 0.2]}
    with said(r"d\.onnx", "scores.weight"):
        load_detector(write_onnx(tmp_path / "d.onnx", about, number))
