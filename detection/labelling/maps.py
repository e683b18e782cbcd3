"""Feature maps of whole sheets by a frozen backbone, at a cell for every 4 px, on disk where asked for.

What is kept of a cell are its first principal components. They are those of a drawn sheet, so a map is a
function of the weights, the sheet and the zoom, whatever else is searched.

Letters in shapes: D components, C channels of the network, h and w cells, H and W pixels.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster import atomic
from cluster.backbone import Normalise, build_backbone
from cluster.errors import UserError
from cluster.foreign import convert
from schematics.drafting import draw_sheet
from schematics.sheets import to_color
from schematics.windows import Image, cut, paper_color

STRIDE = 4  # px of the zoomed sheet from one cell to the next
COMPONENTS = 32
TILE, MARGIN = 768, 64  # px; a tile goes through the network with a margin, which is cut off its map
PLAIN = ((0.9,) * 3, (0.2,) * 3)  # mean and std of drawings, about, for random weights
VERSION = 1  # of what is kept on disk; to be raised when maps change


class Network(nn.Module):
    """Two maps of a backbone: uint8 [B, 3, H, W] -> [B, C, H / 4, W / 4]; sides are multiples of 32.

    The map of stride 8 is stretched to that of stride 4 and stands behind it.
    """

    def __init__(self, body: nn.Module, normalise: Normalise, color_mode: str) -> None:
        super().__init__()
        self.body, self.color_mode = body, color_mode
        self.normalise: Normalise = normalise
        self.levels = [_level(body, stride) for stride in (STRIDE, 2 * STRIDE)]

    def forward(self, images: Tensor) -> Tensor:
        maps = self.body.forward_intermediates(  # type: ignore[operator]
            self.normalise(images), indices=self.levels, intermediates_only=True
        )
        fine, coarse = maps
        return torch.cat([fine, F.interpolate(coarse, size=fine.shape[-2:], mode="bilinear")], 1)


def _level(body: nn.Module, stride: int) -> int:
    info = list(body.feature_info)  # type: ignore[arg-type]
    return next(n for n, stage in enumerate(info) if stage["reduction"] == stride)


def open_network(weights: Path, arch: str | None = None) -> Network:
    """The network of a backbone's file, or one with random weights for "none".

    weights: what `python -m cluster.weights` takes. Raises UserError as `cluster.foreign.convert` does, and
    for a network without maps of stride 4 and 8.
    """
    if str(weights) == "none":
        torch.manual_seed(0)
        return network_of(build_backbone(arch or "resnet18"), {"mean": PLAIN[0], "std": PLAIN[1]}, "none")
    tensors, meta, _ = convert(str(weights), arch)
    body = build_backbone(meta["arch"])
    body.load_state_dict({name: tensors[name] for name in body.state_dict()})
    return network_of(body, meta, str(weights))


def network_of(body: nn.Module, meta: Mapping[str, Any], source: str) -> Network:
    """A backbone with the facts of its training. Raises UserError if one is missing; source: for its line."""
    try:
        normalise = Normalise(meta["mean"], meta["std"])
        return Network(body, normalise, meta.get("color_mode", "gray")).eval()
    except (KeyError, StopIteration):
        cure = "give another backbone"
        raise UserError(f"{source}: lacks mean and std, or maps of stride 4 and 8; {cure}") from None


@dataclass(frozen=True)
class Projection:
    """From the channels of a network to its first components: (cell - mean) @ axes; axes [C, D]."""

    mean: Tensor
    axes: Tensor


@dataclass(frozen=True)
class Eye:
    """A frozen network with its projection. digest: of the weights, to tell maps of two networks apart."""

    network: Network
    projection: Projection
    digest: str
    boxes: Callable[[Image], np.ndarray]  # of a sheet: those that may hold a symbol, float64 [N, 4] xyxy px

    def look(self, image: Image, zoom: float) -> Tensor:
        """float32 [D, h, w], rounded to float16, of an image uint8 [H, W] or [H, W, 3] at a zoom."""
        seen = zoomed(to_color(image, self.network.color_mode), zoom)
        features = F.pad(_components(self.network, seen, self.projection), (1, 1, 1, 1), mode="replicate")
        # A network with a stride of 4 px sees a symbol otherwise 2 px further on; this evens it out.
        soft = torch.tensor([0.25, 0.5, 0.25])
        blurred = F.conv2d(features[:, None], torch.outer(soft, soft)[None, None])[:, 0]
        return blurred.half().float()


def no_boxes(image: Image) -> np.ndarray:
    """No boxes, float64 [0, 4], on whatever sheet."""
    return np.zeros((0, 4))


def open_eye(network: Network, boxes: Callable[[Image], np.ndarray] = no_boxes, of_boxes: str = "") -> Eye:
    """The network with the components that it has on a drawn sheet.

    boxes: where on a sheet a symbol of whatever kind may be. of_boxes: what they depend on beside the weights
    and the sheet, by which files of one way to find them and of another are told apart.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    digest.update(
        repr([network.normalise.mean.tolist(), network.normalise.std.tolist(), of_boxes, VERSION]).encode()
    )
    sheet = to_color(draw_sheet(0, 0)[0], network.color_mode)
    cells = torch.cat([tile.flatten(1) for _, tile in _tiles(network, sheet)], 1).T.double()
    mean = cells.mean(0)
    _, axes = torch.linalg.eigh((cells - mean).T @ (cells - mean))
    # The sign of an axis is the solver's choice: its largest entry is made positive.
    axes = axes.flip(1)[:, :COMPONENTS]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    return Eye(network, Projection(mean.float(), axes.float()), digest.hexdigest(), boxes)


def zoomed(image: Image, zoom: float) -> Image:
    """The image at `zoom` times its size."""
    if zoom == 1:
        return image
    how = cv2.INTER_AREA if zoom < 1 else cv2.INTER_CUBIC
    size = (max(1, round(image.shape[1] * zoom)), max(1, round(image.shape[0] * zoom)))
    return cv2.resize(image, size, interpolation=how)


def _components(network: Network, image: Image, projection: Projection) -> Tensor:
    """[D, ceil(H / 4), ceil(W / 4)] of an image, tile by tile."""
    height, width = (-(-side // STRIDE) for side in image.shape[:2])
    whole = torch.empty(projection.axes.shape[1], height, width)
    for (x, y), tile in _tiles(network, image):
        part = torch.einsum("cd,chw->dhw", projection.axes, tile - projection.mean[:, None, None])
        rows, columns = min(part.shape[1], height - y), min(part.shape[2], width - x)
        whole[:, y : y + rows, x : x + columns] = part[:, :rows, :columns]
    return whole


def _tiles(network: Network, image: Image) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """((x, y) in cells, [C, h, w]) of each tile of an image; beyond its edge there is paper."""
    paper = paper_color(image)
    height, width = image.shape[:2]
    # A small image is one small tile, so that an example costs little.
    side = min(TILE, -(-max(height, width) // 32) * 32)
    with torch.inference_mode():
        for y in range(0, height, side):
            for x in range(0, width, side):
                window = cut(image, x - MARGIN, y - MARGIN, side + 2 * MARGIN, paper)
                pixels = torch.from_numpy(np.ascontiguousarray(window))
                pixels = pixels.expand(3, -1, -1) if pixels.ndim == 2 else pixels.permute(2, 0, 1)
                inner = slice(MARGIN // STRIDE, (MARGIN + side) // STRIDE)
                yield (x // STRIDE, y // STRIDE), network(pixels[None])[0, :, inner, inner]


@dataclass(frozen=True)
class Seen:
    """What is known of a sheet, whatever is searched. features: float32 [D, h, w]."""

    features: Tensor
    boxes: np.ndarray  # float64 [N, 4] xyxy px, that may hold a symbol of whatever kind

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is kept on disk."""
        return {"features": self.features.half().contiguous(), "boxes": torch.from_numpy(self.boxes)}


def look_at(eye: Eye, image: Image, zoom: float, folder: Path) -> Seen:
    """What is known of a sheet uint8 [H, W] or [H, W, 3], read from a folder or else put there.

    The file's name is a hash of the weights, the pixels and the zoom. One whose sha256 is not that beside it,
    or that holds something else, is made again, with a line on stderr.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save

    digest = hashlib.sha256(f"{eye.digest} {image.shape} {zoom}".encode())
    digest.update(np.ascontiguousarray(image).data)
    path = folder / f"{digest.hexdigest()[:32]}.safetensors"
    if path.exists():
        try:
            atomic.verify(path)
            kept = load_file(path)
            return Seen(kept["features"].float(), kept["boxes"].numpy())
        except (UserError, SafetensorError, KeyError) as error:
            print(f"made again: {error}", file=sys.stderr)
    seen = Seen(eye.look(image, zoom), eye.boxes(image))
    atomic.make_folder(folder)
    data = save(seen.tensors)
    atomic.replace(path, lambda file: file.write(data), hashed=True)
    return seen
