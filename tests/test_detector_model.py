"""The detector: its backbone loads whole or not at all, its norms are of one kind, nothing is resized."""

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models.detection.image_list import ImageList

from cluster.backbone import write_backbone
from cluster.checkpoint import sign_final
from cluster.errors import UserError
from cluster.foreign import read_weights
from detection.anchors import STRIDES, TORCHVISION, best_iou, fit_anchors, recall_table
from detection.model import Detector, MersenneTwister, PixelAnchors, SeededSampler, iou_in_parts
from detection.pretrained import fill_backbone
from detection.spec import Spec


def spec_of(arch="resnet18", norm="sync", head="mlp", **changes):
    values = {
        "arch": arch,
        "norm": norm,
        "head": head,
        "fpn_channels": 16,
        "categories": ((3, "relay"), (7, "lamp")),
        "color_mode": "gray",
        "mean": (0.9, 0.9, 0.9),
        "std": (0.2, 0.2, 0.2),
        "window": 128,
        "overlap": 32,
        "anchors": fit_anchors(np.array([[10.0, 10, 40, 40], [20, 20, 60, 40]])),
        "rois": 16,
        "proposals": 32,
        "detections": 20,
        "score_threshold": 0.01,
    }
    return Spec(**{**values, **changes})


def windows(count=2, side=128):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 255, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def targets(*boxes_per_window):
    made = []
    for boxes in boxes_per_window:
        boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        made.append({"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.int64)})
    return made


TWO = targets([[10, 10, 40, 40]], [])


@pytest.fixture(scope="module")
def resnet18():
    torch.manual_seed(1)
    return timm.create_model("resnet18", num_classes=0).state_dict()


def test_a_resnet50_backbone_matches_318_tensors():
    backbone = timm.create_model("resnet50", num_classes=0).state_dict()
    detector = Detector(spec_of("resnet50"))
    assert fill_backbone(detector, backbone, "file") == "backbone: 318 of 318 tensors matched"
    loaded = detector.backbone.body.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in backbone.items())


def test_a_torchvision_file_loads_without_its_classifier(tmp_path):
    published = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(published, tmp_path / "resnet18.pth")
    tensors, meta = read_weights(str(tmp_path / "resnet18.pth"))
    assert meta["mean"] == [0.485, 0.456, 0.406]
    detector = Detector(spec_of())
    audit = fill_backbone(detector, tensors, "resnet18.pth")
    assert audit == "backbone: 120 of 120 tensors matched; 2 tensors of its classifier ignored"
    assert torch.equal(detector.backbone.body.conv1.weight, published["conv1.weight"])


def test_under_group_norm_the_weights_load_and_running_statistics_are_counted(resnet18):
    detector = Detector(spec_of(norm="group"))
    audit = fill_backbone(detector, resnet18, "file")
    assert audit.startswith("backbone: 60 of 60 tensors matched; 60 running statistics set aside")
    assert torch.equal(detector.backbone.body.layer1[0].bn1.weight, resnet18["layer1.0.bn1.weight"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {f"module.{k}": v for k, v in t.items()}, "0 of 120 tensors matched"),
        (lambda t: {k: v for k, v in t.items() if k != "conv1.weight"}, "conv1.weight is missing"),
        (
            lambda t: {**t, "conv1.weight": torch.zeros(64, 1, 7, 7)},
            r"conv1.weight has the shape \[64, 1, 7, 7\]",
        ),
        (lambda t: {**t, "layer9.weight": torch.zeros(1)}, "layer9.weight has no place"),
        (lambda t: timm.create_model("resnet10t", num_classes=0).state_dict(), "of 120 tensors matched"),
    ],
)
def test_a_backbone_that_does_not_fit_is_refused_and_nothing_loaded(resnet18, change, said):
    detector = Detector(spec_of())
    before = {k: v.clone() for k, v in detector.state_dict().items()}
    with pytest.raises(UserError, match=said):
        fill_backbone(detector, change(resnet18), "file.safetensors")
    assert all(torch.equal(before[key], tensor) for key, tensor in detector.state_dict().items())


def test_files_that_are_no_backbone_are_refused_unexecuted(tmp_path, resnet18):
    def refused(content, said):
        file = tmp_path / "file.pth"
        torch.save(content, file)
        with pytest.raises(UserError, match=said):
            read_weights(str(file))

    marker = tmp_path / "was-here"

    class Writes:
        def __reduce__(self):
            return open, (str(marker), "w")

    refused({"conv1.weight": Writes()}, "nothing in it was run")
    assert not marker.exists()
    refused({"state_dict": {"epoch": 3}}, "it holds no tensors")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(UserError, match="not a file of plain tensors"):
        read_weights(str(tmp_path / "cut.pth"))
    with pytest.raises(UserError, match="no such file"):
        read_weights(str(tmp_path / "absent.pth"))


def test_a_backbone_of_an_unfinished_or_changed_run_is_refused(tmp_path, resnet18):
    file = tmp_path / "backbone.safetensors"
    write_backbone(file, resnet18, {"arch": "resnet18"})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has not finished"):
        read_weights(str(file))
    sign_final(tmp_path, 10, [file.name])
    tensors, meta = read_weights(str(file))
    assert (len(tensors), meta["arch"]) == (len(resnet18), "resnet18")
    write_backbone(file, {**resnet18, "conv1.weight": torch.zeros(1)}, {"arch": "resnet18"})
    with pytest.raises(UserError, match="changed since"):
        read_weights(str(file))


@pytest.mark.parametrize("head", ["mlp", "conv"])
@pytest.mark.parametrize(
    ("norm", "kind", "other"),
    [
        ("sync", nn.BatchNorm2d, nn.GroupNorm),
        ("group", nn.GroupNorm, nn.BatchNorm2d),
    ],
)
def test_every_norm_layer_is_of_the_chosen_kind(norm, kind, other, head):
    detector = Detector(spec_of(norm=norm, head=head))
    places = {
        name.split(".")[0] + "." + name.split(".")[1]
        for name, module in detector.named_modules()
        if isinstance(module, kind)
    }
    expected = {"backbone.body", "backbone.fpn"} | ({"roi_heads.box_head"} if head == "conv" else set())
    assert places == expected
    assert not any(isinstance(module, other) for module in detector.modules())


def test_frozen_stages_keep_weights_and_running_statistics():
    torch.manual_seed(0)
    detector = Detector(spec_of())
    detector.backbone.freeze(2)
    detector.train()
    before = {k: v.clone() for k, v in detector.backbone.body.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in detector.parameters() if p.requires_grad], lr=0.1)
    sum(detector(windows(), TWO, [1, 2]).values()).backward()
    optimizer.step()
    moved = {
        k.split(".")[0]
        for k, v in detector.backbone.body.state_dict().items()
        if not torch.equal(v, before[k])
    }
    assert moved == {"layer3", "layer4"}
    with pytest.raises(UserError, match="--freeze-stages 5"):
        detector.backbone.freeze(5)


def test_other_pyramids_work_and_the_rest_is_refused():
    detector = Detector(spec_of("convnext_atto")).eval()
    with torch.no_grad():
        assert [m.shape[-1] for m in detector.backbone(torch.zeros(1, 3, 128, 128)).values()] == [
            32,
            16,
            8,
            4,
            2,
        ]
    with pytest.raises(UserError, match="no pyramid"):
        Detector(spec_of("vit_tiny_patch16_224"))
    with pytest.raises(UserError, match="--arch resnet19"):
        Detector(spec_of("resnet19"))


def test_windows_are_normalised_and_never_resized():
    detector = Detector(spec_of())
    batch, _ = detector.transform(windows())
    expected = (windows().float() / 255 - 0.9) / 0.2
    assert torch.equal(batch.tensors, expected)
    with pytest.raises(ValueError, match="multiples of 64"):
        detector.transform(windows(side=100))


def test_losses_and_boxes_are_float32_under_bf16():
    detector = Detector(spec_of())
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector(windows(), TWO, [1, 2])
        found = detector.eval()(windows())
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert {f["boxes"].dtype for f in found} == {torch.float32}
    boxes = torch.cat([f["boxes"] for f in found])
    inside = boxes[(boxes > 0) & (boxes < 128)]
    assert len(inside) and (inside != inside.bfloat16().float()).any()


def test_a_box_of_one_class_teaches_the_regression_of_all():
    predictor = Detector(spec_of()).roi_heads.box_predictor
    features = torch.randn(5, 1024, generator=torch.Generator().manual_seed(0))
    before = predictor(features)[1].reshape(5, 3, 4)
    loss = (before[:, 1] - 1).square().sum()  # only the boxes of class 1 enter this loss
    (grad,) = torch.autograd.grad(loss, [predictor.bbox_pred.bias])
    with torch.no_grad():
        predictor.bbox_pred.bias -= 0.01 * grad
    after = predictor(features)[1].reshape(5, 3, 4)
    assert (after[:, 2] > before[:, 2]).all()
    assert torch.equal(after[:, 2], after[:, 1])


def test_anchors_are_where_they_are_without_bf16():
    """With BatchNorm the feature maps are bf16, a type in which 700 and 701 are the same number."""
    detector, places = Detector(spec_of()), []
    generate = detector.rpn.anchor_generator.forward
    detector.rpn.anchor_generator.forward = lambda *inputs: places.append(generate(*inputs)) or places[-1]
    images = torch.zeros(1, 3, 64, 1024, dtype=torch.uint8)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            detector.eval()(images)
    assert torch.equal(places[0][0], places[1][0])


@pytest.mark.parametrize("arch", ["resnet10t", "efficientnet_b0"])
def test_every_trained_parameter_gets_a_gradient(arch):
    """DDP would wait in vain for one without. EfficientNet has a norm layer behind its last feature map."""
    detector = Detector(spec_of(arch, norm="group")).train()
    sum(detector(windows(), TWO, seeds=[0, 1]).values()).backward()
    idle = [name for name, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []


def test_sheets_without_symbols_train():
    losses = Detector(spec_of())(windows(), targets([], []), [1, 2])
    assert all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.parametrize("seed", [0, 2**31 - 1, 0x5EED ^ 12345, 2**40 + 3])
def test_k_of_n_are_drawn_as_torch_permutes(seed):
    theirs, ours = torch.Generator().manual_seed(seed), MersenneTwister(seed)
    for n in (0, 300, 1, 2, 70_000, 128, 5):
        assert ours.choose(n, 128) == torch.randperm(n, generator=theirs)[:128].tolist()


def test_the_draws_of_a_window_depend_on_its_seed_alone():
    def losses(global_seed, seeds):
        torch.manual_seed(5)
        detector = Detector(spec_of(norm="group"))
        torch.manual_seed(global_seed)
        return {k: v.item() for k, v in detector(windows(), TWO, seeds).items()}

    assert losses(1, [3, 4]) == losses(2, [3, 4])
    assert losses(1, [3, 4]) != losses(1, [3, 5])
    with pytest.raises(ValueError, match="one seed per window"):
        losses(1, [3])

    labels = [torch.tensor([1, 0, -1] * 40), torch.tensor([0, 0, 1] * 40)]
    sampler = SeededSampler(32, 0.25, salt=9)
    sampler.seeds = [7, 8]
    together = sampler(labels)
    sampler.seeds = [8]
    alone = sampler(labels[1:])
    assert torch.equal(together[0][1], alone[0][0]) and torch.equal(together[1][1], alone[1][0])
    for positive, negative, matched in zip(*together, labels, strict=True):
        assert (int(positive.sum()), int(negative.sum())) == (8, 24)
        assert (matched[positive.bool()] == 1).all() and (matched[negative.bool()] == 0).all()


def test_a_tag_that_timm_does_not_have_is_one_line():
    with pytest.raises(UserError, match=r"--arch resnet18\.nope: .*nope"):
        Detector(spec_of("resnet18.nope"))


def test_fitted_anchors_reach_the_boxes():
    rng = np.random.default_rng(0)
    corner, side = rng.uniform(0, 900, (300, 2)), rng.uniform(20, 60, (300, 2))
    boxes = np.hstack([corner, corner + side])
    fitted = fit_anchors(boxes)
    assert (best_iou(TORCHVISION, boxes) >= 0.7).mean() < 0.5
    assert (best_iou(fitted, boxes) >= 0.7).mean() > 0.8
    assert (best_iou(fitted, boxes) >= 0.5).mean() == 1.0
    assert "fitted" in recall_table(fitted, boxes) and "100.0 %" in recall_table(fitted, boxes)


def test_wires_and_rules_get_anchors_too():
    boxes = np.array([[0.0, 10, 2500, 11], [5, 5, 6, 900], [0, 100, 100, 101]] * 10)
    fitted = fit_anchors(boxes)
    assert best_iou(fitted, boxes).min() > 0
    (laid,) = PixelAnchors(fitted.sizes[:1], (fitted.ratios,)).cell_anchors
    assert ((laid[:, 2:] - laid[:, :2]) > 0.4).all()


def test_best_iou_is_that_of_the_anchors_laid_out():
    rng = np.random.default_rng(1)
    corner = rng.uniform(0, 400, (40, 2))
    boxes = np.hstack([corner, corner + rng.uniform(12, 100, (40, 2))])
    anchors = fit_anchors(boxes)
    generator = PixelAnchors(anchors.sizes, (anchors.ratios,) * 5)
    maps = [torch.zeros(1, 1, 512 // stride, 512 // stride) for stride in STRIDES]
    laid = generator(ImageList(torch.zeros(1, 3, 512, 512), [(512, 512)]), maps)[0]
    exact = torchvision.ops.box_iou(torch.from_numpy(boxes), laid.double()).max(1).values.numpy()
    assert np.abs(best_iou(anchors, boxes) - exact).max() < 1e-4


def test_a_spec_survives_a_file(tmp_path):
    import json

    spec = spec_of()
    assert Spec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize("count", [0, 1, 8, 21])
def test_iou_in_parts_is_torchvisions_to_the_last_bit(count):
    corners = torch.rand(500 + count, 2, 2, generator=torch.Generator().manual_seed(count)) * 100
    laid = torch.cat([corners.amin(1), corners.amax(1)], 1)
    boxes, anchors = laid[:count], laid[count:]
    assert torch.equal(iou_in_parts(boxes, anchors), torchvision.ops.box_iou(boxes, anchors))
