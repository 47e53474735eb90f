"""What SGLang's code raises: a refusal, a crash of the server, or nothing that can be judged."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.sglang.probe import ranks, weights
from pytest_moe_routing.targets.sglang.probe.raised import verdict_on
from pytest_moe_routing.targets.sglang.probe.requests import requesting

RAISING = """
def refuse(value):
    raise ValueError(f"no {value}")
def check(value):
    assert value is None, "not supported"
def check_silently(value):
    assert value is None
def read(value):
    return value.topk_config
def forward(value):
    raise NotImplementedError
def call(value):
    forward(value)
"""


class StandardTopKOutput:
    """Another format than one with a config."""


@pytest.mark.parametrize(
    ("function", "value", "is_built", "verdict"),
    [
        ("refuse", 1, False, ("refused", "ValueError: no 1 (sglang/srt/models/some.py:3)")),
        (
            "check",
            1,
            False,
            ("refused", "AssertionError: not supported (sglang/srt/models/some.py:5)"),
        ),
        ("refuse", 1, True, ("failed", "ValueError: no 1 (sglang/srt/models/some.py:3)")),
        (
            "check",
            1,
            True,
            ("failed", "AssertionError: not supported (sglang/srt/models/some.py:5)"),
        ),
        ("check", stubs.Stub("option"), False, ("unknown", "it does not build and run on a CPU")),
        (
            *("check_silently", 1, True),
            ("failed", "AssertionError (sglang/srt/models/some.py:7: assert value is None)"),
        ),
        (
            *("read", StandardTopKOutput(), True),
            (
                "failed",
                "AttributeError: 'StandardTopKOutput' object has no attribute 'topk_config' "
                "(sglang/srt/models/some.py:9: return value.topk_config)",
            ),
        ),
        ("read", 1, True, ("unknown", "it does not build and run on a CPU: AttributeError: 'int'")),
        ("forward", 1, True, ("unknown", "it does not build and run on a CPU")),
        (
            *("call", 1, True),
            (
                "failed",
                "NotImplementedError (sglang/srt/models/some.py:11: raise NotImplementedError)",
            ),
        ),
    ],
)
def test_what_raises_when_a_server_starts_is_a_refusal_and_later_a_crash(
    tmp_path, function, value, is_built, verdict
):
    """Unless a stand-in of ours, or a method that nobody wrote, may be why it raised."""
    file = tmp_path / "sglang/srt/models/some.py"
    file.parent.mkdir(parents=True)
    file.write_text(RAISING)
    names = {}
    exec(compile(RAISING, str(file), "exec"), names)
    errors = (ValueError, AssertionError, AttributeError, NotImplementedError)
    with pytest.raises(errors) as raised:
        names[function](value)
    kind, text, code = verdict_on(raised.value, is_built=is_built)
    assert (kind, text[: len(verdict[1])]) == verdict
    innermost = {"call": "forward"}.get(function, function)
    assert code == f"{raised.type.__name__}-in-some.py-{innermost}"


def test_an_error_outside_of_sglang_is_told_where_it_was_raised():
    def inner():
        raise KeyError("size")

    def outer():
        inner()

    with pytest.raises(KeyError) as raised:
        outer()
    kind, text, _ = verdict_on(raised.value, is_built=True)
    line = inner.__code__.co_firstlineno + 1
    assert (kind, text) == (
        "unknown",
        f"it does not build and run on a CPU: KeyError: 'size' (test_sglang_errors.py:{line})",
    )


def test_code_that_fails_to_decide_about_shared_experts_decides_nothing():
    def decide(*_):
        raise ValueError("no quant_method")

    names = SimpleNamespace(
        has=lambda key: False,
        get=lambda key: decide,
        spelling=lambda key: SimpleNamespace(module="types"),
    )
    told = "whether shared experts are among the routed ones: .*ValueError: no quant_method"
    with pytest.raises(Unsupported, match=told):
        ranks._decide(names, None, {"text_config": {}}, None)


def prepare(scheme, run):
    """Prepare a layer whose quantization method runs this; one that is quantized scales its input."""
    method = SimpleNamespace(process_weights_after_loading=run)
    config = scheme and SimpleNamespace(get_name=lambda: scheme)
    small = torch.zeros(2, 64, 64)
    layer = SimpleNamespace(quant_method=method, quant_config=config)
    layer.dispatcher = SimpleNamespace(is_told=False)
    layer.named_parameters = lambda: [("w13_input_scale", small)] if scheme else []
    layer._parameters = {"w13_weight": small, "w2_weight": small}
    names = SimpleNamespace(has=lambda _: False)
    with requesting(prepared=lambda _: None):
        return weights._prepare(names, layer)


def subtract_from_a_stand_in(_layer):
    return stubs.Stub("swizzled") - 1


def fail_in_torch(_layer):
    torch.zeros(2).reshape(3)


def fail_itself(_layer):
    raise RuntimeError("no such layout")


def miss_a_key(_layer):
    return {}["w1"]


@pytest.mark.parametrize("run", [subtract_from_a_stand_in, fail_in_torch])
def test_a_preparation_that_needs_a_gpu_leaves_the_activation_open(run):
    assert "gemm1_clamp_limit" in prepare("modelopt_fp8", run)


@pytest.mark.parametrize(
    ("scheme", "run", "error"),
    [
        ("modelopt_fp8", fail_itself, RuntimeError),
        ("modelopt_fp8", miss_a_key, KeyError),
        (None, miss_a_key, KeyError),
        (None, fail_in_torch, RuntimeError),
    ],
)
def test_a_preparation_that_fails_otherwise_is_an_error(scheme, run, error):
    with pytest.raises(error):
        prepare(scheme, run)
