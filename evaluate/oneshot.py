"""How well symbols that no training has seen are found from one or a few examples: `detection.find` on trial.

    python evaluate/oneshot.py --data-dir DATA --arm ssl PRETRAIN/backbone.safetensors --arm random none

A share of the classes is drawn to be novel, several times (--splits). Examples of each novel class are drawn
among the boxes of one split of DATA, and every box of the class on the sheets of another one is to be found.
Beside the arms stands normalised cross-correlation of the pixels (OpenCV's), with the same examples, turns
and scales. TRIAL gets oneshot.json: AP50 with a 95 % interval of a bootstrap over sheets and draws together,
the recall of all places at IoU 0.5, and the share of (sheet, class) pairs with the right count at the
threshold that the calibration gives. An arm that was trained on labels may not have seen the novel classes:
--list-novel prints them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from tyro.conf import UseAppendAction, arg

from cluster import atomic
from cluster.config import Config, setting
from cluster.entry import run
from cluster.errors import UserError
from detection.detections import Detections, to_results
from detection.metrics.bootstrap import average_precision
from detection.metrics.counts import count
from detection.metrics.matching import match
from schematics.coco import Split, find_split, read_split, to_coco
from schematics.draws import Use, draw
from schematics.progress import progress
from schematics.resampling import interval, resample
from schematics.sheets import read_sheet, to_color

if TYPE_CHECKING:
    from detection.labelling.example import Example
    from detection.labelling.maps import Eye

Searcher = Callable[["Sequence[Example]"], "dict[str, list[Detections]]"]  # by arm, on each sheet


@dataclass(frozen=True, kw_only=True)
class OneshotConfig(Config):
    # Labelled sheets, as for finetuning.
    data_dir: Path = setting(exists=True)
    # Arm of the trial: a name and the weights, as detection.find takes them; give it several times.
    arm: UseAppendAction[tuple[Annotated[tuple[str, Path], arg(metavar="NAME FILE")], ...]] = ()
    # Split from which examples are drawn.
    example_split: str = "train"
    # Split on whose sheets symbols are looked for.
    split: str = "test"
    # Numbers of examples.
    shots: tuple[int, ...] = setting((1, 5, 10), least=1)
    # Times that examples are drawn.
    draws: int = setting(10, least=1)
    # Times that classes are split into novel ones and others.
    splits: int = setting(3, least=1)
    # Share of the classes that is novel.
    novel: float = setting(0.33, least=0.01, most=1)
    # Sheets to look at, the first ones of --split; 0 stands for all.
    sheets: int = setting(0, least=0)
    # Sizes of a symbol on the sheets, in units of an example's.
    scales: tuple[float, ...] = setting((0.63, 0.79, 1.0, 1.26, 1.59), least=0.1, most=10)
    # Neither turned nor mirrored.
    upright: bool = False
    # False places on a sheet from which a place no longer counts.
    false_positives: float = setting(0.3, least=1e-9)
    # Sets of sheets and draws for the intervals.
    resamples: int = setting(500, least=1)
    # Number from which classes and examples are drawn.
    seed: int = setting(0, least=0, most=2**63 - 1)
    # Print the novel classes of each split, and stop.
    list_novel: bool = False
    # Folder for oneshot.json and the feature maps.
    out: Path = Path("oneshot")


def main(config: OneshotConfig) -> None:
    train, test = (
        read_split(find_split(config.data_dir, name)) for name in (config.example_split, config.split)
    )
    test.sheets[:] = test.sheets[: config.sheets or None]
    novel = [novel_classes(train, test, config.novel, config.seed, n) for n in range(config.splits)]
    for n, labels in enumerate(novel):
        called = ", ".join(test.categories[label - 1].name for label in labels)
        print(f"split {n}, novel: {called}", flush=True)
    if config.list_novel:
        return
    # Imported here, so that --help and wrong flags are answered before torch is loaded.
    from detection.labelling.search import open_weights

    posing: dict[str, Any] = {"scales": config.scales, "upright": config.upright}
    searchers = [by_pixels(test, **posing)]
    for name, weights in config.arm:
        searchers.append(by_maps(name, open_weights(weights), test, config.out / "maps", **posing))
    results: dict[str, Any] = {}
    again = resample(len(test.sheets), config.resamples, config.seed)
    cells = [(labels, one) for labels in novel for one in range(config.draws)]
    for shots in config.shots:
        for searcher in searchers:
            began, trials = time.process_time(), dict[str, list[dict[str, Any]]]()
            for labels, one in progress(cells, f"{shots} examples"):
                found: dict[str, dict[int, list[Detections]]] = {}
                for label in labels:
                    examples = draw_examples(train, label, shots, config.seed, one)
                    for name, detections in searcher(examples).items():
                        found.setdefault(name, {})[label] = detections
                for name, by_label in found.items():
                    figures = judge(test, by_label, again, 1 / (1 + config.false_positives))
                    trials.setdefault(name, []).append(figures)
            spent = time.process_time() - began
            for name, figures_of_all in trials.items():
                told = {**summary(figures_of_all, config.resamples, config.seed), "cpu_seconds": round(spent)}
                results[f"{name}, {shots}"] = told
                print(f"{name:<18} {shots:>2} examples: {line_of(told)}", flush=True)
    atomic.make_folder(config.out)
    atomic.write_text(config.out / "oneshot.json", json.dumps(results, indent=2) + "\n")


def novel_classes(train: Split, test: Split, share: float, seed: int, number: int) -> list[int]:
    """Labels of the novel classes of a split, ascending: of those that have boxes in both, a drawn share."""
    both = [set(np.concatenate([s.labels[~s.crowd] for s in split.sheets])) for split in (train, test)]
    labels = sorted(int(label) for label in both[0] & both[1])
    if not labels:
        raise UserError(f"{test.folder}: no class has boxes there and in {train.folder}")
    drawn = draw(Use.NOVEL_CLASSES, seed, sample=number).permutation(labels)
    return sorted(drawn[: max(1, round(share * len(labels)))].tolist())


def draw_examples(train: Split, label: int, shots: int, seed: int, number: int) -> list[Example]:
    """Examples of a class: `shots` boxes of it, drawn among all that can be one, or as many as there are."""
    from detection.labelling.example import example_from

    boxes = [
        (sheet, box) for sheet in train.sheets for box in sheet.boxes[(sheet.labels == label) & ~sheet.crowd]
    ]
    examples = list["Example"]()
    for n in draw(Use.EXAMPLES, seed, sample=number, view=label).permutation(len(boxes)):
        sheet, box = boxes[n]
        try:
            examples.append(
                example_from(read_sheet(sheet.file), box.clip(0, 2 * (sheet.width, sheet.height)))
            )
        except ValueError:  # smaller than an example may be
            continue
        if len(examples) == shots:
            break
    return examples


def by_maps(
    name: str, eye: Eye, test: Split, folder: Path, scales: Sequence[float], upright: bool
) -> Searcher:
    """A searcher by a network's maps of the sheets of a split."""
    from detection.labelling.chance import standardise
    from detection.labelling.correlation import Whitening, whitening
    from detection.labelling.maps import look_at
    from detection.labelling.search import search_sheet, templates_of, to_detections, zoom_for

    sizes, whites = sizes_of(test), dict[float, Whitening]()

    def search(examples: Sequence[Example]) -> dict[str, list[Detections]]:
        zoom = zoom_for(examples)
        seen = [look_at(eye, read_sheet(sheet.file), zoom, folder) for sheet in test.sheets]
        if zoom not in whites:
            whites[zoom] = whitening(one.features for one in seen)
        templates = templates_of(eye, examples, scales, upright, zoom, whites[zoom])
        places = [search_sheet(one, templates, zoom, whites[zoom]) for one in seen]
        return {name: to_detections(standardise(places, len(templates)), sizes)}

    return search


def by_pixels(test: Split, scales: Sequence[float], upright: bool) -> Searcher:
    """A searcher by pixels: by the correlation itself, and by the same standardised for each template."""
    from detection.labelling.chance import standardise
    from detection.labelling.pixels import crops_of, match_pixels
    from detection.labelling.search import to_detections

    sizes = sizes_of(test)

    def search(examples: Sequence[Example]) -> dict[str, list[Detections]]:
        crops = crops_of(examples, scales, upright)
        places = [match_pixels(to_color(read_sheet(one.file), "gray"), crops) for one in test.sheets]
        standard = standardise(places, len(crops))
        return {
            "ncc": to_detections(places, sizes),
            "ncc, standardised": to_detections(standard, sizes),
        }

    return search


def sizes_of(split: Split) -> list[tuple[int, int]]:
    """Width and height of each sheet, px."""
    return [(sheet.width, sheet.height) for sheet in split.sheets]


def judge(
    test: Split, detections: Mapping[int, Sequence[Detections]], weights: np.ndarray, least: float
) -> dict[str, Any]:
    """Figures of one draw of examples: AP50, on all sheets and with weights [B, I], recall, counts.

    detections: by label, those on each sheet. least: the score from which one counts.
    """
    truth, rows = to_coco(test), []
    ids = [category.id for category in test.categories]
    for label, found in detections.items():
        by_sheet = zip((sheet.image_id for sheet in test.sheets), found, strict=True)
        rows += to_results(dict(by_sheet), [ids[label - 1]])
    wanted = {ids[label - 1] for label in detections}
    truth["annotations"] = [row for row in truth["annotations"] if row["category_id"] in wanted]
    truth["categories"] = [row for row in truth["categories"] if row["id"] in wanted]
    matches = match(truth, rows, max_detections=len(rows))
    counts = count(matches, matches.found.score >= least)
    once = average_precision(matches)
    return {
        "AP50": float(once["AP50"][0]),
        "AP50_resampled": average_precision(matches, weights)["AP50"],
        "AP50_class": dict(zip(matches.names, once["AP50_class"][0].tolist(), strict=True)),
        "recall": float((np.unique(matches.match[0]) >= 0).sum() / matches.positives.sum()),
        "exact": float(counts.exact.sum() / counts.pairs.sum()),
        "too_many": float((counts.found - counts.truth).clip(0).mean()),
    }


def summary(trials: Sequence[dict[str, Any]], resamples: int, seed: int) -> dict[str, Any]:
    """Means over the trials; the interval of AP50 is over sheets and trials, each drawn again."""
    table = np.array([one["AP50_resampled"] for one in trials])  # [trials, B]
    again = resample(len(trials), resamples, seed + 1).T  # [trials, B]
    draws = (table * again).sum(0) / len(trials)
    means = ("AP50", "recall", "exact", "too_many")
    mean = {name: float(np.mean([one[name] for one in trials])) for name in means}
    bounds = interval(draws, mean["AP50"])
    classes: dict[str, list[float]] = {}
    for one in trials:
        for name, value in one["AP50_class"].items():
            classes.setdefault(name, []).append(value)
    by_class = {name: float(np.mean(values)) for name, values in sorted(classes.items())}
    return {**mean, "low": bounds.low, "high": bounds.high, "AP50_class": by_class}


def line_of(told: dict[str, Any]) -> str:
    """The figures of an arm in a line."""
    return (
        f"AP50 {told['AP50']:.3f} [{told['low']:.3f}, {told['high']:.3f}], recall {told['recall']:.3f}, "
        f"exact counts {told['exact']:.3f}, {told['too_many']:.2f} too many a sheet and class, "
        f"{told['cpu_seconds']:g} CPU s"
    )


if __name__ == "__main__":
    run(OneshotConfig, main)
