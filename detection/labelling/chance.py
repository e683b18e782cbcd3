"""What a correlation is worth: against the template's usual ones, and how many a sheet has by chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from detection.labelling.correlation import Places

LOW, HIGH = 0.5, 0.9  # quantiles of the scores between which their tail is measured
LEAST_SPREAD = 1e-3  # of the scores between the two
LEAST_USUAL = 0.05  # a template's usual score, at least
MOST = 0.999  # correlation above which all count as equal


def standardise(places: Sequence[Places], templates: int) -> list[Places]:
    """The places of all sheets with scores in units of those that their template usually has.

    A small template finds something like itself nearly everywhere, a large one does not, so equal
    correlations are not equally rare. A score is Fisher's z of the correlation, artanh r, over its median
    among the local maxima of that template on all sheets.
    """
    scores = [np.arctanh(one.scores.clip(0, MOST)) for one in places]
    usual = np.ones(templates)
    every, which = _joined(scores), _joined([one.template for one in places]).astype(np.int64)
    for n in np.unique(which):
        usual[n] = max(LEAST_USUAL, np.median(every[which == n]))
    return [replace(one, scores=z / usual[one.template]) for one, z in zip(places, scores, strict=True)]


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0), *arrays])


@dataclass(frozen=True)
class Chance:
    """The tail of the scores of all local maxima, which falls as an exponential from its median on."""

    places: float  # that NMS leaves on a sheet
    median: float
    fall: float  # by which a score must rise for a maximum to be e times as rare

    def expected(self, scores: np.ndarray) -> np.ndarray:
        """float64 [N]: false places that a sheet has with this score [N] or a higher one."""
        return LOW * self.places * np.exp(-np.maximum(scores - self.median, 0) / self.fall)

    def calibrated(self, scores: np.ndarray) -> np.ndarray:
        """float64 [N], 0 to 1: 1 / (1 + expected false places). It is 0.5 where a sheet has one by chance."""
        return 1 / (1 + self.expected(scores))


def fit_chance(scores: Sequence[np.ndarray], places: float) -> Chance:
    """Of the scores of all local maxima on each sheet, nearly all of which are not what is looked for.

    places: that NMS leaves on a sheet, in the mean, as several templates have a maximum at one place.

    Those of the symbols that are looked for are among them. As long as they are fewer than a tenth, they
    hardly move the quantiles; where they are more, the tail looks longer than it is and fewer places pass.
    """
    every = _joined(scores)
    if not every.size:
        return Chance(0.0, 0.0, 1.0)
    low, high = np.quantile(every, [LOW, HIGH])
    fall = max(high - low, LEAST_SPREAD) / np.log((1 - LOW) / (1 - HIGH))
    return Chance(places, float(low), float(fall))
