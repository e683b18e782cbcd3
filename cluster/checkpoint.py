"""Write and read checkpoints, and sign a stage as finished.

    EXP_DIR/checkpoints/step_00000120.pt      a nested dict of tensors and primitives
    EXP_DIR/checkpoints/step_00000120.pt.sha256
    EXP_DIR/final.json                        written when the stage is done; the next stage checks it

A checkpoint is verified by its hash when it is read, and code in it is never run. torch is imported only
inside the functions that need it, so that status commands can read final.json without torch.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import atomic
from cluster.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, Any]
OTHER = "finish the run with the code that began it, give another --exp-dir, or move this file away"
STEP_FILE = re.compile(r"step_(\d+)\.pt")


class Saved(State):
    """What a file that `write` or `write_file` wrote holds, as `read` returns it.

    path: the file. A key that it lacks raises UserError: another version wrote it, or another program.
    """

    def __init__(self, content: State, path: Path) -> None:
        super().__init__(content)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise self.refusal(f"it has no {key!r}")

    def refusal(self, reason: str) -> UserError:
        """The error of a file that is whole but has another layout."""
        return UserError(f"{self.path}: has another layout than this code writes, {reason}; {OTHER}")

    def refuse_other_tensors(self, own: State) -> None:
        """Raise UserError unless each table of `own` has tensors of the same names, shapes and types here.

        A table without tensors is not looked at: neither the facts beside the weights, nor an optimizer
        before its first step.
        """
        for key, table in own.items():
            expected = dict(_tensors(table, key)) if isinstance(table, dict) else {}
            found = dict(_tensors(self[key], key)) if expected else {}
            for name in expected | found:
                if expected.get(name) != found.get(name):
                    told = f"{name} is {found.get(name, 'absent')}, not {expected.get(name, 'absent')}"
                    raise self.refusal(told)


def _tensors(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """The name of each tensor in nested dicts, with its type and shape in words."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}")
    elif hasattr(value, "dtype"):
        yield name, f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def step_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.pt"


def write(
    folder: Path, step: int, state: State, keep: int, allowed: Callable[[], None] = lambda: None
) -> Path:
    """Write a checkpoint that holds `state` and "step", then remove all but the newest `keep`.

    allowed: see cluster.atomic.replace. Raises UserError when the disk is full, TypeError as `plain` does.
    """
    path = step_path(folder, step)
    if folder.parent.is_dir():
        folder.mkdir(exist_ok=True)
    write_file(path, {**state, "step": step}, allowed)
    # Checkpoints of later steps were rejected on resume; if they counted, they would push out good ones.
    for old in [old for old_step, old in listed(folder) if old_step <= step][max(1, keep) :]:
        old.unlink(missing_ok=True)
        atomic.sidecar(old).unlink(missing_ok=True)
    return path


def write_file(path: Path, state: State, allowed: Callable[[], None] = lambda: None) -> str:
    """Write one file such as model.pt, complete or not at all, and its .sha256. Returns that hash in hex."""
    import torch

    content = plain(state)
    # The folder is not made: if it was deleted under a run, the run must end, and say so.
    return atomic.replace(path, lambda file: torch.save(content, file), hashed=True, allowed=allowed)  # type: ignore[arg-type]


def read(path: Path) -> Saved:
    """Read a file that this module wrote, onto the CPU.

    Raises UserError with a one-line message if the file is absent, truncated or damaged, has no .sha256
    beside it, or holds anything but tensors and primitives. Code in it is never run.
    """
    atomic.verify(path)
    return _load(path)


def listed(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints in a folder, newest first; they are not verified."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := STEP_FILE.fullmatch(path.name))]
    return sorted(found, reverse=True)


def load_newest(folder: Path) -> tuple[Path | None, Saved, list[str]]:
    """Path (or None) and content of the newest checkpoint that loads, and why each later one was rejected.

    Raises UserError if the step that it contains is not that of its name: another program wrote it.
    """
    rejected: list[str] = []
    for step, path in listed(folder):
        try:
            saved = read(path)
        except UserError as error:
            rejected.append(str(error))
            continue
        if type(saved["step"]) is not int or saved["step"] != step:
            raise saved.refusal(f"its step is {' '.join(repr(saved['step']).split())[:60]}")
        return path, saved, rejected
    return None, Saved({}, folder), rejected


class Writer:
    """Writes checkpoints without holding up training: `save` copies the state, a thread writes it to disk.

    Only one write runs at a time. An error in the thread is raised by the next call of `save` or `wait`.
    """

    def __init__(self, folder: Path, keep: int, allowed: Callable[[], None] = lambda: None) -> None:
        self.folder = folder
        self.keep = keep
        self.allowed = allowed
        self.newest: Path | None = None  # the newest checkpoint that is on disk
        self.seconds = 0.0  # from the start of the last copy until its file was on disk
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._blocks: dict[str, Tensor] = {}

    def save(self, step: int, state: State) -> None:
        """Wait for the previous write, copy `state` and return. `state` may change afterwards."""
        self.wait()
        began = time.monotonic()
        copy = plain(state, self._blocks)
        self._thread = threading.Thread(target=self._persist, args=(step, copy, began), daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        return self._error is not None

    def wait(self) -> None:
        """Wait until the last save is on disk. Raises the error of the thread, if there was one."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def _persist(self, step: int, state: State, began: float) -> None:
        try:
            self.newest = write(self.folder, step, state, self.keep, self.allowed)
            self.seconds = time.monotonic() - began
        except BaseException as error:
            self._error = error


def plain(state: Any, blocks: dict[str, Tensor] | None = None, where: str = "state") -> Any:
    """`state` as weights_only=True reads it back: dicts, lists, tuples, text, numbers, tensors on the CPU.

    blocks: host memory into which the tensors are copied, by position in the state; the next call reuses it.
    Raises TypeError for a value of any other type; the message names its position.
    """
    import numpy
    import torch

    if isinstance(state, torch.Tensor):
        tensor = state.detach().cpu() if blocks is None else _copy(state.detach(), blocks, where)
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        return tensor if whole else tensor.clone()  # torch.save writes the whole storage of a slice
    if isinstance(state, dict):
        for key in state:
            if type(key) not in (str, int):
                raise TypeError(f"{where}: key {key!r} is neither str nor int")
        return {_one(key): plain(value, blocks, f"{where}[{key!r}]") for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        items = [plain(value, blocks, f"{where}[{index}]") for index, value in enumerate(state)]
        return tuple(items) if isinstance(state, tuple) else items
    if isinstance(state, numpy.generic):
        state = state.item()
    if state is None or type(state) in (bool, int, float, str):
        return _one(state)
    raise TypeError(f"{where} is a {type(state).__name__}: a checkpoint holds tensors and primitives only")


def _one(item: Any) -> Any:
    """The same object for equal strings: as separate objects they would give a pickle other bytes."""
    return sys.intern(item) if type(item) is str else item


def _copy(tensor: Tensor, blocks: dict[str, Tensor], where: str) -> Tensor:
    import torch

    block = blocks.get(where)
    if block is None or block.shape != tensor.shape or block.dtype != tensor.dtype:
        block = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        blocks[where] = block
    return block.copy_(tensor)


def _load(path: Path) -> Saved:
    import pickle

    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about a foreign pickle, which is refused anyway
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = re.search(r"(?:GLOBAL|global|function|class) [`']?([\w.]+)", str(error))
        raise UserError(
            f"{path}: refused, it holds code or objects{f' ({what[1]})' if what else ''}, "
            "not only tensors; nothing in it was run"
        ) from None
    except Exception as error:  # a truncated zip, a foreign format: torch raises many types
        raise UserError(f"{path}: not a checkpoint ({brief(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a checkpoint of Linework, it holds a {type(content).__name__}")
    return Saved(content, path)


def brief(error: Exception) -> str:
    """The first line of an error's message, at most 120 characters, or the name of its type."""
    return (str(error) or type(error).__name__).splitlines()[0][:120]


def sign_final(exp_dir: Path, step: int, files: list[str], told: str = "") -> None:
    """Write EXP_DIR/final.json: the stage is done. It lists `files` (relative to EXP_DIR) with hashes.

    told: a line on how good the results are, which `status` shows.
    """
    signed = {
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "files": {name: atomic.file_hash(exp_dir / name) for name in files},
        **({"told": told} if told else {}),
    }
    atomic.write_text(exp_dir / "final.json", json.dumps(signed, indent=2) + "\n")


def check_final(exp_dir: Path) -> dict[str, Any]:
    """The content of EXP_DIR/final.json. Raises UserError if it is absent or if a listed file has changed."""
    path = exp_dir / "final.json"
    try:
        signed = json.loads(path.read_text())
        files = signed["files"]
        if type(signed["step"]) is not int or not isinstance(files, dict):
            raise ValueError("it signs no step or no files")
    except FileNotFoundError:
        raise UserError(f"{path}: absent, that stage has not finished; run it to its end first") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: unreadable ({error}); remove it and run that stage again") from None
    for name, digest in files.items():
        file = exp_dir / name
        if not file.is_file():
            raise UserError(f"{file}: gone since {path} was signed; run that stage again")
        if atomic.file_hash(file) != digest:
            raise UserError(f"{file}: changed since {path} was signed; restore it or run that stage again")
    return signed
