"""The detector against torchvision's Faster R-CNN with a pyramid (v1): inference, and a training step.

    python benchmarks/detector_speed.py [--only inference|training] [--arch resnet18 resnet50] [--side 640]

One thread, channels_last for both, windows of 640 px, a pyramid of 256 channels, 30 classes, at most 1,000
proposals for both, random weights: no score reaches the threshold, so neither spends time on the last NMS.
Ours is in what `--precision auto` takes on this machine. torchvision is run in float32 and, a line without a
goal, with backbone and pyramid in bf16; under autocast as a whole it rounds boxes to 4 px.
A training step is forward and backward pass, clipping and SGD with momentum, of two windows with 30 boxes.

What limits ours in bf16: RoIAlign, which both have from torchvision, in float32, is 40 % of inference;
convolutions are 20 %, the first hidden layer of the head 8 %.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from race import describe_machine, race
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision_defaults import build_torchvision

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from cluster.guard import Guard
from cluster.precision import in_bf16
from cluster.training import GuardedStep
from detection.anchors import Anchors
from detection.model import Detector
from detection.spec import Spec

CLASSES, BOXES, PROPOSALS, BATCH = 30, 30, 1000, 2
CPU = torch.device("cpu")


def build_ours(arch: str, side: int) -> Detector:
    sizes = ((16, 24), (32, 45), (64, 90), (128, 181), (256, 362))
    spec = Spec(
        arch=arch,
        norm="sync",
        head="mlp",
        fpn_channels=256,
        categories=tuple((n, f"class {n}") for n in range(1, CLASSES + 1)),
        color_mode="gray",
        mean=(0.9,) * 3,
        std=(0.2,) * 3,
        window=side,
        overlap=64,
        anchors=Anchors(sizes, (0.5, 1.0, 2.0)),
        rois=512,  # torchvision's own number
        proposals=PROPOSALS,
        detections=100,
        score_threshold=0.05,
    )
    return Detector(spec).to(memory_format=torch.channels_last)


def build_peer(arch: str, side: int) -> FasterRCNN:
    """torchvision's, which sees the window in its own size and keeps as many proposals as ours."""
    peer = build_torchvision(arch, 256, CLASSES)
    peer.transform.min_size, peer.transform.max_size = (side,), side
    for numbers in (peer.rpn._pre_nms_top_n, peer.rpn._post_nms_top_n):
        numbers.update(training=PROPOSALS, testing=PROPOSALS)
    return peer.to(memory_format=torch.channels_last)


@torch.inference_mode()
def find_ours(detector: Detector, windows: Tensor, bf16: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        detector(windows)


@torch.inference_mode()
def find_peer(peer: FasterRCNN, images: list[Tensor], bf16: bool) -> None:
    peer.backbone.training = bf16  # of the wrapper alone, which looks there for its arithmetic
    peer(images)


def random_targets(side: int) -> list[dict[str, Tensor]]:
    corners = torch.rand(BATCH, BOXES, 2) * (side - 40)
    labels = torch.randint(1, CLASSES + 1, (BATCH, BOXES))
    return [
        {"boxes": torch.cat([corner, corner + 32], 1), "labels": label}
        for corner, label in zip(corners, labels, strict=True)
    ]


def step_of_ours(arch: str, side: int, windows: Tensor, targets: list) -> Callable[[], object]:
    detector = build_ours(arch, side).train()
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)
    guarded = GuardedStep(detector, optimizer, lambda _: 1e-4, Guard(), CPU, 10.0, "auto")

    def step() -> None:
        with guarded.forward():
            losses = detector(windows, targets, range(BATCH))
        guarded.take(0, torch.stack([value.float() for value in losses.values()]).sum())

    return step


def step_of_peer(peer: FasterRCNN, images: list[Tensor], targets: list) -> Callable[[bool], None]:
    optimizer = torch.optim.SGD(peer.train().parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)

    def step(bf16: bool) -> None:
        peer.backbone.training = bf16
        loss = torch.stack(list(peer(images, targets).values())).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 10.0)
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("inference", "training"))
    parser.add_argument("--arch", nargs="+", default=["resnet50", "resnet18"])
    parser.add_argument("--side", type=int, default=640, help="of a window, px")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{describe_machine('torch', 'torchvision', 'timm')}; one thread, nothing is resized")
    windows = torch.randint(0, 256, (BATCH, 3, options.side, options.side), dtype=torch.uint8)
    images, targets = list(windows.float() / 255), random_targets(options.side)
    for arch in options.arch:
        ours, peer = build_ours(arch, options.side).eval(), build_peer(arch, options.side).eval()
        bf16 = in_bf16("auto", CPU, ours)
        for work, mine, theirs, goal in (
            (
                f"inference, {arch}, a window of {options.side} px",
                partial(find_ours, ours, windows[:1], bf16),
                partial(find_peer, peer, images[:1]),
                1.5 if arch == "resnet50" else None,
            ),
            (
                f"training step, {arch}, {BATCH} windows of {options.side} px",
                step_of_ours(arch, options.side, windows, targets),
                step_of_peer(build_peer(arch, options.side), images, targets),
                1.2,
            ),
        ):
            if options.only and not work.startswith(options.only):
                continue
            work += f", {'bf16' if bf16 else 'float32'}"
            race(work, mine, partial(theirs, False), "torchvision", goal, options.rounds)
            race(work, mine, partial(theirs, True), "torchvision, maps in bf16", None, options.rounds)


if __name__ == "__main__":
    main()
