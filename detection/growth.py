"""Begin from a whole detector: classes of its name go on, others are added or dropped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from cluster.errors import UserError
from detection.classes import match_classes
from detection.inference import load_detector
from detection.model import Detector
from detection.spec import Spec
from schematics.coco import Split

SCORES = "roi_heads.box_predictor.cls_score"  # the one layer with rows for classes; row 0 is the background


def grow(path: Path, split: Split, window: int | None, seed: int) -> tuple[Detector, str]:
    """A detector of the split's classes that goes on from the one in a model.pt; lines for the log.

    Classes are matched by name, see `match_classes`. Those that the old detector knows keep their rows of the
    classifier, new ones get random rows, drawn by `seed`, and all other weights, boxes' among them, are the
    old ones, as are anchors and all else in the spec but the window, if one is given.

    Raises UserError for a file that is no detector, for an ONNX file, and where no class goes on.
    """
    old = load_detector(path, precision="fp32")
    if not isinstance(old, Detector):
        raise UserError(f"--grow {path}: an ONNX file can't be trained; give the model.pt it was made of")
    categories = tuple((category.id, category.name) for category in split.categories)
    source = sources(old.spec, split)
    kept = source > 0
    if not kept.any():
        raise UserError(f"--grow {path}: knows none of the classes of these sheets; leave it out")
    spec = replace(old.spec, categories=categories, window=window or old.spec.window)
    torch.manual_seed(seed)
    detector = Detector(Spec.from_dict(spec.to_dict(), f"--grow {path}", "give another --window"))
    tensors = old.state_dict()
    rows = torch.cat([torch.tensor([True]), kept])
    for name in (f"{SCORES}.weight", f"{SCORES}.bias"):
        grown = detector.state_dict()[name].clone()
        grown[rows] = tensors[name][torch.cat([torch.tensor([0]), source])[rows]]
        tensors[name] = grown
    detector.load_state_dict(tensors)

    new = [name for (_, name), known in zip(categories, kept.tolist(), strict=True) if not known]
    lost = [name for label, (_, name) in enumerate(old.spec.categories, 1) if label not in source.tolist()]
    changes = [f"{len(names)} {how} ({', '.join(names)})" for names, how in ((new, "new"), (lost, "dropped"))]
    told = "; ".join([f"{int(kept.sum())} go on", *(said for said in changes if said[0] != "0")])
    return detector, f"detector: {len(tensors)} of {len(tensors)} tensors from {path}; classes: {told}"


def sources(spec: Spec, split: Split) -> torch.Tensor:
    """int64 [K]: for each class of the split the label 1..K' of the spec that has its name, or 0."""
    matched = match_classes(spec.categories, split)
    place = {category.id: number for number, category in enumerate(split.categories)}
    source = torch.zeros(len(split.categories), dtype=torch.int64)
    for label, shared in enumerate(matched.labels.tolist()):
        if shared:
            source[place[matched.split.categories[shared - 1].id]] = label
    return source
