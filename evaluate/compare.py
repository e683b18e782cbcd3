"""Say by how much two detectors differ on the same sheets, and how sure that is.

    python evaluate/compare.py A B

A and B are folders that `evaluate.py` wrote with --out, or the predictions.json of either. The command prints
each figure of A and of B and the difference B - A, with a 95 % interval of the bootstrap over sheets in which
every resample is the same for both. Where an interval holds 0, these sheets do not tell the two apart. It
says nothing about other training runs. Runs on other sheets are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from cluster.config import Config, setting
from cluster.entry import run
from cluster.errors import UserError
from detection.classes import match_classes
from detection.measured import read_run, refuse_other_sheets
from detection.metrics.comparison import compare
from detection.metrics.matching import match
from schematics.coco import find_split, losses, read_split, to_coco


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Config):
    # The two to compare: folders of evaluate.py, or files predictions.json.
    runs: Positional[tuple[Path, ...]] = ()
    # Labelled sheets that both were measured on; by default those that metrics.json beside A names.
    data_dir: Path | None = None
    # Split that both were measured on; by default the one that metrics.json beside A names.
    split: str | None = None
    # Number of resamples of the sheets.
    resamples: int = setting(1000, least=1)


def main(config: CompareConfig) -> None:
    if len(config.runs) != 2:
        raise UserError("name two folders that evaluate.py wrote: python evaluate/compare.py A B")
    first, second = pair = [read_run(path) for path in config.runs]
    settings: dict[str, Any] = next((one.metrics["settings"] for one in pair if one.metrics), {})
    data_dir, split_name = config.data_dir or settings.get("data_dir"), config.split or settings.get("split")
    if not data_dir or not split_name:
        raise UserError(
            f"--data-dir and --split are required: no metrics.json beside {first.path} names them"
        )
    whole = read_split(find_split(Path(data_dir), split_name))
    if line := losses(whole):
        print(line)
    refuse_other_sheets(pair, whole)
    classes = [one.classes(whole) for one in pair]
    common = [known for known in classes[0] if known in classes[1]]
    split = match_classes(common, whole).split
    if not common:
        raise UserError(f"{first.path} and {second.path}: no class in common; evaluate both on the same data")
    truth, ids = to_coco(split), {number for number, _ in common}
    matches = [match(truth, [row for row in one.results if row["category_id"] in ids]) for one in pair]
    thresholds = (first.thresholds(), second.thresholds()) if first.metrics and second.metrics else None
    figures = compare(matches[0], matches[1], thresholds, config.resamples)

    boxes = len(truth["annotations"])
    print(f"A  {first.path}\nB  {second.path}")
    print(f"{len(split.sheets)} sheets of {whole.folder}, {boxes} boxes of {len(common)} classes")
    for one, known, other in (("A", classes[0], classes[1]), ("B", classes[1], classes[0])):
        if alone := [name for number, name in known if (number, name) not in other]:
            print(f"only {one} was measured on, and left out here: {', '.join(alone)}")
    print(f"\n{'':<13}{'A':>8}{'B':>8}{'B - A':>9}   95 % of {config.resamples} resamples")
    for name, row in figures.items():
        gain = row.gain
        print(
            f"{name:<13}{row.first:>8.3f}{row.second:>8.3f}{gain.value:>+9.3f}   "
            f"{gain.low:+.3f} to {gain.high:+.3f}"
        )
    few = ", but with fewer than 20 sheets intervals are too narrow" if len(split.sheets) < 20 else ""
    print(f"\nWhere an interval holds 0, these sheets do not tell the two apart{few}.")


if __name__ == "__main__":
    run(CompareConfig, main)
