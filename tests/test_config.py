"""A frozen dataclass is the command line: help, one line for every mistake, saved beside the run."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest

from cluster import config


@dataclass(frozen=True)
class Stage:
    """Train a thing."""

    data_dir: Path  # folder of drawings
    # seconds between checkpoints
    checkpoint_every: float = 600.0
    epochs: int | None = None
    """Passes over the pool."""
    recipe: Literal["drawing", "simclr"] = "drawing"
    flips: bool = False
    size: tuple[int, int] = (224, 224)


class DataError(Exception):
    pass


def test_flags_become_fields():
    stage = config.parse(Stage, ["--data-dir", "a b", "--checkpoint-every=5", "--epochs", "3", "--flips"])
    assert stage == Stage(Path("a b"), 5.0, 3, "drawing", True, (224, 224))
    assert config.parse(Stage, ["--data_dir=x", "--size", "3", "4", "--no-flips"]).size == (3, 4)


def test_comments_and_docstrings_are_the_help(capsys):
    with pytest.raises(SystemExit) as stop:
        config.parse(Stage, ["--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    for words in (
        "Train a thing.",
        "--data-dir",
        "folder of drawings",
        "seconds between checkpoints",
        "600.0",
    ):
        assert words in text
    assert "Passes over the pool." in text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--data-dir", "x", "--epoch", "3"], ["unknown flag --epoch", "--epochs"]),
        (["--data-dir", "x", "--zzz"], ["unknown flag --zzz", "--help"]),
        (["--data-dir", "x", "--epochs", "three"], ["--epochs", "three"]),
        (["--data-dir", "x", "--checkpoint-every", "soon"], ["--checkpoint-every", "soon"]),
        (["--data-dir", "x", "--recipe", "photo"], ["--recipe", "photo", "drawing", "simclr"]),
        (["--data-dir", "x", "--size", "3"], ["--size"]),
        (["--data-dir", "x", "stray"], ["stray"]),
        (["--data-dir"], ["--data-dir"]),
        (["--epochs", "3"], ["--data-dir is required"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(args, words, capsys):
    with pytest.raises(SystemExit) as stop:
        config.parse(Stage, args)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (config.UserError("x.pt: truncated;\n  remove it"), 1, "error: x.pt: truncated; remove it"),
        (DataError("sheets: empty"), 1, "error: sheets: empty"),
        (SystemExit(75), 75, ""),
        (KeyboardInterrupt(), 130, ""),
        (ZeroDivisionError("by zero"), 70, "ZeroDivisionError: by zero"),
    ],
)
def test_exit_status_of_main(error, status, line, capsys, monkeypatch):
    def main(stage: Stage) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["stage", "--data-dir", "x"])
    with pytest.raises(SystemExit) as stop:
        config.run(Stage, main, (DataError,))
    assert stop.value.code == status
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1:] == ([line] if line else [])
    assert status == 70 or len(lines) <= 1


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"checkpoint_every": -1.0}, "--checkpoint-every -1.0: give 0 or more"),
        ({"checkpoint_every": float("nan")}, "--checkpoint-every nan: give 0 or more"),
        ({"checkpoint_every": float("inf")}, "--checkpoint-every inf: give 0 or more"),
        ({"size": (3, 9)}, "--size 9: give 5 or less"),
        ({"size": (2, 3), "epochs": None}, ""),
    ],
)
def test_numbers_outside_their_limits_are_one_line(change, line):
    limits = {"checkpoint_every": (0,), "size": (2, 5), "epochs": (1,)}
    given = replace(Stage(data_dir=Path("x"), size=(2, 2)), **change)
    if not line:
        return config.refuse_outside(given, limits)
    with pytest.raises(config.UserError) as raised:
        config.refuse_outside(given, limits)
    assert str(raised.value) == line


LOADING = """
import dataclasses, torch
from cluster import config

@dataclasses.dataclass(frozen=True)
class Stage:
    data_dir: str

class Sheets(torch.utils.data.Dataset):
    def __len__(self):
        return 1
    def __getitem__(self, index):
        raise config.UserError("a.png: truncated; copy it again")

config.run(Stage, lambda _: list(torch.utils.data.DataLoader(Sheets(), num_workers=1)))
"""


def test_an_error_out_of_a_loader_s_worker_is_one_line_too(tmp_path):
    (tmp_path / "stage.py").write_text(LOADING)
    command = [sys.executable, tmp_path / "stage.py", "--data-dir", "x"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."})
    assert (done.returncode, done.stderr) == (1, "error: a.png: truncated; copy it again\n")


def test_run_calls_main_once(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", ["stage", "--data-dir", "x"])
    config.run(Stage, seen.append)
    assert seen == [Stage(Path("x"))]


def test_changed_names_the_flags_that_differ(tmp_path):
    path = tmp_path / "config.json"
    old = Stage(Path("x"), epochs=3)
    config.save(old, path)
    assert config.changed(old, path) == {}
    assert config.changed(replace(old, epochs=5, size=(3, 4)), path) == {
        "--epochs": (3, 5),
        "--size": ([224, 224], [3, 4]),
    }
    path.write_text('{"data_dir": "x", "gone": 1}')  # saved before there was --epochs
    assert config.changed(old, path) == {"--epochs": (None, 3)}
    path.write_text("{")
    with pytest.raises(config.UserError, match=r"config\.json"):
        config.changed(old, path)


def test_reading_flags_needs_no_torch():
    code = "import sys, cluster.config, cluster.checkpoint, cluster.owner; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
