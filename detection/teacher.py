"""What a teacher's boxes on unlabelled windows are worth: pure functions of tensors.

The teacher is the average of the student's weights (Unbiased Teacher, arXiv 2102.09480). Each of its boxes is
one of three kinds: sure, from the threshold of its class on; unsure, below that; or too faint to be kept. A
student learns from what is sure, and from places where no box is. What lies at an unsure box is neither
symbol nor background.

Letters in shapes: K classes, N boxes, P proposals, J jittered copies of a box, S side of a window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou, nms

FAINT = 0.1  # score below which a box is no candidate: its place counts as background
BINS = 50  # of the distribution of a class's scores, from 0 to 1
FIRST = 0.7  # threshold of a class with less than ENOUGH scores: the fixed one of arXiv 2102.09480
ENOUGH = 20.0
LEAST, MOST = 0.4, 0.9  # between which a threshold stays
FORGET = 0.99  # share of the old scores that stays at each step
STABLE = 0.02  # spread of a box under jitter, up to which it teaches regression (arXiv 2106.09018, section 4)


@dataclass(frozen=True)
class Candidates:
    """The teacher's boxes on a window that are not faint, best first; no two overlap by more than NMS allows.

    boxes: float32 [N, 4], xyxy in pixels. scores: float32 [N], of the likeliest class. soft: float32 [N, K],
    the distribution over classes of what is there, if anything is.
    """

    boxes: Tensor
    scores: Tensor
    soft: Tensor

    @property
    def labels(self) -> Tensor:
        """int64 [N], 0..K-1: the likeliest class."""
        return self.soft.argmax(1)


@dataclass(frozen=True)
class Pseudo:
    """What a student is told of one window, in pixels of the window as it sees it.

    boxes: float32 [N, 4], xyxy. soft: float32 [N, K]. sure: bool [N], whether a symbol is there. stable: bool
    [N], whether the box is exact enough to be learnt. seen: float32 [4], the part of the window that the
    teacher saw.
    """

    boxes: Tensor
    soft: Tensor
    sure: Tensor
    stable: Tensor
    seen: Tensor


def candidates(logits: Tensor, boxes: Tensor, iou: float, most: int) -> Candidates:
    """At most `most` boxes of a window that are not faint, after NMS over all classes together.

    logits: [P, 1 + K], the first for background. boxes: [P, 4]. iou: above which the lower score goes.
    A place that two classes claim has one box, whose distribution names both.
    """
    shares = logits.softmax(1)
    scores = shares[:, 1:].amax(1)
    extent = boxes[:, 2:] - boxes[:, :2]
    loud = torch.where((scores >= FAINT) & (extent >= 1).all(1))[0]
    kept = loud[nms(boxes[loud], scores[loud], iou)][:most]
    soft = shares[kept, 1:]
    return Candidates(boxes[kept], scores[kept], soft / soft.sum(1, keepdim=True))


def jittered(boxes: Tensor, offsets: Tensor) -> Tensor:
    """Copies [J, N, 4] of boxes [N, 4] with other corners. offsets: [J, 4], shares of width and height."""
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
    return boxes + offsets[:, None] * torch.stack([width, height, width, height], 1)


def spread(refined: Tensor) -> Tensor:
    """How far the teacher disagrees with itself on N boxes: [N], from what it makes of J copies of each.

    refined: [J, N, 4]. It is the mean over the four coordinates of their standard deviation, in units of half
    the sum of width and height (arXiv 2106.09018, equations 8 and 9).
    """
    middle = refined.mean(0)
    extent = 0.5 * (middle[:, 2:] - middle[:, :2]).sum(1).clamp(min=1e-6)
    return (refined - middle).pow(2).mean(0).sqrt().mean(1) / extent


def count_scores(found: Candidates) -> Tensor:
    """How many candidates of each class have which score: int64 [K, BINS]."""
    classes = found.soft.shape[1]
    place = (found.scores * BINS).long().clamp(max=BINS - 1)
    return torch.bincount(found.labels * BINS + place, minlength=classes * BINS).view(classes, BINS)


def thresholds(counts: Tensor) -> Tensor:
    """The score of each class from which a box is sure: [K], from its distribution of scores [K, BINS].

    Scores fall into two groups, symbols and mistakes. Consistent-Teacher (arXiv 2209.01589, section 3.3) fits
    two Gaussians; here the cut is where the variance between the groups is largest (Otsu 1979), which needs
    no iteration. A box of score s counts s times, as that many symbols are to be expected there. A class with
    few scores has the threshold FIRST, and no threshold is outside LEAST to MOST.
    """
    centres = (torch.arange(BINS, dtype=counts.dtype, device=counts.device) + 0.5) / BINS
    below = torch.cumsum(counts * centres, 1)  # the weight of the scores up to each bin
    moment = torch.cumsum(counts * centres**2, 1)
    all_of, all_moment = below[:, -1:], moment[:, -1:]
    above = all_of - below
    between = (all_moment * below - all_of * moment) ** 2 / (below * above).clamp(min=1e-12)
    between = torch.where((below > 1e-9) & (above > 1e-9), between, torch.zeros_like(between))
    # Between two groups that are far apart every cut is as good; the middle one is taken.
    best = between >= between.amax(1, keepdim=True) * (1 - 1e-9)
    edges = centres + 0.5 / BINS
    cut = (best * edges).sum(1) / best.sum(1)
    fitted = (counts.sum(1) >= ENOUGH) & (between.amax(1) > 0)
    return torch.where(fitted, cut.clamp(LEAST, MOST), torch.full_like(cut, FIRST))


def moved(boxes: Tensor, matrix: Tensor) -> Tensor:
    """Boxes [N, 4] after an affine map [2, 3] that scales, mirrors and turns by quarters."""
    corners = boxes.view(-1, 2, 2) @ matrix[:, :2].T + matrix[:, 2]
    return torch.cat([corners.amin(1), corners.amax(1)], 1)


def taught(
    found: Candidates, least: Tensor, stable: Tensor, matrix: Tensor, side: int, keep: float
) -> Pseudo:
    """What a student that sees a window through `matrix` [2, 3] is told of the teacher's candidates.

    least: [K], thresholds. stable: bool [N]. side: of both windows, px. A box of which less than `keep` is
    inside the student's window is left out, as a true one would be; others are clipped.
    """
    boxes = moved(found.boxes, matrix)
    inside = boxes.clamp(0, side)
    extent = inside[:, 2:] - inside[:, :2]
    kept = (extent.prod(1) >= keep * (boxes[:, 2:] - boxes[:, :2]).prod(1)) & (extent >= 1).all(1)
    sure = found.scores >= least[found.labels]
    whole = torch.tensor([[0.0, 0.0, side, side]], device=boxes.device)
    seen = moved(whole, matrix).clamp(0, side)[0]
    return Pseudo(inside[kept], found.soft[kept], sure[kept], (stable & sure)[kept], seen)


def share_within(boxes: Tensor, part: Tensor, side: int) -> Tensor:
    """The share [N] of boxes [N, 4], clipped to a window of `side` px, that lies in its part [4]."""
    boxes = boxes.clamp(0, side)
    shared = torch.minimum(boxes[:, 2:], part[2:]) - torch.maximum(boxes[:, :2], part[:2])
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return shared.clamp(min=0).prod(1) / area.clamp(min=1e-6)


def agreement(boxes: Tensor, labels: Tensor, true_boxes: Tensor, true_labels: Tensor) -> Tensor:
    """Which of the boxes [N, 4], best first, are right: bool [N].

    Each takes the free true box [M, 4] of its class that it overlaps best, by an IoU of 0.5 or more.
    """
    right = torch.zeros(len(boxes), dtype=torch.bool)
    overlap = box_iou(boxes, true_boxes) * (labels[:, None] == true_labels)
    for n in range(len(boxes) if len(true_boxes) else 0):
        value, place = overlap[n].max(0)
        if value >= 0.5:
            right[n] = True
            overlap[:, place] = 0
    return right
