"""Precision at 101 recalls, and recall, from matches: those of pycocotools' `accumulate`, to the last bit."""

from __future__ import annotations

import numpy as np

from detection.metrics.matching import AREAS, Matches, in_range


def accumulate(
    matches: Matches,
    limit: int | None = None,
    area: tuple[float, float] = AREAS[0],
    match: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Precision float64 [T, R, K] and recall float64 [T, K]; -1 for a class without truth.

    limit: the detections of a class on a sheet that count; None for matches.limit. area: a range in square
    pixels. match: int32 [T, D], what `matching.match_in_ranges` gives for it; None for matches.match.
    """
    found, truth = matches.found, matches.truth
    rows = np.flatnonzero(found.rank < (limit or matches.limit))
    classes = np.arange(len(matches.category_ids) + 1)
    match = matches.match if match is None else match
    regular = ~truth.crowd & in_range(truth.area, area)
    positives = np.bincount(truth.label[regular], minlength=len(classes) - 1)
    regular = np.append(regular, False)  # the last is what -1, nothing found, reads
    inside = in_range(found.area[rows], area)
    wanted = least_right(positives, matches.recalls)
    precision = np.zeros((len(matches.ious), len(matches.recalls), len(positives)))
    recall = np.zeros((len(matches.ious), len(positives)))
    starts = np.searchsorted(found.label[rows], classes)
    for t in range(len(matches.ious)):
        taken = match[t, rows]
        right = regular[taken]
        counted = right | ((taken < 0) & inside)
        so_far = np.append(0, counted.cumsum())  # before each row
        place = np.flatnonzero(right)
        first = np.searchsorted(place, starts)
        size = np.diff(first)
        true = np.arange(1, len(place) + 1) - np.repeat(first[:-1], size)
        false = so_far[place + 1] - np.repeat(so_far[starts[:-1]], size) - true
        precision[t] = _at_recalls(true / (false + true + np.spacing(1)), first, wanted).T
        recall[t] = size / np.maximum(positives, 1)
    precision[:, :, positives == 0] = recall[:, positives == 0] = -1.0
    return precision, recall


def _at_recalls(precision: np.ndarray, first: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """float64 [K, R]: the best precision at each recall or beyond, 0 for a recall that is never reached.

    precision: float64, where a detection is right (it only rises there), class after class, as first [K + 1]
    says. wanted: int64 [K, R], how many must be right to reach each recall.
    """
    wanted = np.maximum(wanted, 1)
    reached = wanted <= np.diff(first)[:, None]
    places = np.minimum(first[:-1, None] + wanted - 1, first[1:, None])
    best = np.maximum.reduceat(np.append(precision, 0.0), places.ravel()).reshape(places.shape)
    best[~reached] = 0.0
    return np.maximum.accumulate(best[:, ::-1], axis=1)[:, ::-1]


def least_right(positives: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """int64 [N, R]: the fewest right detections whose share of `positives` [N] reaches each recall [R]."""
    several = np.maximum(positives, 1)[:, None]
    about = np.floor(recalls * several).astype(np.int64)  # rounding may put it one off, either way
    return about - 1 + sum((about + n) / several < recalls for n in (-1, 0, 1))
