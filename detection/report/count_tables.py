"""The report's tables of counts by sheet, and of their ranges: what they hold, by kind, class and sheet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from detection.metrics.analysis import Analysis
from detection.metrics.coverage import KINDS, Coverage
from detection.metrics.ranges import OWN, widest_first
from detection.report.gallery import miscounts


def sheet_rows(analysis: Analysis, sheets: Sequence[str], most: int) -> list[dict[str, Any]]:
    """The `most` sheets whose counts are furthest off, from the worst on. sheets: the names, [I]."""
    counts, f1 = analysis.counts, analysis.sheet_f1
    order = np.argsort(-counts.error.sum(1), kind="stable")[:most].tolist()
    return [
        {
            "name": sheets[sheet],
            "boxes": int(counts.truth[sheet].sum()),
            "counted": int(counts.found[sheet].sum()),
            "off": int(counts.error[sheet].sum()),
            "f1": f1[sheet],
            "wrong": miscounts(analysis, sheet),
        }
        for sheet in order
    ]


def range_tables(coverage: Coverage, sheets: Sequence[str], most: int) -> dict[str, Any]:
    """What the template shows of the ranges. sheets: their names, [I]; most: how many sheets are listed."""
    return {
        "level": coverage.ranges.level,
        "own": OWN,
        "kinds": [(KINDS[kind], row) for kind, row in coverage.figures().items()],
        "classes": _class_rows(coverage),
        "sheets": _range_rows(coverage, sheets, most),
    }


def _class_rows(coverage: Coverage) -> list[dict[str, Any]]:
    """The classes that were found, on most sheets first; label is that of the analysis."""
    found = (coverage.found[:, :-1] > 0).sum(0).tolist()
    each = zip(coverage.to_dict()["classes"], found, strict=True)
    rows = [row | {"label": k, "found": number} for k, (row, number) in enumerate(each) if number]
    return sorted(rows, key=lambda row: -row["found"])


def _range_rows(coverage: Coverage, sheets: Sequence[str], most: int) -> list[dict[str, Any]]:
    """The sheets to look at first. low, high, true and said are of the total, places in percent of a bar."""
    low, high = coverage.low[:, -1], coverage.high[:, -1]
    truth, found = coverage.truth[:, -1], coverage.found[:, -1]
    longest = max(1.0, *np.fmax(high, truth).tolist())
    outside = (coverage.promised & ~coverage.holds)[:, :-1].sum(1)
    return [
        {
            "name": sheets[n],
            "doubt": int(coverage.width[n, :-1].sum()),
            "low": low[n],
            "high": high[n],
            "true": int(truth[n]),
            "said": int(found[n]),
            "from": 100 * low[n] / longest,
            "to": 100 * high[n] / longest,
            "at": 100 * truth[n] / longest,
            "outside": int(outside[n]),
        }
        for n in widest_first(coverage.low, coverage.high)[:most].tolist()
    ]
