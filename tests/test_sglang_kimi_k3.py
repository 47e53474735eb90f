"""Kimi-K3 in MXFP4, as published: SGLang's block with its latent experts, and mistakes put into it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sglang_targets import oldest_and_newest, opened
from test_sglang_mistakes import edit
from told import code_sentences
from wheels import unpack, wheels_since

from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.layouts import wrong_layouts
from pytest_moe_routing.oracle.model_code import compare_request
from pytest_moe_routing.oracle.other_experts import other_calls
from pytest_moe_routing.report.text import sentences
from pytest_moe_routing.targets.sglang.model_configs import published_of

MODELS = load_models(packaged_directory())
K3 = MODELS["kimi-k3"]
#: The same with a factor: that of the published checkpoint is 1.
SCALED = replace(K3, router=replace(K3.router, routed_scaling_factor=2.5))
#: What the block tells its experts.
FACTOR = "            routed_scaling_factor=self.routed_scaling_factor,\n"
ACTIVATION = "            activation=config.hidden_act,\n"
PARAMETERS = (
    "            gemm1_alpha=config.activation_situ_beta,\n"
    "            gemm1_clamp_limit=config.activation_situ_linear_beta,\n"
)
HALVES = "            gate_up_interleaved=False,\n"
#: What 0.5.18 does to the router's weights, which it packs with the ids.
PACKED = "the float32 router weights are downcast to bfloat16 before the call"
GIVEN = "fc1_expert_weights and quant_scales[0]"
ORDER = "its rows and columns lie in no order that a kernel reads"


@pytest.fixture(scope="module", **oldest_and_newest())
def target(request):
    yield from opened(request.param)


def mutant(root, before, after):
    """Yield the newest release whose block tells its experts something else."""
    wheels = wheels_since("0.5.18", "sglang")
    if wheels:
        edit(unpack(wheels[-1], root), "models/kimi_k3.py", (before, after))
    yield from opened(root if wheels else None)


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory):
    """One that keeps the factor, the activation's parameters and the order of rows to itself."""
    root = tmp_path_factory.mktemp("forgetful")
    told = FACTOR + ACTIVATION + PARAMETERS + HALVES
    yield from mutant(root, told, ACTIVATION)


@pytest.fixture(scope="module")
def other_activation(tmp_path_factory):
    yield from mutant(tmp_path_factory.mktemp("activation"), ACTIVATION + PARAMETERS, PARAMETERS)


def given_by_default(target):
    """Return what is wrong with the call that is given experts and weights by default."""
    method = target.classify(K3).method
    assert all(gate.ok for gate in target.modular_gates(K3, "mxfp4", method))
    return list(sentences(target.modular_findings(K3, "mxfp4")))


def asked(target, model):
    """Return how the model's code and the model disagree."""
    return code_sentences(compare_request(model, target.layer_request(model)))


def orders(target):
    """Return which tensors lie otherwise than a kernel reads them, by GPU and tensors."""
    found = wrong_layouts(target, "mxfp4", [K3]).wrong
    return [(wrong.at.device, *sentences(wrong.at.findings)) for wrong in found]


def test_its_block_is_judged_as_it_runs_by_default(target):
    assert target.chosen_runner(K3, "mxfp4") == "flashinfer_mxfp4"
    assert given_by_default(target) == ([PACKED] if target.version() == "0.5.18" else [])
    assert asked(target, K3) == asked(target, SCALED) == []


def test_a_latent_block_is_built_with_its_projections(target):
    """A kernel of one without would have the width of hidden states, 256."""
    nemotron = MODELS["nemotron-3-super"]
    for call in (target._handed_over(K3, "mxfp4"), target._run(nemotron, "bf16")):
        assert call["arguments"]["hidden_states"]["shape"][1] == 768


@pytest.mark.parametrize(
    ("model", "key"),
    [("kimi-k3", "routed_expert_hidden_size"), ("nemotron-3-super", "moe_latent_size")],
)
def test_a_published_config_states_the_latent_size(model, key):
    assert published_of(MODELS[model], "")[key] == 768


def test_its_rows_are_taken_for_alternating_ones_on_rtx_blackwell(target):
    """`_process_weights_for_sm120_cutlass` in mxfp4.py does not look at `gate_up_interleaved`."""
    assert orders(target) == [("RTX Blackwell", f"{GIVEN}: {ORDER}")]


def test_its_activation_is_another_in_cutlass_kernels(target):
    """`_fused_experts_flashinfer_mxfp4_cutlass` in flashinfer_cutlass.py has Swiglu for all."""
    [wrong] = other_calls(target, "mxfp4", [K3]).wrong
    text = "activation_type arrives as Swiglu, the layer has Situ"
    assert (wrong.call.requests, list(sentences(wrong.findings))) == (True, [text])


def test_parameters_of_the_activation_that_are_lost(forgetful):
    assert given_by_default(forgetful) == [
        "gemm1_alpha arrives as 1.702, the layer has 4",
        "gemm1_beta arrives as 7, the layer has 25",
        *([PACKED] if forgetful.version() == "0.5.18" else []),
    ]


def test_a_factor_that_is_lost(forgetful):
    text = "routed_scaling_factor: the model has 2.5, the model code asks for 1"
    assert any(sentence.startswith(text) for sentence in asked(forgetful, SCALED))


def test_an_order_of_rows_that_is_not_told(forgetful):
    on_blackwell = ("", f"gemm1_weights and gemm1_weights_scale: {ORDER}")
    others = (("Hopper", f"{GIVEN}: {ORDER}"), ("RTX Blackwell", f"{GIVEN}: {ORDER}"))
    assert orders(forgetful) == [on_blackwell, *others]


def test_an_activation_that_is_lost(other_activation):
    [raised] = given_by_default(other_activation)
    assert raised.startswith("forward: forward: AssertionError: standard topk output only wired")
    assert asked(other_activation, K3)[0].startswith("activation: the model has situ")
