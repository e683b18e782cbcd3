"""Show features: their t-SNE map, and a page of the nearest neighbours of crops."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
import torch.nn.functional as F
from markupsafe import Markup
from torch import Tensor

from cluster import atomic
from pretraining.baselines import LabelledCrops
from pretraining.features import ClassFolder

TEMPLATE = Path(__file__).with_name("neighbours.html.j2")
THUMBNAIL = 56  # pixels


def evenly(count: int, most: int) -> np.ndarray:
    """int64 [min(count, most)]: places 0 .. count - 1, evenly spaced where there are more than `most`."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def tsne(features: Tensor, seed: int) -> np.ndarray:
    """A map float [N, 2] of features [N, D] on which neighbours by cosine similarity stay neighbours.

    t-SNE of van der Maaten and Hinton (2008), perplexity 30, or less below 91 crops. N is 2 or more.
    """
    # Imported here, as it takes a second.
    from sklearn.manifold import TSNE

    points = F.normalize(features.float(), dim=1).cpu().numpy()
    perplexity = min(30.0, (len(points) - 1) / 3)
    return TSNE(perplexity=perplexity, init="random", random_state=seed % 2**32).fit_transform(points)


def write_neighbours(
    path: Path,
    crops: LabelledCrops,
    splits: tuple[str, str],
    shown: np.ndarray,
    near: tuple[Tensor, Tensor],
    weights: str,
) -> None:
    """Write one HTML file with each shown crop beside its neighbours, grouped by class. It loads nothing.

    splits: that of the neighbours, and that of the crops that are shown. shown: int64 [N], places among the
    latter. near: similarity [N, k] and place of the neighbours, as `probe.neighbours` gives them. weights:
    their name for the heading. Raises DataError for a crop that can't be read, and UserError as
    `atomic.write_text` does.
    """
    folders = [crops.folders[split].seen_at(THUMBNAIL, "rgb") for split in splits]
    similarity, places = (part.cpu().tolist() for part in near)
    groups: dict[str, list[dict[str, Any]]] = {}
    for row, place in enumerate(shown.tolist()):
        label = folders[1].files[place][1]
        others = [
            {"picture": f"n{there}", **_described(folders[0], crops.classes, there), "similarity": cosine}
            for there, cosine in zip(places[row], similarity[row], strict=True)
        ]
        crop = {"picture": f"c{place}", **_described(folders[1], crops.classes, place), "others": others}
        crop["right"] = others[0]["name"] == crop["name"]
        groups.setdefault(crops.classes[label], []).append(crop)
    used = {f"c{place}": (folders[1], place) for place in shown.tolist()}
    used |= {f"n{place}": (folders[0], place) for places_of in places for place in places_of}
    pictures = {name: picture_uri(folder[place][0]) for name, (folder, place) in used.items()}
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        groups=groups,
        pictures={name: Markup(uri) for name, uri in pictures.items()},
        side=THUMBNAIL,
        weights=weights,
        split=splits[1],
        among=splits[0],
        shown=len(shown),
        crops=len(crops.sheets[splits[1]]),
        right=sum(crop["right"] for group in groups.values() for crop in group),
    )
    atomic.write_text(path, page)


def _described(folder: ClassFolder, classes: Sequence[str], place: int) -> dict[str, Any]:
    crop, label = folder.files[place]
    return {"name": classes[label], "file": crop.path.name}


def picture_uri(pixels: Tensor) -> str:
    """A data URI of uint8 [3, S, S] RGB. It has no character that ends a url() of CSS."""
    image = cv2.cvtColor(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()), cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".webp", image, [cv2.IMWRITE_WEBP_QUALITY, 80])
    return "data:image/webp;base64," + base64.b64encode(encoded.tobytes()).decode()
