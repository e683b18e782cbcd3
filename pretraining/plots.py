"""Pictures of what probes find: confusions, accuracy by labelled crops, embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from cluster import atomic
from pretraining.shots import Point, said

MARKERS = "osD^vP*X"


def plot_confusion(path: Path, confusion: np.ndarray, classes: Sequence[str]) -> None:
    """Write a PNG of a confusion int64 [K, K]: the share of each true class, a row, predicted as each.

    Classes that neither occur nor are predicted are left out. Raises UserError as `atomic.replace` does.
    """
    used = np.flatnonzero(confusion.sum(axis=0) + confusion.sum(axis=1)).tolist()
    counts = confusion[np.ix_(used, used)]
    crops = counts.sum(axis=1)
    shares = counts / np.maximum(crops[:, None], 1)
    side = 2.5 + 0.28 * len(used)
    figure = Figure(figsize=(side + 2, side + 1.5), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [plain_text(classes[k]) for k in used]
    axes.set_xticks(range(len(used)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(used)), [f"{n} ({c})" for n, c in zip(names, crops, strict=True)], fontsize=7)
    axes.set(xlabel="predicted", ylabel="true (crops)")
    for row, column in np.argwhere(counts):
        color = "white" if shares[row, column] > 0.6 else "black"
        text = f"{100 * shares[row, column]:.0f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=6, color=color)
    axes.set_title("Per cent of the crops of a class", fontsize=9)
    atomic.write_figure(path, figure)


def plot_shots(path: Path, curves: Mapping[str, Sequence[Point]], ylabel: str) -> None:
    """Write a PNG of top-1 over the labelled crops of each class, a curve with intervals for each name."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    numbers = [said(point) for point in next(iter(curves.values()))]
    lines = []
    for n, points in enumerate(curves.values()):
        at = np.arange(len(points)) + 0.06 * (n - (len(curves) - 1) / 2)  # so that intervals don't overlap
        values, low, high = np.array([[p.top1.value, p.top1.low, p.top1.high] for p in points]).T
        # An interval of percentiles may leave the value out.
        errors = np.maximum([values - low, high - values], 0)
        lines.append(axes.errorbar(at, values, errors, marker=MARKERS[n % len(MARKERS)], capsize=3, lw=1.2))
    axes.set_xticks(range(len(numbers)), numbers)
    axes.set(xlabel="labelled crops of each class", ylabel=ylabel, ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(lines, map(plain_text, curves), fontsize=8, loc="lower right")
    atomic.write_figure(path, figure)


def plot_embeddings(
    path: Path, maps: Mapping[str, tuple[np.ndarray, Sequence[int]]], classes: Sequence[str]
) -> None:
    """Write a PNG with a panel for each of maps: its points [N, 2] in the color and shape of their labels."""
    known = sorted({label for _, labels in maps.values() for label in labels})
    rows = -(-len(known) // 6)
    figure = Figure(figsize=(5 * len(maps), 5.3 + 0.2 * rows), layout="constrained")
    panels = figure.subplots(1, len(maps), squeeze=False)[0]
    colors = colormaps["tab20"]
    for axes, (name, (points, labels)) in zip(panels, maps.items(), strict=True):
        handles = []
        for n, label in enumerate(known):
            chosen = points[np.array(labels) == label]
            style = {"color": colors(n % 20), "marker": MARKERS[n // 20 % len(MARKERS)]}
            handles.append(axes.scatter(*chosen.T, s=14, linewidths=0, **style))
        axes.set(xticks=[], yticks=[])
        axes.set_title(plain_text(name, 60), fontsize=9)
    names = [plain_text(classes[label], 36) for label in known]
    figure.legend(handles, names, loc="outside lower center", ncols=6, fontsize=7, frameon=False)
    atomic.write_figure(path, figure)


def plot_epochs(path: Path, epochs: Sequence[Mapping[str, float]]) -> None:
    """Write a PNG of loss and top-1 over the epochs, on train and valid. epochs: rows of `epochs_of`."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss", "top1"), strict=True):
        for split in ("train", "valid"):
            at, values = [row["epoch"] for row in epochs], [float(row[f"{split}_{name}"]) for row in epochs]
            axes.plot(at, values, marker=".", label=split)
        axes.set(xlabel="epochs", ylabel=name.replace("top1", "top-1"))
        axes.grid(alpha=0.3)
        axes.legend()
    atomic.write_figure(path, figure)


def plain_text(name: str, most: int = 50) -> str:
    """A name as matplotlib shows it letter by letter, shortened in front.

    A $ would start a formula, and a name in a legend that starts with _ would be left out.
    """
    short = name if len(name) <= most else f"...{name[3 - most :]}"
    return ("\u200b" if short.startswith("_") else "") + short.replace("$", r"\$")
