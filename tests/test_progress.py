"""Where standard error is no terminal, a long loop says now and then how far it is."""

import time

from cluster.progress import progress


def test_lines_in_a_log(capsys, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert list(progress(range(8), "validation")) == list(range(8))
    out, err = capsys.readouterr()
    assert not out
    assert err.splitlines() == [
        "validation: 2 of 8 sheets, 30 s, about 90 s to go",
        "validation: 5 of 8 sheets, 60 s, about 36 s to go",
    ]


def test_a_short_loop_and_other_ranks_say_nothing(capsys, monkeypatch):
    assert list(progress("abc", "validation")) == [*"abc"]
    monkeypatch.setattr(time, "monotonic", iter(range(0, 10000, 100)).__next__)
    assert list(progress("abc", "validation", shown=False)) == [*"abc"]
    assert capsys.readouterr() == ("", "")
    assert list(progress("abc", "validation")) == [*"abc"] and "1 of 3" in capsys.readouterr().err
