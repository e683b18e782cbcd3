"""COCO figures of a finetuned detector on a labelled split, in sheet coordinates.

    python evaluate/evaluate.py --checkpoint OUT/model.pt --data-dir DATA --split test --out REPORT

By default DATA is what the detector was finetuned on. Classes are matched by name; what the detector does not
know is counted beside the figures. REPORT gets report.html (see docs/report.md), validation_results.txt (the
12 COCO figures and what they leave out), metrics.json, predictions.json (COCO results with the data set's own
ids), ranges.json (ranges of counts that these sheets give, for predict) and pictures/ (truth beside
prediction). `evaluate/compare.py` compares two such folders.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cluster import atomic
from cluster.config import Config, setting
from cluster.entry import run
from cluster.errors import UserError
from detection.classes import match_classes
from detection.counting import applying, read_ranges
from detection.detections import Detections, to_results
from detection.draw import annotate, side_by_side, write_png
from detection.labelling.doubt_page import as_part, make_cards
from detection.labelling.doubts import Judged, find_doubts
from detection.labelling.judges import class_map, see
from detection.metrics.analysis import analyse
from detection.metrics.coco import measure
from detection.metrics.coverage import cover
from detection.metrics.engines import Engine, check_engine
from detection.metrics.ranges import fit_ranges_of, tally_matches
from detection.report.page import CHOSEN_HERE, write_report
from schematics.coco import SPLITS, LabelledSheet, Split, find_split, losses, read_split, to_coco
from schematics.progress import progress
from schematics.sheets import DataError, read_sheet


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Config):
    # Detector to measure: model.pt of a finetuning, or an exported .onnx.
    checkpoint: Path = setting(Path("checkpoints/detector/model.pt"), exists=True)
    # Labelled sheets, as for finetuning; by default those that the detector was finetuned on.
    data_dir: Path | None = None
    # Split to measure on: train, valid or test; by default test, or valid where there is no test.
    split: str | None = None
    # Folder for what is written; by default evaluate-SPLIT beside the checkpoint.
    out: Path | None = None
    # Number of sheets to draw, from the first.
    pictures: int = 6
    # Doubtful labels that the report shows at most; of the training split it shows none.
    doubts: int = setting(12, least=0)
    # Score from which a detection is drawn and counted; by default each class's own, the best on valid.
    threshold: float | None = setting(None, least=0, most=1)
    # Ranges of the counts to try: ranges.json of an earlier call; by default the detector's own.
    ranges: Path | None = None
    # Measure a model.pt whose finetuning has not signed its end: its best so far.
    unfinished: bool = False
    # Program that computes the figures: linework, or to compare with it pycocotools or hotcoco
    # (pip install 'linework[fast]'), which give the same.
    coco_engine: Engine = "linework"
    # Size at which sheets are seen, such as 0.5 for half of it; by default that of the detector's training.
    scale: float | None = setting(None, least=0.01, most=1)
    # Windows in one forward pass; memory grows with it.
    batch_size: int = setting(4, least=1)
    # Where to compute: auto (a GPU if there is one), cpu, cuda, or one GPU as cuda:1.
    device: str = "auto"
    # Arithmetic of the network: fp32, bf16, or auto: bf16 if the detector was validated in it, on a machine
    # that computes it faster in it. Boxes and scores are float32.
    precision: Literal["auto", "fp32", "bf16"] = "auto"


def main(config: EvaluateConfig) -> None:
    # Imported here, so that --help and wrong flags are answered before torch is loaded.
    import torch

    from cluster import distributed
    from detection.inference import detect, load_detector

    if not config.unfinished:
        refuse_unfinished(config.checkpoint)
    device = distributed.lone_device(config.device)
    check_engine(config.coco_engine)
    detector = load_detector(config.checkpoint, device, config.precision)
    spec = detector.spec
    data_dir = config.data_dir or finetuned_on(config.checkpoint)
    split_name = config.split or default_split(data_dir)
    whole = read_split(find_split(data_dir, split_name))
    matched = match_classes(spec.categories, whole)
    split = matched.split
    if not any(len(sheet.boxes) for sheet in split.sheets):
        raise UserError(
            f"{whole.folder}: no box of a class that {config.checkpoint} knows; it has boxes of "
            f"{', '.join(matched.unknown)}, not of {', '.join(name for _, name in spec.categories)}"
        )
    sheets = f"{len(split.sheets)} sheet{'s' * (len(split.sheets) != 1)}"
    precision = "bf16" if detector.bf16 else "fp32"
    print(f"{config.checkpoint} on {split.folder}, {sheets}, in {precision}", flush=True)
    given = detector.thresholds if config.threshold is None else [config.threshold] * len(spec.categories)
    # Of several labels that are one class here, the first has the threshold.
    first = [matched.labels.tolist().index(label, 1) - 1 for label in range(1, len(split.categories) + 1)]
    thresholds = np.array(given)[first]
    if config.threshold is not None:
        thresholds_from = f"--threshold {config.threshold:g} for all classes"
    elif split_name in SPLITS["valid"]:
        thresholds_from = f"the detector's, {CHOSEN_HERE}"
    else:
        thresholds_from = "the detector's, of the highest F1 on its validation sheets"
    out = config.out or config.checkpoint.parent / f"evaluate-{split_name}"
    atomic.make_folder(out / "pictures")
    for picture in (out / "pictures").glob("[0-9][0-9].png"):  # an earlier run may have drawn more sheets
        picture.unlink()

    ids, names = zip(*((category.id, category.name) for category in split.categories), strict=True)
    found: dict[int, Detections] = {}
    judged, classes = list[Judged](), class_map(spec.categories, whole)
    counted = np.zeros(len(spec.categories), np.int64)  # above its threshold, by label of the detector
    for n, sheet in enumerate(progress(split.sheets, "evaluation")):
        image = read_sheet(sheet.file)
        detections = detect(detector, image, config.batch_size, config.scale)
        other = whole.sheets[n - len(whole.sheets) // 2]
        judged.append(see(whole.sheets[n], other, image, detections, classes))
        counted += np.bincount(detections.above(np.array(given)).labels - 1, minlength=len(counted))
        found[sheet.image_id] = matched.relabel(detections)
        if n < config.pictures:
            shown = found[sheet.image_id].above(thresholds)
            draw(out / "pictures" / f"{n + 1:02}.png", image, sheet, shown, names)
    truth, results = to_coco(split), to_results(found, ids)
    figures, matches = measure(truth, results, engine=config.coco_engine)
    by_id = dict(zip(ids, thresholds.tolist(), strict=True))
    analysis = analyse(matches, thresholds=by_id)
    scale = spec.scale if config.scale is None else config.scale
    called = {number: spec.categories[k][1] for number, k in zip(ids, first, strict=True)}
    fitted_here = config.threshold is None and split_name in SPLITS["valid"]
    fitted = fit_ranges_of(matches, by_id, called, scale, fitted_here)
    known = read_ranges(config.ranges) if config.ranges else detector.ranges
    ranges, ranges_from = applying(known, fitted.names, analysis.thresholds, scale, config.checkpoint)
    if ranges and not config.ranges and split_name in SPLITS["valid"]:
        ranges_from = f"{ranges_from}; these are the very ones, so what they hold is flattered"
    counts = tally_matches(matches, analysis.thresholds)
    coverage = cover(ranges, counts, matches.positives) if ranges else None
    unlisted = dict[str, int]()
    for k in np.flatnonzero(matched.labels[1:] == 0).tolist():
        name = spec.categories[k][1]
        unlisted[name] = unlisted.get(name, 0) + int(counted[k])
    boxes = detector.train_boxes
    in_train = dict(zip(ids, np.array(boxes)[first].tolist(), strict=True)) if boxes else {}
    notes = notes_on(whole, matched.unknown, unlisted)
    settings = {
        "checkpoint": str(config.checkpoint),
        "data_dir": str(data_dir),
        "split": split_name,
        "window": spec.window,
        "overlap": spec.overlap,
        "scale": scale,
        "score_threshold": spec.score_threshold,
        "detections_per_window": spec.detections,
        "max_detections": sorted({1, 10, 100, figures.max_detections}),
        "coco_engine": config.coco_engine,
        "precision": precision,
        "torch": torch.__version__,
    }
    metrics = {
        "settings": {**settings, "thresholds": thresholds_from},
        "notes": notes,
        "left_out": {
            "sheets": lost_sheets(whole),
            "boxes_of_unknown_classes": matched.unknown,
            "detections_of_unlisted_classes": unlisted,
        },
        "sheets": {sheet.image_id: sheet.file_name for sheet in split.sheets},
        **figures.to_dict(),
        "analysis": analysis.to_dict(),
        "ranges": {"from": ranges_from, **(coverage.to_dict() if coverage else {})},
    }
    held = [ranges_from, *([coverage.summary()] if coverage else [])]
    summary = "\n".join([figures.table(), "", *notes, analysis.summary(), *held, figures.details(), ""])
    atomic.write_text(out / "ranges.json", json.dumps(fitted.to_dict(), indent=2) + "\n")
    atomic.write_text(out / "predictions.json", json.dumps(results))
    atomic.write_text(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    atomic.write_text(out / "validation_results.txt", summary)
    shown_doubts = find_doubts(judged)[: 0 if split_name in SPLITS["train"] else config.doubts]
    cards = make_cards(shown_doubts, whole.sheets, [c.name for c in whole.categories], [False] * len(judged))
    report = write_report(
        out / "report.html",
        split,
        figures,
        analysis,
        title=f"{data_dir.resolve().name}, {split_name}",
        thresholds_from=thresholds_from,
        notes=notes,
        in_train=in_train,
        settings=settings,
        coverage=coverage,
        ranges_from=ranges_from,
        doubtful=as_part(cards) if cards else "",
    )
    print(f"{summary}\nreport: {report}\nbeside it: figures, predictions and pictures")


def finetuned_on(checkpoint: Path) -> Path:
    """The data folder that the finetuning of a detector was given. Raises UserError unless it is here."""
    path = checkpoint.parent / "config.json"
    try:
        folder = Path(json.loads(path.read_text())["data_dir"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"--data-dir is required: no {path} says on what {checkpoint.name} was finetuned"
        ) from None
    if not folder.is_dir():
        raise UserError(f"--data-dir is required: {path} names {folder}, which is not there (any more)")
    return folder


def default_split(data_dir: Path) -> str:
    """ "test" if the folder has such a split, else "valid"."""
    try:
        find_split(data_dir, "test")
    except DataError:
        return "valid"
    return "test"


def lost_sheets(split: Split) -> list[str]:
    """The sheets that the annotations name and that could not be used."""
    dropped = (finding for finding in split.findings if finding.action == "dropped")
    return [finding.where for finding in dropped if finding.kind.startswith("image ")]


def notes_on(split: Split, unknown: dict[str, int], unlisted: dict[str, int]) -> list[str]:
    """What is not in the figures, a line each.

    unknown: boxes of the classes that the detector does not know. unlisted: detections above their thresholds
    of the classes that the split does not list.
    """
    notes = [line] if (line := losses(split)) else []
    if lost := lost_sheets(split):
        more = f" and {len(lost) - 10} more" if len(lost) > 10 else ""
        notes.append(f"sheets that are not in the figures: {', '.join(lost[:10])}{more}")
    for said, classes in (
        ("boxes of classes that the detector does not know, in no figure", unknown),
        ("detections of classes that the data does not list, in no figure", unlisted),
    ):
        if classes:
            named = ", ".join(f"{name} {number}" for name, number in classes.items())
            notes.append(f"{sum(classes.values())} {said}: {named}")
    return notes


def refuse_unfinished(path: Path) -> None:
    """Raise UserError for a file in the exp-dir of a finetuning that has not signed it."""
    if not (path.parent / "config.json").exists():
        return  # a copy elsewhere: its sha256 is checked, its history is its owner's affair
    from cluster import checkpoint  # here, as it loads torch

    try:
        signed = checkpoint.check_final(path.parent)
    except UserError as error:
        raise UserError(f"{error}; or give --unfinished to measure {path} as it is") from None
    if path.suffix == ".pt" and path.name not in signed["files"]:
        raise UserError(
            f"{path}: is none of the results that {path.parent / 'final.json'} signs; give model.pt"
        )


def draw(
    path: Path, image: np.ndarray, sheet: LabelledSheet, found: Detections, names: Sequence[str]
) -> None:
    """Write truth beside prediction, as one PNG. Raises UserError where the file can't be written."""
    truth = annotate(image, sheet.boxes, sheet.labels, names, title=f"Truth: {sheet.file_name}")
    prediction = annotate(image, found.boxes, found.labels, names, found.scores, title="Found")
    write_png(path, side_by_side(truth, prediction))


if __name__ == "__main__":
    run(EvaluateConfig, main)
