"""Where on a sheet an example may stand: normalised correlation of feature maps with their layout kept.

Letters in shapes: D components, h and w cells of a sheet, m and n cells of a template, N places.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms

from detection.labelling.example import Pose
from detection.labelling.maps import STRIDE, Eye

KEPT = 0.3  # IoU of two places from which only the better one is kept
MOST_PLACES = 300  # of a sheet that are left by NMS
PEAKS = 200  # places of each template on a sheet that are looked at, at most
LEAST = 0.1  # correlation of a place that is looked at
ALIKE = 0.5  # least IoU of a candidate's box with a template's, centres laid on each other


@dataclass(frozen=True)
class Whitening:
    """(cell - mean) @ matrix has no correlations between its components over the sheets; matrix [D, D]."""

    mean: Tensor
    matrix: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """[D, h, w] -> [D, h, w]"""
        return torch.einsum("cd,chw->dhw", self.matrix, features - self.mean[:, None, None])


def whitening(maps: Iterable[Tensor], ridge: float = 0.1) -> Whitening:
    """Of the cells of all maps [D, h, w]. ridge: share of the mean variance that is added to each.

    Correlation in whitened features is that of linear discriminant analysis against the sheets themselves
    (Hariharan, Malik and Ramanan, ECCV 2012): what is common on them counts little.
    """
    count, total, square = 0, torch.zeros(()), torch.zeros(())
    for features in maps:
        cells = features.flatten(1).double()
        count += cells.shape[1]
        total, square = total + cells.sum(1), square + cells @ cells.T
    mean = total / count
    values, axes = torch.linalg.eigh(square / count - torch.outer(mean, mean))
    values = values.clamp(min=0) + ridge * values.mean() + 1e-12
    return Whitening(mean.float(), (axes / values.sqrt() @ axes.T).float())


@dataclass(frozen=True)
class Template:
    """Whitened features of a pose. cells: [D, m, n]. box: x0 y0 x1 y1 in px from its first cell's corner."""

    cells: Tensor
    box: tuple[float, ...]


def template(eye: Eye, pose: Pose, zoom: float, white: Whitening) -> Template:
    """The cells that a pose covers; its box is in px of the sheet."""
    features, cell = white(eye.look(pose.image, zoom)), STRIDE / zoom
    x0, y0, x1, y1 = (edge / cell for edge in pose.box)
    left, top = round(x0), round(y0)
    right, bottom = max(left + 1, round(x1)), max(top + 1, round(y1))
    box = tuple(cell * edge for edge in (x0 - left, y0 - top, x1 - left, y1 - top))
    return Template(features[:, top:bottom, left:right], box)


@dataclass(frozen=True)
class Places:
    """Places on a sheet. boxes: float64 [N, 4] xyxy px. scores: float64 [N]. template: int64 [N]."""

    boxes: np.ndarray
    scores: np.ndarray
    template: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    def strongest(self, iou: float) -> Places:
        """Those that are left by NMS at this IoU, best first."""
        kept = nms(torch.from_numpy(self.boxes), torch.from_numpy(self.scores), iou).numpy()
        return Places(self.boxes[kept], self.scores[kept], self.template[kept])

    def first(self, count: int) -> Places:
        return Places(self.boxes[:count], self.scores[:count], self.template[:count])


def correlate(
    features: Tensor, templates: Sequence[Template], zoom: float, candidates: np.ndarray | None = None
) -> Places:
    """Where whitened features [D, h, w] correlate with a template: local maxima, and candidates of its size.

    The correlation is the cosine of the angle between the m n D numbers of a template and those of the sheet
    under it. candidates: boxes [N, 4] xyxy px that may hold a symbol of whatever kind.
    """
    boxes, scores, which = [np.zeros((0, 4))], [np.zeros(0)], [np.zeros(0, np.int64)]
    energy = features.square().sum(0)[None, None]
    for shape in sorted({tuple(one.cells.shape[1:]) for one in templates}):
        if shape[0] > features.shape[1] or shape[1] > features.shape[2]:
            continue
        rows = [n for n, one in enumerate(templates) if tuple(one.cells.shape[1:]) == shape]
        kernels = torch.stack([templates[n].cells / templates[n].cells.norm().clamp(min=1e-6) for n in rows])
        length = F.avg_pool2d(energy, shape, stride=1, divisor_override=1).clamp(min=1e-6).sqrt()
        response = F.conv2d(features[None], kernels) / length
        highest = F.max_pool2d(response, 3, stride=1, padding=1)
        for n, here, around in zip(rows, response[0], highest[0], strict=True):
            y, x, score = _peaks(here, around)
            found = [(STRIDE / zoom * np.stack([x, y, x, y], 1) + np.array(templates[n].box), score)]
            if candidates is not None:
                found.append(_at(candidates, around, templates[n], zoom))
            for box, score in found:
                boxes.append(box)
                scores.append(score)
                which.append(np.full(len(score), n))
    return Places(np.concatenate(boxes), np.concatenate(scores), np.concatenate(which))


def _peaks(response: Tensor, highest: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y, x and height of the highest local maxima of [h, w]. highest: of the 3 x 3 cells around each."""
    y, x = torch.nonzero((response == highest) & (response > LEAST), as_tuple=True)
    height = response[y, x]
    best = height.argsort(descending=True, stable=True)[:PEAKS]
    return y[best].numpy(), x[best].numpy(), height[best].double().numpy()


def _at(boxes: np.ndarray, highest: Tensor, one: Template, zoom: float) -> tuple[np.ndarray, np.ndarray]:
    """Those of the boxes [N, 4] that are about as large as the template, and the response at each."""
    size, own = boxes[:, 2:] - boxes[:, :2], np.array(one.box[2:]) - np.array(one.box[:2])
    alike = np.minimum(size, own).prod(1) / (size.prod(1) + own.prod() - np.minimum(size, own).prod(1))
    middle = (boxes[:, :2] + boxes[:, 2:] - np.array(one.box[:2]) - np.array(one.box[2:])) / 2
    x, y = np.round(middle * zoom / STRIDE).astype(np.int64).T
    height, width = highest.shape
    fits = (alike >= ALIKE) & (x >= -1) & (y >= -1) & (x <= width) & (y <= height)
    x, y = x[fits].clip(0, width - 1), y[fits].clip(0, height - 1)
    score = highest[torch.from_numpy(y), torch.from_numpy(x)].double().numpy()
    return boxes[fits][score > LEAST], score[score > LEAST]
