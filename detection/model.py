"""Faster R-CNN on a timm backbone, for windows of drawings at their native resolution.

torchvision's detector with four things changed: the backbone is built as pretraining builds it, so its
tensors load one to one; every norm layer is synced or grouped, also in the FPN; nothing resizes or pads;
anchors and sampling come from the data. Suffixes: B windows, H, W pixels, C channels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from timm.layers import BatchNormAct2d, GroupNormAct
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import AnchorGenerator, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from cluster.errors import UserError
from cluster.weights import Normalise, build_backbone
from detection.anchors import STRIDES, Anchors


@dataclass(frozen=True)
class Spec:
    """All that rebuilds a detector and feeds it as in training; travels in model.pt."""

    arch: str
    norm: str  # "sync": BatchNorm, synced over ranks on GPUs; "group": GroupNorm
    head: str  # "mlp": two hidden layers; "conv": four convolutions with norm, one hidden layer
    fpn_channels: int
    categories: tuple[tuple[int, str], ...]  # (id in the data set, name) of labels 1..K
    color_mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    window: int  # pixels, a multiple of 64
    overlap: int  # pixels
    anchors: Anchors
    rois: int  # sampled per window in training
    proposals: int  # kept per window
    detections: int  # at most, per window
    score_threshold: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Spec:
        """Inverse of `to_dict`, also after a round trip that made lists of tuples."""
        sizes = tuple(tuple(level) for level in values["anchors"]["sizes"])
        tuples = {
            "anchors": Anchors(sizes, tuple(values["anchors"]["ratios"])),
            "categories": tuple((int(i), str(name)) for i, name in values["categories"]),
            "mean": tuple(values["mean"]),
            "std": tuple(values["std"]),
        }
        return Spec(**{**values, **tuples})


class Pyramid(nn.Module):
    """Backbone and FPN: [B, 3, H, W] -> maps of `out_channels` at strides 4 to 64, keys "0".."3", "pool"."""

    body: Any  # timm's models have what nn.Module does not promise: forward_intermediates, feature_info

    def __init__(self, arch: str, norm: str, channels: int):
        super().__init__()
        self.body = _build_body(arch)
        if norm == "group":
            _group(self.body)
        stage_channels = _probe_stages(self.body, arch)
        self.fpn = FeaturePyramidNetwork(
            stage_channels,
            channels,
            extra_blocks=LastLevelMaxPool(),
            norm_layer=_group_norm if norm == "group" else nn.BatchNorm2d,
        )
        self.out_channels = channels
        self.frozen: list[nn.Module] = []

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.body.forward_intermediates(images, indices=4, intermediates_only=True)
        return self.fpn(OrderedDict((str(n), features) for n, features in enumerate(maps)))

    def freeze(self, stages: int) -> None:
        """Freeze the first `stages` of the backbone (1: up to stride 4), running statistics included."""
        info = list(self.body.feature_info)[-4:]
        if not 0 <= stages <= len(info):
            raise UserError(f"--freeze-stages {stages}: give 0 to {len(info)}")
        if not stages:
            return
        last = info[stages - 1]["module"]
        passed = False
        for name, module in self.body.named_modules():
            within = name == last or name.startswith(last + ".")
            if passed and not within:
                break
            passed = passed or within
            if not last.startswith(name + ".") and name:
                self.frozen.append(module)
                module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Pyramid:
        super().train(mode)
        # A frozen layer whose BatchNorm still follows the batches is not frozen.
        for module in self.frozen:
            module.eval()
        return self


class Windows(nn.Module):
    """Stands where torchvision resizes and pads: uint8 windows of one size in, a normalised batch out."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.normalise = Normalise(mean, std)

    def forward(self, images: Sequence[Tensor], targets: list[dict[str, Tensor]] | None = None) -> tuple:
        batch = images if isinstance(images, Tensor) else torch.stack(list(images))
        height, width = batch.shape[-2:]
        if height % STRIDES[-1] or width % STRIDES[-1]:
            raise ValueError(f"a window of {width}x{height} px: its sides must be multiples of {STRIDES[-1]}")
        return ImageList(self.normalise(batch), [(height, width)] * len(batch)), targets

    def postprocess(self, detections: list[dict[str, Tensor]], *_: Any) -> list[dict[str, Tensor]]:
        return detections


class PixelAnchors(AnchorGenerator):
    """Anchors in float32, as they were fitted.

    torchvision takes the type of the maps, 4 px apart in bf16, and rounds half sides to whole pixels, which
    leaves nothing of thin anchors.
    """

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """[ratios x scales, 4] xyxy about the origin."""
        sides = torch.tensor(scales, dtype=dtype, device=device)
        root = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        half = torch.stack([(1 / root)[:, None] * sides, root[:, None] * sides], 2).reshape(-1, 2) / 2
        return torch.cat([-half, half], 1)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        return super().forward(image_list, [features[:, :1].float() for features in feature_maps])


class ProposalHead(RPNHead):
    """Outputs in float32: under bf16 autocast torchvision decodes boxes in bf16, 4 px apart at x = 1000."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [t.float() for t in logits], [t.float() for t in deltas]


class Predictor(FastRCNNPredictor):
    """One box regression for all classes (arXiv 1605.06409, 2), as few labels hardly teach one for each.

    Outputs in float32, for the same reason as above, and so the losses are.
    """

    def __init__(self, channels: int, classes: int):
        super().__init__(channels, classes)
        self.classes = classes
        self.bbox_pred = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, channels] -> scores [N, classes], offsets [N, 4 classes] as torchvision expects them."""
        scores, deltas = super().forward(x)
        return scores.float(), deltas.float().repeat(1, self.classes)


class SeededSampler:
    """torchvision's balanced choice of anchors or proposals, drawn per window from its own seed (law 1).

    torchvision draws from the global generator, so a window's draw depends on everything drawn before it.
    """

    def __init__(self, batch_size_per_image: int, positive_fraction: float, salt: int):
        self.count = batch_size_per_image
        self.positives = int(batch_size_per_image * positive_fraction)
        self.salt = salt
        self.seeds: list[int] = []

    def __call__(self, matched: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """matched: per window [n], >= 1 positive, 0 negative, -1 ignored -> masks of the chosen."""
        chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
        for seed, labels in zip(self.seeds, matched, strict=True):
            generator = torch.Generator().manual_seed(seed ^ self.salt)
            positive, negative = torch.where(labels >= 1)[0], torch.where(labels == 0)[0]
            n_positive = min(self.positives, positive.numel())
            for group, limit, masks in (
                (positive, n_positive, chosen[0]),
                (negative, self.count - n_positive, chosen[1]),
            ):
                order = torch.randperm(group.numel(), generator=generator)[:limit]
                mask = torch.zeros_like(labels, dtype=torch.uint8)
                mask[group[order.to(group.device)]] = 1
                masks.append(mask)
        return chosen


class Detector(FasterRCNN):
    """Faster R-CNN over windows. Training: (images, targets, seeds) -> losses; else: images -> detections."""

    def __init__(self, spec: Spec):
        pyramid = Pyramid(spec.arch, spec.norm, spec.fpn_channels)
        channels = pyramid.out_channels
        generator = PixelAnchors(spec.anchors.sizes, (spec.anchors.ratios,) * len(STRIDES))
        super().__init__(
            pyramid,
            rpn_anchor_generator=generator,
            rpn_head=ProposalHead(channels, generator.num_anchors_per_location()[0]),
            rpn_pre_nms_top_n_train=spec.proposals,
            rpn_pre_nms_top_n_test=spec.proposals,
            rpn_post_nms_top_n_train=spec.proposals,
            rpn_post_nms_top_n_test=spec.proposals,
            box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=7, sampling_ratio=2),
            box_head=_box_head(spec.head, spec.norm, channels),
            box_predictor=Predictor(1024, 1 + len(spec.categories)),
            box_score_thresh=spec.score_threshold,
            box_detections_per_img=spec.detections,
        )
        _he_init(self.rpn.head.conv, self.roi_heads.box_head)
        for layer, std in (
            (self.roi_heads.box_predictor.cls_score, 0.01),
            (self.roi_heads.box_predictor.bbox_pred, 0.001),
        ):  # arXiv 1504.08083, 2.3
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        self.spec = spec
        self.thresholds = [0.5] * len(spec.categories)  # score from which a class's detection should count
        self.transform = Windows(spec.mean, spec.std)
        self.rpn.fg_bg_sampler = SeededSampler(256, 0.5, salt=0x5EED)
        self.roi_heads.fg_bg_sampler = SeededSampler(spec.rois, 0.25, salt=0xB0C5)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(
        self,
        images: Sequence[Tensor],
        targets: list[dict[str, Tensor]] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Any:
        """images: uint8 [B, 3, H, W], H and W multiples of 64.

        targets: per window `boxes` float32 [N, 4] xyxy in its pixels (N may be 0), `labels` int64 [N], 1..K.
        seeds: one int per window, for the choice of anchors and proposals; training needs them.
        Returns four losses in training; else per window `boxes`, `labels`, `scores`, best first.
        """
        if self.training:
            if seeds is None or len(seeds) != len(images):
                raise ValueError("training needs one seed per window")
            self.rpn.fg_bg_sampler.seeds = self.roi_heads.fg_bg_sampler.seeds = list(seeds)
        return super().forward(images, targets)


def _build_body(arch: str) -> Any:
    """The backbone exactly as pretraining builds it: same keys, same shapes."""
    body = build_backbone(arch)
    if not hasattr(body, "forward_intermediates"):
        raise UserError(f"--arch {arch}: timm gives no intermediate maps of it; take a ResNet or a ConvNeXt")
    return body


def _probe_stages(body: Any, arch: str) -> list[int]:
    """Channels of the last four maps; parameters that no map depends on are frozen, as DDP asks.

    Raises UserError unless the maps have strides 4, 8, 16, 32.
    """
    body.eval()
    try:
        maps = body.forward_intermediates(torch.zeros(1, 3, 64, 64), indices=4, intermediates_only=True)
        strides = [64 // m.shape[-1] for m in maps]
    except (AssertionError, RuntimeError, TypeError, ValueError):
        strides = []
    if strides != list(STRIDES[:4]):
        raise UserError(f"--arch {arch}: no pyramid of strides 4 to 32; take a ResNet or a ConvNeXt")
    sum(m.sum() for m in maps).backward()
    for parameter in body.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
    body.train()
    return [m.shape[1] for m in maps]


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_groups(channels), channels)


def _groups(channels: int) -> int:
    """32 as published (arXiv 1803.08494), fewer where 32 does not divide the channels."""
    return next(groups for groups in (32, 16, 8, 4, 2, 1) if channels % groups == 0)


def _group(module: nn.Module) -> None:
    """Replace every BatchNorm below `module` by a GroupNorm under the same keys."""
    for name, child in module.named_children():
        if isinstance(child, BatchNormAct2d):
            grouped = GroupNormAct(child.num_features, _groups(child.num_features))
            grouped.drop, grouped.act = child.drop, child.act
            setattr(module, name, grouped)
        elif isinstance(child, nn.BatchNorm2d):
            setattr(module, name, _group_norm(child.num_features))
        else:
            _group(child)


def _he_init(*heads: nn.Module) -> None:
    """He's initialisation (arXiv 1502.01852) of the layers before a ReLU.

    torchvision's own is 2 to 4 times smaller in each, made for maps without norm: behind a normalised pyramid
    the signal dwindles, and the proposals hardly learn in their first hundred steps.
    """
    for head in heads:
        for layer in head.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)


def _box_head(head: str, norm: str, channels: int) -> nn.Module:
    if head == "mlp":
        return TwoMLPHead(channels * 7 * 7, 1024)
    norm_layer = _group_norm if norm == "group" else nn.BatchNorm2d
    return FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [1024], norm_layer=norm_layer)
