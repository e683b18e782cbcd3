"""Compare torchvision's Faster R-CNN as it comes with Linework's: the same sheets, steps, rates and seeds.

    python benchmarks/torchvision_defaults.py --data-dir DATA --out OUT [--arch resnet18] [--channels 128]
        [--steps 150] [--batch-size 2] [--lr 0.01] [--seeds 0 1 2] [--train N] [--valid 30] [--test 100]
        [--backbone FILE]

Both start from random weights and train with SGD, a linear warm-up and a cosine. With FILE, a
backbone.safetensors of that arch, Linework is also trained from pretrained weights.

torchvision: whole sheets resized to 800/1333 px, torchvision's own anchors, norm, sampling, mean and std, and
the horizontal flips of its reference recipe; backbone and pyramid in bf16, the rest in float32. Linework:
`python -m detection.finetune` with the settings that it derives from the data, in bf16; its CPU seconds
include the start of a process and a validation.

For both, the score thresholds for counting are those of the best F1 on valid. Runs whose predictions are in
OUT are not repeated, so several processes may share the seeds. The table covers the seeds that the command
names.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import shutil
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.models import get_model
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT))
from cluster import atomic  # noqa: E402
from detection.detections import Detections, to_results  # noqa: E402
from detection.inference import detect, load_detector  # noqa: E402
from detection.metrics.analysis import fit_thresholds  # noqa: E402
from detection.metrics.bootstrap import average_precision  # noqa: E402
from detection.metrics.counts import count  # noqa: E402
from detection.metrics.matching import Matches, match  # noqa: E402
from detection.plan import fit_overlap, fit_window  # noqa: E402
from detection.schedule import Phase, lr_at  # noqa: E402
from detection.sheets import SheetReader  # noqa: E402
from schematics.coco import Split, find_split, read_split, to_coco, write_split  # noqa: E402
from schematics.resampling import Interval, interval, ratio, resample  # noqa: E402
from schematics.windows import tile_sheet  # noqa: E402

ARMS = ("torchvision", "linework", "pretrained")
Results = list[dict[str, Any]]


def choose_sheets(source: Path, folder: Path, sheets: dict[str, int]) -> None:
    """Link at most `sheets[split]` random sheets of each split into `folder`, the same for all seeds."""
    for name, most in sheets.items():
        if (folder / name).exists():
            continue
        partial = folder / f".{name}-{os.getpid()}"
        split = read_split(find_split(source, name))
        document = to_coco(split)
        drawn = random.Random(0).sample(document["images"], min(most, len(split.sheets)))
        kept = {image["id"] for image in drawn}
        paths = {sheet.image_id: sheet.path.resolve() for sheet in split.sheets}
        rows = [row for row in document["annotations"] if row["image_id"] in kept]
        partial.mkdir(parents=True)
        for image in drawn:
            image["file_name"] = f"{image['id']}{paths[image['id']].suffix}"
            (partial / image["file_name"]).symlink_to(paths[image["id"]])
        write_split(partial, drawn, split.categories, rows)
        try:
            partial.rename(folder / name)
        except OSError:  # another process was faster
            shutil.rmtree(partial)


def refuse_other_options(out: Path, options: argparse.Namespace) -> None:
    """Exit with an error line if OUT holds runs that were made with other options."""
    free = ("out", "seeds", "arms", "backbone")
    given = {name: str(value) for name, value in vars(options).items() if name not in free}
    path = out / "options.json"
    known = json.loads(path.read_text()) if path.exists() else {} if list(out.glob("*/found.json")) else given
    for name, value in given.items():
        if known.get(name) != value:
            flag = name.replace("_", "-")
            sys.exit(f"error: --{flag} {value}: the runs in {out} have {known.get(name)}; take another --out")
    out.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, json.dumps(given, indent=2) + "\n")


class Maps(torch.nn.Module):
    """Backbone and pyramid in bf16, output in float32: torchvision casts anchors and boxes to its type."""

    def __init__(self, pyramid: BackboneWithFPN):
        super().__init__()
        self.pyramid, self.out_channels = pyramid, pyramid.out_channels

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.training):
            return OrderedDict((name, maps.float()) for name, maps in self.pyramid(images).items())


def build_torchvision(arch: str, channels: int, classes: int) -> FasterRCNN:
    """fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None) for any ResNet and pyramid width."""
    body = get_model(arch, weights=None)
    wide = body.inplanes // 8
    layers = {f"layer{n}": str(n - 1) for n in (1, 2, 3, 4)}
    backbone = BackboneWithFPN(body, layers, [wide, 2 * wide, 4 * wide, 8 * wide], channels)
    return FasterRCNN(Maps(backbone), 1 + classes)


def train_torchvision(split: Split, seed: int, options: argparse.Namespace) -> FasterRCNN:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = build_torchvision(options.arch, options.channels, len(split.categories))
    model.to(options.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)
    phases = [Phase(0, options.lr, "cosine", 1, 1.0, options.steps)]
    usable = [n for n, sheet in enumerate(split.sheets) if len(sheet.boxes)]
    reader, order = SheetReader(split, "rgb"), list[int]()
    for step in range(options.steps):
        if len(order) < options.batch_size:
            order = rng.permutation(usable).tolist()
        picked, order = order[: options.batch_size], order[options.batch_size :]
        images, targets = [], []
        for n in picked:
            image, boxes = reader[n][0], split.sheets[n].boxes
            if rng.random() < 0.5:
                width = image.shape[1]
                image = image[:, ::-1]
                boxes = np.array([width, 0, width, 0]) + boxes[:, [2, 1, 0, 3]] * [-1, 1, -1, 1]
            images.append(as_float(image).to(options.device))
            targets.append(
                {
                    "boxes": torch.from_numpy(boxes.astype(np.float32)).to(options.device),
                    "labels": torch.from_numpy(split.sheets[n].labels).to(options.device),
                }
            )
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, phases, min(options.warmup, options.steps // 10))
        loss = torch.stack(list(model(images, targets).values())).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        if math.isfinite(float(norm)):
            optimizer.step()
        if step % 10 == 0:
            print(f"torchvision, seed {seed}, step {step}: loss {loss.item():.3f}", flush=True)
    return model


def as_float(image: np.ndarray) -> torch.Tensor:
    """uint8 [H, W] or [H, W, 3] -> float32 [3, H, W] in [0, 1], the input of torchvision's models."""
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float() / 255


@torch.inference_mode()
def find_torchvision(model: FasterRCNN, split: Split) -> Results:
    model.eval()
    device, reader = next(model.parameters()).device, SheetReader(split, "rgb", cache_bytes=0)
    found = {}
    for n, sheet in enumerate(split.sheets):
        (output,) = model([as_float(reader[n][0]).to(device)])
        columns = (output[key].double().cpu().numpy() for key in ("boxes", "scores"))
        found[sheet.image_id] = Detections(*columns, output["labels"].cpu().numpy())
    return to_results(found, [category.id for category in split.categories])


def find_linework(model: Path, split: Split, device: str) -> Results:
    detector = load_detector(model, device)
    reader = SheetReader(split, detector.spec.color_mode, cache_bytes=0)
    found = {sheet.image_id: detect(detector, reader[n][0]) for n, sheet in enumerate(split.sheets)}
    return to_results(found, [category.id for category in split.categories])


def windows_per_step(split: Split, sheets: int) -> int:
    """Number of windows in `sheets` average sheets: a step of both detectors then covers an equal area."""
    side = fit_window(split.sheets)
    overlap = fit_overlap(split.sheets, side)
    windows = sum(len(tile_sheet(sheet.width, sheet.height, side, overlap)) for sheet in split.sheets)
    return max(1, round(sheets * windows / len(split.sheets)))


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def make_run(arm: str, seed: int, data: Path, folder: Path, options: argparse.Namespace) -> None:
    """Train one detector; write its predictions on valid and test and the CPU seconds of the training."""
    splits = {name: read_split(find_split(data, name)) for name in ("train", "valid", "test")}
    began = cpu_seconds()
    if arm == "torchvision":
        model = train_torchvision(splits["train"], seed, options)
        seconds = cpu_seconds() - began
        found = {name: find_torchvision(model, splits[name]) for name in ("valid", "test")}
    else:
        batch = windows_per_step(splits["train"], options.batch_size)
        backbone = options.backbone if arm == "pretrained" else "none"
        flags = f"""--arch {options.arch} --fpn-channels {options.channels} --seed {seed}
            --steps {options.steps} --batch-size {batch} --lr {options.lr} --scheduler cosine
            --warmup-steps {options.warmup} --wd 0.0001 --workers 0 --precision bf16 --device {options.device}
            --validate-every 1000000"""
        places = ["--backbone", backbone, "--data-dir", data, "--exp-dir", folder / "run"]
        command = [sys.executable, "-m", "detection.finetune", *flags.split(), *map(str, places)]
        subprocess.run(command, cwd=ROOT, check=True)
        seconds = cpu_seconds() - began  # with the validation at the end
        model = folder / "run" / "last.pt"
        found = {name: find_linework(model, splits[name], options.device) for name in ("valid", "test")}
    folder.mkdir(parents=True, exist_ok=True)
    found_and_cost = {**found, "cpu_seconds": seconds, "threads": torch.get_num_threads()}
    if arm == "pretrained":
        found_and_cost["backbone"] = atomic.file_hash(options.backbone)
    atomic.write_text(folder / "found.json", json.dumps(found_and_cost))


def backbone_of(folder: Path) -> str:
    """The sha256 of the backbone from which a run of the arm `pretrained` started."""
    return json.loads((folder / "found.json").read_text())["backbone"]


def judge(run: dict[str, Any], valid: Split, test: Split, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Each figure on test for the sheets as they are and for B resamples of them: arrays [B + 1]."""
    thresholds = fit_thresholds(match(to_coco(valid), run["valid"]))
    matches = match(to_coco(test), run["test"])
    whole = np.vstack([np.ones((1, weights.shape[1]), np.int64), weights])
    figures = average_precision(matches, whole)
    return {
        **{name: figures[name] for name in ("AP", "AP50", "AP75")},
        "exact counts": exact_counts(matches, thresholds, whole),
    }


def exact_counts(matches: Matches, thresholds: dict[int, float], weights: np.ndarray) -> np.ndarray:
    """Share of (sheet, class) pairs whose count is right, for each weighting of the sheets."""
    above = matches.above(np.array([thresholds[int(n)] for n in matches.category_ids]))
    counts = count(matches, above)
    return ratio(counts.exact.sum(1).astype(float), counts.pairs.sum(1).astype(float), weights)


def table(data: Path, out: Path, seeds: list[int], arms: Sequence[str]) -> str:
    """Table of means over seeds with 95 % bootstrap intervals over sheets, ranges over seeds, and gains."""
    valid, test = (read_split(find_split(data, name)) for name in ("valid", "test"))
    weights = resample(len(test.sheets), 500)
    mean, lines, cost = {}, [], {}
    for arm in arms:
        runs = [json.loads((out / f"{arm}-{seed}" / "found.json").read_text()) for seed in seeds]
        judged = [judge(run, valid, test, weights) for run in runs]
        cost[arm] = float(np.mean([run["cpu_seconds"] for run in runs]))
        mean[arm] = {name: np.mean([each[name] for each in judged], axis=0) for name in judged[0]}
        cells = []
        for name, draws in mean[arm].items():
            of_seeds = [float(each[name][0]) for each in judged]
            cells.append(f"{spread(draws)} ({min(of_seeds):.3f} to {max(of_seeds):.3f})")
        lines.append(f"| {arm} | {' | '.join(cells)} | {cost[arm]:.0f} |")
    for before, arm in pairwise(arms):
        gains = [str(spread(mean[arm][name] - mean[before][name])) for name in mean[arm]]
        lines.append(f"| {arm} - {before} | {' | '.join(gains)} | x {cost[arm] / cost[before]:.2f} |")
    head = ["", *mean[arms[0]], "CPU s a training"]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines])


def spread(draws: np.ndarray) -> Interval:
    return interval(draws[1:], draws[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arch", default="resnet18", help="a ResNet of torchvision")
    parser.add_argument("--channels", type=int, default=128, help="of the pyramid; torchvision's own is 256")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=2, help="sheets, or the windows of as many")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--warmup", type=int, default=15, help="steps; at most a tenth of all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--backbone", type=Path, help="backbone.safetensors for the arm `pretrained`")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="default: all that can run")
    parser.add_argument("--train", type=int, default=10**6, help="at most so many sheets, drawn at random")
    parser.add_argument("--valid", type=int, default=30)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    options.out = options.out.absolute()  # finetuning runs in another folder
    options.backbone = options.backbone and options.backbone.absolute()
    arms = options.arms or [arm for arm in ARMS if arm != "pretrained" or options.backbone]
    if "pretrained" in arms and not (options.backbone and options.backbone.exists()):
        parser.error(f"--backbone {options.backbone}: give the file of a finished pretraining")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    refuse_other_options(options.out, options)
    data = options.out / "data"
    choose_sheets(
        options.data_dir, data, {"train": options.train, "valid": options.valid, "test": options.test}
    )
    for seed in options.seeds:
        for arm in arms:
            folder = options.out / f"{arm}-{seed}"
            if not (folder / "found.json").exists():
                make_run(arm, seed, data, folder, options)
            elif arm == "pretrained" and backbone_of(folder) != atomic.file_hash(options.backbone):
                sys.exit(f"error: --backbone {options.backbone}: {folder} has another; take another --out")
    if len(arms) > 1:
        print(table(data, options.out, options.seeds, arms))


if __name__ == "__main__":
    main()
