"""Do ranges of counts hold what they promise? Shown by many random splits of labelled sheets.

    python evaluate/coverage.py RUN [RUN ...]

Each RUN is a folder that `evaluate.py` wrote for the same detector, such as those of its valid and of its
test split; their sheets are put together. In each of 100 splits half of them play the labelled sheets, on
which thresholds and ranges are fitted as finetuning does it, and the others are counted. The command prints
how many of the ranges hold the true count, how wide they are, and what looking at the widest first is worth.

150 sheets with 31 classes take 20 s on one busy core. Figures are in docs/results.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from cluster.config import Config, setting
from cluster.entry import run
from cluster.errors import UserError
from detection.classes import match_classes
from detection.measured import Measured, read_run, refuse_other_sheets
from detection.metrics.coverage import FOUND, KINDS, Coverage, cover
from detection.metrics.curves import best_thresholds
from detection.metrics.matching import Matches, match
from detection.metrics.ranges import LEVEL, cross_tally, fit_ranges, tally_matches, why_none, widest_first
from schematics.coco import find_split, losses, read_split, to_coco
from schematics.draws import Use, draw


@dataclass(frozen=True, kw_only=True)
class CoverageConfig(Config):
    # Folders of evaluate.py, of one detector on sheets that it was not trained on.
    runs: Positional[tuple[Path, ...]] = ()
    # Number of random splits.
    splits: int = setting(100, least=1)
    # Sheets that play the labelled ones in each split; by default half of them.
    labelled: int | None = setting(None, least=1)
    # Probability that is promised.
    level: float = setting(LEVEL, least=0.5, most=0.99)
    # Seed of the splits.
    seed: int = setting(0, least=0)


def main(config: CoverageConfig) -> None:
    if not config.runs:
        raise UserError("name folders that evaluate.py wrote: python evaluate/coverage.py RUN [RUN ...]")
    truth, results = put_together([read_run(path) for path in config.runs])
    matches = match(truth, results)
    sheets = len(matches.image_ids)
    labelled = sheets // 2 if config.labelled is None else config.labelled
    if not 0 < labelled < sheets:
        raise UserError(f"--labelled {labelled}: give fewer than the {sheets} sheets, and at least one")
    if said := why_none(labelled, config.level):
        raise UserError(f"--labelled {labelled}: {said}")
    drawn = [split(matches, labelled, config.level, config.seed, n) for n in range(config.splits)]
    print(
        f"{sheets} sheets, {len(truth['annotations'])} boxes of {len(matches.names)} classes. "
        f"{config.splits} splits, seed {config.seed}: {labelled} sheets labelled, {sheets - labelled} "
        f"counted, {100 * config.level:g} % promised"
    )
    print("\n".join([*kinds_table(drawn), "", *classes_table(drawn, matches.names), "", worth(drawn)]))


def put_together(runs: Sequence[Measured]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One ground truth and one list of results of all runs, each with image ids of its own.

    Raises UserError for runs on other classes than the first, or on sheets that have changed.
    """
    truth: dict[str, Any] = {"images": [], "annotations": []}
    results: list[dict[str, Any]] = []
    for one in runs:
        if one.metrics is None:
            raise UserError(f"{one.path}: no metrics.json says which sheets it is of; evaluate again")
        settings = one.metrics["settings"]
        whole = read_split(find_split(Path(settings["data_dir"]), settings["split"]))
        if line := losses(whole):
            print(line)
        refuse_other_sheets([one], whole)
        part = to_coco(match_classes(one.classes(whole), whole).split)
        if truth.setdefault("categories", part["categories"]) != part["categories"]:
            raise UserError(f"{one.path}: has other classes than {runs[0].path}; evaluate one detector")
        number = {image["id"]: len(truth["images"]) + k for k, image in enumerate(part["images"])}
        truth["images"] += [image | {"id": number[image["id"]]} for image in part["images"]]
        for rows, into in ((part["annotations"], truth["annotations"]), (one.results, results)):
            into += [row | {"image_id": number[row["image_id"]]} for row in rows]
    return truth, results


def split(matches: Matches, labelled: int, level: float, seed: int, number: int) -> Coverage:
    """Fit on some of the sheets, drawn by the number of the split, and cover the others."""
    order = draw(Use.COUNTED_SHEETS, seed, sample=number).permutation(len(matches.image_ids))
    known, new = order[:labelled], order[labelled:]
    thresholds = best_thresholds(matches, np.isin(np.arange(len(order)), known))
    truth = matches.positives
    ranges = fit_ranges(matches.names, cross_tally(matches, known), truth[known], thresholds, level=level)
    return cover(ranges, tally_matches(matches, thresholds).on(new), truth[new])


def kinds_table(drawn: Sequence[Coverage]) -> list[str]:
    """By kind the share of ranges that hold: mean, 5th and 95th percentile of the splits; and the width."""
    lines = [f"{'':<34}{'hold':>7}{'in 90 % of the splits':>25}{'mean width':>12}{'ranges':>8}{'without':>9}"]
    for kind, name in KINDS.items():
        made = [one.promised & one.pairs(kind) for one in drawn]
        if not sum(pairs.sum() for pairs in made):
            lines.append(f"{name:<34}{'nothing is promised: too few of the labelled sheets':>61}")
            continue
        parts = [(one.holds[pairs], one.width[pairs]) for one, pairs in zip(drawn, made, strict=True)]
        holds = np.array([held.mean() for held, _ in parts if len(held)])
        without = np.mean([(one.pairs(kind) & ~one.promised).sum() for one in drawn])
        low, high = np.quantile(holds, [0.05, 0.95])
        width, number = np.concatenate([width for _, width in parts]).mean(), np.mean([m.sum() for m in made])
        lines.append(
            f"{name:<34}{holds.mean():>7.3f}{f'{low:.3f} to {high:.3f}':>25}{width:>12.2f}"
            f"{number:>8.0f}{without:>9.0f}"
        )
    return lines


def classes_table(drawn: Sequence[Coverage], names: Sequence[str]) -> list[str]:
    """The same of each class where it was found, over all splits together; those with most ranges first."""
    made, held, wide, without = (
        np.sum([np.where(one.pairs(FOUND), part(one), 0).sum(0) for one in drawn], 0)[:-1] / len(drawn)
        for part in (
            lambda one: one.promised,
            lambda one: one.holds,
            lambda one: one.width,
            lambda one: ~one.promised,
        )
    )
    lines = [f"{'where the class was found':<34}{'hold':>7}{'mean width':>37}{'ranges':>8}{'without':>9}"]
    for k in np.argsort(-made, kind="stable").tolist():
        if made[k] + without[k]:
            holds, width = (part[k] / made[k] if made[k] else np.nan for part in (held, wide))
            lines.append(f"{names[k][:33]:<34}{holds:>7.3f}{width:>37.2f}{made[k]:>8.1f}{without[k]:>9.1f}")
    return lines


def worth(drawn: Sequence[Coverage]) -> str:
    """What looking at the widest quarter of the sheets first finds, beside the quarter with most symbols."""
    orders = {
        "widest ranges": lambda one: widest_first(one.low, one.high),
        "most symbols counted": lambda one: np.argsort(-one.found[:, -1], kind="stable"),
    }
    said = []
    for name, order in orders.items():
        shares = []
        for one in drawn:
            error = abs(one.found - one.truth)[:, :-1].sum(1)
            first = order(one)[: -(-len(error) // 4)]
            shares.append(error[first].sum() / max(1, error.sum()))
        said.append(f"the quarter of the sheets with the {name} has {100 * np.mean(shares):.0f} %")
    return f"Of the symbols too many or too few, {', '.join(said)}"


if __name__ == "__main__":
    run(CoverageConfig, main)
