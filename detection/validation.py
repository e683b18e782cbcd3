"""Measure a detector on the validation split during finetuning, and write it to model.pt with its figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster import checkpoint, distributed
from cluster.distributed import World
from detection.detections import to_results
from detection.inference import detect
from detection.metrics.analysis import fit_thresholds
from detection.metrics.coco import Figures, measure
from detection.metrics.engines import Engine
from detection.metrics.ranges import Ranges, fit_ranges_of
from detection.model import Detector
from detection.sheets import SheetReader
from schematics.progress import progress

VALIDATING = 6 * 3600.0  # seconds that a validation may take before it counts as hung


def validate(
    detector: Detector,
    reader: SheetReader,
    truth: dict[str, Any],
    world: World,
    engine: Engine = "linework",
    leave: Callable[[], bool] = lambda: False,
) -> tuple[Figures, dict[int, float], Ranges] | None:
    """COCO figures in sheet coordinates, by category id the score threshold with the highest F1, and ranges
    of the counts at these thresholds.

    The split's classes are the detector's, but their ids may differ: the figures have those of the split, the
    thresholds those of the detector. Call it on every rank: each takes a share of the sheets, and all get the
    same result. leave: asked on each rank before each of its sheets; if it returns True on any rank, the
    validation ends and the result is None.
    """
    training = detector.training
    detector.eval()
    sheets, mine = reader.split.sheets, {}
    share = range(world.rank, len(sheets), world.size)
    doing = "validation" if world.size == 1 else f"validation, rank 0 of {world.size}"
    for n in progress(share, doing, shown=world.main):
        if leave():
            break
        mine[sheets[n].image_id] = detect(detector, reader[n][0])
    detector.train(training)
    if distributed.agree(leave())[0]:
        return None
    found = {image_id: d for share in distributed.gather_objects(mine) for image_id, d in share.items()}
    ids = [category.id for category in reader.split.categories]
    results = to_results(found, ids)

    def judge() -> tuple[Figures, dict[int, float], Ranges]:
        figures, matches = measure(truth, results, engine=engine)
        thresholds = fit_thresholds(matches)
        known = detector.spec.categories
        names = tuple(name for _, name in known)
        called = dict(zip(ids, names, strict=True))
        ranges = fit_ranges_of(matches, thresholds, called, detector.spec.scale, fitted_here=True)
        by_id = {category_id: thresholds[own] for (category_id, _), own in zip(known, ids, strict=True)}
        return figures, by_id, ranges.of(names)

    return distributed.on_main(judge)


def out_of_patience(best: Mapping[str, float], step: int, patience: int) -> bool:
    """Whether the best validation is `patience` steps or more before `step`; never if patience is 0.

    best: holds the "step" of the best validation.
    """
    return 0 < patience <= step - best["step"]


def write_model(
    path: Path,
    detector: Detector,
    step: int,
    figures: Figures,
    thresholds: dict[int, float],
    ranges: Ranges,
    train_boxes: dict[int, int],
) -> None:
    """Write model.pt or last.pt, which evaluate and predict read: the detector, its figures, its thresholds.

    figures, thresholds, ranges: as `validate` gives them for `detector` after `step` steps. train_boxes: by
    category id, how many boxes of it the training split has.
    """
    state = {
        "spec": detector.spec.to_dict(),
        "model": detector.state_dict(),
        "step": step,
        "valid": figures.to_dict(),
        "thresholds": thresholds,
        "ranges": ranges.to_dict(),
        "train_boxes": train_boxes,
        "precision": "bf16" if detector.bf16 else "fp32",
    }
    distributed.on_main(lambda: checkpoint.write_file(path, state))
