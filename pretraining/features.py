"""Compute features by a frozen pretrained backbone, for probes and pictures."""

from collections import defaultdict
from copy import copy
from dataclasses import fields
from itertools import chain
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from cluster.backbone import AGAIN, BackboneFacts, Normalise, build_backbone, read_backbone
from cluster.errors import UserError
from cluster.foreign import convert
from schematics.sheets import DataError, find_sheets, read_sheet, to_color
from schematics.splits import share_of
from schematics.windows import paper_color


def open_backbone(path: Path) -> tuple[nn.Module, dict]:
    """(network, meta) of a backbone.safetensors. In eval mode: uint8 [B, 3, S, S] -> features [B, D].

    Raises:
        UserError: the file was not written by Linework, is damaged, or lacks tensors of its architecture.
    """
    tensors, meta = read_backbone(path)
    for field in fields(BackboneFacts):
        if field.name not in meta:
            raise UserError(f"{path}: {field.name} is missing; {AGAIN}")
    try:
        backbone = build_backbone(meta["arch"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    try:
        missing, unexpected = backbone.load_state_dict(tensors, strict=False)
    except RuntimeError as error:  # tensors of other shapes; the first line of its message names no tensor
        raise UserError(f"{path}: {' '.join(str(error).split())[:200]}; {AGAIN}") from None
    if missing or unexpected:
        raise UserError(
            f"{path}: {len(missing)} tensors of {meta['arch']} are missing, {len(unexpected)} are foreign; "
            "export the backbone again"
        )
    return frozen(backbone, meta), meta


def open_weights(file: Path, arch: str | None = None) -> tuple[nn.Module, dict, str]:
    """(network, meta) as `open_backbone`, also of other projects' weights, and lines on how they were read.

    arch: as `cluster.foreign.convert` takes it. Raises UserError as it and `open_backbone` do.
    """
    tensors, meta, story = convert(str(file), arch)
    if meta["init"]["kind"] == "Linework":
        return *open_backbone(file), story
    backbone = build_backbone(meta["arch"])
    backbone.load_state_dict(tensors)
    return frozen(backbone, meta), meta, story


def frozen(backbone: nn.Module, meta: dict) -> nn.Module:
    """A backbone in eval mode behind the mean and std of `meta`: uint8 [B, 3, S, S] -> features [B, D]."""
    return nn.Sequential(Normalise(meta["mean"], meta["std"], torch.channels_last), backbone).eval()


@torch.no_grad()
def embed(network: nn.Module, images: Tensor, batch: int = 64) -> Tensor:
    """Output of a network in eval mode for images uint8 [N, 3, S, S]: float32 [N, D] on the CPU."""
    device = next(chain(network.parameters(), network.buffers())).device
    training = network.training
    network.eval()
    features = [network(chunk.to(device)).float().cpu() for chunk in images.split(batch)]
    network.train(training)
    return torch.cat(features)


class ClassFolder(Dataset):
    """Images in a folder per class, as schematics.symbols writes them; item -> uint8 [3, size, size], label.

    A label is the position of the class in `classes`, which may hold more names than this folder has. A class
    folder may be empty.

    Raises:
        DataError: there is no drawing in any of them.
    """

    def __init__(self, root: Path, classes: list[str], size: int, color_mode: str):
        label_of = {name: k for k, name in enumerate(classes)}
        crops = ((sheet, sheet.path.relative_to(root).parts[0]) for sheet in find_sheets(root))
        self.files = [(sheet, label_of[name]) for sheet, name in crops if name in label_of]
        if not self.files:
            raise DataError(f"{root}: no drawings in its class folders; cut them with schematics.symbols")
        self.root, self.classes, self.size, self.color_mode = root, classes, size, color_mode

    @property
    def sheets(self) -> list[str]:
        """The sheet of each crop, by its file name, which schematics.symbols makes SHEET_ANNOTATION-ID.

        A crop with another name is a sheet of its own.
        """
        names = []
        for crop, _ in self.files:
            sheet, _, number = crop.path.stem.rpartition("_")
            names.append(sheet if sheet and number.isdecimal() else crop.path.as_posix())
        return names

    def drawn_again(self, resample: str) -> list[str]:
        """Of each crop what intervals draw again: its sheet, or where `resample` is "crops" itself."""
        return self.sheets if resample == "sheets" else [crop.name for crop, _ in self.files]

    def take_share(self, share: float, seed: int) -> str:
        """Leave a share of the sheets, drawn by class as `schematics.splits.take_share` does; its line."""
        if share == 1:
            return ""
        sheets, classes = self.sheets, defaultdict[str, set[str]](set)
        for sheet, (_, label) in zip(sheets, self.files, strict=True):
            classes[sheet].add(self.classes[label])
        names, told = share_of(classes, share, seed, self.root.name)
        kept = {*names}
        self.files = [file for sheet, file in zip(sheets, self.files, strict=True) if sheet in kept]
        return told

    def seen_at(self, size: int, color_mode: str) -> "ClassFolder":
        """The same crops at another size and in another color mode."""
        other = copy(self)
        other.size, other.color_mode = size, color_mode
        return other

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[np.ndarray, int]:
        """The crop as its file has it, uint8 [H, W] or [H, W, 3] by the color mode, and its label."""
        crop, label = self.files[index]
        return to_color(read_sheet(crop), self.color_mode), label

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        crop, label = self.read(index)
        return square(crop, self.size), label


def square(image: np.ndarray, size: int) -> Tensor:
    """uint8 [H, W] or [H, W, 3], padded to a square with the paper's color -> uint8 [3, size, size]."""
    paper = np.atleast_1d(paper_color(image)).tolist()
    h, w = image.shape[:2]
    side = max(h, w)
    top, left = (side - h) // 2, (side - w) // 2
    borders = (top, side - h - top, left, side - w - left)
    image = cv2.copyMakeBorder(image, *borders, cv2.BORDER_CONSTANT, value=paper)
    image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if size < side else cv2.INTER_CUBIC)
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def class_names(data_dir: Path, splits: list[str]) -> list[str]:
    """Names of the class folders of all splits together, sorted.

    Raises:
        UserError: a split's folder does not exist or has no class folders.
    """
    names: set[str] = set()
    for split in splits:
        root = data_dir / split
        here = (
            {child.name for child in root.iterdir() if child.is_dir() and child.name[0] != "."}
            if root.is_dir()
            else set()
        )
        if not here:
            raise UserError(
                f"{root}: no class folders there; cut them with: python -m schematics.symbols DATA "
                f"{data_dir}, or name another split"
            )
        names |= here
    return sorted(names)


def class_features(
    network: nn.Module, folder: ClassFolder, device: torch.device, workers: int
) -> tuple[Tensor, Tensor]:
    """Features [N, D] and labels int64 [N] of all images of a class folder, both on `device`."""
    network = network.to(device)
    features, labels = [], []
    for images, batch_labels in DataLoader(folder, batch_size=64, num_workers=workers):
        features.append(embed(network, images))
        labels.append(batch_labels)
    return torch.cat(features).to(device), torch.cat(labels).to(device)
