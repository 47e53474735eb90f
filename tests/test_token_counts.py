"""Calls with several numbers of tokens: what is wrong with one number alone names it."""

from __future__ import annotations

from dataclasses import replace

from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.exact import kernel_call
from pytest_moe_routing.oracle.finding import Finding, Kind, only_with
from pytest_moe_routing.oracle.target import Captured
from pytest_moe_routing.report.text import sentence
from pytest_moe_routing.targets.sglang.recorded import with_tokens

ROUTER = load_models(packaged_directory())["deepseek-r1"].router
CALL = kernel_call(ROUTER, "fp8_block", "DeepSeekV3", FlashInfer.of("0.7.2"))
WIDTH = Finding(Kind.ARGUMENT, "top_k", 8, 4, "first")
CRASH = Finding(Kind.RAISED, "ValueError", None, "too few", "m.py:1")


def test_what_is_wrong_with_any_number_is_told_once():
    same = replace(WIDTH, where="second")
    other = Finding(Kind.ARGUMENT, "bias", "the bias", None)
    found = [sentence(finding) for finding in only_with(1, [same, other, CRASH], [WIDTH])]
    assert found == [
        "bias arrives as none (with 1 token), the layer has the bias",
        "m.py:1: ValueError: too few (with 1 token)",
    ]


def test_another_call_is_a_finding():
    small = replace(CALL, routed_scaling_factor=1.0)
    found = with_tokens(
        Captured(CALL, (WIDTH,)), {1: Captured(CALL, (WIDTH,)), 1025: Captured(small)}
    )
    assert found.call == CALL
    assert [sentence(finding) for finding in found.findings] == [
        "top_k arrives as 4, the layer has 8",
        "routed_scaling_factor arrives as 1 (with 1025 tokens), the layer has 2.5",
    ]


def test_a_crash_with_one_number_is_a_crash():
    found = with_tokens(Captured(CALL), {1: Captured(None, (CRASH,)), 1025: Captured(CALL)})
    assert found.call is None
    assert found.findings[0].kind is Kind.RAISED


def test_a_number_of_tokens_that_the_kernel_does_not_route_leaves_the_call_unknown():
    refused = {1: "SGLang's own top-k routes"}
    found = with_tokens(Captured(CALL), {1025: Captured(CALL)}, refused)
    assert (found.call, found.findings) == (CALL, ())
    assert found.unknown == "with 1 token: SGLang's own top-k routes"
    assert with_tokens(Captured(CALL), {1025: Captured(CALL)}).unknown == ""
