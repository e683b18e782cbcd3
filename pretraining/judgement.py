"""How often predictions are right, with intervals of the bootstrap over sheets, and by how much two differ.

In shapes M is the number of test crops, K that of classes, S that of sheets and B that of resamples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cluster import atomic
from schematics.resampling import Interval, interval, ratio, resample

FIGURES = {"top1": "top-1", "top5": "top-5", "mean_per_class": "mean over classes"}
FEW = 20  # sheets, below which a bootstrap is too sure of itself


@dataclass(frozen=True)
class Judgement:
    """The accuracies of one set of predictions, in 0..1.

    figures: by the keys of FIGURES. classes: top-1 by class, of those that occur. confusion: int64 [K, K],
    the crops by true and by predicted class. draws: float64 [B] of each figure, for comparisons.
    """

    figures: dict[str, Interval]
    classes: dict[str, Interval]
    confusion: np.ndarray
    draws: dict[str, np.ndarray]

    def to_dict(self) -> dict[str, Any]:
        """The figures, the classes and the draws, for JSON."""
        figures = {name: plain(figure) for name, figure in self.figures.items()}
        classes = {name: plain(figure) for name, figure in self.classes.items()}
        draws = {name: np.round(values, 6).tolist() for name, values in self.draws.items()}
        return figures | {"classes": classes, "draws": draws}


def judge(
    scores: Tensor, labels: Tensor, sheets: Sequence[str], classes: Sequence[str], resamples: int
) -> Judgement:
    """Judge the scores float [M, K] of crops with the labels int64 [M].

    A class with the score -inf is no prediction. sheets: of each crop; the same sheets give the same
    resamples, so that judgements on the same crops can be compared.
    """
    ranks = scores.argsort(dim=1, descending=True, stable=True)[:, :5]
    valid = scores.gather(1, ranks) > -math.inf
    right = ((ranks == labels[:, None]) & valid).cpu().numpy()  # [M, 5]
    y, predicted = labels.cpu().numpy(), ranks[:, 0].cpu().numpy()
    names, sheet = np.unique(np.array(sheets), return_inverse=True)
    weights = resample(len(names), resamples)  # [B, S]

    hits = {"top1": right[:, 0], "top5": right.any(axis=1)}
    crops = np.bincount(sheet, minlength=len(names))
    draws = {key: ratio(np.bincount(sheet, hit, len(names)), crops, weights) for key, hit in hits.items()}
    values = {key: float(hit.mean()) for key, hit in hits.items()}

    known = np.unique(y)
    by_class = np.stack([_class_draws(right[:, 0], y == k, sheet, weights) for k in known])  # [K, B]
    in_class = [float(right[y == k, 0].mean()) for k in known]
    # A resample may lack a class, but it holds a crop and so one class at least.
    draws["mean_per_class"] = np.nanmean(by_class, axis=0)
    values["mean_per_class"] = float(np.mean(in_class))

    confusion = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion, (y, predicted), 1)
    named = {
        classes[k]: interval(row, value) for k, row, value in zip(known, by_class, in_class, strict=True)
    }
    return Judgement({key: interval(draws[key], values[key]) for key in FIGURES}, named, confusion, draws)


def _class_draws(
    right: np.ndarray, of_class: np.ndarray, sheet: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """float64 [B]: the share that is right of the crops `of_class`, NaN where a resample has none."""
    there = np.bincount(sheet, of_class, weights.shape[1])
    return ratio(np.bincount(sheet, right & of_class, weights.shape[1]), there, weights)


def difference(first: Judgement, second: Judgement) -> dict[str, Interval]:
    """By how much each figure of the first is above that of the second, on the same resamples."""
    return {
        key: interval(first.draws[key] - second.draws[key], first.figures[key].value - figure.value)
        for key, figure in second.figures.items()
    }


def plain(figure: Interval) -> dict[str, float | None]:
    """An interval for JSON, in which NaN is null."""
    values = {"value": figure.value, "low": figure.low, "high": figure.high}
    return {key: None if math.isnan(value) else round(value, 6) for key, value in values.items()}


def report(judged: Mapping[str, Judgement], sheets: Sequence[str], over: str) -> str:
    """A table of the judgements, by how much the first is above the others, and its lowest classes.

    judged: by name. sheets: of each test crop. over: what they are, sheets or crops.
    """
    (_, first), *others = judged.items()
    count, width = len(set(sheets)), max(map(len, judged))
    resamples = len(first.draws["top1"])
    lines = [
        f"{len(sheets)} crops, {len(first.classes)} classes; 95 % of {resamples} resamples of {count} {over}"
        + (", which are few: the intervals are too narrow" if count < FEW else ""),
        f"{'':{width}}  " + "  ".join(f"{said:<20}" for said in FIGURES.values()),
    ]
    for name, each in judged.items():
        lines.append(f"{name:{width}}  " + "  ".join(f"{each.figures[key]!s:<20}" for key in FIGURES))
    for name, each in others:
        gain = difference(first, each)["top1"]
        lines.append(f"above {name}, top-1: {gain.signed}")
    crops = dict(zip(first.classes, first.confusion.sum(axis=1)[first.confusion.any(axis=1)], strict=True))
    wrong = sorted((each.value, name) for name, each in first.classes.items() if each.value < 1)
    if wrong:
        said = (f"{name} {value:.2f} of {crops[name]}" for value, name in wrong[:5])
        lines.append(f"its lowest classes: {', '.join(said)}")
    return "\n".join(line.rstrip() for line in lines)


def write_judgements(
    path: Path, judged: Mapping[str, Judgement], sheets: Sequence[str], settings: Mapping[str, Any]
) -> None:
    """Write the first judgement as JSON; the others are its baselines, each with the difference to it.

    judged: by the key that a baseline has there. sheets: of each test crop. Raises UserError as
    `atomic.write_text` does.
    """
    (_, first), *others = judged.items()
    baselines = {}
    for key, each in others:
        gains = {figure: plain(gain) for figure, gain in difference(first, each).items()}
        baselines[key] = each.to_dict() | {"difference": gains}
    document = first.to_dict() | {
        "baselines": baselines,
        "crops": len(sheets),
        "sheets": len(set(sheets)),
        "settings": dict(settings),
    }
    atomic.write_text(path, json.dumps(document, indent=2) + "\n")
