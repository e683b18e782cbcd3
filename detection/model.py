"""Faster R-CNN on a timm backbone, for windows of drawings at their native resolution.

This is torchvision's detector with some things changed. The backbone is built as pretraining builds it, so
that its tensors load one to one. Every norm layer, in the FPN too, is a BatchNorm that is synced over ranks
or a GroupNorm. Nothing resizes or pads. Anchors and the numbers of proposals come from the data, random
choices from a seed for each window. docs/detection.md lists all changes with the reason for each.

Letters in shapes: B windows, C channels, H and W pixels, S side of a window, N boxes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from timm.layers import BatchNormAct2d, GroupNormAct
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import AnchorGenerator, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, box_iou
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from cluster.backbone import Normalise, build_backbone
from cluster.errors import UserError
from detection.anchors import STRIDES
from detection.metrics.ranges import Ranges
from detection.spec import Spec
from detection.student import student_losses
from detection.teacher import Pseudo

ROWS = 8  # true boxes whose IoU with all anchors is computed at a time


class Pyramid(nn.Module):
    """Backbone and feature pyramid: images [B, 3, H, W] -> maps [B, out_channels, H / stride, W / stride].

    The strides are 4, 8, 16, 32 and 64, the keys of the maps "0", "1", "2", "3" and "pool".
    """

    body: Any  # nn.Module doesn't declare what timm's models have: forward_intermediates, feature_info

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
        """Freeze the first `stages` stages of the backbone, running statistics included.

        1 freezes it up to the map of stride 4, 4 all of it. Raises UserError for a number outside 0 to 4.
        """
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
        # In training mode the BatchNorm of a frozen layer would still update its running statistics.
        for module in self.frozen:
            module.eval()
        return self


def as_tensor(window: np.ndarray) -> Tensor:
    """uint8 [H, W] or [H, W, 3] -> uint8 [3, H, W]. A gray window becomes three equal channels."""
    tensor = torch.from_numpy(np.ascontiguousarray(window))
    return tensor.expand(3, -1, -1) if tensor.ndim == 2 else tensor.permute(2, 0, 1)


class Windows(nn.Module):
    """Normalises uint8 windows of one size to a batch, in place of torchvision's transform.

    That one would resize and pad the windows. Raises ValueError for sides that are not multiples of 64.
    """

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
    """Anchors laid out in float32, with the sizes that were fitted.

    torchvision lays them out in the type of the feature maps, and numbers above 512 are 4 apart in bf16. It
    also rounds half of an anchor's width and height to whole pixels, which makes thin anchors vanish.
    """

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """The anchors of one level, [ratios * scales, 4], xyxy around the origin."""
        sides = torch.tensor(scales, dtype=dtype, device=device)
        root = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        half = torch.stack([(1 / root)[:, None] * sides, root[:, None] * sides], 2).reshape(-1, 2) / 2
        return torch.cat([-half, half], 1)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        return super().forward(image_list, [features[:, :1].float() for features in feature_maps])


class ProposalHead(RPNHead):
    """The RPN's head with outputs in float32.

    Under bf16 autocast torchvision decodes boxes in bf16, in which coordinates near 1000 are 4 px apart.
    """

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [t.float() for t in logits], [t.float() for t in deltas]


class Predictor(FastRCNNPredictor):
    """One box regression for all classes (arXiv 1605.06409, section 2): few labels hardly teach one for each.

    Outputs are in float32, as those of `ProposalHead`, and so are the losses.
    """

    def __init__(self, channels: int, classes: int):
        super().__init__(channels, classes)
        self.classes = classes
        self.bbox_pred = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, channels] -> scores [N, classes], offsets [N, 4 * classes].

        torchvision expects offsets for each class, so the same four are repeated.
        """
        scores, deltas = super().forward(x)
        return scores.float(), deltas.float().repeat(1, self.classes)


def iou_in_parts(boxes: Tensor, anchors: Tensor, rows: int = ROWS) -> Tensor:
    """IoU of each box with each anchor, [N, 4] and [M, 4] xyxy -> [N, M], for a few boxes at a time.

    For 600 boxes and the 262,000 anchors of a window of 1,024 px torchvision's intermediate results take 8
    times the memory of the result.
    """
    iou = boxes.new_empty(len(boxes), len(anchors))
    for part, some in zip(iou.split(rows), boxes.split(rows), strict=True):
        part.copy_(box_iou(some, anchors))
    return iou


class MersenneTwister:
    """Draws k of n as `torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:k]` does on a CPU.

    randperm swaps place 0, 1, 2, ... with one drawn from the places from there on, so the first k are settled
    after k swaps. It makes all n, which takes 2.5 ms for the anchors of a window of 1024 px.
    """

    def __init__(self, seed: int):
        self.random = np.random.RandomState(seed & 0xFFFFFFFF)  # the bits of torch's generator
        self.behind = 0  # draws that randperm would have made for the places that were not asked for

    def choose(self, n: int, k: int) -> list[int]:
        """The first k of a random permutation of 0 to n - 1, all of them if there are fewer."""
        draws = max(0, n - 1)  # the last place has nothing to be swapped with
        taken = min(k, draws)
        drawn = self.random.randint(0, 1 << 32, self.behind + taken, np.uint32)[self.behind :].tolist()
        self.behind = draws - taken
        moved: dict[int, int] = {}
        chosen = []
        for place, number in enumerate([*drawn, *[0] * (min(k, n) - taken)]):
            other = place + number % (n - place)
            chosen.append(moved.get(other, other))
            moved[other] = moved.get(place, place)
        return chosen


class SeededSampler:
    """Chooses the positive and negative anchors or proposals that enter the loss, by a seed for each window.

    torchvision's BalancedPositiveNegativeSampler chooses the same numbers of each, but draws from the global
    generator: its choice depends on everything drawn before, so a resumed run would differ from an
    uninterrupted one. salt: makes two samplers draw differently from the same seed.
    """

    def __init__(self, batch_size_per_image: int, positive_fraction: float, salt: int):
        self.count = batch_size_per_image
        self.positives = int(batch_size_per_image * positive_fraction)
        self.salt = salt
        self.seeds: list[int] = []

    def __call__(self, matched: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Two lists with a mask uint8 [n] for each window: the chosen positives, and the chosen negatives.

        matched: a tensor [n] for each window; 1 or more is positive, 0 negative, -1 ignored.
        """
        chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
        for seed, labels in zip(self.seeds, matched, strict=True):
            generator = MersenneTwister(seed ^ self.salt)
            positive, negative = torch.where(labels >= 1)[0], torch.where(labels == 0)[0]
            n_positive = min(self.positives, positive.numel())
            for group, limit, masks in (
                (positive, n_positive, chosen[0]),
                (negative, self.count - n_positive, chosen[1]),
            ):
                order = torch.tensor(
                    generator.choose(len(group), limit), dtype=torch.int64, device=group.device
                )
                mask = torch.zeros_like(labels, dtype=torch.uint8)
                mask[group[order]] = 1
                masks.append(mask)
        return chosen


class Detector(FasterRCNN):
    """Faster R-CNN over windows.

    In training mode it maps (images, targets, seeds) to losses, in eval mode images to detections.
    """

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
        ):  # as Fast R-CNN does: arXiv 1504.08083, section 2.3
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        self.spec = spec
        # For each class the score from which a detection counts; `load_detector` puts the fitted ones here.
        self.thresholds = [0.5] * len(spec.categories)
        # And how many boxes of it training had; empty where that is not known.
        self.train_boxes: list[int] = []
        self.ranges: Ranges | None = None  # of the counts at these thresholds; None where none are known
        self.bf16 = False  # whether `detect` computes in bf16
        self.transform = Windows(spec.mean, spec.std)
        self.rpn.box_similarity = iou_in_parts
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
        pseudo: Sequence[Pseudo] = (),
    ) -> Any:
        """Losses by name in training mode, else for each window its detections.

        images: uint8 [B, 3, H, W], H and W multiples of 64. targets: for each window `boxes` float32 [N, 4],
        xyxy in its pixels (N may be 0), and `labels` int64 [N], 1..K. seeds: an int for each window, from
        which `SeededSampler` draws. pseudo: what a teacher says of the last windows of a batch, which then
        have no targets; see `student_losses`. Detections are `boxes`, `labels` and `scores`, highest score
        first.
        Raises ValueError if seeds are missing in training, or if H or W is not a multiple of 64.
        """
        if self.training:
            if seeds is None or len(seeds) != len(images):
                raise ValueError("training needs one seed per window")
            if pseudo and targets is not None:
                return student_losses(self, images, targets, pseudo, seeds)
            self.rpn.fg_bg_sampler.seeds = self.roi_heads.fg_bg_sampler.seeds = list(seeds)
        return super().forward(images, targets)


def _build_body(arch: str) -> Any:
    """The backbone exactly as pretraining builds it, with the same keys and shapes.

    Raises UserError for one that timm doesn't have, or whose intermediate feature maps it doesn't give.
    """
    body = build_backbone(arch)
    if not hasattr(body, "forward_intermediates"):
        raise UserError(f"--arch {arch}: timm gives no intermediate maps of it; take a ResNet or a ConvNeXt")
    return body


def _probe_stages(body: Any, arch: str) -> list[int]:
    """The channels of the backbone's last four feature maps.

    Parameters on which none of these maps depends are frozen, because DDP would wait for their gradients in
    vain. Raises UserError unless the maps have strides 4, 8, 16 and 32.
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
    """The number of groups: 32 as published (arXiv 1803.08494), fewer if 32 does not divide the channels."""
    return next(groups for groups in (32, 16, 8, 4, 2, 1) if channels % groups == 0)


def _group(module: nn.Module) -> None:
    """Replace every BatchNorm inside `module` by a GroupNorm whose weights have the same keys."""
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
    """Initialise the layers before a ReLU as He et al. do (arXiv 1502.01852).

    torchvision's initialisation is 2 to 4 times smaller in each layer, because it was made for feature maps
    without norm layers. After a normalised pyramid it lets the signal dwindle, and the RPN hardly learns in
    the first hundred steps (docs/log.md).
    """
    for head in heads:
        for layer in head.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)


def _box_head(head: str, norm: str, channels: int) -> nn.Module:
    """The head on each proposal, as `Spec.head` says: [N, channels, 7, 7] -> [N, 1024]."""
    if head == "mlp":
        return TwoMLPHead(channels * 7 * 7, 1024)
    norm_layer = _group_norm if norm == "group" else nn.BatchNorm2d
    return FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [1024], norm_layer=norm_layer)
