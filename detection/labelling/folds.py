"""Cross-validation: K detectors, each finetuned on the sheets of all folds but one, which it then judges."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import numpy as np

from cluster import array, atomic
from cluster.errors import UserError
from detection.config import FinetuneConfig
from detection.labelling.judges import Desk
from schematics.coco import ANNOTATIONS, Category, write_split
from schematics.splits import draw

SET = ("--data-dir", "--exp-dir", "--train-share")  # flags of finetuning that are set here
LAST = "last.pt"  # the held-out labels have chosen model.pt among the epochs, but not this one


def draw_folds(desk: Desk, count: int, seed: int) -> np.ndarray:
    """int64 [N]: the fold of each sheet, by class, with sheets that look alike in one.

    Raises UserError or DataError if there are too few sheets.
    """
    classes = [[desk.names[label - 1] for label in set(sheet.labels.tolist())] for _, sheet in desk.sheets]
    numbers = {"train": 0, **{f"fold {k}": k for k in range(1, count)}}
    shares = {name: 1 / count for name in numbers if name != "train"}
    return np.array([numbers[name] for name in draw(desk.files, classes, shares, seed)])


def write_folds(desk: Desk, folds: np.ndarray, folder: Path) -> list[Path]:
    """A data set for each fold: train/ has the other folds, valid/ this one; images are links.

    Sheets keep their names below that of their split. What is there already stays; raises UserError if it was
    made of other labels, which the detectors that were trained on it don't know.
    """
    homes = []
    for fold in range(int(folds.max()) + 1):
        home = folder / f"fold{fold}"
        for split, chosen in (("train", folds != fold), ("valid", folds == fold)):
            _write(desk, np.flatnonzero(chosen).tolist(), home / split)
        homes.append(home)
    return homes


def _write(desk: Desk, places: list[int], folder: Path) -> None:
    images, annotations = [], []
    categories = [Category(number, name) for number, name in enumerate(desk.names, start=1)]
    atomic.make_folder(folder)
    for place in places:
        split, sheet = desk.sheets[place]
        name = f"{split.name}/{sheet.file_name}"
        images.append({"id": place + 1, "file_name": name, "width": sheet.width, "height": sheet.height})
        xywh = np.hstack([sheet.boxes[:, :2], sheet.boxes[:, 2:] - sheet.boxes[:, :2]]).tolist()
        for bbox, label, crowd in zip(xywh, sheet.labels.tolist(), sheet.crowd.tolist(), strict=True):
            row = {"image_id": place + 1, "category_id": label, "bbox": bbox, "iscrowd": int(crowd)}
            annotations.append(row)
        link = folder / (name if sheet.page is None else name.rpartition("#page=")[0])
        atomic.make_folder(link.parent)
        if not os.path.lexists(link):
            link.symlink_to(sheet.path.resolve())
    there = folder / ANNOTATIONS
    if not there.exists():
        write_split(folder, images, categories, annotations)
        return
    document = json.loads(there.read_text())
    rows = (
        [{key: row[key] for key in annotations[0]} for row in document["annotations"]] if annotations else []
    )
    if document["images"] != images or rows != annotations:
        raise UserError(f"{folder}: was made of other sheets or labels; give another --out, or remove it")


def plan(homes: list[Path], folder: Path, finetune: str, seed: int) -> list[array.Run]:
    """A run of our finetuning for each fold, in folder/runs.

    finetune: its flags, as typed. Raises UserError for one that is set here.
    """
    try:
        words = shlex.split(finetune)
    except ValueError as error:
        raise UserError(f"--finetune {finetune}: {error}; close the quotes") from None
    given = [word.partition("=")[0] for word in words]
    if taken := [word for word in given if word.replace("_", "-") in SET]:
        raise UserError(f"--finetune: {taken[0]} is set by the folds themselves; leave it out")
    if "--backbone" not in given:
        words += ["--backbone", str(Path(FinetuneConfig.backbone).absolute())]
    elif "--backbone" in words and words[words.index("--backbone") + 1 :][:1] not in ([], ["none"]):
        at = words.index("--backbone") + 1
        words[at] = str(Path(words[at]).absolute())  # the commands run in another folder
    if "--seed" not in given:
        words += ["--seed", str(seed)]
    if "--validate-every" not in given:
        words += ["--validate-every", "100000"]  # the last step has one in any case, and no other is of use
    return [
        array.Run(
            home.name,
            (
                (
                    "-m",
                    "detection.finetune",
                    "--data-dir",
                    str(home.absolute()),
                    "--exp-dir",
                    str((folder / "runs" / home.name).absolute()),
                    *words,
                ),
            ),
        )
        for home in homes
    ]


def judges_of(homes: list[Path], folder: Path) -> list[Path]:
    """The detector of each fold."""
    return [folder / "runs" / home.name / LAST for home in homes]
