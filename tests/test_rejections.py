"""What vLLM rejects by a check of its own, and what merely fails."""

from __future__ import annotations

import runpy

import pytest

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.vllm.probe.rejections import Rejected, rejections

CHECKS = """
def states():
    raise ValueError(
        "not with these experts"
    )

def asserts():
    assert 1 > 2, "no such layout"

def has_not():
    raise NotImplementedError("not yet")

def fails():
    return int("four")

def looks_up():
    return {}["backend"]

def breaks():
    raise RuntimeError("no device")

def wraps():
    try:
        states()
    except ValueError as error:
        raise Unsupported("not judged: makes no layer") from error

def is_abstract():
    raise NotImplementedError

def does_not_know(): raise Unsupported("not judged: no such name")
"""


def checks(folder):
    """The functions of a file in a folder; those of one named `vllm` are vLLM's own."""
    folder.mkdir()
    path = folder / "checks.py"
    path.write_text(CHECKS)
    return runpy.run_path(str(path), {"Unsupported": Unsupported})


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    return checks(tmp_path_factory.mktemp("release") / "vllm")


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("states", "vllm/checks.py:3: ValueError: not with these experts"),
        ("asserts", "vllm/checks.py:8: AssertionError: no such layout"),
        ("has_not", "vllm/checks.py:11: NotImplementedError: not yet"),
        ("wraps", "vllm/checks.py:3: ValueError: not with these experts"),
    ],
)
def test_a_check_rejects(vllm, function, told):
    with pytest.raises(Rejected) as rejected, rejections():
        vllm[function]()
    assert str(rejected.value) == told


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("fails", "not judged: vllm/checks.py:14: ValueError: invalid literal"),
        ("looks_up", "not judged: vllm/checks.py:17: KeyError: 'backend', which is no check"),
        ("breaks", "not judged: vllm/checks.py:20: RuntimeError: no device, which is no check"),
        ("is_abstract", "not judged: vllm/checks.py:29: NotImplementedError: raise"),
        ("does_not_know", "not judged: no such name"),
    ],
)
def test_what_merely_fails_is_not_judged(vllm, function, told):
    with pytest.raises(Unsupported) as unknown, rejections():
        vllm[function]()
    assert str(unknown.value).startswith(told)


def test_a_check_of_another_package_is_none_of_vllm(tmp_path):
    with pytest.raises(Unsupported, match="which is no check of a request"), rejections():
        checks(tmp_path / "torch")["states"]()


def test_what_is_not_rejected_goes_on():
    with rejections():
        found = 1
    assert found == 1
