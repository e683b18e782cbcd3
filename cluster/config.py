"""A stage's configuration: one frozen dataclass, from which the flags and the config.json of a run are made.

The comment above a field is the help text of its flag. The bounds and other rules of the flag are set with
the field:

    # Learning rate at the peak.
    lr: float = setting(0.005, least=0, may_change=True)

A derived class may give a field another default and comment by an assignment without `setting`; it inherits
the rules. With `setting` it replaces them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from cluster import atomic
from cluster.errors import UserError

LARGEST_SEED = 2**63 - 1
LONGEST_WAIT = 8 * 3600.0  # seconds: more than a first step, a save and a validation may take together
RunType = TypeVar("RunType", bound="RunConfig")


@dataclass(frozen=True)
class Rule:
    """The rules of a flag besides its type and default.

    least, most: bounds of the number, or of each number of a tuple. may_change: whether a resumed run may be
    given another value. also: an older spelling of the flag that is still accepted, such as "--wd". exists:
    whether the default is a file or folder without which the flag is required. unless: another flag with
    which it is not.
    """

    least: float | None = None
    most: float = math.inf
    may_change: bool = False
    also: str | None = None
    exists: bool = False
    unless: str | None = None


def setting(
    default: Any = dataclasses.MISSING,
    *,
    least: float | None = None,
    most: float = math.inf,
    may_change: bool = False,
    also: str | None = None,
    exists: bool = False,
    unless: str | None = None,
) -> Any:
    """A dataclass field that carries a `Rule`. A flag without a default is required."""
    rule = Rule(least, most, may_change, also, exists, unless)
    return dataclasses.field(default=default, metadata={"rule": rule})


def rules(config_class: type) -> dict[str, Rule]:
    """The rules by field name; a field without one of its own inherits that of the base class."""
    found: dict[str, Rule] = {}
    for base in reversed(config_class.__mro__):
        for field in vars(base).get("__dataclass_fields__", {}).values():
            if "rule" in field.metadata:
                found[field.name] = field.metadata["rule"]
    return found


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base class of a command's flags. Raises UserError for a number outside the bounds of its field."""

    def __post_init__(self) -> None:
        for name, rule in rules(type(self)).items():
            if rule.least is None:
                continue
            for number in numbers(getattr(self, name)):
                if not rule.least <= number < math.inf:
                    raise UserError(f"{flag(name)} {number}: give {rule.least} or more")
                if number > rule.most:
                    raise UserError(f"{flag(name)} {number}: give {rule.most} or less")


def numbers(value: Any) -> Iterator[float]:
    """The numbers in a field's value: the items of a tuple, nothing for None."""
    yield from value if isinstance(value, tuple) else () if value is None else (value,)


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """The flags that every training stage has."""

    # Folder with the drawings to train on.
    data_dir: Path = setting(may_change=True, exists=True)
    # Folder of this run; the same command again goes on from its newest valid checkpoint.
    exp_dir: Path = setting(may_change=True)

    # Passes over the data, in all.
    epochs: int = setting(least=1, may_change=True)
    # Optimizer steps in all; they take the place of --epochs.
    steps: int | None = setting(None, least=1, may_change=True)
    # Minutes that training may take, about. Some steps are timed before the first one; the number of steps
    # for which there is time takes the place of --epochs and --steps, and the run keeps it.
    minutes: float | None = setting(None, least=0.01, may_change=True)
    # Say what would be trained, in how much time and memory, and stop there.
    dry_run: bool = setting(False, may_change=True)
    # Windows in a batch over all ranks together; the number of ranks must divide it.
    batch_size: int | None = setting()
    # Momentum of the optimizers that have one: lars and sgd.
    momentum: float = setting(0.9, least=0)
    # Weight decay (L2); --wd is taken too.
    weight_decay: float | None = setting(least=0, also="--wd")
    # Largest norm of the gradient, to which longer ones are scaled down; None leaves them as they are.
    clip_grad: float | None = setting(None, least=1e-6, may_change=True)

    # Processes on each rank that prepare batches; 0 prepares them in the training process. By default one for
    # each CPU of the rank but one, at most 16, to feed a GPU; 2 where the CPU itself trains.
    workers: int | None = setting(None, least=0, may_change=True)
    # Number from which the first weights, the order of the data and its changes are drawn.
    seed: int = setting(0, least=0, most=LARGEST_SEED)
    # Where to compute: auto (a GPU if there is one), cpu, cuda, or one GPU as cuda:1.
    device: str = setting("auto", may_change=True)
    # Arithmetic of the network: fp32, bf16, or auto: bf16 where the machine computes this network faster in
    # it. A run keeps what it began with. Losses are computed in float32 always.
    precision: Literal["auto", "fp32", "bf16"] = setting("auto", may_change=True)
    # Compile the network by torch.compile at the first step, which takes minutes and a C++ compiler. Figures
    # then differ from those of a run without it in their last digits.
    compile: bool = setting(False)
    # Use deterministic algorithms alone, so that a GPU repeats a run to the last bit. A CPU always does.
    deterministic: bool = setting(False)

    # Seconds from one checkpoint to the next.
    checkpoint_every: float = setting(600.0, least=0, may_change=True)
    # Number of checkpoints that are kept, the newest ones.
    keep: int = setting(3, least=1, may_change=True)
    # Seconds that a step may take before the run is ended as hung.
    step_timeout: float = setting(600.0, least=1, may_change=True)
    # Steps from one line of metrics.jsonl to the next.
    log_every: int = setting(10, least=1, may_change=True)
    # Project of Weights & Biases to which metrics are sent too (pip install 'linework[wandb]').
    wandb_project: str | None = setting(None, may_change=True)

    @property
    def seconds(self) -> float | None:
        """Seconds to fill with training while --minutes still has to find the number of steps, else None."""
        return None if self.minutes is None or self.steps is not None else 60 * self.minutes

    @property
    def joining(self) -> dict[str, Any]:
        """The arguments of `distributed.start`."""
        return {
            "device": self.device,
            "rendezvous": self.exp_dir,
            # After the longest wait that Run allows, which ends a rank that hangs with a line that says so.
            "collective_timeout": LONGEST_WAIT + self.step_timeout,
            "deterministic": self.deterministic,
        }

    @property
    def saving(self) -> dict[str, Any]:
        """The arguments of `lifecycle.Run` about checkpoints and hung steps."""
        return {
            "checkpoint_every": self.checkpoint_every,
            "keep": self.keep,
            "step_timeout": self.step_timeout,
        }


def flag(name: str) -> str:
    """The flag of a field: weight_decay -> --weight-decay."""
    return "--" + name.replace("_", "-")


def save(config: Any, path: Path) -> None:
    """Write a dataclass as JSON, with paths as text; the file is written completely or not at all."""
    atomic.write_text(path, json.dumps(_plain(dataclasses.asdict(config)), indent=2) + "\n")


def recorded(config: RunType, exp_dir: Path, device_type: str, *decided: str) -> RunType:
    """The config, with what the run in `exp_dir` decided for itself when it began.

    That is the number of steps for which --minutes had time, the batch that was fitted to the memory, what
    --precision auto stood for, and the fields `decided` that are None: they stay as they were on whatever
    machine the run goes on. With --minutes that are new or others than the run's, steps is None. device_type:
    "cpu" or "cuda", on which it goes on. Raises UserError when steps are given too, or config.json is not a
    saved config.
    """
    if config.minutes is not None and config.steps is not None:
        raise UserError(f"--minutes {config.minutes:g} and --steps {config.steps}: give one of them")
    path = exp_dir / "config.json"
    if not path.exists():
        return config
    try:
        old = json.loads(path.read_text())
        if config.batch_size is None:
            config = dataclasses.replace(config, batch_size=old["batch_size"])
        own = {name: old.get(name) for name in decided if getattr(config, name) is None}
        config = dataclasses.replace(config, **own)
        if config.minutes is not None and config.minutes == old.get("minutes"):
            config = dataclasses.replace(config, steps=old["steps"])
        if config.precision == "auto":
            kept = old.get("precision", "auto")
            # Earlier versions kept "auto", which meant float32 on every CPU.
            if kept == "auto" and device_type == "cpu":
                kept = "fp32"
            if kept not in ("auto", "fp32", "bf16"):
                raise ValueError(f"precision {kept}")
            config = dataclasses.replace(config, precision=kept)
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a saved config ({error}); remove it") from None
    return config


def changed(config: Any, path: Path) -> dict[str, tuple[Any, Any]]:
    """Flags whose value differs from the one saved in `path`: {"--epochs": (old, new)}.

    A flag that the file does not contain is compared with its default. Raises UserError when the file is
    not a saved config.
    """
    new, known = _plain(dataclasses.asdict(config)), rules(type(config))
    differences = {}
    try:
        old = json.loads(path.read_text())
        for field in dataclasses.fields(config):
            older = (known[field.name].also or "") if field.name in known else ""
            earlier = old.get(older.removeprefix("--").replace("-", "_"), _plain(_default(field)))
            value = old.get(field.name, earlier)
            if value != new[field.name]:
                differences[flag(field.name)] = (value, new[field.name])
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a saved config ({error}); remove it") from None
    return differences


def refuse_changes(config: Any, exp_dir: Path) -> None:
    """Raise UserError if a flag that may not change differs from that of the run in `exp_dir`."""
    path = exp_dir / "config.json"
    free = {flag(name) for name, rule in rules(type(config)).items() if rule.may_change}
    for name, (old, new) in (changed(config, path) if path.exists() else {}).items():
        if name not in free:
            raise UserError(f"{name} {new}: the run in {exp_dir} has {old}; give that, or another --exp-dir")


def _plain(value: Any) -> Any:
    """The value as it is after being written to JSON and read back."""
    return json.loads(json.dumps(value, default=str))


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default
