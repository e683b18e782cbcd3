"""Build, write and read the backbone that one stage hands to the next, and normalise its input.

backbone.safetensors holds the tensors of a timm backbone and the facts of its training: architecture, method,
color mode, mean and std.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from cluster import atomic, checkpoint
from cluster.config import setting
from cluster.errors import UserError
from cluster.facts import LEAST_STD, check_facts

SMALL = ".cifar"  # ends the name of a ResNet whose stem is that of small images
CLASSIFIER = ("fc.", "head.fc.", "classifier.")
AGAIN = "copy the file again from where it was made, or run its pretraining again"


def build_backbone(arch: str) -> Any:
    """A timm backbone without classifier: images [B, 3, H, W] -> features [B, backbone.num_features].

    The keys and shapes of a ResNet's state dict are torchvision's without `fc.*`. A name that ends in .cifar,
    as resnet18.cifar, is that ResNet with the stem of SimCLR's for CIFAR-10 (arXiv 2002.05709, appendix B.9):
    a first convolution of 3 x 3 with stride 1, and no max pooling. Raises UserError for a name that timm does
    not know, with the nearest ones, and for that stem on another network.
    """
    if arch.endswith(SMALL):
        return _with_small_stem(build_backbone(arch.removesuffix(SMALL)), arch)
    if not timm.is_model(arch):
        near = difflib.get_close_matches(arch, timm.list_models(), n=3)
        raise UserError(f"--arch {arch}: timm has no such model; near: {', '.join(near) or 'none'}")
    try:
        return timm.create_model(arch, pretrained=False, num_classes=0)
    except RuntimeError as error:
        if "." not in arch:  # is_model ignores the tag, as in resnet50.a1_in1k, which may not exist
            raise
        raise UserError(f"--arch {arch}: {' '.join(str(error).split())}") from None


def _with_small_stem(backbone: Any, arch: str) -> Any:
    first = getattr(backbone, "conv1", None)
    if not (isinstance(first, nn.Conv2d) and isinstance(getattr(backbone, "maxpool", None), nn.MaxPool2d)):
        raise UserError(
            f"--arch {arch}: the stem for small images is that of a ResNet; take resnet18 or the like, or "
            "leave out --stem"
        )
    backbone.conv1 = nn.Conv2d(3, first.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm's
    backbone.maxpool = nn.Identity()
    return backbone


@dataclass(frozen=True)
class BackboneFacts:
    """What a backbone.safetensors may say of itself, as far as it is used: here or by the probes."""

    arch: str = ""
    color_mode: Literal["gray", "rgb"] = "gray"
    mean: tuple[float, float, float] = setting((0.0, 0.0, 0.0), least=0, most=1)
    std: tuple[float, float, float] = setting((1.0, 1.0, 1.0), least=LEAST_STD, most=1)
    image_size: int = setting(224, least=1, most=32768)  # pixels


@dataclass(frozen=True)
class Judged:
    """What a probe during pretraining says of a backbone against the weights that its run began with."""

    verdict: Literal["better", "same", "worse"]
    told: str  # the figures and the verdict in a line


class Normalise(nn.Module):
    """Pixels uint8 [B, C, H, W] -> (pixels / 255 - mean) / std, float32 [B, 3, H, W]; C is 3, or 1 for gray.

    mean and std are in units of 0..1.

    mean and std are not in the state dict: they are stored beside the weights and given to the constructor.
    memory_format: layout of the result; channels_last suits a network that is trained in it.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> None:
        super().__init__()
        self.memory_format = memory_format
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return ((pixels.float() / 255 - self.mean) / self.std).to(memory_format=self.memory_format)


def write_backbone(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> str:
    """Write backbone.safetensors and its .sha256. The file contains meta (arch, method, mean, ...).

    The same tensors and meta give the same bytes. Returns the sha256 in hex.
    """
    from safetensors.torch import save

    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = save(content, {key: json.dumps(value) for key, value in meta.items()})
    size = int.from_bytes(data[:8], "little")
    # safetensors writes the meta in an order that changes at random, so it is sorted here.
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    data = len(header).to_bytes(8, "little") + header + data[8 + size :]
    atomic.make_folder(path.parent)
    return atomic.replace(path, lambda file: file.write(data), hashed=True)


def read_backbone(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by name, meta) of a file that `write_backbone` wrote.

    Raises UserError for a file that is absent, damaged, without its sha256, or of another kind, and for a
    meta or tensors that no pretraining writes.
    """
    from safetensors import SafetensorError, safe_open

    atomic.verify(path)
    try:
        with safe_open(path, framework="pt") as file:
            meta = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a backbone of Linework ({checkpoint.brief(error)})") from None
    check_facts(BackboneFacts, meta, str(path), AGAIN)
    if "judged" in meta:
        check_facts(Judged, meta["judged"], str(path), AGAIN)
    if ("mean" in meta) != ("std" in meta):
        raise UserError(f"{path}: {'std' if 'mean' in meta else 'mean'} is missing; {AGAIN}")
    refuse_not_finite(tensors, str(path), AGAIN)
    return tensors, meta


def refuse_not_finite(tensors: Mapping[str, Tensor], source: str, cure: str) -> None:
    """Raise UserError if a number of the tensors is NaN or infinite. source, cure: for its line."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise UserError(f"{source}: {name} holds numbers that are NaN or infinite; {cure}")


def audit_backbone(
    wanted: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    arch: str,
    source: str,
    unkept: tuple[str, ...] = (),
) -> str:
    """A line that says how many tensors matched those that a network of `arch` wants, and what was left over.

    tensors: by torchvision's or timm's keys, without a prefix. source: their file, for an error. A classifier
    (`fc.*` and the like) is ignored, and so are tensors whose names end in one of `unkept`, which this
    network keeps none of; the line counts both. Raises UserError unless every wanted tensor is given in its
    shape and no other tensor is left over.
    """
    fitting = {k for k, v in wanted.items() if k in tensors and tensors[k].shape == v.shape}
    left = set(tensors) - set(wanted)
    classifier = {k for k in left if k.startswith(CLASSIFIER)}
    set_aside = {k for k in left - classifier if unkept and k.endswith(unkept)}
    stray = left - classifier - set_aside
    audit = f"backbone: {len(fitting)} of {len(wanted)} tensors matched"
    if len(fitting) < len(wanted) or stray:
        problem = sorted(set(wanted) - fitting or stray)[0]
        why = "is missing"
        if problem in stray:
            why = "has no place"
        elif problem in tensors:
            why = f"has the shape {list(tensors[problem].shape)}, not {list(wanted[problem].shape)}"
        raise UserError(
            f"{source}: {audit} for {arch} ({problem} {why}, {len(stray)} left over); "
            "give the --arch the file was trained with, and keys that docs/weights.md lists"
        )
    if set_aside:
        audit += f"; {len(set_aside)} running statistics set aside (--norm group keeps none)"
    if classifier:
        audit += f"; {len(classifier)} tensors of its classifier ignored"
    return audit
