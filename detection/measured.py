"""What evaluate.py left of a detector: read again, to compare it with others on the same sheets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from schematics.coco import Split


@dataclass(frozen=True)
class Measured:
    """What `evaluate.py` left: its predictions, and its metrics.json, which may be absent."""

    path: Path
    results: list[dict[str, Any]]
    metrics: dict[str, Any] | None

    @property
    def sheets(self) -> dict[int, str] | None:
        """The sheets that were measured, by image id."""
        if self.metrics is None:
            return None
        return {int(number): name for number, name in self.metrics["sheets"].items()}

    def classes(self, split: Split) -> list[tuple[int, str]]:
        """The classes that were measured, by id and name; without a metrics.json all of the split."""
        if self.metrics is None:
            return [(category.id, category.name) for category in split.categories]
        return [(row["category_id"], row["name"]) for row in self.metrics["classes"]]

    def thresholds(self) -> dict[int, float]:
        return {row["id"]: row["threshold"] for row in (self.metrics or {})["analysis"]["classes"]}


def read_run(path: Path) -> Measured:
    """Raises UserError for what `evaluate.py` did not write."""
    file = path / "predictions.json" if path.is_dir() else path
    beside = file.with_name("metrics.json")
    try:
        results = json.loads(file.read_text())
        metrics = json.loads(beside.read_text()) if beside.exists() else None
        for row in results:
            row["image_id"], row["category_id"], row["bbox"], row["score"]
        if metrics is not None:
            metrics["sheets"], metrics["classes"], metrics["settings"], metrics["analysis"]["classes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not what evaluate.py writes ({type(error).__name__} {error}); evaluate again"
        ) from None
    return Measured(path, results, metrics)


def refuse_other_sheets(runs: Sequence[Measured], split: Split) -> None:
    """Raise UserError, which names a sheet, unless all were measured on the sheets of the split as it is."""
    now = {sheet.image_id: sheet.file_name for sheet in split.sheets}
    for one in runs:
        sheets = now if one.sheets is None else one.sheets
        for number, name in sorted(sheets.items() ^ now.items()):
            where = "only it has" if sheets.get(number) == name else "it does not have"
            raise UserError(
                f"{one.path}: measured on other sheets than those of {split.folder}: {where} {name}; "
                "evaluate all on the same sheets"
            )
