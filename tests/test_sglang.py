"""The SGLang target, on whole releases where there are some.

The releases are those of which MOE_WHEELS has a wheel.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from packaging.version import Version
from sglang_targets import opened, params
from told import code_sentences
from wheels import wheels_since

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.exact import Gate, kernel_call
from pytest_moe_routing.oracle.judge import judge
from pytest_moe_routing.oracle.model_code import compare_request
from pytest_moe_routing.oracle.target import Captured
from pytest_moe_routing.report.text import sentence, story
from pytest_moe_routing.targets.builtin.target import BuiltinTarget
from pytest_moe_routing.targets.sglang.model_code import request_of
from pytest_moe_routing.targets.sglang.model_configs import config_of
from pytest_moe_routing.targets.sglang.target import SglangTarget
from pytest_moe_routing.targets.source import Source

MODELS = load_models(Path(__file__).parent.parent / "golden")
RELEASES = wheels_since("0.5.6", "sglang")


def test_a_config_has_the_models_values_under_every_name():
    config = config_of(MODELS["deepseek-r1"])
    assert (config["n_routed_experts"], config["num_experts_per_tok"]) == (256, 8)
    assert (config["n_group"], config["topk_group"], config["routed_scaling_factor"]) == (8, 4, 2.5)
    assert config["topk_method"] == "noaux_tc"
    # What a model does not have, its config does not have either.
    assert "n_group" not in config_of(MODELS["qwen3-30b-a3b"])


def test_a_scheme_that_the_adapter_has_no_names_for_is_not_judged(tmp_path):
    """The reason tells a release that never calls the kernel from one that we cannot follow."""
    for version, text, reason in (
        (
            "1",
            "x = 1",
            "sglang 1 does not support fp8_per_channel through FlashInfer: its code does not use ",
        ),
        ("2", "trtllm_fp8_per_channel_scale_moe()", "sglang 2: its code calls trtllm_fp8_per"),
    ):
        root = tmp_path / version
        file = root / "sglang/srt/layers/moe.py"
        file.parent.mkdir(parents=True)
        file.write_text(text)
        target = SglangTarget(FlashInfer.of(), Source(root, version, None))
        with pytest.raises(Unsupported, match=reason):
            target.gates(MODELS["kimi-k2.5"], "fp8_per_channel", "DeepSeekV3")
        target.close()


@pytest.fixture(scope="module", **params(RELEASES))
def target(request):
    yield from opened(request.param)


@pytest.mark.parametrize("scheme", ["fp8_block", "nvfp4"])
def test_release_deepseek_is_exact(target, scheme):
    """The model that this runner was made for; expert parallel, with groups, bias and scale."""
    found = judge(target, MODELS["deepseek-r1"], scheme)
    assert found.verdict == "exact", "\n".join(story(found.record()))
    assert "declares -> DeepSeekV3" in str(found.classification)
    assert (found.call.n_group, found.call.topk_group, found.call.bias) == (8, 4, "router")


def test_release_sees_a_changed_model(target):
    """The verdict follows from what the code does with the config, not from the model's name."""
    model = MODELS["deepseek-r1"]
    softmax = replace(model, router=replace(model.router, scoring_func="softmax"))
    assert judge(target, softmax, "fp8_block").verdict != "exact"
    unscaled = replace(model, router=replace(model.router, routed_scaling_factor=1.0))
    assert judge(target, unscaled, "fp8_block").call.routed_scaling_factor == 1.0


def test_release_that_lacks_a_model_says_so(target):
    model = replace(MODELS["deepseek-r1"], architecture="NoSuchForCausalLM")
    with pytest.raises(Unsupported, match="has no NoSuchForCausalLM"):
        target.classify(model)


#: By the first release that behaves so: Gemma 4 has a routing function of its own, and Llama 4 the
#: weight on the experts' input.
HISTORY = {
    ("gemma-4-26b-a4b", "nvfp4"): {"0.5.13": "wrong", "0.5.18": "wrong", "0.5.23": "fallback"},
    ("llama-4-scout", "fp8_per_tensor"): {
        "0.5.9": "exact",
        "0.5.13": "crash",
        "0.5.18": "crash",
        "0.5.23": "wrong",
    },
    ("minimax-m2", "nvfp4"): {
        "0.5.9": "missed",
        "0.5.13": "wrong",
        "0.5.18": "wrong",
        "0.5.23": "missed",
    },
    # The bf16 call has no clamp; that of FP8 is prepared while weights are loaded.
    ("glm-5.3-flash", "bf16"): dict.fromkeys(["0.5.20", "0.5.22", "0.5.23"], "wrong"),
    ("glm-5.3-flash", "fp8_block"): dict.fromkeys(["0.5.20", "0.5.22", "0.5.23"], "exact"),
    ("glm-5.3-flash", "nvfp4"): dict.fromkeys(["0.5.20", "0.5.22", "0.5.23"], "exact"),
    ("gpt-oss-20b", "nvfp4"): {"0.5.18": "wrong", "0.5.22": "wrong", "0.5.23": "missed"},
    # The named runner fails on what SGLang's router chose, until it takes that.
    ("kimi-linear-48b-a3b", "bf16"): {"0.5.18": "crash", "0.5.22": "crash", "0.5.23": "missed"},
    # An assertion in the forward pass.
    ("llama-4-scout", "bf16"): dict.fromkeys(["0.5.18", "0.5.22", "0.5.23"], "crash"),
    ("longcat-flash", "bf16"): {"0.5.18": "crash", "0.5.22": "crash", "0.5.23": "fallback"},
    ("nemotron-3-super", "nvfp4"): {"0.5.13": "exact", "0.5.18": "exact", "0.5.23": "exact"},
    ("qwen3-235b-a22b", "fp8_block"): dict.fromkeys(
        ["0.5.9", "0.5.13", "0.5.18", "0.5.23"], "exact"
    ),
}


@pytest.mark.parametrize(("model", "scheme"), HISTORY)
def test_release_history(target, model, scheme):
    """Verdicts confirmed by reading these releases' sources."""
    expected = HISTORY[model, scheme].get(target.version())
    if expected is None:
        pytest.skip(f"the verdict on {model} in {target} was not confirmed by reading")
    found = judge(target, MODELS[model], scheme)
    assert found.verdict == expected, "\n".join(story(found.record()))


ROUNDED = [
    "the float32 bias is downcast to bfloat16 before the call",
    "the float32 router logits are downcast to bfloat16 before the call",
]


@pytest.mark.parametrize(
    ("model", "findings"),
    [("deepseek-r1", []), ("qwen3-30b-a3b", []), ("kimi-linear-48b-a3b", ROUNDED)],
)
def test_release_asks_its_topk_for_the_models_router(target, model, findings):
    """Kimi-Linear's gate and bias are made in the model's dtype (models/kimi_linear.py)."""
    if Version(target.version()) < Version("0.5.18"):
        pytest.skip("this was not confirmed by reading")
    found = compare_request(MODELS[model], target.layer_request(MODELS[model]))
    assert code_sentences(found) == findings


#: What SGLang's code of DeepSeek-V3 asks of its TopK.
R1 = {
    "block": "a.Block",
    "captured": False,
    "num_experts": 256,
    "sizes": {},
    "config_class": "",
    "top_k": 8,
    "use_grouped_topk": True,
    "num_expert_group": 8,
    "topk_group": 4,
    "renormalize": True,
    "scoring_func": "softmax",
    "routed_scaling_factor": None,
    "bias_dtype": "float32",
    "bias_is_loaded": True,
    "logits_dtype": "float32",
    "gate_dtypes": ["float32"],
    "router_weight_dtypes": ["bfloat16", "float32"],
    "on_input": False,
    "output_factor": 2.5,
    "experts": {
        "activation": "silu",
        "is_gated": True,
        "has_bias": False,
        "gemm1_alpha": None,
        "gemm1_clamp_limit": None,
        "swiglu_limit": None,
    },
    "custom_routing": None,
    "choice_problem": None,
    "choice_unknown": None,
}


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({}, ""),
        ({"output_factor": 2.5 * (1 + 2**-9)}, ""),
        (
            {"output_factor": 1.0},
            "routed_scaling_factor: the model has 2.5, the model code asks for 1 (",
        ),
        (
            {"routed_scaling_factor": 2.5},
            "routed_scaling_factor: the model has 2.5, the model code asks for 6.25",
        ),
        ({"renormalize": False}, "renormalize: the model has sum, the model code asks for none"),
        ({"num_expert_group": None}, "n_group: the model has 8, the model code asks for 1"),
        ({"bias_dtype": None}, "correction bias: the model has yes, the model code asks for no"),
        ({"bias_is_loaded": False}, "bias arrives as a copy that was made before the checkpoint's"),
        (
            {"on_input": True},
            "router weight side: the model has output, the model code asks for input",
        ),
    ],
)
def test_what_a_block_asks_of_its_topk_is_compared_with_the_router(changed, problem):
    model = MODELS["deepseek-r1"]
    found = code_sentences(compare_request(model, request_of({**R1, **changed}, model)))
    assert any(text.startswith(problem) for text in found) if problem else found == []


@pytest.mark.parametrize(
    ("model", "scheme", "runner", "is_default"),
    [
        ("deepseek-r1", "fp8_block", "flashinfer_trtllm", True),
        ("qwen3-30b-a3b", "nvfp4", "flashinfer_trtllm", True),
        # SGLang names the runner that is given experts and weights.
        ("minimax-m2", "nvfp4", "flashinfer_trtllm_routed", False),
        # It names none, and the layer chooses: another one, or TRT-LLM with experts that SGLang's
        # own router chooses.
        ("mixtral-8x22b", "bf16", "triton", False),
        ("llama-4-scout", "fp8_block", "triton", False),
        ("llama-4-scout", "nvfp4", "flashinfer_trtllm", False),
        ("llama-4-scout", "fp8_per_tensor", "flashinfer_trtllm", True),
    ],
)
def test_release_chooses_the_runner_or_has_to_be_told(target, model, scheme, runner, is_default):
    """Confirmed by reading arg_groups/overrides.py and model_overrides of 0.5.18 to 0.5.23.

    A layer's own choice is in `create_moe_runner` of its quantization method.
    """
    if Version(target.version()) < Version("0.5.18"):
        pytest.skip("this release chooses runners in another way")
    switch = () if is_default else ("--moe-runner-backend flashinfer_trtllm",)
    assert target.chosen_runner(MODELS[model], scheme) == runner
    record = judge(target, MODELS[model], scheme).record()
    assert (record.opt_in, record.by_default, record.reach_question) == (switch, is_default, "")
    assert (record.reach == "only with an opt-in switch") is (not is_default)


def test_a_release_whose_choice_cannot_be_asked_has_an_open_question(target):
    if Version(target.version()) >= Version("0.5.18"):
        pytest.skip("this release chooses runners in a way that is known")
    record = judge(target, MODELS["deepseek-r1"], "fp8_block").record()
    assert (record.opt_in, record.by_default) == ((), False)
    assert "chooses runners in a way that the probe does not know" in record.reach_question


class Records(BuiltinTarget):
    """Lets everything through; its calls are recorded, with one routing method for all."""

    method = ""

    def gates(self, model, scheme, method):
        return (Gate("anything goes", True),)

    def capture(self, model, scheme, method):
        return Captured(kernel_call(model.router, scheme, self.method, self.flashinfer))


def test_a_recorded_call_is_judged_as_far_as_the_router_can_be_said():
    gemma, target = MODELS["gemma-4-26b-a4b"], Records(FlashInfer.of("0.6.17"))
    target.method = "Default"
    found = judge(target, gemma, "nvfp4")
    assert found.verdict == "wrong"
    assert sentence(found.findings[0]) == "renormalize: the router has sum, the kernel none"
    # The nearest recipe is met; who applies the experts' own scales is not known.
    target.method = "RenormalizeNaive"
    with pytest.raises(Unsupported, match="cannot be judged"):
        judge(target, gemma, "nvfp4")
