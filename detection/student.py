"""The losses of a student on windows that a teacher has labelled, beside those on labelled windows.

All windows of a step go through backbone and pyramid together. The losses on labelled windows are those of
torchvision, as without a teacher. Those on the others are sums over samples, divided by how many samples
these windows have at most: a number that does not depend on the window, so ranks that average their gradients
have that of one process, and a window of which little is sure counts little.

A weak teacher misses most symbols, and a student that takes all their places for background would unlearn
them. So background weighs no more beside a window's symbols than it does where torchvision's sampler finds
enough of both: as much in the RPN, three times as much in the head. Where nothing is sure nothing is taught.

Letters in shapes: K classes, N boxes, A anchors, P proposals, U windows that a teacher has labelled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers

from detection.teacher import Pseudo, share_within

NEAR = 0.3  # IoU with an unsure box from which on a place is not background
SEEN = 0.6  # share of a box that the teacher must have seen for its place to be background
BETA = 1 / 9  # where the smooth L1 loss turns linear, as in torchvision

Maps = dict[str, Tensor]


def student_losses(
    detector: Any,
    images: Sequence[Tensor],
    targets: list[dict[str, Tensor]],
    pseudo: Sequence[Pseudo],
    seeds: Sequence[int],
) -> dict[str, Tensor]:
    """The losses of a detector in training mode by name: torchvision's four, and three on a teacher's labels.

    images: uint8 [B + U, 3, S, S]; the first B have targets, the others pseudo-labels. seeds: an int for each
    of all of these, from which anchors and proposals are drawn.
    """
    batch, targets = detector.transform(images, targets)
    maps: Maps = detector.backbone(batch.tensors)
    count = len(targets)
    labelled, others = (
        (ImageList(batch.tensors[part], batch.image_sizes[part]), {name: m[part] for name, m in maps.items()})
        for part in (slice(None, count), slice(count, None))
    )
    detector.rpn.fg_bg_sampler.seeds = detector.roi_heads.fg_bg_sampler.seeds = seeds[:count]
    proposals, of_rpn = detector.rpn(*labelled, targets)
    _, of_head = detector.roi_heads(labelled[1], proposals, labelled[0].image_sizes, targets)
    objectness, proposals = _objectness_loss(detector.rpn, *others, pseudo, seeds[count:])
    classes, boxes = _head_losses(detector.roi_heads, *others, proposals, pseudo, seeds[count:])
    of_teacher = {"teacher_classifier": classes, "teacher_box_reg": boxes, "teacher_objectness": objectness}
    return of_head | of_rpn | of_teacher


def _objectness_loss(
    rpn: Any, images: ImageList, maps: Maps, pseudo: Sequence[Pseudo], seeds: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """Binary cross-entropy of the sampled anchors [], and the proposals [P, 4] of each window.

    The RPN's boxes are not taught: the head moves them anyway, and its boxes are.
    """
    levels = list(maps.values())
    logits, offsets = rpn.head(levels)
    anchors = rpn.anchor_generator(images, levels)
    per_level = [level[0].numel() for level in logits]
    flat, offsets = concat_box_prediction_layers(logits, offsets)
    proposals = rpn.box_coder.decode(offsets.detach(), anchors).view(len(pseudo), -1, 4)
    objectness = flat.view(len(pseudo), -1)
    kept, _ = rpn.filter_proposals(proposals, objectness, images.image_sizes, per_level)
    losses = []
    for n, told in enumerate(pseudo):
        (matched,), _ = rpn.assign_targets_to_anchors([anchors[n]], [{"boxes": told.boxes[told.sure]}])
        labels = without_doubtful(matched, anchors[n], told, images.image_sizes[n][0], rpn.box_similarity)
        chosen, weights = _sample(rpn.fg_bg_sampler, labels, seeds[n])
        losses.append(
            F.binary_cross_entropy_with_logits(
                objectness[n][chosen], labels[chosen], weights, reduction="sum"
            )
        )
    return torch.stack(losses).sum() / (rpn.fg_bg_sampler.count * len(pseudo)), kept


@dataclass(frozen=True)
class Regions:
    """The proposals of a window that are sampled for the head, and what it is to make of them.

    boxes: [N, 4]. classes: [N, 1 + K], the distribution over background and classes, times the weight of
    each. offsets: [N, 4], to the teacher's box. exact: bool [N], whether they are to be learnt.
    """

    boxes: Tensor
    classes: Tensor
    offsets: Tensor
    exact: Tensor


def _regions(heads: Any, proposals: Tensor, told: Pseudo, side: int, seed: int) -> Regions:
    """Sample the proposals [P, 4] of a window, and the sure boxes among them, as torchvision does."""
    boxes, soft, stable = told.boxes[told.sure], told.soft[told.sure], told.stable[told.sure]
    proposals = torch.cat([proposals, boxes])
    ones = torch.ones(len(boxes), dtype=torch.int64, device=boxes.device)
    (match,), (labels,) = heads.assign_targets_to_proposals([proposals], [boxes], [ones])
    labels = without_doubtful(labels, proposals, told, side, heads.box_similarity)
    chosen, weights = _sample(heads.fg_bg_sampler, labels, seed)
    if not len(chosen):  # a norm layer needs something to norm
        chosen, weights = chosen.new_zeros(1), weights.new_zeros(1)
    proposals, match, found = proposals[chosen], match[chosen], labels[chosen] > 0
    classes = soft.new_zeros(len(chosen), 1 + soft.shape[1])
    classes[~found, 0] = 1
    classes[found, 1:] = soft[match[found]]
    aims = proposals.clone()  # where there is nothing to aim at
    aims[found] = boxes[match[found]]
    exact = found.clone()
    exact[found] = stable[match[found]]
    (offsets,) = heads.box_coder.encode([aims], [proposals])
    return Regions(proposals, classes * weights[:, None], offsets, exact)


def _head_losses(
    heads: Any,
    images: ImageList,
    maps: Maps,
    proposals: Sequence[Tensor],
    pseudo: Sequence[Pseudo],
    seeds: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Cross-entropy with the teacher's distribution over classes [], and smooth L1 of its stable boxes []."""
    sides = [height for height, _ in images.image_sizes]
    regions = [_regions(heads, *of) for of in zip(proposals, pseudo, sides, seeds, strict=True)]
    pooled = heads.box_roi_pool(maps, [region.boxes for region in regions], images.image_sizes)
    scores, offsets = heads.box_predictor(heads.box_head(pooled))
    targets = torch.cat([region.classes for region in regions])
    exact = torch.cat([region.exact for region in regions])
    aims = torch.cat([region.offsets for region in regions])[exact]
    # The predictor repeats its four offsets for each class.
    distance = F.smooth_l1_loss(offsets[exact, :4], aims, beta=BETA, reduction="sum")
    most = heads.fg_bg_sampler.count * len(pseudo)
    return (targets * -scores.log_softmax(1)).sum() / most, distance / most


def _sample(sampler: Any, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Which of the labels [N] enter the loss, int64 [M], drawn from the seed, and their weights [M].

    -1 never does.
    """
    sampler.seeds = [seed]
    (positive,), (negative,) = sampler([labels])
    chosen = torch.where(positive | negative)[0]
    symbols, others = int(positive.sum()), int(negative.sum())
    ratio = (sampler.count - sampler.positives) / sampler.positives
    background = min(1.0, ratio * symbols / max(1, others))
    return chosen, torch.where(positive[chosen] > 0, 1.0, background)


def without_doubtful(
    labels: Tensor, boxes: Tensor, told: Pseudo, side: int, iou: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Labels [N] of boxes [N, 4] with -1, which is neither, for what is not surely background.

    That is what overlaps an unsure box, and what the teacher did not see.
    """
    doubtful = share_within(boxes, told.seen, side) < SEEN
    unsure = told.boxes[~told.sure]
    if len(unsure):
        doubtful |= iou(unsure, boxes).amax(0) >= NEAR
    return torch.where((labels == 0) & doubtful, torch.full_like(labels, -1), labels)
