"""A frozen dataclass is the command line: help, one line for every mistake, saved beside the run."""

import importlib.util
import inspect
import itertools
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Literal

import pytest

from cluster import config, entry
from cluster.errors import UNREAD, UserError
from cluster.snapshot import methods

ROOT = Path(__file__).parent.parent


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


@dataclass(frozen=True, kw_only=True)
class Limited(config.Config):
    """The same with bounds on its fields."""

    data_dir: Path = config.setting(may_change=True)
    checkpoint_every: float = config.setting(600.0, least=0, may_change=True)
    size: tuple[int, int] = config.setting((2, 2), least=2, most=5)
    epochs: int | None = config.setting(None, least=1)
    weight_decay: float = config.setting(0.1, least=0, also="--wd")


@dataclass(frozen=True, kw_only=True)
class Derived(Limited):
    """Another default for a field; what its field says of it is inherited."""

    epochs: int | None = 7


class DataError(Exception):
    """A class of another package: it carries a status, so it is a line."""

    exit_status = 1


def test_flags_become_fields():
    stage = entry.parse(Stage, ["--data-dir", "a b", "--checkpoint-every=5", "--epochs", "3", "--flips"])
    assert stage == Stage(Path("a b"), 5.0, 3, "drawing", True, (224, 224))
    assert entry.parse(Stage, ["--data_dir=x", "--size", "3", "4", "--no-flips"]).size == (3, 4)


def test_comments_and_docstrings_are_the_help(capsys):
    with pytest.raises(SystemExit) as stop:
        entry.parse(Stage, ["--help"])
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
        entry.parse(Stage, args)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    for word in words:
        assert word in err


@dataclass(frozen=True, kw_only=True)
class Needy(config.Config):
    # Drawings.
    data_dir: Path = config.setting(Path("drawings"), exists=True)
    # Weights.
    weights: Path
    # Number of steps.
    steps: int = 3


def test_all_that_is_missing_is_told_at_once_with_a_command(tmp_path, monkeypatch, capsys):
    """A default that is a folder counts where the folder is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", "Train.\n\n    run --data-dir D --weights W.pt\n")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as stop:
        entry.parse(Needy, ["--steps", "5"])
    said = "python train.py --steps 5 --data-dir D --weights W.pt"
    assert capsys.readouterr().err == f"error: --data-dir and --weights are required, as in: {said}\n"
    assert stop.value.code == 2
    (tmp_path / "drawings").mkdir()
    with pytest.raises(SystemExit):
        entry.parse(Needy, [])
    assert "error: --weights is required, as in: " in capsys.readouterr().err
    assert entry.parse(Needy, ["--weights", "w"]).data_dir == Path("drawings")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("x.pt: truncated;\n  remove it"), 1, "error: x.pt: truncated; remove it"),
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
        entry.run(Stage, main)
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
    allowed = Limited(data_dir=Path("x"))
    if not line:
        assert replace(allowed, **change).epochs is None
        return
    with pytest.raises(UserError) as raised:
        replace(allowed, **change)
    assert str(raised.value) == line


def test_a_number_outside_its_limits_on_the_command_line_is_exit_1(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stage", "--data-dir", "x", "--checkpoint-every", "-1"])
    with pytest.raises(SystemExit) as stop:
        entry.run(Limited, pytest.fail)
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: --checkpoint-every -1.0: give 0 or more\n"


LOADING = """
import dataclasses, torch
from cluster.entry import run
from cluster.errors import UserError

@dataclasses.dataclass(frozen=True)
class Stage:
    data_dir: str

class Sheets(torch.utils.data.Dataset):
    def __len__(self):
        return 1
    def __getitem__(self, index):
        raise UserError("a.png: truncated; copy it again")

run(Stage, lambda _: list(torch.utils.data.DataLoader(Sheets(), num_workers=1)))
"""


def test_an_error_out_of_a_loader_s_worker_is_one_line_too(tmp_path):
    (tmp_path / "stage.py").write_text(LOADING)
    command = [sys.executable, tmp_path / "stage.py", "--data-dir", "x"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."})
    assert (done.returncode, done.stderr) == (1, "error: a.png: truncated; copy it again\n")


def test_run_calls_main_once(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", ["stage", "--data-dir", "x"])
    entry.run(Stage, seen.append)
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
    with pytest.raises(UserError, match=r"config\.json"):
        config.changed(old, path)


def test_reading_flags_needs_no_torch():
    code = "import sys, cluster.entry, cluster.checkpoint, cluster.owner; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_a_field_says_is_inherited_with_another_default():
    assert Derived(data_dir=Path("x")).epochs == 7
    with pytest.raises(UserError, match="--epochs 0: give 1 or more"):
        Derived(data_dir=Path("x"), epochs=0)


def test_an_older_spelling_of_a_flag_is_taken_on_the_command_line_and_in_a_saved_config(tmp_path):
    assert entry.parse(Limited, ["--data-dir", "x", "--wd", "0.5"]).weight_decay == 0.5
    assert entry.parse(Limited, ["--data-dir", "x", "--wd=0.25"]).weight_decay == 0.25
    assert entry.parse(Limited, ["--data-dir", "x", "--weight-decay", "2"]).weight_decay == 2.0
    (tmp_path / "config.json").write_text('{"data_dir": "x", "wd": 0.5}')
    begun = Limited(data_dir=Path("x"), weight_decay=0.5)
    assert config.changed(begun, tmp_path / "config.json") == {}
    config.refuse_changes(begun, tmp_path)
    with pytest.raises(UserError, match=r"--weight-decay 0\.1: the run in .* has 0\.5"):
        config.refuse_changes(Limited(data_dir=Path("x")), tmp_path)


def test_only_what_may_change_may_differ_from_the_run_that_goes_on(tmp_path):
    begun = Limited(data_dir=Path("x"), size=(2, 3))
    config.save(begun, tmp_path / "config.json")
    config.refuse_changes(replace(begun, data_dir=Path("moved"), checkpoint_every=5.0), tmp_path)
    with pytest.raises(
        UserError, match=r"--size \[2, 4\]: the run in .* has \[2, 3\]; give that, or another"
    ):
        config.refuse_changes(replace(begun, size=(2, 4)), tmp_path)


ENTRIES = [
    *(f"{method}.pretrain" for method in methods()),
    *("detection.pretrain", "detection.finetune", "detection.predict", "detection.export"),
    *("evaluate/evaluate.py", "evaluate/compare.py", "evaluate/knn.py", "evaluate/linear.py"),
    *("evaluate/shots.py", "evaluate/embedding.py", "evaluate/study.py", "slurm/sweep.py"),
    *("evaluate/classify.py", "evaluate/coverage.py", "evaluate/oneshot.py", "detection.find"),
]


@pytest.mark.parametrize("name", ENTRIES)
def test_help_and_wrong_flags_are_answered_before_torch_is_loaded(name):
    command = [name] if name.endswith(".py") else ["-m", name]
    for flags, status in (["--help"], 0), (["--bacth-size", "4"], 2):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", *command, *flags], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == status, done.stderr
        imported = set(re.findall(r"\|\s+(\S+)$", done.stderr, re.M))
        assert "cluster.entry" in imported and not imported & {"torch", "timm", "matplotlib"}


def own_comments(config_class: type) -> dict[str, str]:
    """The comment right above each field in the source, by flag; a derived class's own comes first."""
    found: dict[str, str] = {}
    for base in config_class.__mro__:
        if not is_dataclass(base):
            continue
        lines = inspect.getsource(base).splitlines()
        for number, line in enumerate(lines):
            field = re.match(r"    (\w+): ", line)
            above = list(itertools.takewhile(lambda text: text.startswith("    # "), lines[:number][::-1]))
            if field and above:
                comment = " ".join(text.strip().removeprefix("# ") for text in above[::-1])
                found.setdefault(config.flag(field[1]), comment)
    return found


@pytest.mark.parametrize("name", ENTRIES)
def test_the_help_of_each_flag_is_the_sentence_of_its_own_field(name, monkeypatch, capsys):
    path = ROOT / (name if name.endswith(".py") else name.replace(".", "/") + ".py")
    spec = importlib.util.spec_from_file_location("entry_under_test", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "entry_under_test", module)
    spec.loader.exec_module(module)
    found = [item for item in vars(module).values() if isinstance(item, type) and is_dataclass(item)]
    config_class = max(found, key=lambda item: len(item.__mro__))
    assert issubclass(config_class, config.Config)
    monkeypatch.setenv("COLUMNS", "10000")
    with pytest.raises(SystemExit):
        entry.parse(config_class, ["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    comments = own_comments(config_class)
    for field in fields(config_class):
        flag = config.flag(field.name)
        sentence = comments.get(flag, "has no comment of its own")
        assert sentence[0].isupper() and sentence.endswith(".") and len(sentence.split()) >= 3, (
            flag + sentence
        )
        # Arguments without a flag have another name.
        shown = {"sheets": r"\[PATH \.\.\.\]", "runs": r"\[PATH \.\.\.\]", "what": r"\[\{plan,\S+\}\]"}
        shown |= {"file": r"\[\S+PATH\]"}
        name = flag if re.search(f" {flag}[ ,]", text) else shown.get(field.name, flag)
        until_the_next = r"(?:(?!\(default|\(required|\(repeatable).)*"
        ends = r"\((default|required|repeatable)"
        assert re.search(f" {name}{until_the_next} {re.escape(sentence)} {ends}", text), flag
    assert len(set(comments.values())) == len(comments), "two flags share their help"


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "simclr.pretrain", "--help"],
        ["evaluate/study.py", "plan", "evaluate/studies/ablations.toml"],
        ["-c", "from cluster import entry; entry.live(lambda: print('x' * 10_000_000))"],
    ],
)
def test_a_reader_that_has_left_is_no_traceback(command):
    """`... | head -0`: what is printed, by the command or by its --help, can't be written."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    ended = subprocess.run(
        [sys.executable, *command], stdout=write_end, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    os.close(write_end)
    assert (ended.returncode, ended.stderr) == (UNREAD, "")
