"""How good the detector is so far, on the validation split, and the file that keeps the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster import checkpoint, distributed
from cluster.distributed import World
from detection.data import SheetReader
from detection.inference import detect, to_results
from detection.metrics.analysis import fit_thresholds
from detection.metrics.coco import Figures, measure
from detection.metrics.matching import Engine
from detection.model import Detector

VALIDATING = 6 * 3600.0  # seconds that a validation may take before it counts as hung


def validate(
    detector: Detector,
    reader: SheetReader,
    truth: dict[str, Any],
    world: World,
    engine: Engine = "pycocotools",
    leave: Callable[[], bool] = lambda: False,
) -> tuple[Figures, dict[int, float]] | None:
    """COCO figures in sheet coordinates, and the score by category id at which F1 is highest.

    Each rank takes a share of the sheets; all get the same answer. None when `leave`, asked on each rank
    before each of its sheets, says so on any.
    """
    training = detector.training
    detector.eval()
    sheets, mine = reader.split.sheets, {}
    for n in range(world.rank, len(sheets), world.size):
        if leave():
            break
        mine[sheets[n].image_id] = detect(detector, reader[n][0])
    detector.train(training)
    if distributed.agree(leave())[0]:
        return None
    found = {image_id: d for share in distributed.gather_objects(mine) for image_id, d in share.items()}
    results = to_results(found, [category_id for category_id, _ in detector.spec.categories])

    def judge() -> tuple[Figures, dict[int, float]]:
        figures, matches = measure(truth, results, engine=engine)
        return figures, fit_thresholds(matches)

    return distributed.on_main(judge)


def out_of_patience(best: Mapping[str, float], step: int, patience: int) -> bool:
    """Whether validation AP has not risen for `patience` steps before `step`; with 0 it never is."""
    return 0 < patience <= step - best["step"]


def write_model(
    path: Path, detector: Detector, step: int, figures: Figures, thresholds: dict[int, float]
) -> None:
    """The file that evaluate and predict take."""
    state = {
        "spec": detector.spec.to_dict(),
        "model": detector.state_dict(),
        "step": step,
        "valid": figures.to_dict(),
        "thresholds": thresholds,
    }
    distributed.on_main(lambda: checkpoint.write_file(path, state))
