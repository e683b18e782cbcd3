"""The backbone has torchvision's keys, the projectors are the papers', each method batches views its way."""

import pytest
import torch
import torchvision
from torch import nn

from cluster.backbone import Normalise, build_backbone
from cluster.errors import UserError
from pretraining.encoder import Encoder, build_projector


@pytest.mark.parametrize(("arch", "tensors"), [("resnet18", 120), ("resnet50", 318)])
def test_resnet_keys_and_shapes_are_torchvisions(arch, tensors):
    ours = build_backbone(arch).state_dict()
    theirs = torchvision.models.get_model(arch, weights=None).state_dict()
    assert len(ours) == tensors
    assert {k: v.shape for k, v in ours.items()} == {
        k: v.shape for k, v in theirs.items() if not k.startswith("fc.")
    }


def test_same_weights_give_torchvisions_features():
    ours, theirs = build_backbone("resnet18").eval(), torchvision.models.resnet18(weights=None).eval()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(images), theirs(images))


def test_unknown_backbone_is_refused_with_the_nearest_names():
    with pytest.raises(UserError, match=r"--arch resnet5O: .*resnet50"):
        build_backbone("resnet5O")


@pytest.mark.parametrize("joint", [True, False])
def test_gray_views_in_one_channel_have_the_embeddings_of_three_equal_ones(joint):
    torch.manual_seed(0)
    normalise = Normalise([0.9, 0.8, 0.7], [0.2, 0.3, 0.4], torch.channels_last)
    encoder = Encoder(normalise, build_backbone("resnet18"), build_projector([512, 16, 8], True), joint)
    gray = torch.randint(0, 256, (2, 4, 1, 32, 32), dtype=torch.uint8)
    one, three = encoder(*gray), encoder(*gray.expand(2, 4, 3, 32, 32))
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_projectors_of_the_papers():
    def shapes(m):
        return [(*p.weight.shape,) for p in m if isinstance(p, nn.Linear)], [type(p).__name__ for p in m]

    vicreg = build_projector([2048, 8192, 8192, 8192], last_norm=False)
    assert shapes(vicreg) == (
        [(8192, 2048), (8192, 8192), (8192, 8192)],
        ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"],
    )
    assert vicreg[-1].bias is None
    parameters = sum(p.numel() for p in vicreg.parameters()) + 23_508_032
    assert parameters == pytest.approx(174.6e6, rel=1e-3)  # with a ResNet-50
    simclr = build_projector([2048, 2048, 128], last_norm=True)
    assert shapes(simclr) == (
        [(2048, 2048), (128, 2048)],
        ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"],
    )


def test_batchnorm_sees_both_views_in_simclr_and_one_in_vicreg():
    view1, view2 = (torch.full((4, 3, 1, 1), level, dtype=torch.uint8) for level in (0, 255))
    for joint in (True, False):
        backbone = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3, affine=False))
        encoder = Encoder(Normalise([0.0] * 3, [1.0] * 3), backbone, nn.Identity(), joint=joint)
        z1, z2 = encoder(view1, view2)
        apart = (z2 - z1).abs().min().item()
        assert apart == pytest.approx(2, rel=1e-3) if joint else apart == 0


def test_pixels_are_normalised_by_the_mean_and_std_that_travel_with_the_weights():
    normalise = Normalise([0.1, 0.2, 0.3], [0.5, 1.0, 2.0], torch.channels_last)
    pixels = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    channels = zip(pixels.unbind(1), (0.1, 0.2, 0.3), (0.5, 1.0, 2.0), strict=True)
    expected = torch.stack([(channel / 255 - mean) / std for channel, mean, std in channels], 1)
    torch.testing.assert_close(normalise(pixels), expected)
    assert normalise(pixels).is_contiguous(memory_format=torch.channels_last)
    assert Normalise([0.0] * 3, [1.0] * 3)(pixels).is_contiguous()
    encoder = Encoder(normalise, nn.Conv2d(3, 2, 1), nn.Flatten(), joint=True)
    assert set(encoder.state_dict()) == {"backbone.weight", "backbone.bias"}
    z1, z2 = encoder(pixels, pixels)
    assert torch.equal(z1, z2) and torch.equal(z1, encoder.backbone(normalise(pixels)).flatten(1))
