"""Long work shows how far it has come: on a terminal, and nowhere else."""

from __future__ import annotations

import io

from pytest_moe_routing import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_sees_the_work_and_keeps_no_line_of_it(monkeypatch):
    monkeypatch.setattr(progress, "_PAUSE", 0.0)
    stream = Terminal()
    assert list(progress.each("abc", "release", stream)) == ["a", "b", "c"]
    steps = stream.getvalue().split("\r")
    assert steps[1:] == [
        *(f"release {n} of 3: {x}\x1b[K" for n, x in enumerate("abc", 1)),
        "\x1b[K",
    ]


def test_the_line_is_rewritten_no_faster_than_it_is_read():
    stream = Terminal()
    list(progress.each(range(1000), "case", stream))
    assert stream.getvalue().count("case") < 10


def test_a_log_sees_nothing():
    stream = io.StringIO()
    assert list(progress.each("abc", "release", stream)) == ["a", "b", "c"]
    assert stream.getvalue() == ""


def test_the_line_goes_when_the_work_breaks_off():
    stream = Terminal()
    for _ in progress.each("abc", "x", stream):
        break
    assert stream.getvalue().endswith("\r\x1b[K")


def test_a_line_fits_and_acts_on_no_terminal():
    stream = Terminal()
    list(progress.each(["\x1b[2J" + "x" * 500], "x", stream))
    assert "\x1b[2J" not in stream.getvalue()
    assert max(map(len, stream.getvalue().split("\r"))) < 90
