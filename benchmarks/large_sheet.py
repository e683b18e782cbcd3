"""Measure the memory that inference on one large sheet needs in addition to the model.

    python benchmarks/large_sheet.py [--width 10000] [--height 7000] [--arch resnet50] [--batch-size 4]

The sheet is drawn, written as a color PNG and read back. A detector with random weights processes it in
windows of 1024 px and keeps as many detections of each window as it may. Prints the peak memory of the
process from reading to merged detections, minus its memory with the model loaded (Linux only).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from detection.anchors import fit_anchors
from detection.inference import detect
from detection.model import Detector
from detection.spec import Spec
from schematics.sheets import Sheet, read_sheet
from schematics.windows import tile_sheet


def draw(width: int, height: int) -> np.ndarray:
    """A sheet with colored rectangles, circles and wires on white, uint8 [H, W, 3]."""
    rng = np.random.default_rng(0)
    sheet = np.full((height, width, 3), 255, np.uint8)
    for _ in range(width * height // 10_000):
        x, y = int(rng.integers(0, width - 60)), int(rng.integers(0, height - 60))
        color = rng.integers(0, 160, 3).tolist()
        cv2.rectangle(sheet, (x, y), (x + 40, y + 30), color, 2)
        cv2.circle(sheet, (x + 20, y + 15), 12, color, 2)
        cv2.line(sheet, (x + 40, y + 15), (min(width - 1, x + 300), y + 15), color, 1)
    return sheet


def build(arch: str) -> Detector:
    """A detector as `detection.finetune` plans it for sheets that are much larger than a window."""
    boxes = np.array([[0.0, 0.0, 40.0, 30.0]])
    spec = Spec(
        arch=arch,
        norm="sync",
        head="mlp",
        fpn_channels=256,
        categories=tuple((n, f"class {n}") for n in range(1, 32)),
        color_mode="rgb",
        mean=(0.9,) * 3,
        std=(0.2,) * 3,
        window=1024,
        overlap=128,
        anchors=fit_anchors(boxes),
        rois=512,
        proposals=2000,
        detections=300,
        score_threshold=0.01,
    )
    return Detector(spec).eval()


def status(name: str) -> float:
    """An entry of /proc/self/status in GiB, such as VmRSS."""
    (line,) = (text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(name))
    return int(line.split()[1]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("width", 10_000), ("height", 7_000), ("batch-size", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--arch", default="resnet50")
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sheet.png"
        cv2.imwrite(str(file), draw(options.width, options.height))
        detector = build(options.arch)
        size = sum(t.numel() * t.element_size() for t in detector.state_dict().values()) / 2**30
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far was the drawing
        before, began = status("VmRSS"), time.perf_counter()
        image = read_sheet(Sheet(file))
        decoded = time.perf_counter() - began
        found = detect(detector, image, options.batch_size)
        seconds, peak = time.perf_counter() - began, status("VmHWM")
    windows = len(tile_sheet(options.width, options.height, 1024, 128))
    print(f"{options.arch}, {size:.2f} GiB of weights, {torch.get_num_threads()} threads")
    print(f"{options.width} x {options.height} px: {windows} windows, {options.batch_size} at a time")
    print(f"{len(found)} detections in {seconds:.0f} s, of which reading {decoded:.1f} s")
    print(f"peak {peak:.2f} GiB, {peak - before:.2f} GiB above the {before:.2f} GiB with the model loaded")


if __name__ == "__main__":
    main()
