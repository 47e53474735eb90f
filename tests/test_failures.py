"""What a terminal shows of failed tests: each defect once, urgent ones first, latent ones last."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_moe_routing.failure import Failure, Rank

TESTS = """
import pytest
from pytest_moe_routing.failure import Failure, Rank
from pytest_moe_routing.report.failures import fail

def wrong(model, scheme, site, reach):
    lines = (f"{model} on {scheme}: wrong", "  kernel   k", "  because  of the scale")
    return Failure(
        f"wrong:scale:{site}", Rank.SILENT, f"{model} {scheme}", lines, site=site, reach=reach,
        brief=(lines[0], lines[2], "  because  of the bias", f"  because  {139 * 'x'}", lines[1]),
    )

def latent(number):
    lines = (f"crash: top_k is {number}", "more")
    return Failure(f"sweep:{number}", Rank.LATENT, "bf16", lines, differs=(str(number),))

BOTH = Failure(
    "sweep:1+2", Rank.LATENT, "bf16", ("crash: top_k is 1 or 2",), differs=("1", "2")
)

def elsewhere(site):
    lines = ("weights differ", "  because  x")
    return Failure(f"router:weights:{site}", Rank.LATENT, "m6", lines, site=site)

LOUD = Failure(
    "crash:a", Rank.LOUD, "m4 nvfp4", ("m4 on nvfp4: crash", "  because  of a limit"),
    differs=("m4 top_k",),
)
ADDS = Failure("crash:a+c", Rank.LOUD, "m4 fp8", ("m4 crash",), differs=("m4 top_k", "m4 groups"))
SECOND = Failure("crash:b", Rank.LOUD, "m4 nvfp4", ("m4 on nvfp4: hang", "  because  of ranks"))
CASES = {
    "latent": [latent(1)],
    "loud": [LOUD, SECOND, latent(2)],
    "first": [wrong("m1", "nvfp4", "A->f", "everybody"), latent(3)],
    "adds": [ADDS],
    "combined": [BOTH, elsewhere("A"), elsewhere("B")],
    "second": [wrong("m2", scheme, "B->g", "nobody") for scheme in ("bf16", "fp8")],
    "third": [wrong("m3", "bf16", "B->g", "nobody")],
    "fourth": [wrong("m5", "mxfp8", "C->h", "everybody")],
    "good": [],
}

@pytest.mark.parametrize("case", CASES)
def test_it(case, request):
    fail(lambda *stated: request.node.user_properties.append(stated), CASES[case])
"""
BRIEF = """\
___ m1 on nvfp4: wrong ___
  because  of the scale; of the bias
  because  xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
  kernel   k
  also     wrong:scale:B->g: m2 bf16, m2 fp8, m3 bf16 (nobody); wrong:scale:C->h: m5 mxfp8
  cause    wrong:scale:A->f
___ m4 on nvfp4: crash ___
  because  of a limit
  also     crash:a+c: m4 fp8
  cause    crash:a
m4 on nvfp4: hang
  because  of ranks
  cause    crash:b
___ latent: no known model meets these on a GPU without an opt-in switch ___
crash: top_k is 1 (bf16; more)  [sweep:1]
crash: top_k is 2 (bf16; more)  [sweep:2]
crash: top_k is 3 (bf16; more)  [sweep:3]
2 x weights differ (m6; because x)  [router:weights:A]
1 more only combine causes of this list; --lf -v shows each in full
8 tests failed: 3 shown (failed), 5 of shown or latent causes (repeated)
"""


def shown(result) -> list[str]:
    """The lines between the heading of the failures and what follows them."""
    text = result.stdout.str().partition("= FAILURES =")[2].splitlines()[1:]
    end = next(place for place, line in enumerate(text) if line.startswith("=="))
    told = [line for line in text[:end] if not line.startswith("[gw")]
    return [f"___ {line.strip('_ ')} ___" if line[:3] == "___" else line for line in told]


@pytest.mark.parametrize("in_ci", [True, False])
@pytest.mark.parametrize("workers", [(), ("-n1",)])
def test_each_defect_is_one_block(host, monkeypatch, in_ci, workers):
    monkeypatch.delenv("BUILD_NUMBER", raising=False)
    monkeypatch.delenv("CI", raising=False)
    if in_ci:
        monkeypatch.setenv("CI", "true")
    host.makepyfile(test_own=TESTS)
    result = host.runpytest_subprocess("test_own.py", *workers)
    assert shown(result) == BRIEF.splitlines()
    assert result.parseoutcomes() == {"failed": 3, "passed": 1, "repeated": 5}
    assert "FAILED" not in result.stdout.str()


def test_latent_lines_that_are_cut_say_how_to_see_them(host):
    host.makepyfile(test_own=TESTS.replace('is {number}"', 'is {number} of " + 80 * "x"'))
    lines = shown(host.runpytest_subprocess("test_own.py"))
    place = lines.index("1 more only combine causes of this list; --lf -v shows each in full")
    assert [line[-4:] for line in lines[place - 4 : place - 1]] == ["x..."] * 3
    text = host.runpytest_subprocess("test_own.py", "-v").stdout.str()
    assert "x (bf16; more)  [sweep:3]" in text
    assert "in full" not in text


def test_counts_add_up_with_those_that_are_expected(host):
    xfail = "\n\n@pytest.mark.xfail\ndef test_known(): assert 0\n"
    host.makepyfile(test_own=TESTS + xfail)
    result = host.runpytest_subprocess("test_own.py", "-v")
    counts = {"failed": 7, "passed": 1, "repeated": 1, "xfailed": 1}
    assert result.parseoutcomes() == counts
    result.stdout.fnmatch_lines(
        [
            "9 tests failed: 7 shown (failed), 1 of shown or latent causes (repeated), 1",
            "  accepted as known (xfailed)",
        ]
    )
    host.makepyfile(test_own="def test_plain(): assert 0")
    assert "tests failed" not in host.runpytest_subprocess("test_own.py").stdout.str()


def test_verbose_output_has_everything(host):
    host.makepyfile(test_own=TESTS)
    text = host.runpytest_subprocess("test_own.py", "-v").stdout.str()
    assert text.count("  kernel   k\n") == 3
    assert "___ test_it[second] ___" in text
    assert "  also     2 more: m2 fp8, m3 bf16\n  cause    wrong:scale:B->g\n" in text
    assert "test_own.py::test_it[third] REPEATED" in text
    paragraph = "weights differ\n  because  x\n  cause    router:weights:A\n"
    assert f"[sweep:1+2]\n\n{paragraph}\nweights differ\n" in text


def test_a_short_summary_is_there_if_it_says_more(host):
    host.makepyfile(test_own=TESTS)
    text = host.runpytest_subprocess("test_own.py", "-rf").stdout.str()
    assert "FAILED test_own.py::test_it[first] - m1 on nvfp4: wrong\n" in text
    host.makepyfile(test_theirs="def test_other(): assert not 'theirs'")
    text = host.runpytest_subprocess("test_own.py", "test_theirs.py").stdout.str()
    assert "FAILED test_theirs.py::test_other" in text
    assert "FAILED test_own.py::test_it[first]" in text


ECHOES = """
import pytest
from pytest_moe_routing.failure import Failure, Rank
from pytest_moe_routing.report.failures import fail

def of(cause, case, *differs):
    return Failure(cause, Rank.SILENT, case, (f"{case}: {cause}",), differs=differs)

CASES = {
    "code": of("code", "m1", "m1 scale 2 1"),
    "code-again": of("code", "m2", "m2 scale 3 1"),
    "kernel": of("kernel", "m1 nvfp4", "m1 scale 2 1"),
    "kernel-again": of("kernel", "m2 nvfp4", "m2 scale 3 1"),
    "further": of("further", "m1 bf16", "m1 scale 2 1"),
    "further-model": of("further", "m3 bf16", "m3 scale 2 1"),
    "other-value": of("value", "m1 fp8", "m1 scale 2 4"),
    "silent": of("silent", "m1 mxfp8", "m1 scale 2 1"),
    "silent-again": of("silent", "m2 mxfp8"),
}

@pytest.mark.parametrize("case", CASES)
def test_it(case, request):
    fail(lambda *stated: request.node.user_properties.append(stated), [CASES[case]])
"""


def test_what_another_test_finds_again_is_one_block(host):
    """Only if it says the same of all of its models; whatever says more may be another defect."""
    host.makepyfile(test_own=ECHOES)
    result = host.runpytest_subprocess("test_own.py")
    assert shown(result) == [
        "___ m1: code ___",
        "  also     1 more: m2; kernel: m1 nvfp4, m2 nvfp4",
        "  cause    code",
        "___ m1 bf16: further ___",
        "  also     1 more: m3 bf16",
        "  cause    further",
        "___ m1 fp8: value ___",
        "  cause    value",
        "___ m1 mxfp8: silent ___",
        "  also     1 more: m2 mxfp8",
        "  cause    silent",
        "9 tests failed: 4 shown (failed), 5 of shown causes (repeated)",
    ]


REACHED = """
import pytest
from pytest_moe_routing.failure import Failure, Rank
from pytest_moe_routing.report.failures import fail

def of(model, site, rarity, reach):
    lines = (f"{model}: wrong", f"  reach    {reach}")
    about = {"site": site, "reach": reach, "rarity": rarity}
    return Failure(f"wrong:scale:{site}", Rank.SILENT, model, lines, **about)

CASES = [
    of("m1", "A->f", 3, "a few"),
    of("m2", "B->g", 3, "a few"),
    of("m3", "B->g", 0, "everybody"),
    of("m4", "B->g", 0, "everybody"),
]

@pytest.mark.parametrize("case", CASES)
def test_it(case, request):
    fail(lambda *stated: request.node.user_properties.append(stated), [case])
"""


@pytest.mark.parametrize("workers", [(), ("-n1",)])
def test_the_case_that_most_people_can_meet_is_shown(host, workers):
    """Also if it is not the first of its cause, or of its defect."""
    host.makepyfile(test_own=REACHED)
    assert shown(host.runpytest_subprocess("test_own.py", *workers))[:4] == [
        "___ m3: wrong ___",
        "  reach    everybody",
        "  also     2 more: m2, m4; wrong:scale:A->f: m1 (a few)",
        "  cause    wrong:scale:B->g",
    ]
    text = host.runpytest_subprocess("test_own.py", "-v", *workers).stdout.str()
    assert "m3: wrong\n  reach    everybody\n  also     2 more: m2, m4\n" in text


ORDERED = """
import pytest
from pytest_moe_routing.failure import Failure, Rank
from pytest_moe_routing.report.failures import fail

def of(name, rank, is_opt_in=False):
    return Failure(name, rank, name, (f"{name}: wrong",), is_opt_in=is_opt_in)

CASES = {
    "slight": [of("downcast", Rank.DOWNCAST)],
    "switch": [of("opt-in loud", Rank.LOUD, True), of("opt-in missed", Rank.MISSED, True)],
    "several": [
        of("latent", Rank.LATENT), of("opt-in silent", Rank.SILENT, True),
        of("opt-in downcast", Rank.DOWNCAST, True), of("loud", Rank.LOUD),
    ],
    "lost": [of("lost", Rank.LOST)],
    "silent": [of("silent", Rank.SILENT), of("missed", Rank.MISSED)],
    "both": [of("either silent", Rank.SILENT, True)],
    "both-again": [of("either silent", Rank.SILENT)],
}

@pytest.mark.parametrize("case", CASES)
def test_it(case, request):
    fail(lambda *stated: request.node.user_properties.append(stated), CASES[case])
"""
IN_ORDER = [
    *("silent", "either silent", "loud", "lost", "missed"),
    *("opt-in silent", "opt-in loud", "opt-in missed", "downcast", "opt-in downcast"),
]


@pytest.mark.parametrize("workers", [(), ("-n1",)])
def test_what_only_a_switch_leads_to_is_shown_after_all_else(host, workers):
    """Whatever kind it is, and whichever test has found it."""
    host.makepyfile(test_own=ORDERED)
    lines = shown(host.runpytest_subprocess("test_own.py", *workers))
    told = [line.strip("_ ").removesuffix(": wrong") for line in lines if ": wrong" in line]
    assert told == [*IN_ORDER, "latent: wrong (latent)  [latent]"]
    host.makepyfile(test_own=f'{ORDERED}\nCASES.pop("lost")')
    text = host.runpytest_subprocess("test_own.py", "-v", *workers).stdout.str()
    titles = [line.strip("_ ") for line in text.splitlines() if line.startswith("___")]
    assert titles == [
        *("test_it[silent]", "test_it[both]", "test_it[several]", "test_it[switch]"),
        "test_it[slight]",
    ]


def test_a_defect_elsewhere_says_who_meets_it_if_that_is_known_and_differs():
    failure = Failure("a:b", Rank.SILENT, "m1", ("m1",), reach="nobody")
    assert failure.elsewhere([], "everybody") == "a:b: m1 (nobody)"
    assert failure.elsewhere([], "nobody") == "a:b: m1"
    assert replace(failure, reach="").elsewhere([], "everybody") == "a:b: m1"


def test_a_cause_that_a_test_meets_twice_is_as_urgent_as_its_worst_case(host):
    """A server may take by default on one GPU what it has to be told to take on another."""
    cases = '[replace(latent(1), cause="crash:a"), LOUD]'
    host.makepyfile(
        test_own=f"{TESTS}\nfrom dataclasses import replace\nCASES.clear()\n\n"
        f"def test_twice(request):\n"
        f"    fail(lambda *stated: request.node.user_properties.append(stated), {cases})\n"
    )
    lines = shown(host.runpytest_subprocess("test_own.py", "-k", "twice"))
    assert lines[0] == "___ m4 on nvfp4: crash ___"
    assert not any("latent" in line or "top_k" in line for line in lines)
