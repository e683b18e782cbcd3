"""With --wandb-project the metrics of a run are in Weights & Biases too: one run, however often resumed."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from processes import until

from cluster.dashboard import ID
from cluster.distributed import World
from cluster.journal import Journal

ROOT = Path(__file__).resolve().parents[1]


def sent(folder: Path) -> dict[str, list[dict[str, float]]]:
    """What launches without a server left to be sent, in their order: the lines of each run by its id."""
    from wandb.proto.wandb_internal_pb2 import Record

    lines: dict[str, list[dict[str, float]]] = {}
    for file in sorted(
        (folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime
    ):
        run = ""
        for data in written(file.read_bytes()):
            record = Record.FromString(data)
            run = record.run.run_id or run
            items = {
                item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item
            }
            if items:
                named = {name: value for name, value in items.items() if not name.startswith("_")}
                lines.setdefault(run, []).append(named)
    return lines


def written(log: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format: blocks of 32 KiB, in them pieces with a header of 7 bytes."""
    position, record = 7, b""
    while position + 7 <= len(log):
        if (left := -position % 32768) and left < 7:
            position += left
        length, kind = int.from_bytes(log[position + 4 : position + 6], "little"), log[position + 6]
        record += log[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def test_metrics_are_sent_and_a_resumed_run_is_the_same_run_there(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "run of Jörg"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"seed": 3}))
    for start in (0, 1):
        journal = Journal(folder, World(), 3, start, every=1, wandb_project="drawings")
        for step in range(start, 3):
            journal.log(step, loss=0.5 * step)
        journal.rewind(2)
        journal.record(2, valid_AP=0.25)
        journal.close()
    # The process of wandb that writes may be behind when a run is closed.
    until(lambda: sum(map(len, sent(folder).values())) >= 7, what="seven lines of wandb")
    (known, lines), *others = sent(folder).items()
    assert not others and known == (folder / ID).read_text().strip()
    losses = [{"step": step, "loss": 0.5 * step} for step in range(3)]
    assert lines == [*losses, {"step": 2, "valid_AP": 0.25}, *losses[1:], {"step": 2, "valid_AP": 0.25}]
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3


def test_other_ranks_send_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    Journal(tmp_path, World(rank=1, size=2), 3, wandb_project="drawings").log(0, loss=1.0)
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_one_line(tmp_path):
    """In a process of its own, since the package keeps what it read of its environment."""
    begin = (
        "import sys; sys.path[0] = {root!r}; {first}; from pathlib import Path; from cluster import dashboard"
    )
    begin += "; dashboard.Dashboard('drawings', Path({folder!r}))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}  # where a key would be

    def ends(first: str) -> str:
        code = begin.format(root=str(ROOT), folder=str(tmp_path / "run"), first=first)
        ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert ended.returncode
        return ended.stderr.strip().splitlines()[-1]

    assert re.search(
        r"UserError: --wandb-project drawings: .*; run `wandb login`, or set WANDB_MODE", ends("0")
    )
    absent = ends("sys.modules['wandb'] = None")
    assert absent.endswith("the package is not installed; pip install 'linework[wandb]'")
