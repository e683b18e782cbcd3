"""A study: arms x numbers of labels x seeds, each a chain of our own commands. Read from a TOML file.

Nothing here runs or loads anything: docs/studies.md describes the file, cluster.array runs what comes out.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.array import Run, read_done
from cluster.errors import UserError
from cluster.flags import Flags, read_toml, words
from cluster.snapshot import methods
from detection.config import FinetuneConfig

NAME = re.compile(r"[\w.+-]+")
# Flags that are set by the study itself.
SET = ("data-dir", "exp-dir", "backbone", "train-share", "seed", "checkpoint", "out", "freeze")
TRAINED = ("head", "whole")


@dataclass(frozen=True)
class Arm:
    """What is compared: a backbone that is there ("none": random weights), or a way to pretrain one.

    train: in classification, what of a classifier is trained, its "head" or the "whole"; None for a linear
    layer that is fitted to the backbone's features.
    """

    name: str
    backbone: str | None
    method: str | None
    train: str | None
    pretrain: Flags
    finetune: Flags


@dataclass(frozen=True)
class Labels:
    """How much is labelled: a share of the data's training sheets, or other data."""

    name: str
    share: float
    data: Path
    seeds: tuple[int, ...]
    finetune: Flags


@dataclass(frozen=True)
class Cell:
    """One run of the comparison. name: also that of its folder."""

    arm: Arm
    labels: Labels
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm.name}_{self.labels.name}_seed{self.seed}"


@dataclass(frozen=True)
class Study:
    """pool: unlabelled drawings. split: on which detectors are measured. slurm: options of sbatch."""

    name: str
    classification: bool
    folder: Path
    pool: Path | None
    split: str
    arms: tuple[Arm, ...]
    labels: tuple[Labels, ...]
    pretrain: Flags
    finetune: Flags
    evaluate: Flags
    slurm: Flags

    @property
    def cells(self) -> list[Cell]:
        """All runs of the comparison.

        A linear layer that is fitted to given weights and all labels has no seed, so such an arm has the
        first one alone.
        """
        return [
            Cell(arm, labels, seed)
            for labels in self.labels
            for arm in self.arms
            for seed in (labels.seeds[:1] if self._sure(arm, labels) else labels.seeds)
        ]

    def _sure(self, arm: Arm, labels: Labels) -> bool:
        """Whether no seed changes what comes of an arm."""
        return self.fitted(arm) and arm.backbone is not None and labels.share == 1

    def fitted(self, arm: Arm) -> bool:
        """Whether an arm is a linear layer that is fitted to the features of its backbone."""
        return self.classification and arm.train is None

    def out(self, cell: Cell) -> Path:
        """The folder that the last command of a cell writes its figures to."""
        folder = self.folder / cell.name
        if not self.classification:
            return folder / "evaluate"
        return folder / "linear" if self.fitted(cell.arm) else folder

    def result(self, cell: Cell) -> Path:
        """The file with the figures of a cell."""
        name = "metrics" if not self.classification else "linear" if self.fitted(cell.arm) else "classify"
        return self.out(cell) / f"{name}.json"

    def runs(self) -> list[Run]:
        """Pretrainings first, then what needs them."""
        before = {self._pretrained(cell): self._pretraining(cell) for cell in self.cells if cell.arm.method}
        cells = [
            Run(cell.name, self._commands(cell), (self._pretrained(cell),) if cell.arm.method else ())
            for cell in self.cells
        ]
        return [*(Run(name, (command,)) for name, command in before.items()), *cells]

    def refuse_changes(self) -> None:
        """Raise UserError if a pretraining has other flags now than when runs were begun from it."""
        for run in self.runs():
            needing = [other.name for other in self.runs() if run.name in other.after]
            begun = [name for name in needing if (self.folder / name).exists()]
            if begun and read_done(self.folder, run.name) and not run.done(self.folder):
                raise UserError(
                    f"{run.name}: it was made with other flags, and {begun[0]} began from it; give those "
                    "flags again, or the study another folder"
                )

    def _pretrained(self, cell: Cell) -> str:
        """The run that pretrains for a cell: one for all runs of an arm, in classification one for a seed.

        It has the name of the first arm that pretrains alike, so that such arms share it.
        """
        alike = (
            arm for arm in self.arms if (arm.method, arm.pretrain) == (cell.arm.method, cell.arm.pretrain)
        )
        return f"pretrain_{next(alike).name}" + (f"_seed{cell.seed}" if self.classification else "")

    def _pretraining(self, cell: Cell) -> tuple[str, ...]:
        flags = {**self.pretrain, **cell.arm.pretrain}
        if self.classification:
            flags["seed"] = cell.seed
        where = ("--data-dir", str(self.pool), "--exp-dir", str(self.folder / self._pretrained(cell)))
        return ("-m", f"{cell.arm.method}.pretrain", *where, *words(flags))

    def _commands(self, cell: Cell) -> tuple[tuple[str, ...], ...]:
        labels, exp_dir = cell.labels, self.folder / cell.name
        backbone = cell.arm.backbone or str(self.folder / self._pretrained(cell) / "backbone.safetensors")
        data = ("--data-dir", str(labels.data))
        measuring = ("--out", str(self.out(cell)), *words(self.evaluate))
        share = ("--train-share", f"{labels.share:g}") if labels.share < 1 else ()
        if self.fitted(cell.arm):
            drawn = (*share, "--seed", str(cell.seed)) if share else ()
            return (("evaluate/linear.py", "--checkpoint", backbone, *data, *drawn, *measuring),)
        flags = words({**self.finetune, **labels.finetune, **cell.arm.finetune})
        place = ("--exp-dir", str(exp_dir), "--seed", str(cell.seed))
        if self.classification:
            freeze = ("--freeze",) if cell.arm.train == "head" else ()
            own = ("--checkpoint", backbone, *place, *share, *freeze)
            return (("evaluate/classify.py", *data, *own, *flags),)
        own = ("--backbone", backbone, *place, *share)
        model = ("--checkpoint", str(exp_dir / "model.pt"), *data, "--split", self.split)
        return (
            ("-m", "detection.finetune", *data, *own, *flags),
            ("evaluate/evaluate.py", *model, *measuring),
        )


def read_study(path: Path) -> Study:
    """The study of a TOML file; what is relative in it is so to the current folder.

    Raises UserError for a file that can't be read, a key that is unknown or absent, and a value of the wrong
    type.
    """
    return _Reader(path).study(read_toml(path))


class _Reader:
    """Reads tables of one file, whose name its errors have."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def wrong(self, what: str) -> UserError:
        return UserError(f"{self.path}: {what}")

    def study(self, table: Flags) -> Study:
        kinds = {"name": str, "task": str, "folder": str, "data": str, "pool": str, "split": str}
        tables = ("pretrain", "finetune", "evaluate", "slurm", "arms")
        self.check(table, "", {**kinds, "seeds": list, "labels": list, **dict.fromkeys(tables, dict)})
        for key in ("folder", "data", "arms"):
            if not table.get(key):
                raise self.wrong(f"{key} is required")
        task = table.get("task", "detection")
        if task not in ("detection", "classification"):
            raise self.wrong(f'task = "{task}": give "detection" or "classification"')
        classification = task == "classification"
        arms = tuple(self.arm(name, arm, classification) for name, arm in table["arms"].items())
        if any(arm.method for arm in arms) and "pool" not in table:
            raise self.wrong("pool is required, the unlabelled drawings that an arm is pretrained on")
        labels = tuple(self.labels(entry, table, classification) for entry in table.get("labels", [{}]))
        if len({each.name for each in labels}) < len(labels):
            raise self.wrong("two of labels have one name; give each its own")
        if classification and "split" in table:
            raise self.wrong("split is for detection; [evaluate] has test-split")
        return Study(
            name=table.get("name", self.path.stem),
            classification=classification,
            folder=Path(table["folder"]).absolute(),
            pool=Path(table["pool"]).absolute() if "pool" in table else None,
            split=table.get("split", "test"),
            arms=arms,
            labels=labels,
            pretrain=self.flags(table, "pretrain"),
            finetune=self.flags(table, "finetune", classification=classification),
            evaluate=self.flags(table, "evaluate"),
            slurm=table.get("slurm", {}),
        )

    def arm(self, name: str, table: Flags, classification: bool) -> Arm:
        where = f"arms.{name}"
        self.named(name, where)
        kinds = {"backbone": str, "method": str, "train": str, "pretrain": dict, "finetune": dict}
        self.check(table, where, kinds)
        backbone, method, train = table.get("backbone"), table.get("method"), table.get("train")
        if (backbone is None) == (method is None) or ("pretrain" in table and method is None):
            raise self.wrong(f"{where}: give it a backbone, or a method to pretrain one with")
        if method is not None and method not in methods():
            raise self.wrong(f'{where}: method = "{method}": give one of {", ".join(methods())}')
        if train is not None and not (classification and train in TRAINED):
            raise self.wrong(
                f'{where}: train = "{train}": give {" or ".join(TRAINED)}, in classification alone'
            )
        if classification and train is None and (backbone == "none" or "finetune" in table):
            fault = "finetune" if "finetune" in table else 'backbone = "none"'
            raise self.wrong(
                f'{where}: {fault}: a layer on its features is fitted there; give train = "whole"'
            )
        if backbone not in (None, "none"):
            backbone = str(Path(backbone).absolute())
        pretrain = self.flags(table, "pretrain", where)
        finetune = self.flags(table, "finetune", where, classification)
        return Arm(name, backbone, method, train, pretrain, finetune)

    def labels(self, entry: Any, table: Flags, classification: bool) -> Labels:
        kinds = {"name": str, "share": float, "data": str, "seeds": list, "finetune": dict}
        self.check(entry, "labels", kinds)
        share, seeds = float(entry.get("share", 1.0)), entry.get("seeds", table.get("seeds", [0]))
        if not 0 < share <= 1:
            raise self.wrong(f"labels: share = {share:g}: give more than 0 and at most 1")
        if not seeds or any(type(seed) is not int or seed < 0 for seed in seeds):
            raise self.wrong(f"seeds = {seeds}: give whole numbers from 0 on")
        name = entry.get("name", f"{100 * share:g}pc")
        self.named(name, "labels")
        data = Path(entry.get("data", table["data"])).absolute()
        flags = self.flags(entry, "finetune", "labels", classification)
        return Labels(name, share, data, tuple(seeds), flags)

    def flags(self, table: Flags, key: str, where: str = "", classification: bool = False) -> Flags:
        """The flags of a command, with dashes in their names.

        Those of evaluate/classify.py are not known here; a wrong one ends that command at once.
        """
        name = f"{where}.{key}".lstrip(".")
        flags = {flag.replace("_", "-"): value for flag, value in table.get(key, {}).items()}
        if taken := [flag for flag in flags if flag in SET and not (key == "pretrain" and flag == "seed")]:
            raise self.wrong(f"{name}: {taken[0]} is set by the study itself; leave it out")
        if key == "finetune" and not classification:
            known = [field.name.replace("_", "-") for field in dataclasses.fields(FinetuneConfig)]
            self.check(flags, name, dict.fromkeys(known, object))
        return flags

    def check(self, table: Any, where: str, kinds: Mapping[str, type]) -> None:
        """Refuse keys that are not in `kinds`, and values of another type."""
        if not isinstance(table, dict):
            raise self.wrong(f"{where}: give it as a table, [{where}] or [[{where}]]")
        for key, value in table.items():
            place = f"{where}.{key}".lstrip(".")
            if key not in kinds:
                raise self.wrong(f"unknown key {place}{_nearest(key, kinds)}")
            number = kinds[key] is float and isinstance(value, int)
            if not (isinstance(value, kinds[key]) or number):
                raise self.wrong(f"{place} = {value}: give a {kinds[key].__name__}")

    def named(self, name: str, where: str) -> None:
        if not NAME.fullmatch(name):
            raise self.wrong(f'{where}: a name of letters, digits and . + - _ alone is needed, not "{name}"')


def _nearest(key: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"; the nearest is {near[0]}" if near else f"; known are {', '.join(known)}"
