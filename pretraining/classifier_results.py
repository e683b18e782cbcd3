"""What a classifier came to: its figures on test crops beside those of raw pixels, and its epochs."""

from __future__ import annotations

import copy
import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster import atomic, checkpoint
from cluster.timeline import timeline
from pretraining.baselines import raw_pixels
from pretraining.classifier import Crops, Progress
from pretraining.features import class_features
from pretraining.judgement import Judgement, judge, report, write_judgements
from pretraining.plots import plot_confusion, plot_epochs
from pretraining.probe import linear_probe, unseen

RESULTS = ["classifier.pt", "classify.json", "confusion.png", "epochs.csv", "epochs.png"]
DECAYS = (1e-5, 1e-4, 1e-3, 1e-2)  # of the linear layer on raw pixels, as evaluate/linear.py has them
FIGURES = ("train_loss", "train_top1", "valid_loss", "valid_top1")


def write_results(
    out: Path,
    progress: Progress,
    crops: Crops,
    per_epoch: int,
    device: torch.device,
    workers: int,
    resample: str,
    resamples: int,
    settings: Mapping[str, Any],
) -> str:
    """Test the weights of the best epoch, write RESULTS and print a table. Returns top-1 with its interval.

    out: the exp-dir. per_epoch: steps. workers: processes that read crops. resample: what intervals draw
    again, sheets or crops. settings: the flags, for classify.json.
    """
    best = progress.best
    classifier = copy.deepcopy(progress.classifier)
    classifier.load_state_dict(progress.kept)
    kept = {"classifier": progress.kept, "step": best.step, **progress.facts()}
    checkpoint.write_file(out / "classifier.pt", kept)
    scores, labels = class_features(classifier, crops.test, device, workers)
    sheets = crops.test.drawn_again(resample)
    judged: dict[str, Judgement] = {
        kind: judge(each, labels, sheets, crops.classes, resamples)
        for kind, each in (("weights", scores), ("raw", raw_scores(crops, device, workers)))
    }
    epochs, seconds = epochs_of(out, per_epoch)
    came = {"best_step": best.step, "training_minutes": round(seconds / 60, 2)}
    write_judgements(out / "classify.json", judged, sheets, {**settings, **came})
    plot_confusion(out / "confusion.png", judged["weights"].confusion, crops.classes)
    atomic.write_text(out / "epochs.csv", as_csv(epochs))
    plot_epochs(out / "epochs.png", epochs)
    print(f"kept: the weights after step {best.step}, top-1 {best.top1:.3f} on {crops.names[1]}")
    named = {"this classifier": judged["weights"], raw_pixels().name: judged["raw"]}
    print(report(named, sheets, resample))
    trained = torch.tensor([label for _, label in crops.train.files])
    if missed := unseen(trained, labels.cpu(), crops.classes):
        print(missed)
    print(f"{out}: {', '.join(RESULTS)}", flush=True)
    return str(judged["weights"].figures["top1"])


def raw_scores(crops: Crops, device: torch.device, workers: int) -> Tensor:
    """What a linear layer on raw pixels says of the test crops: float [M, K]."""
    raw, seen = raw_pixels(), []
    for folder in (crops.train, crops.valid, crops.test):
        folder = folder.seen_at(raw.size, raw.color_mode)
        seen.append(class_features(raw.network, folder, device, workers))
    train, valid, (test, _) = seen
    return linear_probe(train, valid, test, len(crops.classes), DECAYS).scores


def epochs_of(exp_dir: Path, per_epoch: int) -> tuple[list[dict[str, Any]], float]:
    """A row for each validation of a run that has closed its journal, and the seconds of all its launches.

    A row has epoch, step, FIGURES and the seconds since the one before. per_epoch: steps.
    """
    lines = map(json.loads, (exp_dir / "metrics.jsonl").read_text().splitlines())
    points, spent = timeline(exp_dir, "valid_top1")
    ended, before, rows = {point.step: point.seconds for point in points}, 0.0, []
    for line in (line for line in lines if "valid_top1" in line):
        now, step = ended.get(line["step"], before), line["step"] + 1
        figures = {name: line[name] for name in FIGURES}
        rows.append({"epoch": step / per_epoch, "step": step, **figures, "seconds": round(now - before, 2)})
        before = now
    return rows, spent


def as_csv(rows: list[dict[str, Any]]) -> str:
    """The rows of `epochs_of`, of which there is one at least."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*rows[0]], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
