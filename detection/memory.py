"""How much memory a training step of the detector takes, and which window and batch fit into what is free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from cluster.errors import UserError
from cluster.memory import PEAK, SHARE, saved_bytes, tell_bytes
from cluster.training import rehearsal
from detection.anchors import STRIDES
from detection.data import MULTIPLE
from detection.model import ROWS, Detector
from detection.plan import boxes_per_window, large_side
from schematics.coco import LabelledSheet

BATCHES = (8, 4, 2)  # windows; the first is the recipe's
# Bytes of each (true box, anchor) pair when anchors are matched, one window at a time: the IoU, and whether
# it is a box's best. The IoU of the boxes that iou_in_parts takes at a time needs more.
PAIR, IN_PART = 5, 36
# Bytes of work space that torch's libraries take beside a step's tensors: 140 to 330 MB were measured.
WORK_SPACE = 200_000_000


@dataclass(frozen=True)
class Footprint:
    """What a training step takes, in bytes, beside the detector itself."""

    fixed: int  # gradients, the optimizer's momentum, work space
    window: float  # for each window of any size: its proposals
    pixel: float  # for each pixel of a window: feature maps
    anchors: float  # number of anchors for each pixel

    def need(self, side: int, windows: int, boxes: int) -> int:
        """Bytes for a step of `windows` windows of `side` px, the fullest of which shows `boxes` boxes."""
        kept = self.window + self.pixel * side**2
        matched = PAIR * boxes + IN_PART * min(boxes, ROWS)  # for each anchor
        return int(self.fixed + PEAK * windows * kept + matched * self.anchors * side**2)


def measure_footprint(detector: Detector, precision: str, copies: int) -> Footprint:
    """The footprint of a detector on the CPU, from what autograd keeps of two small windows.

    copies: how often the weights are held beside the detector's own: as gradients, momentum, an average.
    """
    kept = []
    with rehearsal(detector, torch.device("cpu"), precision) as copied:
        for side in (2 * MULTIPLE, 4 * MULTIPLE):
            window = torch.zeros(1, 3, side, side, dtype=torch.uint8)
            box = torch.tensor([[8.0, 8, 56, 56]])
            target = {"boxes": box, "labels": torch.ones(1, dtype=torch.int64)}
            kept.append(saved_bytes(lambda w=window, t=target: copied.train()(w, [t], [0]), copied))  # type: ignore[misc]
    pixel = (kept[1] - kept[0]) / (12 * MULTIPLE**2)
    sizes, ratios = detector.spec.anchors.sizes, detector.spec.anchors.ratios
    return Footprint(
        fixed=WORK_SPACE + copies * sum(p.nbytes for p in detector.parameters()),
        window=max(0.0, kept[0] - pixel * 4 * MULTIPLE**2),
        pixel=pixel,
        anchors=sum(
            len(level) * len(ratios) / stride**2 for level, stride in zip(sizes, STRIDES, strict=True)
        ),
    )


@dataclass(frozen=True)
class Fit:
    """A window and a batch, and the bytes that they take on each rank of which `free` are there."""

    window: int  # px
    batch: int
    need: int
    free: int
    unlabelled: int = 0  # windows beside the batch

    @property
    def fits(self) -> bool:
        return self.need <= self.free

    def __str__(self) -> str:
        told = (
            f"batches of {self.batch} windows of {self.window} px"
            f"{f' and {self.unlabelled} unlabelled ones' if self.unlabelled else ''}: a step takes about "
            f"{tell_bytes(self.need)} of memory, {tell_bytes(self.free)} are free"
        )
        return told if self.fits else f"warning: {told}; give a smaller --batch-size, --window or --scale"


def fit_to_memory(
    footprint: Footprint,
    planned: int,
    overlap: int,
    sheets: Sequence[LabelledSheet],
    window: int | None,
    batch: int | None,
    ranks: int,
    free: int,
    unlabelled: Callable[[int], int] = lambda batch: 0,
) -> Fit:
    """The largest window, and for it the largest batch of BATCHES, that fit; what is given stays as it is.

    The batch is halved first; then the window shrinks from the planned one, down to twice a large symbol.
    planned, overlap: px, of the scaled sheets in `sheets`. ranks: by which a batch must be divisible. free:
    bytes on each rank. unlabelled: windows in a step beside a batch of so many. Where nothing fits, the
    smallest is returned if window or batch is given; else UserError is raised.
    """
    least = min(planned, max(2 * MULTIPLE, -(-2 * large_side(sheets) // MULTIPLE) * MULTIPLE))
    sides = [window] if window else range(planned, least - 1, -MULTIPLE)
    batches = [batch] if batch else [size for size in BATCHES if size % ranks == 0] or [BATCHES[0]]
    for side in sides:
        boxes = max(boxes_per_window(sheets, side, min(overlap, side // 2)))
        for size in batches:
            windows = (size + unlabelled(size)) // ranks
            fit = Fit(side, size, footprint.need(side, windows, boxes), free, unlabelled(size))
            if replace(fit, free=int(SHARE * free)).fits:
                return fit
    if window or batch:
        return fit
    raise UserError(
        f"{fit}: that is the least for these sheets; --scale 0.5 makes do with a quarter, "
        "or give --batch-size and --window to try"
    )
