"""What becomes of a requested backend, and of the reasons of a refusal: selectors of miniatures."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import pytest

from pytest_moe_routing.targets.vllm.probe import (
    choice,
    gates,
    rejections,
    selectors,
    server_defaults,
)
from pytest_moe_routing.targets.vllm.probe.choice import Selector


@dataclass(frozen=True)
class Config:
    moe_backend: str = "auto"


class Experts:
    @staticmethod
    def is_supported_config(cls, config):
        return True, None


class Fused(Experts):
    """Has a gate of its own, as some classes have."""

    @staticmethod
    def is_supported_config(cls, config):
        return config.moe_backend in ("auto", "flashinfer_trtllm"), "no"


class Other(Experts):
    pass


def select(config, *, tells):
    """Take the first experts that accept a layer."""
    reasons = []
    for cls in (Fused, Other):
        accepted, reason = cls.is_supported_config(cls, config)
        if accepted:
            return "backend", cls
        reasons.append(reason)
    raise NotImplementedError(f"no experts: {reasons}" if tells else "no experts")


def tells(config):
    return select(config, tells=True)


def tells_nothing(config):
    return select(config, tells=False)


def takes_what_is_left(config):
    try:
        return select(config, tells=False)
    except NotImplementedError:
        return "backend", Other


class Asks:
    def __init__(self, moe):
        self.experts_cls = tells(moe)[1]


class ByDevice:
    def __init__(self, moe):
        self.experts_cls = Fused


class Names:
    def __init__(self, method):
        self.method = method

    def has(self, key):
        return self.method is not None and key == "made-w4a4-mxfp4"

    def get(self, key):
        return self.method


@pytest.fixture(autouse=True)
def _nothing_around(monkeypatch):
    monkeypatch.setattr(selectors, "on_one_gpu", nullcontext)
    monkeypatch.setattr(rejections, "is_of_vllm", lambda _: True)
    monkeypatch.setattr(server_defaults, "moe_backend", lambda: "auto")


def selector(function):
    return Selector(function, Config(), {})


def test_reasons_of_a_refusal():
    assert selectors._reasons(selector(tells), Fused)["answer"] == "honored"
    assert selectors._reasons(selector(tells_nothing), Fused) == {
        "answer": "ignored",
        "why": "tells_nothing raises NotImplementedError: no experts",
        "switches": [],
    }
    # Gates are as they were.
    assert Fused.is_supported_config(Fused, Config()) == (True, "no")


def test_a_selector_that_always_takes_some_experts():
    assert selectors._reasons(selector(takes_what_is_left), Fused) is None


@pytest.mark.parametrize(("method", "answer"), [(Asks, "honored"), (ByDevice, "ignored")])
def test_a_requested_backend(method, answer, monkeypatch):
    monkeypatch.setattr(selectors, "names", lambda: Names(method))
    assert selectors._backend(selector(tells), "mxfp4")["answer"] == answer


def test_a_backend_is_asked_of_known_methods_alone(monkeypatch):
    monkeypatch.setattr(selectors, "names", lambda: Names(None))
    assert selectors._backend(selector(tells), "mxfp4") is None
    assert selectors._backend(selector(tells), "nvfp4") is None


@pytest.fixture
def served(monkeypatch):
    """Gives the selector of a scheme in a release whose one selector is a function."""

    class Release:
        def has(self, key):
            return key in ("select-mxint4", "select-mxfp4")

        def spelling(self, key):
            return key

    def find(function, scheme):
        release = Release()
        release.get = lambda key: function
        monkeypatch.setattr(choice, "names", lambda: release)
        monkeypatch.setattr(choice, "moe_config", lambda model, method: Config())
        monkeypatch.setattr(gates, "quant_keys", lambda row: ("key of weights", "of activations"))
        return choice.selector_of({"architecture": "SomeForCausalLM"}, scheme, "Renormalize")

    return find


def test_a_selector_is_told_of_a_checkpoint_without_zero_points_or_biases(served):
    """Groups of 32 in their own order: all that experts of TRT-LLM take."""

    def select(config, weight_key, activation_key, quant_config, may_have_zp, may_have_bias):
        assert (weight_key, activation_key) == ("key of weights", "of activations")
        odd = may_have_zp or may_have_bias or quant_config.desc_act
        return "backend", Other if odd or quant_config.group_size != 32 else Fused

    found = served(select, "mxint4")
    assert found(found.config) is Fused


def test_a_checkpoint_of_mxfp4_declares_no_format_of_its_activations(served):
    def select(config, activation_key=None):
        return "backend", Fused if activation_key is None else Other

    found = served(select, "mxfp4")
    assert found(found.config) is Fused
    assert served(select, "nvfp4") is None
