"""What a few labelled crops of each class are enough for: a linear probe on 1, 2, 5, ... of them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cluster import atomic
from pretraining.judgement import judge, plain
from pretraining.probe import linear_probe
from schematics.draws import Use, draw
from schematics.resampling import Interval, interval, resample


@dataclass(frozen=True)
class Point:
    """The accuracies with so many labelled crops of each class, means over the draws; 0 shots are all.

    crops: in all, on average. top1, mean_per_class: the intervals are of the sheets and the draws together.
    samples: float64 [B] of top-1, of which `difference` makes that of two curves.
    """

    shots: int
    crops: float
    top1: Interval
    mean_per_class: Interval
    samples: np.ndarray


def draw_shots(labels: np.ndarray, shots: int, seed: int, sample: int) -> np.ndarray:
    """The crops of one draw, ascending: `shots` of each class, or all of a class that has fewer.

    labels: int64 [N]. The crops for fewer shots are among those for more. 0 shots are all crops.
    """
    order = draw(Use.SHOTS, seed, sample=sample).permutation(len(labels))
    of_class = (order[labels[order] == k] for k in np.unique(labels))
    return np.sort(np.concatenate([crops[: shots or None] for crops in of_class]))


def shot_curve(
    train: tuple[Tensor, Tensor],
    valid: tuple[Tensor, Tensor] | None,
    test: tuple[Tensor, Tensor],
    sheets: tuple[Sequence[str], Sequence[str]],
    classes: Sequence[str],
    shots: Sequence[int],
    draws: int,
    weight_decays: Sequence[float],
    resamples: int,
    seed: int,
) -> list[Point]:
    """Fit a linear probe to each draw, and judge it on test.

    train, valid, test: features [N, D] and labels int64 [N]. sheets: of the crops of train and of test. With
    no valid, the weight decay is chosen on the crops of train that were not drawn; for all crops, by
    cross-validation over sheets. Two representations with the same labels and seed get the same draws.
    """
    x, y = train
    labels, points = y.cpu().numpy(), []
    for number in shots:
        chosen = [draw_shots(labels, number, seed, sample) for sample in range(draws if number else 1)]
        judged = []
        for crops in chosen:
            rest = torch.from_numpy(np.setdiff1d(np.arange(len(labels)), crops)).to(y.device)
            picked = torch.from_numpy(crops).to(y.device)
            if valid is not None:
                chooser: tuple[Tensor, Tensor] | Sequence[str] = valid
            else:
                chooser = (x[rest], y[rest]) if len(rest) else [sheets[0][n] for n in crops]
            probe = linear_probe((x[picked], y[picked]), chooser, test[0], len(classes), weight_decays)
            judged.append(judge(probe.scores, test[1], sheets[1], classes, resamples))
        share = resample(len(judged), resamples, seed=1) / len(judged)  # [B, draws], other than the sheets'
        samples, figures = {}, {}
        for key in ("top1", "mean_per_class"):
            samples[key] = (share * np.stack([one.draws[key] for one in judged], axis=1)).sum(axis=1)
            figures[key] = interval(samples[key], float(np.mean([one.figures[key].value for one in judged])))
        size = float(np.mean([len(crops) for crops in chosen]))
        points.append(Point(number, size, figures["top1"], figures["mean_per_class"], samples["top1"]))
    return points


def difference(first: Point, second: Point) -> Interval:
    """By how much top-1 of the first is above that of the second, on the same draws and resamples."""
    return interval(first.samples - second.samples, first.top1.value - second.top1.value)


def table(curves: Mapping[str, Sequence[Point]]) -> str:
    """Top-1 of each curve, a line each and a column for each number of shots."""
    width = max(map(len, curves))
    head = [f"{said(point)} ({point.crops:.0f} crops)" for point in next(iter(curves.values()))]
    lines = [f"{'':{width}}  " + "  ".join(f"{text:<20}" for text in head)]
    for name, points in curves.items():
        lines.append(f"{name:{width}}  " + "  ".join(f"{point.top1!s:<20}" for point in points))
    return "\n".join(line.rstrip() for line in lines)


def said(point: Point) -> str:
    return str(point.shots or "all")


def write_curves(folder: Path, curves: Mapping[str, Sequence[Point]], settings: Mapping[str, object]) -> None:
    """Write shots.csv, a row a point, and shots.json. Raises UserError as `atomic.write_text` does.

    Both have the difference of top-1 to the first curve, first minus other.
    """
    first, rows = next(iter(curves.values())), []
    document: dict[str, dict[str, dict]] = {}
    for name, points in curves.items():
        for point, other in zip(points, first, strict=True):
            figures = {"top1": point.top1, "mean_per_class": point.mean_per_class}
            if points is not first:
                figures["first_minus_this"] = difference(other, point)
            entry = {key: plain(figure) for key, figure in figures.items()}
            document.setdefault(name, {})[said(point)] = {"crops": point.crops} | entry
            rows += [[name, said(point), point.crops, key, *figure.values()] for key, figure in entry.items()]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["backbone", "shots", "crops", "figure", "value", "low", "high"])
    writer.writerows(rows)
    atomic.write_text(folder / "shots.csv", text.getvalue())
    whole = {"curves": document, "settings": dict(settings)}
    atomic.write_text(folder / "shots.json", json.dumps(whole, indent=2) + "\n")
