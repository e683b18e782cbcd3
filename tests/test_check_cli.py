"""The commands of the data folder: what they print, their exit codes, one line where they can't go on."""

import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from cluster.entry import live
from schematics.coco import Category, write_split
from schematics.command import Parser, run
from schematics.sheets import DataError


def command(capsys, monkeypatch, name: str, *arguments: object) -> tuple[int, str, str]:
    """Run python -m schematics.NAME here; (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    monkeypatch.delitem(sys.modules, f"schematics.{name}", raising=False)  # as in a fresh process
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"schematics.{name}", run_name="__main__")
    return int(ended.value.code or 0), *capsys.readouterr()


def sheet(path: Path, level: int = 255) -> None:
    image = np.full((80, 100, 3), 255, np.uint8)
    image[10:40, 10:30] = (level, 0, 200)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)


@pytest.fixture
def data(tmp_path) -> Path:
    """train with two sheets and valid with one, all sound."""
    for split, names in (("train", ["a.png", "b.png"]), ("valid", ["c.png"])):
        images = [{"id": n, "file_name": name, "width": 100, "height": 80} for n, name in enumerate(names, 1)]
        rows = [{"image_id": image["id"], "category_id": 1, "bbox": [10, 10, 20, 30]} for image in images]
        for n, name in enumerate(names):
            sheet(tmp_path / "data" / split / name, level=n + 10 * (split == "valid"))
        write_split(tmp_path / "data" / split, images, [Category(1, "valve"), Category(2, "pump")], rows)
    return tmp_path / "data"


def edit(folder: Path, change) -> None:
    file = folder / "_annotations.coco.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_sound_data(capsys, monkeypatch, data):
    before = contents(data)
    code, out, err = command(capsys, monkeypatch, "check", data)
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert ["train", "2", "0", "2", "2", "100", "x", "80", "100", "x", "80"] in lines
    assert ["train", "24", "24", "24", "24", "24"] in lines  # sqrt(20 * 30)
    assert ["1", "valve", "2", "1"] in lines and ["2", "pump", "0", "0"] in lines
    assert out.endswith("nothing to repair\n")
    assert contents(data) == before


def test_findings_are_named_by_file_and_count_and_are_no_failure(capsys, monkeypatch, data):
    def change(content):
        content["annotations"][0]["bbox"] = [-5, 10, 20, 30]
        content["annotations"] += [
            {"id": n, "image_id": 2, "category_id": 1, "bbox": [1, 1, 0, 3]} for n in (8, 9)
        ]
        content["images"].append({"id": 3, "file_name": "gone.png", "width": 9, "height": 9})

    edit(data / "train", change)
    sheet(data / "train/stray.png")
    (data / "valid/c.png").write_bytes((data / "train/a.png").read_bytes())
    code, out, err = command(capsys, monkeypatch, "check", data)
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    for kind, first in (
        ("repaired 1 train: box partly outside the sheet: clipped", "1 a.png"),
        ("dropped 2 train: box without area", "2 b.png"),
        ("dropped 1 train: image named but missing", "1 gone.png"),
        ("kept 1 train: file that the annotations don't name", "1 stray.png"),
        ("kept 1 train: the same file is also in valid", "1 a.png"),
        ("kept 1 valid: the same file is also in train", "1 c.png"),
    ):
        assert lines[lines.index(kind) + 1] == first


def test_long_lists_of_files_are_cut(capsys, monkeypatch, data):
    for number in range(7):
        sheet(data / f"train/stray{number}.png")
    out = command(capsys, monkeypatch, "check", data)[1]
    assert "stray4.png" in out and "stray5.png" not in out and "2  in 2 more\n" in out
    assert "stray6.png" in command(capsys, monkeypatch, "check", data, "--files", 9)[1]


def test_a_class_that_is_never_trained_is_said(capsys, monkeypatch, data):
    edit(data / "valid", lambda content: content["annotations"][0].update(category_id=2))
    out = command(capsys, monkeypatch, "check", data)[1]
    assert "valid: class 'pump' has boxes here and none in train" in out


def damage_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def shaded(kind: str) -> np.ndarray:
    """Paper of 400 x 300 px: white, dark, in half a shadow, or with a panel of a second color."""
    paper = np.full((300, 400, 3), 20 if kind == "dark" else 250, np.uint8)
    if kind == "shadow":
        paper = (paper * np.linspace(0.4, 1, 400)[None, :, None]).astype(np.uint8)
    if kind == "panel":
        paper[:, 200:] = (160, 190, 230)
    return paper


@pytest.mark.parametrize("kind", ["white", "dark", "shadow", "panel"])
def test_boxes_on_bare_paper_are_counted_by_sheet(capsys, monkeypatch, tmp_path, kind):
    image, drawn = shaded(kind), [[40, 60], [160, 200], [250, 90], [340, 230]]
    for x, y in drawn:
        cv2.rectangle(image, (x, y), (x + 20, y + 16), (240, 240, 240) if kind == "dark" else (20, 20, 20), 2)
    for split, shift in (("train", 0), ("valid", 40)):  # in valid, all labels but one lie beside the symbols
        (tmp_path / split).mkdir()
        cv2.imwrite(str(tmp_path / split / "a.png"), image)
        rows = [
            {"image_id": 1, "category_id": 1, "bbox": [x - 3, y - 3 + shift * (n > 0), 27, 23]}
            for n, (x, y) in enumerate(drawn)
        ]
        images = [{"id": 1, "file_name": "a.png", "width": 400, "height": 300}]
        write_split(tmp_path / split, images, [Category(1, "valve")], rows[: 3 if shift else 4])
    code, out, _ = command(capsys, monkeypatch, "check", tmp_path)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0 and not [line for line in lines if "train: boxes" in line]
    assert lines[lines.index("kept 2 valid: boxes that hold no ink") + 1] == "2 a.png: 2 of 3"


def test_sheets_that_decode_to_no_picture_are_said(capsys, monkeypatch):
    """16-bit gray of which 12 bits are in use, and white ink on transparency."""
    case = Path(__file__).parent / "cases/21-blank-after-decoding/train"
    code, out, _ = command(capsys, monkeypatch, "check", case)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0 and lines[-3:] == ["kept 2 train: sheet blank or nearly so", "1 a.png", "1 b.png"]
    assert lines[-6:-3] == ["kept 8 train: boxes that hold no ink", "4 a.png: 4 of 4", "4 b.png: 4 of 4"]


def test_what_finetuning_would_miss_is_one_line_that_names_the_command(capsys, monkeypatch, data):
    (data / "valid").rename(data / "elsewhere")
    code, out, err = command(capsys, monkeypatch, "check", data)
    assert code == 1 and "nothing to repair" in out and err.count("\n") == 1
    assert "no valid split" in err and f"python -m schematics.convert {data} OUT --valid 0.2" in err
    assert command(capsys, monkeypatch, "check", data / "train")[0] == 0  # one split, checked for itself
    code, _, err = command(capsys, monkeypatch, "check", data / "elsewhere")  # one folder that is no split
    assert code == 1 and "no train and no valid split" in err
    (data / "train").rename(data / "test")
    (data / "elsewhere").rename(data / "valid")
    code, _, err = command(capsys, monkeypatch, "check", data)
    assert code == 1 and "no train split" in err


def test_a_class_that_cannot_be_measured_is_said(capsys, monkeypatch, data):
    edit(data / "train", lambda content: content["annotations"][0].update(category_id=2))
    out = command(capsys, monkeypatch, "check", data)[1]
    assert "valid: classes of train without a box here, whose AP can't be measured" in out
    assert "'pump', 1 in train" in out and "train: classes" not in out


def test_a_page_of_sheets_shows_the_suspicious_ones_first(capsys, monkeypatch, data, tmp_path):
    edit(data / "train", lambda content: content["annotations"][1].update(bbox=[60, 45, 20, 20]))
    edit(data / "train", lambda content: content["categories"][0].update(name="<b>valve</b>"))
    edit(data / "valid", lambda content: content["categories"][0].update(name="<b>valve</b>"))
    out = tmp_path / "page"
    assert command(capsys, monkeypatch, "check", data, "--pictures", out)[0] == 0
    page = (out / "index.html").read_text()
    cards = re.findall("<figure.*?</figure>", page, re.S)
    titles = [re.search("<figcaption>(.*?)<ul>", card)[1] for card in cards]
    assert titles == ["train/b.png", "train/a.png", "valid/c.png"]
    assert "1 of 1 boxes hold no ink" in cards[0] and cards[0].count('class="bare"') == 1
    assert 'class="bare"' not in cards[1] + cards[2] and "&lt;b&gt;valve" in page and "<b>valve" not in page
    pictures = re.findall('src="(.*?)"', page)
    assert sorted(path.name for path in out.iterdir()) == sorted(["index.html", *pictures])
    assert all(cv2.imread(str(out / name)).shape == (80, 100, 3) for name in pictures)
    before = contents(out)
    code, text, err = command(capsys, monkeypatch, "check", data, "--pictures", out)
    assert (code, text) == (1, "") and "page: exists already" in err and contents(out) == before


UNUSABLE = {  # what is done to the folder -> the line
    "train/a.png: image damaged: replace it, or delete it": lambda d: damage_middle(d / "train/a.png"),
    "id 2 is 'pump' in train but 'fan' in valid; give each class one id": lambda d: edit(
        d / "valid", lambda c: c["categories"][1].update(name="fan")
    ),
    "no usable box on any usable sheet": lambda d: edit(d / "valid", lambda c: c["annotations"].clear()),
    "_annotations.coco.json: not valid JSON": lambda d: (d / "train/_annotations.coco.json").write_text("{"),
}


@pytest.mark.parametrize("line", UNUSABLE)
def test_unusable_data_ends_with_1_and_the_cure(capsys, monkeypatch, data, line):
    UNUSABLE[line](data)
    before = contents(data)
    code, _, err = command(capsys, monkeypatch, "check", data)
    assert code == 1 and line in err and err.startswith("error: ") and err.count("\n") == 1
    assert contents(data) == before


def test_a_folder_without_annotations(capsys, monkeypatch, data):
    (data / "valid/_annotations.coco.json").unlink()
    code, out, err = command(capsys, monkeypatch, "check", data)
    assert (code, out) == (1, "") and "no valid/_annotations.coco.json" in err and err.count("\n") == 1
    code, _, err = command(capsys, monkeypatch, "check", data.parent / "absent")
    assert code == 1 and "no such folder" in err


def test_an_unlabelled_pool(capsys, monkeypatch, tmp_path):
    sheet(tmp_path / "sub/a.png")
    sheet(tmp_path / "sub/copy.png")
    cv2.imwrite(str(tmp_path / "gray.png"), np.full((50, 60), 255, np.uint8))
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    code, out, err = command(capsys, monkeypatch, "check", "--unlabeled", tmp_path)
    assert (code, err) == (0, "")
    assert "4 sheets, 1 unreadable, 1 byte-identical to another" in out and "cut.jpg" in out
    assert ["3", "2", "100", "x", "80", "100", "x", "80"] in [line.split() for line in out.splitlines()]
    for path in (tmp_path / "sub").iterdir():
        path.write_bytes(b"")
    (tmp_path / "gray.png").unlink()
    code, _, err = command(capsys, monkeypatch, "check", "--unlabeled", tmp_path)
    assert code == 1 and "none of 3 drawings can be read" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["check", "convert", "symbols"])
def test_unknown_flags_end_with_2_and_one_line(capsys, monkeypatch, name, data):
    code, out, err = command(capsys, monkeypatch, name, data, data / "out", "--color", "red")
    assert (code, out) == (2, "") and "--color" in err and err.count("\n") == 1
    assert not (data / "out").exists()


@pytest.mark.parametrize("name", ["check", "convert", "pack", "symbols", "synthetic", "views"])
def test_every_flag_has_a_sentence_of_its_own_as_help(monkeypatch, name):
    parsers = []
    monkeypatch.setattr("schematics.command.run", lambda main, parser: parsers.append(parser))
    monkeypatch.delitem(sys.modules, f"schematics.{name}", raising=False)
    runpy.run_module(f"schematics.{name}", run_name="__main__")
    (parser,) = parsers
    assert parser.prog == f"python -m schematics.{name}" and parser.description.endswith(".")
    helps = [action.help for action in parser._actions if action.dest != "help"]
    assert len(set(helps)) == len(helps) and all(text.endswith(".") and " " in text for text in helps)
    assert len(parser.format_help().splitlines()) > len(helps)  # every %(default)s is filled in


class Mistake(Exception):
    exit_status = 7


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (None, 0, ""),
        (DataError("a.png: cut short; copy it again"), 1, "error: a.png: cut short; copy it again\n"),
        (
            OSError(28, "No space left on device", "out"),
            1,
            "error: [Errno 28] No space left on device: 'out'\n",
        ),
        (Mistake("what to do"), 7, "error: what to do\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_how_a_command_ends(capsys, error, status, said):
    def main(args):
        if error:
            raise error

    with pytest.raises(SystemExit) as ended:
        run(main, Parser("schematics.check", "Check."), [])
    assert (ended.value.code, capsys.readouterr().err) == (status, said)


def test_a_bug_ends_as_a_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda args: 1 // 0, Parser("schematics.check", "Check."), [])


def test_a_reader_that_stops_early_gets_no_traceback(data):
    """`check DIR | head -0`, with output that can't be written from the first line on."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "schematics.check", str(data)]
    ended = subprocess.run(
        command, stdout=write_end, stderr=subprocess.PIPE, cwd=Path(__file__).parents[1], text=True
    )
    os.close(write_end)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize(
    "frame", [lambda main: run(main, Parser("x", ""), []), lambda main: live(lambda: main(None))]
)
def test_a_name_that_the_terminal_cannot_show_is_escaped(monkeypatch, encoding, frame):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, errors="strict") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    def main(args):
        print("class 阀")
        raise DataError("阀.png: no image")

    with pytest.raises(SystemExit) as ended:
        frame(main)
    for stream in (out, err):
        stream.flush()
    assert ended.value.code == 1
    assert out.buffer.getvalue() == b"class \\u9600\n"
    assert err.buffer.getvalue() == b"error: \\u9600.png: no image\n"
