"""What the runs of a study came to: figures with intervals, differences between arms, tables and plots."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster import atomic
from cluster.errors import UserError
from cluster.timeline import timeline
from detection.classes import match_classes
from detection.measured import read_run, refuse_other_sheets
from detection.metrics.comparison import drawn_figures, drawn_interval
from detection.metrics.matching import match
from detection.studies import Cell, Labels, Study
from schematics.coco import find_split, read_split, to_coco
from schematics.resampling import Interval

DETECTION = ("AP", "AP50", "Counts right")
SAID = {"top1": "top-1", "top5": "top-5", "mean_per_class": "mean over classes"}  # in plots


@dataclass(frozen=True)
class Group:
    """The runs of one arm with the same labels, by seed.

    drawn: of each seed, each figure of the sheets as they are and then of each resample of them; where only
    intervals are known, as of classifiers that earlier versions tested, the value alone.
    """

    arm: str
    labels: Labels
    drawn: dict[int, dict[str, np.ndarray]]
    bounds: dict[int, dict[str, Interval]]

    def mean(self, name: str) -> Interval:
        """The mean over seeds, with the interval over sheets of that mean.

        Without resamples the bounds are the means of the runs' bounds: those of a typical run.
        """
        if all(len(each[name]) > 1 for each in self.drawn.values()):
            return drawn_interval(np.mean([each[name] for each in self.drawn.values()], axis=0))
        rows = [each[name] for each in self.bounds.values()]
        return Interval(
            *(float(np.mean([getattr(row, k) for row in rows])) for k in ("value", "low", "high"))
        )

    def gain_over(self, other: Group, name: str) -> Interval | None:
        """self - other, the mean over the seeds that both have; None where they have none in common.

        Its interval is over sheets, each resample of which is the same for both arms. Without resamples it is
        the range over the seeds.
        """
        seeds = [seed for seed in self.drawn if seed in other.drawn]
        if not seeds:
            return None
        pairs = [(self.drawn[seed][name], other.drawn[seed][name]) for seed in seeds]
        if all(len(one) == len(two) > 1 for one, two in pairs):
            return drawn_interval(np.mean([one - two for one, two in pairs], axis=0))
        apart = np.array([one[0] - two[0] for one, two in pairs])
        return Interval(float(apart.mean()), float(apart.min()), float(apart.max()))


def read_groups(study: Study, resamples: int) -> tuple[list[Group], list[Cell]]:
    """The groups that have results, and the cells that have none. Raises UserError for a broken result.

    In classification the baselines that stand beside the results are groups too, before the arms.
    """
    groups, missing = dict[tuple[str, str], Group](), list[Cell]()
    for labels in study.labels:
        cells = [cell for cell in study.cells if cell.labels is labels]
        missing += [cell for cell in cells if not study.result(cell).exists()]
        done = [cell for cell in cells if cell not in missing]
        read = _read_classifiers if study.classification else _read_detectors
        for cell, found in zip(done, read(study, labels, done, resamples), strict=True):
            for name, (drawn, bounds) in found.items():
                group = groups.setdefault((labels.name, name), Group(name, labels, {}, {}))
                group.drawn[cell.seed], group.bounds[cell.seed] = drawn, bounds
    names, order = [arm.name for arm in study.arms], list(study.labels)
    return sorted(groups.values(), key=lambda g: (order.index(g.labels), g.arm in names)), missing


# By the name of an arm or a baseline: as `drawn` and `bounds` of a Group have them for one seed.
Read = dict[str, tuple[dict[str, np.ndarray], dict[str, Interval]]]


def _read_classifiers(study: Study, labels: Labels, cells: Sequence[Cell], resamples: int) -> Iterator[Read]:
    """Of each cell its figures and those of its baselines; the resamples are those of the command itself."""
    for cell in cells:
        path = study.result(cell)
        try:
            found = json.loads(path.read_text())
            arm = cell.arm.name
            beside = {
                "raw pixels" if kind == "raw" else f"{kind}, as {arm}": _figures(baseline)
                for kind, baseline in found.get("baselines", {}).items()
            }
            yield {**beside, arm: _figures(found)}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not what {path.stem}.py writes ({error}); run that again") from None


def _figures(found: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Interval]]:
    """What a judgement in JSON says of each figure; files of earlier versions have no draws."""
    bounds = {
        name: Interval(*(float(row[key]) for key in ("value", "low", "high")))
        for name, row in found.items()
        if isinstance(row, dict) and {"value", "low", "high"} <= {*row}
    }
    draws = found.get("draws", {})
    return {name: np.array([row.value, *draws.get(name, [])], float) for name, row in bounds.items()}, bounds


def _read_detectors(study: Study, labels: Labels, cells: Sequence[Cell], resamples: int) -> Iterator[Read]:
    """Of each cell its figures, all measured on the same sheets and classes; else UserError is raised."""
    if not cells:
        return
    whole = read_split(find_split(labels.data, study.split))
    measured = [read_run(study.out(cell)) for cell in cells]
    refuse_other_sheets(measured, whole)
    classes = measured[0].classes(whole)
    split = match_classes(classes, whole).split
    truth = to_coco(split)
    for cell, one in zip(cells, measured, strict=True):
        if one.classes(whole) != classes:
            raise UserError(f"{one.path}: measured on other classes than {measured[0].path}")
        drawn = drawn_figures(match(truth, one.results), one.thresholds(), resamples)
        yield {cell.arm.name: (drawn, {name: drawn_interval(values) for name, values in drawn.items()})}


def names_of(study: Study, groups: Sequence[Group]) -> list[str]:
    """The figures to show: those of detection, or what every result in classification has."""
    if not study.classification:
        return [*DETECTION]
    every = [set(bounds) for group in groups for bounds in group.bounds.values()]
    return [name for name in next(iter(groups[0].bounds.values())) if all(name in one for one in every)]


def as_csv(study: Study, groups: Sequence[Group]) -> str:
    """One row a run and figure."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["arm", "labels", "share", "seed", "figure", "value", "low", "high"])
    for group in groups:
        for seed, figures in group.bounds.items():
            for name, figure in figures.items():
                values = [f"{value:.6g}" for value in (figure.value, figure.low, figure.high)]
                rows.writerow([group.arm, group.labels.name, group.labels.share, seed, name, *values])
    return text.getvalue()


def as_markdown(
    study: Study, groups: Sequence[Group], missing: Sequence[Cell], minutes: dict[str, str]
) -> str:
    """The means over seeds, and the differences between arms. minutes: of training, by arm and labels."""
    names = names_of(study, groups)
    head = ["labels", "arm", "seeds", *names, "training"]
    rows = [
        [
            *(g.labels.name, g.arm, str(len(g.drawn))),
            *(str(g.mean(name)) for name in names),
            minutes.get(f"{g.arm} {g.labels.name}", ""),
        ]
        for g in groups
    ]
    apart = []
    for one, other in itertools.permutations(groups, 2):
        if one.labels is other.labels and groups.index(one) > groups.index(other):
            gains = [one.gain_over(other, name) for name in names]
            if gains[0]:
                seeds = len({*one.drawn} & {*other.drawn})
                shown = [gain.signed for gain in gains if gain]
                apart.append([one.labels.name, f"{one.arm} - {other.arm}", str(seeds), *shown])
    everything = [values for g in groups for drawn in g.drawn.values() for values in drawn.values()]
    how = (
        "Brackets hold 95 % of the resamples of the test sheets, each the same for both arms of a "
        "difference; other training runs would differ more."
        if all(len(values) > 1 for values in everything)
        else "Brackets hold the mean bounds of the runs over sheets; of a difference, its range over the "
        "seeds."
    )
    parts = [f"# {study.name}", "Means over the seeds. " + how, _table(head, rows)]
    if apart:
        parts += ["## Differences", _table(["labels", "arms", "seeds", *names], apart)]
    if missing:
        parts.append(f"Without a result yet: {', '.join(cell.name for cell in missing)}.")
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def training_minutes(study: Study, groups: Sequence[Group]) -> dict[str, str]:
    """By arm and labels, how long a finetuning took on average, and what pretraining it began from."""
    told = {}
    for group in groups:
        spent = []
        for cell in study.cells:
            if (cell.arm.name, cell.labels) == (group.arm, group.labels):
                after = next(run.after for run in study.runs() if run.name == cell.name)
                folders = [study.folder / name for name in (cell.name, *after)]
                spent.append([timeline(folder, "loss")[1] / 60 for folder in folders])
        if not spent:  # a baseline, which nothing was trained for
            continue
        own, *before = (float(np.mean(each)) for each in zip(*spent, strict=True))
        parts = [f"{own:.1f} min"] * (own > 0) + [f"pretraining {each:.1f} min" for each in before]
        told[f"{group.arm} {group.labels.name}"] = ", ".join(parts)
    return told


def plot_figures(path: Path, study: Study, groups: Sequence[Group]) -> None:
    """Each figure against the labels, a line an arm, with intervals."""
    names = names_of(study, groups)[:3]
    figure, axes = _canvas(1, len(names))
    arms, labels = list(dict.fromkeys(g.arm for g in groups)), list(study.labels)
    for name, axis in zip(names, axes[0], strict=True):
        for k, arm in enumerate(arms):
            own = [group for group in groups if group.arm == arm]
            means = [group.mean(name) for group in own]
            x = [labels.index(group.labels) + 0.06 * (k - (len(arms) - 1) / 2) for group in own]
            y = np.array([mean.value for mean in means])
            spread = [[mean.value - mean.low for mean in means], [mean.high - mean.value for mean in means]]
            axis.errorbar(x, y, np.maximum(spread, 0), marker="o", capsize=3, label=arm, color=f"C{k}")
        axis.set_xticks(range(len(labels)), [_title(each) for each in labels])
        axis.set(title=SAID.get(name, name), xlabel="labelled training sheets")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    atomic.write_figure(path, figure)


def plot_curves(path: Path, study: Study, groups: Sequence[Group]) -> bool:
    """How each training went, a column for each number of labels; whether there was anything to plot.

    Rows have AP or top-1 on valid against steps and against minutes, and in classification the loss on train.
    """
    figure = "valid_top1" if study.classification else "valid_AP"
    rows = [(figure, False), (figure, True), *([("train_loss", False)] if study.classification else [])]
    labels = [each for each in study.labels if any(group.labels is each for group in groups)]
    canvas, axes = _canvas(len(rows), len(labels))
    arms, plotted = [arm.name for arm in study.arms], False
    for column, each in enumerate(labels):
        for cell in (cell for cell in study.cells if cell.labels is each):
            k = arms.index(cell.arm.name)
            label = cell.arm.name if cell.seed == each.seeds[0] else None
            look: dict[str, Any] = {"color": f"C{k}", "marker": ".", "label": label, "alpha": 0.7}
            for (name, timed), axis in zip(rows, axes[:, column], strict=True):
                points, _ = timeline(study.folder / cell.name, name)
                plotted |= bool(points)
                at = [point.seconds / 60 if timed else point.step for point in points]
                axis.plot(at, [point.value for point in points], **look)
        axes[0][column].set(title=_title(each))
        for (name, timed), axis in zip(rows, axes[:, column], strict=True):
            axis.set(xlabel="minutes of training" if timed else "steps", ylabel=name.replace("_", " "))
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    if plotted:
        atomic.write_figure(path, canvas)
    return plotted


def _title(labels: Labels) -> str:
    return labels.name.replace("pc", " %") if labels.name == f"{100 * labels.share:g}pc" else labels.name


def _canvas(rows: int, columns: int) -> tuple[Any, np.ndarray]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * columns, 3.8 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)
