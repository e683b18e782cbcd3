"""The backbone has torchvision's keys, the projectors are the papers', each method batches views its way."""

import pytest
import torch
import torchvision
from torch import nn

from pretraining.encoder import Encoder, build_backbone, build_projector


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
    with pytest.raises(ValueError, match=r"--arch resnet5O: .*resnet50"):
        build_backbone("resnet5O")


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
    view1, view2 = torch.zeros(4, 3), torch.ones(4, 3)
    for joint in (True, False):
        encoder = Encoder(nn.BatchNorm1d(3, affine=False), nn.Identity(), joint=joint)
        z1, z2 = encoder(view1, view2)
        apart = (z2 - z1).abs().min().item()
        assert apart == pytest.approx(2, rel=1e-3) if joint else apart == 0
