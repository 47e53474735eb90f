"""The verdicts of a run on a terminal: what is not exact first, within the width, coloured."""

from __future__ import annotations

import pytest
from verdict_records import verdict

from pytest_moe_routing.oracle.record import Known
from pytest_moe_routing.oracle.verdict import Verdict
from pytest_moe_routing.report.terminal import MARKUP, plain, summary

SCHEMES = ("bf16", "fp8_block", "fp8_per_channel", "fp8_per_tensor", "mxfp4", "mxfp8", "nvfp4")


def lines(records, **options):
    return list(map(plain, summary(records, **options)))


def test_what_is_not_exact_comes_first_and_says_where():
    records = [
        verdict("good"),
        verdict("lost", verdict="missed", known=Known("slow", "https://example.com")),
        verdict("bad", "fp8_block", "wrong"),
        verdict("bad", "nvfp4", "wrong"),
        verdict("odd", verdict="fallback", obstacles=("shape: 96 not a multiple of 128",)),
        verdict("even", verdict="fallback", obstacles=("shape: 64 not a multiple of 128",)),
        verdict("mute", verdict="not judged", reason="the crystal ball is cloudy"),
        # A scheme without verdicts has no row, and is counted below.
        verdict("mute", "mxint4", "not judged", reason="the crystal ball is cloudy"),
    ]
    assert lines(records) == [
        "wrong       bad: fp8_block, nvfp4",
        "missed      lost: nvfp4 (known)",
        "fallback    2 x shape",
        "scheme     exact  wrong  fallback  missed  not judged",
        "fp8_block  -      1      -         -       -",
        "nvfp4      1      1      2         1       1",
        "1 exact, 2 fallback, 1 missed (1 known), 2 not judged, 2 wrong; vllm 0.32.0,",
        "  FlashInfer 0.7.0",
        "2 x the crystal ball is cloudy",
    ]


def test_many_bad_models_are_counted():
    records = [verdict(f"model-{n:02}", verdict="crash") for n in range(30)]
    [shown] = [line for line in lines(records) if line.startswith("crash")]
    names = ", ".join(f"model-{n:02}" for n in range(3))
    assert shown == f"crash       30 x: {names} and 27 more; -v lists all"


@pytest.mark.parametrize("width", [60, 80, 132])
@pytest.mark.parametrize("every", [False, True])
def test_no_line_is_wider_than_the_terminal(width, every):
    records = [
        verdict(f"a-model-with-a-long-name-{n:02}", scheme, v, obstacles=("shape: no",))
        for n in range(20)
        for scheme in SCHEMES
        for v in [list(Verdict)[(n + len(scheme)) % 5]]
    ]
    shown = lines(records, every=every, width=width)
    assert max(map(len, shown)) <= width
    if every:
        text = "\n".join(shown)
        assert all(text.count(scheme) == 1 for scheme in SCHEMES)
        cells = [word for line in shown for word in line.split() if word in list(Verdict)]
        assert len(cells) == len(records)


def test_a_matrix_shows_methods_where_they_fit():
    records = [verdict("m", scheme) for scheme in SCHEMES[:2]]
    assert lines(records, every=True)[1] == "m      exact (Default)  exact (Default)"
    narrow = lines([verdict("m", s, known=Known("a", "b")) for s in SCHEMES], every=True)
    assert "exact*" in narrow[1]
    assert "* known failure" in narrow


def test_several_deciders_have_a_row_where_they_differ():
    records = [
        verdict("same", release="0.31.0"),
        verdict("same"),
        verdict("differs", release="0.31.0", verdict="wrong"),
        verdict("differs"),
    ]
    shown = lines(records, width=120)
    assert not any(line.startswith("same") for line in shown)
    assert shown[1].split("  ")[0] == "differs"
    assert "wrong (Default)" in shown[1]


def test_verdicts_have_colours():
    records = [verdict(), verdict("bad", verdict="wrong"), verdict("lost", verdict="missed")]
    coloured = {(p.text.strip(), *p.markup) for line in summary(records) for p in line if p.markup}
    assert {("wrong", "red", "bold"), ("missed", "yellow"), ("1", "green")} <= coloured
    assert set(MARKUP) == set(Verdict)


def test_a_terminal_gets_the_colours_and_a_log_does_not(host):
    run = ("--moe-golden", "--moe-models", "minimax-m2", "-k", "test_verdict[")
    coloured = host.runpytest_subprocess(*run, "--color=yes").stdout.str()
    assert "\x1b[32m8\x1b[0m" in coloured or "\x1b[32m1\x1b[0m" in coloured
    assert "\x1b" not in host.runpytest_subprocess(*run).stdout.str()
    quiet = host.runpytest_subprocess(*run, "-q").stdout.str()
    assert "verdicts" not in quiet
    assert "left out" not in quiet
