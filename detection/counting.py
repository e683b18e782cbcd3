"""Counts with ranges that hold the true ones: which ranges apply, what is said of them, counts.csv."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cluster.errors import UserError
from cluster.facts import check_facts
from detection.detections import Detections
from detection.metrics.ranges import Ranges, Tally, tally, why_none, widest_first

AGAIN = "give the ranges.json that evaluate.py wrote for this detector"
NAMED = 3  # of the sheets to look at first, and of the classes that are named on the screen


def read_ranges(path: Path) -> Ranges:
    """The ranges in a file of evaluate.py. Raises UserError for another file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not read ({type(error).__name__} {error}); {AGAIN}") from None
    ranges = Ranges(**check_facts(Ranges, values, str(path), AGAIN, closed=True))
    if flaw := ranges.flaw():
        raise UserError(f"{path}: {flaw}; {AGAIN}")
    return ranges


def applying(
    ranges: Ranges | None, names: Sequence[str], thresholds: np.ndarray, scale: float, checkpoint: Path
) -> tuple[Ranges | None, str]:
    """The ranges for counts of these classes at these thresholds and scale, or None, and what to say of them.

    ranges: those that are known. thresholds: float64 [K]. checkpoint: of the detector, for the cure.
    """
    command = f"python evaluate/evaluate.py --checkpoint {checkpoint} --split valid"
    cure = f"`{command} --out CALIBRATION` writes CALIBRATION/ranges.json for --ranges"
    if ranges is None:
        return None, f"no ranges of the counts: {checkpoint} was written before there were any; {cure}"
    fitted = ranges.of(tuple(names))
    known = np.array([number > 0 for number in fitted.boxes])
    if not np.array_equal(np.array(fitted.thresholds)[known], thresholds[known]):
        return None, f"no ranges of the counts: they hold at other thresholds; with --threshold {cure}"
    if scale != fitted.scale:
        return None, f"no ranges of the counts: they hold at --scale {fitted.scale:g}; with --scale {cure}"
    if said := why_none(fitted.sheets, fitted.level):
        return None, f"no ranges of the counts: {said}"
    return fitted, (
        f"ranges of the counts hold the true one with {100 * fitted.level:g} % probability, on sheets like "
        f"the {fitted.sheets} labelled ones behind them"
    )


def without_range(ranges: Ranges) -> str:
    """The classes that have no range where they are found, in a line; "" if all have one."""
    names = [name for name, basis in zip(ranges.names, ranges.found, strict=True) if not ranges.holds(basis)]
    if not names:
        return ""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return (
        f"{len(names)} of {len(ranges.names)} classes have no range where they are found, as too few of the "
        f"labelled sheets have them: {', '.join(names[:NAMED])}{more}"
    )


def look_first(ranges: Ranges, counted: Tally, sheets: Sequence[str]) -> str:
    """The sheets to look at first, in a line; "" where no range has any width."""
    low, high = ranges.bounds(counted)
    width = np.nansum((high - low)[:, :-1], 1)
    first = [n for n in widest_first(low, high)[:NAMED].tolist() if width[n]]
    # The terminal may not take a name that is not UTF-8.
    named = ", ".join(f"{sheets[n].encode(errors='replace').decode()} ({width[n]:.0f})" for n in first)
    return f"look first at the sheets with the widest ranges (symbols in doubt): {named}" if first else ""


def tally_sheets(found: Sequence[Detections], thresholds: np.ndarray) -> Tally:
    """The tally of sheets of which everything that was found is given. thresholds: float64 [K]."""
    sheet = np.repeat(np.arange(len(found)), [len(one) for one in found])
    labels = np.concatenate([np.empty(0, np.int64), *(one.labels for one in found)]) - 1
    scores = np.concatenate([np.empty(0), *(one.scores for one in found)])
    return tally(sheet, labels.astype(np.int64), scores, thresholds, len(found))


def to_counts(
    sheets: Sequence[str], counted: Tally, names: Sequence[str], ranges: Ranges | None = None
) -> str:
    """CSV with a row for each sheet: its name, the number of symbols of each class, and their sum.

    With ranges there follow "look at", the place of the sheet among those to look at, widest ranges first,
    and the lowest and highest count of the sum and of each class, empty where nothing is promised. A name
    that a spreadsheet would run as a formula has an apostrophe before it (OWASP, CSV injection).
    """
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    head: list[str] = ["sheet", *names, "total"]
    rows: list[list[object]] = [
        [_no_formula(sheet), *numbers] for sheet, numbers in zip(sheets, counted.found.tolist(), strict=True)
    ]
    if ranges:
        low, high = ranges.bounds(counted)
        places = np.argsort(widest_first(low, high)) + 1
        for row, place, lowest, highest in zip(rows, places.tolist(), low, high, strict=True):
            ends = [["" if np.isnan(end) else int(end) for end in ends] for ends in (lowest, highest)]
            pairs = [*zip(*ends, strict=True)]
            row += [place, *pairs[-1], *(end for pair in pairs[:-1] for end in pair)]
        head += ["look at", *(f"{name} {end}" for name in ("total", *names) for end in ("low", "high"))]
    writer.writerow(map(_no_formula, head))
    writer.writerows(rows)
    return table.getvalue()


def _no_formula(name: str) -> str:
    return f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name
