"""report.html: one file that shows how good a detector is and where it goes wrong.

It needs no network: pictures are inside, boxes are drawn over them, and the page's content policy lets
nothing else be loaded or run. docs/report.md explains the figures.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from cluster.atomic import write_text
from detection.metrics.analysis import Analysis
from detection.metrics.coco import Figures
from detection.metrics.coverage import Coverage
from detection.metrics.tide import KINDS, confusions
from detection.report.count_tables import range_tables, sheet_rows
from detection.report.gallery import choose_sheets, make_card
from schematics.coco import Split

TEMPLATE, STYLE, SCRIPT = (
    Path(__file__).with_name(name) for name in ("template.html.j2", "style.css", "script.js")
)
FEW = 20  # boxes in training, below which a weak class is named as one to label more of
LISTED = 200  # the tables of counts and of their ranges have at most so many sheets, the worst

CHOSEN_HERE = (
    "of the highest F1 on these very sheets, so F1 and counts are flattered; judge them on another split"
)

MEANING = {
    "found": "Right class, in its place (IoU 0.5 or more).",
    "class": "On a symbol of another class (IoU 0.5 or more), be that found as well or not.",
    "localisation": "Right class, badly placed (IoU 0.1 to 0.5).",
    "both": "Badly placed on a symbol of another class.",
    "duplicate": "A second detection of a symbol already found.",
    "background": "There is no symbol (IoU under 0.1 with all).",
    "missed": "A symbol that no detection accounts for.",
}


def write_report(
    path: Path,
    split: Split,
    figures: Figures,
    analysis: Analysis,
    *,
    title: str,
    thresholds_from: str = "",
    notes: Sequence[str] = (),
    in_train: Mapping[int, int] = {},
    settings: Mapping[str, object] = {},
    coverage: Coverage | None = None,
    ranges_from: str = "",
    most_sheets: int = 12,
    doubtful: str = "",
) -> Path:
    """Write the page to `path`, whole or not at all, and return `path`.

    figures, analysis: of the same `metrics.coco.measure` of detections on `split`.
    thresholds_from: where the thresholds of the analysis come from, in words.
    notes: what is not in the figures, a line each. in_train: by category id, how many boxes of it training
    had; {} where that is not known.
    settings: what a reader needs to get the same figures again, shown as given and in this order.
    coverage: of ranges of the counts on these sheets; None where no range is known. ranges_from: what they
    rest on, or why there are none, in words.
    most_sheets: how many sheets the gallery has, half of them the worst by F1 and half the best.
    doubtful: HTML of a section on doubtful labels, "" for none.
    Raises DataError for a sheet that can't be read and UserError where the file can't be written.
    """
    script = SCRIPT.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "f2": _with_decimals(2),
        "f3": _with_decimals(3),
        "percent": _as_percent,
        "short": _as_coordinate,
    }
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    rows = _class_rows(figures, analysis)
    names = {sheet.image_id: sheet.file_name for sheet in split.sheets}
    sheets = [names[number] for number in analysis.matches.image_ids.tolist()]
    page = template.render(
        title=title,
        style=Markup(STYLE.read_text(encoding="utf-8")),
        script=Markup(script),
        script_sha256=digest,
        figures=figures,
        analysis=analysis,
        thresholds_from=thresholds_from or ("given" if analysis.thresholds_given else CHOSEN_HERE),
        notes=notes,
        advice=_advice(rows, in_train),
        in_train=in_train,
        settings=settings,
        kinds=KINDS,
        meaning=MEANING,
        headline=_headline_figures(figures, analysis),
        errors=_error_rows(analysis),
        classes=rows,
        absent=[row for row in figures.classes if not row.boxes],
        charts=_curve_charts(analysis),
        confusion=_confusion_table(analysis),
        counted=sheet_rows(analysis, sheets, LISTED),
        ranges_from=ranges_from,
        ranges=range_tables(coverage, sheets, LISTED) if coverage else None,
        doubtful=Markup(doubtful),
        cards=[make_card(split, analysis, *chosen) for chosen in choose_sheets(analysis, most_sheets)],
    )
    write_text(Path(path), page)
    return Path(path)


def _headline_figures(figures: Figures, analysis: Analysis) -> list[dict[str, Any]]:
    """The figures in large print: name, interval, how it is written and what it says."""
    limit = figures.max_detections
    at_100 = dict(zip(("AP", "AP50", "AP75"), figures.coco, strict=False))
    beside = {name: f"{value:.3f} at COCO's 100" if limit != 100 else "" for name, value in at_100.items()}
    rows = [
        ("AP50", "AP50", "Mean average precision at IoU 0.5.", beside["AP50"]),
        ("AP", "AP", "The same over IoU 0.5 to 0.95, COCO's figure.", beside["AP"]),
        ("AP75", "AP75", "The same at IoU 0.75: boxes must fit well.", beside["AP75"]),
        ("F1", "F1", "Of all classes pooled, at the thresholds.", ""),
        ("exact_pairs", "Counts right", "Classes on a sheet counted to the exact number.", ""),
        ("exact_sheets", "Sheets right", "Sheets on which every class is counted right.", ""),
    ]
    return [
        {
            "name": name,
            "interval": analysis.intervals[key],
            "percent": key.startswith("exact"),
            "says": says,
            "note": note,
        }
        for key, name, says, note in rows
    ]


def _error_rows(analysis: Analysis) -> list[dict[str, Any]]:
    """Each kind of error with the AP50 it costs, in the order of KINDS; bar and part are percents."""
    counts, gains = analysis.kinds.counts(), analysis.delta_ap50
    drawn = {kind: gain if gain > 0 else 0.0 for kind, gain in gains.items()}  # without any box a gain is NaN
    widest, total = max(drawn.values()) or 1.0, sum(drawn.values()) or 1.0
    return [
        {
            "kind": KINDS.index(kind),
            "name": kind,
            "gain": gain,
            "bar": 100 * drawn[kind] / widest,
            "part": 100 * drawn[kind] / total,
            "count": counts[kind],
        }
        for kind, gain in gains.items()
    ]


def _class_rows(figures: Figures, analysis: Analysis) -> list[dict[str, Any]]:
    """The classes with boxes, that with most boxes first."""
    known = {row.category_id: row for row in figures.classes}
    at, counts = analysis.operating, analysis.counts
    rows = []
    for k, number in enumerate(analysis.matches.category_ids.tolist()):
        pairs = int(counts.pairs[:, k].sum())
        rows.append(
            {
                "label": k,
                "id": number,
                "name": analysis.matches.names[k],
                "boxes": int(at.boxes[k]),
                "ap": known[number].ap,
                "ap50": analysis.class_ap50[k],
                "ap75": known[number].ap75,
                "threshold": analysis.thresholds[k],
                "precision": at.precision[k],
                "recall": at.recall[k],
                "f1": at.f1[k],
                "counted": int(at.found[k]),
                "exact": counts.exact[:, k].sum() / pairs if pairs else np.nan,
                "off": counts.error[:, k].sum() / pairs if pairs else np.nan,
            }
        )
    return sorted((row for row in rows if row["boxes"]), key=lambda row: -row["boxes"])


def _advice(rows: list[dict[str, Any]], in_train: Mapping[int, int]) -> list[dict[str, Any]]:
    """Classes below the mean AP50 of which training had fewer than FEW boxes, the rarest there first."""
    mean = np.nanmean([row["ap50"].value for row in rows]) if rows else np.nan
    weak = (row for row in rows if in_train.get(row["id"], FEW) < FEW and row["ap50"].value < mean)
    return sorted(weak, key=lambda row: in_train[row["id"]])


# Where the plot of either chart lies in its picture of 440 x 320 units. Both axes go from 0 to 1.
LEFT, TOP, WIDE, HIGH = 46, 14, 380, 260


def _curve_charts(analysis: Analysis) -> list[dict[str, Any]]:
    """The PR and the F1 chart: each line as points of a polyline and as whole percents for the tooltip."""
    names, lines = analysis.matches.names, analysis.curves
    thresholds, f1 = analysis.thresholds, analysis.operating.f1
    shown = np.flatnonzero(~np.isnan(lines.precision[:, 0])).tolist()
    charts = []
    for key, heading, x_name, y_name, table in (
        ("pr", "Precision over recall", "recall", "precision", lines.precision),
        ("f1", "F1 over the score threshold", "threshold", "F1", lines.f1),
    ):
        each = [
            {
                "label": k,
                "name": names[k],
                "points": _polyline_points(table[k], key == "pr"),
                "percents": _tooltip_percents(table[k]),
                "dot": _chart_position(thresholds[k], f1[k]) if key == "f1" else None,
            }
            for k in shown
        ]
        mean = table[shown].mean(0) if shown else np.zeros(table.shape[1])
        charts.append(
            {
                "key": key,
                "heading": heading,
                "x": x_name,
                "y": y_name,
                "lines": each,
                "mean": {"points": _polyline_points(mean, key == "pr"), "percents": _tooltip_percents(mean)},
            }
        )
    return charts


def _polyline_points(values: np.ndarray, ends_at_zero: bool) -> str:
    """Values at 0, 0.01, ..., 1 as the points of a polyline.

    ends_at_zero: the line stops where it reaches 0, which on a PR curve is a recall that was never reached.
    """
    last = len(values)
    if ends_at_zero and (values == 0).any():
        last = int((values == 0).argmax()) + 1
    steps = len(values) - 1
    places = [_chart_position(n / steps, value) for n, value in enumerate(values[:last].tolist())]
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _chart_position(x: float, y: float) -> tuple[float, float]:
    """Where a point of the unit square lies in a chart's picture, in its units."""
    return LEFT + WIDE * float(x), TOP + HIGH * (1 - float(y))


def _tooltip_percents(values: np.ndarray) -> str:
    """Values from 0 to 1 as whole percents, which script.js reads out."""
    return " ".join(str(value) for value in np.round(100 * values).astype(int).tolist())


def _confusion_table(analysis: Analysis) -> dict[str, Any]:
    """The matrix without the classes that are neither there nor predicted; shares are of the true class."""
    matrix, names = analysis.confusion, [*analysis.matches.names, "background"]
    busy = (matrix.sum(0) + matrix.sum(1)) > 0
    busy[-1] = True
    kept = np.flatnonzero(busy)
    rows = matrix[np.ix_(kept, kept)]
    shares = rows / np.maximum(rows.sum(1, keepdims=True), 1)
    return {
        "names": [names[k] for k in kept],
        "rows": [
            {"name": names[k], "cells": list(zip(row.tolist(), share.tolist(), strict=True))}
            for k, row, share in zip(kept, rows, shares, strict=True)
        ],
        "mistaken": int(matrix[:-1, :-1].sum() - np.trace(matrix[:-1, :-1])),
        "of_class": analysis.kinds.counts()["class"],
        "worst": [
            {"true": names[a], "said": names[b], "times": n, "of": int(matrix[a].sum())}
            for a, b, n in confusions(matrix, 8)
        ],
    }


def _with_decimals(places: int) -> Callable[[float | None], str]:
    """A filter that writes a number with so many decimals, and a dash where there is nothing to measure."""
    return lambda value: "–" if value is None or np.isnan(value) or value == -1 else f"{value:.{places}f}"


def _as_percent(value: float) -> str:
    return "–" if np.isnan(value) else f"{100 * value:.0f} %"


def _as_coordinate(value: float) -> str:
    """Pixels to a tenth, without a trailing zero."""
    return f"{value:.1f}".removesuffix(".0")
