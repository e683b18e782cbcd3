"""What is found on a sheet, and how COCO writes it. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Detections:
    """The detections on one sheet, highest score first.

    boxes: float64 [N, 4], xyxy in pixels of the sheet. scores: float64 [N]. labels: int64 [N], 1..K.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, threshold: float | np.ndarray) -> Detections:
        """The detections with at least this score; an array [K] has a threshold for each class."""
        kept = self.scores >= (np.asarray(threshold)[self.labels - 1] if np.ndim(threshold) else threshold)
        return Detections(self.boxes[kept], self.scores[kept], self.labels[kept])


def to_results(found: Mapping[int, Detections], category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """COCO results of {image_id: detections}, with the category ids of the data set.

    Label k has the id category_ids[k - 1].
    """
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[label - 1],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": score,
        }
        for image_id, detections in found.items()
        for (x0, y0, x1, y1), score, label in zip(
            detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True
        )
    ]
