"""metrics.jsonl and TensorBoard hold each step once, however often the run was killed and resumed."""

import fcntl
import json
import math
import os
import pty
import re
import signal
import struct
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import Ranks, until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster import journal
from cluster.distributed import World
from cluster.heartbeat import Heartbeat
from cluster.journal import Journal


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def board(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def life(folder: Path, start: int, value: float) -> None:
    """Log steps until this process is killed."""
    record = Journal(folder, World(), 10**9, start, every=1)
    step = start
    while True:
        record.log(step, loss=value)
        record._board.flush()
        step += 1


def test_killed_lives_leave_one_line_and_one_point_a_step(tmp_path):
    folder = tmp_path / "run"
    starts = [0, 7, 7, 20]
    for value, start in enumerate(starts):
        with Ranks(life, folder, start, float(value), logs=tmp_path / str(value)) as ranks:
            until(lambda start=start, value=value: f"step {start + 30}/" in ranks.log(), what="30 steps")
            ranks.signal(signal.SIGKILL)
            ranks.statuses()
    last = Journal(folder, World(), 31, 30)
    last.log(30, loss=4.0)
    last.close()
    lived = [0.0] * 7 + [2.0] * 13 + [3.0] * 10 + [4.0]
    assert [(line["step"], line["loss"]) for line in lines(folder)] == list(enumerate(lived))
    assert board(folder, "loss") == list(enumerate(lived))


def test_rewind_forgets_what_is_logged_again(tmp_path):
    record = Journal(tmp_path, World(), 6)
    for step in range(4):
        record.log(step, loss=1.0)
    record.rewind(2)
    for step in range(2, 6):
        record.log(step, loss=2.0)
    record.close()
    assert [line["loss"] for line in lines(tmp_path)] == [1.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    assert [value for _, value in board(tmp_path, "loss")] == [1.0, 1.0, 2.0, 2.0, 2.0, 2.0]


def test_half_a_line_and_lines_that_are_no_json_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 0, "loss": 1.5}\nnoise\n{"no": "step"}\n{"step": 3}\n'
        '{"step": 1, "loss": 0.25}\n{"step": 2, "lo'
    )
    held = path.open("a")  # by a lost rank of an earlier life
    journal.truncate(path, 3)
    held.write("late\n")
    held.close()
    assert path.read_text() == '{"step": 0, "loss": 1.5}\n{"step": 1, "loss": 0.25}\n'


@pytest.mark.parametrize("tail", [b'{"step": 50, "lo', b"\0" * 4096, b"[" * 100_000 + b"\n"])
def test_a_damaged_tail_and_lost_lines_are_named(tmp_path, capsys, tail):
    path = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps({"step": step}) + "\n" for step in range(0, 41, 10))
    path.write_bytes(whole.encode() + tail)
    journal.truncate(path, 60, every=10)
    assert path.read_text() == whole
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: 1 torn or damaged lines are cut",
        f"{path}: ends at step 40, the checkpoint is of step 60: lines are lost",
    ]


def test_a_whole_file_is_resumed_without_a_word(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(0, 91, 10)))
    for start, every in [(95, 10), (60, 10), (60, 1), (0, 10)]:
        journal.truncate(path, start, every)
    assert capsys.readouterr().out == ""


def test_every_float_survives_the_file(tmp_path):
    values = {"a": 0.1, "b": 1e-300, "c": math.nan, "d": math.inf, "e": -math.inf, "f": torch.tensor(1 / 3)}
    record = Journal(tmp_path, World(), 1)
    record.log(0, **values)
    record.close()

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=no_constant)
    for name, value in values.items():
        assert float(line[name]).hex() == float(value).hex()


def test_only_rank_0_writes(tmp_path):
    record = Journal(tmp_path / "run", World(rank=1, size=2), 3)
    record.log(0, loss=1.0)
    record.message("x")
    record.rewind(0)
    record.close()
    assert not (tmp_path / "run").exists()


def test_a_log_gets_a_line_every_few_steps_with_rate_and_time_left(tmp_path, capsys):
    record = Journal(tmp_path, World(), 25, every=10)
    for step in range(25):
        record.log(step, loss=1.0)
    record.message("done")
    record.close()
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in told[:-1]] == ["1/25", "11/25", "21/25", "25/25"]
    assert "loss 1" in told[0] and "ms/step" in told[0] and "ETA 0:00:0" in told[0]
    assert told[-1] == "done"
    assert [step for step in range(25) if record.due(step)] == [0, 10, 20, 24]


def test_speeds_go_to_the_log_and_to_the_board_but_not_into_the_metrics(tmp_path, capsys):
    awaited, worked = [], []  # seconds of each step as measured here, inside what the journal measures

    def slow() -> Iterator[int]:
        for step in range(4):
            since = time.monotonic()
            time.sleep(0.03)
            awaited.append(time.monotonic() - since)
            yield step

    record = Journal(tmp_path, World(), 4, every=2, batch_size=6)
    heart = Heartbeat(tmp_path / "heartbeat", rank=0, size=1, step_timeout=60)
    for step in heart.waits(slow(), record.waited):
        since = time.monotonic()
        time.sleep(0.01)
        worked.append(time.monotonic() - since)
        record.log(step, loss=1.0)
    heart.close()
    record.close()
    found = re.findall(r"(\S+) ms/step  (\S+) images/s  data (\d+)%  peak (\S+) GiB", capsys.readouterr().out)
    # However the machine stalls: the share holds all of the waiting of its steps, and none of their work.
    for steps, (ms, rate, share, peak) in zip([[0], [1, 2], [3]], found, strict=True):
        seconds = float(ms) / 1000 * len(steps)
        assert float(rate) == pytest.approx(6000 / float(ms), rel=0.05)
        assert int(share) >= 100 * sum(awaited[step] for step in steps) / seconds * 0.95 - 1
        assert int(share) <= 100 * (1 - sum(worked[step] for step in steps) / seconds * 0.95) + 1
        assert 0.05 < float(peak) < 24
    assert [step for step, _ in board(tmp_path, "speed/data_share")] == [0, 2, 3]
    assert all(line.keys() == {"step", "loss"} for line in lines(tmp_path))


def test_a_terminal_gets_a_bar(tmp_path):
    pid, screen = pty.fork()
    if pid == 0:
        try:
            fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # not pytest's
            record = Journal(tmp_path, World(), 3)
            for step in range(3):
                record.log(step, loss=0.5)
            record.message("a word")
            record.close()
        finally:
            os._exit(0)
    shown = b""
    with pytest.raises(OSError):  # the terminal is closed
        while True:
            shown += os.read(screen, 1 << 16)
    os.waitpid(pid, 0)
    assert b"3/3" in shown and b"loss=0.5" in shown and b"a word\r\n" in shown
    assert b"ETA" not in shown


def test_embeddings_for_the_projector(tmp_path):
    record = Journal(tmp_path, World(), 1)
    names = ["a.png @0,0", "b\tc\nd.png @0,0", "e\udcff.png @0,0", "<f>.png @0,0"]
    record.embeddings(0, torch.randn(4, 3), torch.rand(4, 3, 8, 8), names)
    record.picture(0, "views", np.zeros((8, 16, 3), np.uint8))
    record.close()
    (metadata,) = (tmp_path / "tensorboard").rglob("metadata.tsv")
    assert metadata.read_text().splitlines() == [
        "a.png @0,0",
        "b c d.png @0,0",
        "e?.png @0,0",
        "<f>.png @0,0",
    ]
    assert list((tmp_path / "tensorboard").rglob("tensors.tsv"))
    assert list((tmp_path / "tensorboard").rglob("sprite.png"))
