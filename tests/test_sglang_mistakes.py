"""A release of SGLang with mistakes put into it, each found by the question about it."""

from __future__ import annotations

import pytest
from sglang_targets import opened
from told import code_sentences
from wheels import unpack, wheels_since

from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.around import Answer, Request
from pytest_moe_routing.oracle.judge import judge
from pytest_moe_routing.oracle.layouts import wrong_layouts
from pytest_moe_routing.oracle.model_code import compare_request
from pytest_moe_routing.oracle.moved import moved_placements
from pytest_moe_routing.oracle.other_experts import other_calls
from pytest_moe_routing.oracle.verdict import Verdict
from pytest_moe_routing.report.text import sentences
from pytest_moe_routing.suite.causes import of_layout, of_other_experts
from pytest_moe_routing.suite.placements import of_moved

MODELS = load_models(packaged_directory())
CHANNEL = "fp8_per_channel"
RUNNER = "layers/moe/moe_runner/flashinfer_trtllm.py"
#: What the FP8 runner of 0.5.23 does for placed experts, and the line that earlier releases have.
PLACED = "        or topk_output.expert_location_dispatch_info is not None\n"
LOGITS = "        router_logits = topk_output.router_logits\n        topk_config = topk_output.topk_config"
RAISES = """        if topk_output.expert_location_dispatch_info is not None:
            raise NotImplementedError("placed experts")
"""
GATE = """            router_logits = torch.matmul(
                hidden_states.to(torch.float32), self.gate.weight.t().to(torch.float32)
            )
"""
BF16_GATE = """            router_logits = torch.matmul(
                hidden_states, self.gate.weight.t().to(hidden_states.dtype)
            ).to(torch.float32)
"""


def edit(root, file, *edits):
    """Make the first of some edits that fits the file."""
    path = root / "sglang/srt" / file
    text = path.read_text()
    before, after = next(pair for pair in edits if pair[0] in text)
    path.write_text(text.replace(before, after))


#: The runner is named for a quantization no longer, and the layer takes it by itself.
NAMED = '["fp8", "modelopt_fp8", "modelopt_fp4", "modelopt_mixed"]'
#: Factors of the first GEMM that change places, and one of the second that is not dequantized.
OUTPUTS = """output1_scales_scalar=quant_info.output1_scales_scalar,
{0}output1_scales_gate_scalar=quant_info.output1_scales_gate_scalar,
"""
SWAPPED = """output1_scales_scalar=quant_info.output1_scales_gate_scalar,
{0}output1_scales_gate_scalar=quant_info.output1_scales_scalar,
"""
#: What the second half of the first GEMM is scaled by, whose beta is to be 1 then.
BETAS = (
    "else (1.0 / layer.g1_alphas_up).to(torch.float32)",
    "else (1.0 / layer.g1_alphas).to(torch.float32)",
)
GEMMS = ("gemm1", "gemm2")
INDENTS = (" " * 8, " " * 12)
ALPHAS = '"g2_alphas",\n            (w2_input_scale * layer.w2_weight_scale_2)'
WEIGHT = "F.linear(hidden_states.to(self.dtype), self.weight, None)"
ROUNDED_WEIGHT = WEIGHT.replace("weight,", "weight.bfloat16().to(self.dtype),")
#: Where what follows the CUTLASS kernel applies the factor, and applies it again.
SCALED = 'if quant_info.quant_type in ("bf16", "fp8"):\n'
SCALED_TWICE = "        output.mul_(runner_config.routed_scaling_factor or 1.0)\n"
#: What the quantizer of the input is given.
INPUT = '"w13_input_scale_quant",\n            (1 / w13_input_scale)'
#: What the FP8 kernel multiplies by, which is lost for a few tokens.
FACTOR = '"routed_scaling_factor": routed_scaling_factor,'
#: Marlin's runner applies the factor, so TopK does not; now TopK does as well.
LAYER = "layers/moe/fused_moe_triton/layer.py"
EXCEPTED = (
    ("not (runner_backend.is_marlin() or runner_backend.is_lora_marlin())", "True"),
    (").is_marlin()\n            )\n            or", ").is_auto()\n            )\n            or"),
)
#: A server with this runner keeps shared experts apart, now but for one scheme.
APART = 'if runner in ("flashinfer_trtllm", "experimental_sgl_trtllm")'

#: Sizes of the weights that change places while their rows are shuffled.
SIZES = (
    "        w2_weight.size(-2),  # hidden_size\n",
    "        intermediate_size,  # padded intermediate_size\n",
)

#: The clamp of DeepSeek V4's experts on Hopper, and the halves of gpt-oss' biases there.
LIMIT = "swiglu_limit=self._swiglu_limit_tensor"
HALF_OF_UP = "w13_bias_padded[:, :N_un] = w13_bias_up"
HALF_OF_GATE = "w13_bias_padded[:, N_pad : N_pad + N_un] = w13_bias_gate"


#: RTX Blackwell no longer gets the runner of gpt-oss.
GPT_OSS = ("is_sm120_supported() and is_mxfp4", "get_platform().is_sm120 and is_mxfp4")
#: What a config made of Mistral's own format has, which states no scoring function.
SCORE = 'config["scoring_func"] = "softmax"'
#: MiniMax-M2's servers look at the flag alone, rather than at what the checkpoint states.
DETECTED = (
    ('model_config_of(server_args).quantization == "modelopt_fp4"', "cfg"),
    ('server_args.get_model_config().quantization == "modelopt_fp4"', "server_args"),
)
#: A runner that has no kernel for compressed-tensors' FP8 per channel gets it by default.
GLM = 'quantization in {"modelopt_fp4", None}'
#: What may be served with the runner of experts that are given ids and weights, but for FP8.
ROUTED = '"flashinfer_trtllm_routed":'


def rejecting(server):
    """Return the line after which models that are not quantized lose that runner, and both."""
    line = f"a2a_backend = resolved_view({server}).moe_a2a_backend\n"
    told = f"(view := resolved_view({server})).quantization or view.moe_runner_backend"
    indent = " " * (8 if server == "self" else 4)
    return line, f'{line}{indent}assert a2a_backend != "flashinfer" or {told} != {ROUTED[:-1]}\n'


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    wheels = wheels_since("0.5.18", "sglang")
    root = unpack(wheels[-1], tmp_path_factory.mktemp("sglang")) if wheels else None
    if root is not None:
        edit(root, RUNNER, (PLACED, ""), (LOGITS, RAISES + LOGITS))
        edit(root, RUNNER, *((OUTPUTS.format(i), SWAPPED.format(i)) for i in INDENTS))
        edit(root, RUNNER, ("".join(SIZES), "".join(SIZES[::-1])))
        quantization = "layers/quantization/modelopt_quant.py"
        edit(root, quantization, (ALPHAS, ALPHAS.replace("w2_input_scale * ", "")))
        edit(root, quantization, (INPUT, INPUT.replace("1 / ", "")))
        edit(
            root, quantization, *((beta, "else torch.ones_like(layer.g1_alphas)") for beta in BETAS)
        )
        edit(
            root,
            "layers/quantization/mxfp4_flashinfer_cutlass_moe.py",
            (LIMIT, "swiglu_limit=None"),
        )
        for right, half in ((HALF_OF_UP, "gate"), (HALF_OF_GATE, "up")):
            wrong = f"{right.partition(' = ')[0]} = w13_bias_{half}"
            edit(root, "layers/quantization/mxfp4.py", (right, wrong))
        edit(root, "models/step3p5.py", (GATE, BF16_GATE))
        edit(root, "layers/moe/moe_runner/flashinfer_cutlass.py", (SCALED, SCALED + SCALED_TWICE))
        edit(root, "models/mimo_v2.py", (WEIGHT, ROUNDED_WEIGHT))
        lost = FACTOR.replace(",", " if len(hidden_states) > 8 else None,")
        edit(root, "layers/moe/flashinfer_trtllm_moe.py", (FACTOR, lost))
        edit(root, "arg_groups/overrides.py", (NAMED, NAMED.replace('"modelopt_fp4", ', "")))
        split = root / "sglang/srt/arg_groups/model_overrides/gpt_oss.py"
        file = "model_overrides/gpt_oss.py" if split.exists() else "overrides.py"
        edit(root, f"arg_groups/{file}", *((test, f"False and {test}") for test in GPT_OSS))
        mistral = "utils/hf_transformers/mistral_utils.py"
        edit(root, mistral, (SCORE, SCORE.replace("softmax", "sigmoid")))
        split = root / "sglang/srt/arg_groups/model_overrides/minimax_m2.py"
        file = "model_overrides/minimax_m2.py" if split.exists() else "overrides.py"
        flag = ((test, f'{of}.quantization == "modelopt_fp4"') for test, of in DETECTED)
        edit(root, f"arg_groups/{file}", *flag)
        split = root / "sglang/srt/arg_groups/moe_hook.py"
        path = split if split.exists() else root / "sglang/srt/server_args.py"
        before, assertion, after = path.read_text().partition(ROUTED)
        path.write_text(before + assertion + after.replace('"fp8",', "", 1))
        edit(root, path.relative_to(root / "sglang/srt"), *map(rejecting, ("self", "server_args")))
        split = root / "sglang/srt/arg_groups/model_overrides/glm4_moe.py"
        file = "model_overrides/glm4_moe.py" if split.exists() else "overrides.py"
        edit(root, f"arg_groups/{file}", (GLM, GLM.replace("None", 'None, "compressed-tensors"')))
        edit(root, "arg_groups/overrides.py", (APART, f'{APART} and view.quantization != "mxfp8"'))
        edit(root, LAYER, *EXCEPTED)
    yield from opened(root)


def test_a_factor_that_marlin_s_runner_applies_too(target):
    runs = [run for run in target.router_runs([MODELS["glm-4.7"]]) if "in nvfp4" in run.way]
    assert {deviation.kind for run in runs for deviation in run.deviations} == {"weights"}


def test_a_placement_that_fails_in_the_forward_pass_is_no_rejection(target):
    answer = target.around(MODELS["deepseek-r1"], "fp8_block", "DeepSeekV3")[Request.BALANCING]
    assert answer.answer is Answer.FAILED
    assert answer.why.startswith("NotImplementedError: ")
    assert "--enable-eplb" in answer.switches


def test_a_factor_that_is_lost_for_a_few_tokens(target):
    record = judge(target, MODELS["deepseek-r1"], "fp8_block").record()
    text = "routed_scaling_factor arrives as 1 (with 1 token), the layer has 2.5"
    assert (record.verdict, list(sentences(record.findings))) == ("wrong", [text])


def test_a_default_that_is_lost_names_the_function_and_what_is_used_now(target):
    rule = target.rule(MODELS["deepseek-r1"], "nvfp4", "DeepSeekV3", "")
    assert rule.name == "_deepseek_moe_quant_resolution"
    assert rule.source.startswith("sglang/srt/arg_groups/overrides.py:")
    assert rule.instead == (
        "SGLang's own top-k routes by default, and the layer takes flashinfer_trtllm by itself"
    )


def test_a_beta_that_is_not_scaled_reaches_a_published_checkpoint(target):
    model = MODELS["minimax-m3"]
    found = list(sentences(target.modular_findings(model, "nvfp4")))
    text = "gemm1_beta arrives as 1, the layer has 1 / (w1_scale * a1_scale)"
    assert [each for each in found if "gemm1_beta" in each] == [text]
    assert target.choice(model, "nvfp4", "MiniMax2", modular=True).switches == ()


@pytest.mark.parametrize(
    ("model", "scheme", "cause", "where", "now"),
    [
        (
            "deepseek-r1",
            "nvfp4",
            "monolithic:_deepseek_moe_quant_resolution",
            "10.0, 10.3, with tp, ep, ep+eplb",
            "--moe-runner-backend auto",
        ),
        (
            "gpt-oss-120b",
            "mxfp4",
            "mxfp4:",
            "12.0, with tp, ep, ep+eplb and 4 others",
            "--moe-runner-backend ",
        ),
        (
            "minimax-m2",
            "nvfp4",
            "modular:_minimax_m2_overrides",
            "10.0, 10.3, with tp, ep, ep+eplb",
            "--moe-runner-backend auto without --quantization",
        ),
        (
            "qwen3-30b-a3b",
            "fp8_block",
            "modular:",
            "10.0, 10.3, 12.0, with tp, ep, ep+eplb and ",
            "the server does not start: AssertionError: Invalid quantization 'fp8'",
        ),
    ],
)
def test_a_runner_that_is_lost_somewhere(target, model, scheme, cause, where, now):
    found = moved_placements(target, scheme, [MODELS[model]])
    failure, *others = [of_moved(target, scheme, moved) for moved in found.moved]
    assert not others, others
    assert failure.cause.startswith(f"lost-place:{cause}")
    assert failure.lines[2].startswith(f"  where    on compute capability {where}")
    assert failure.lines[5].startswith(f"  now      {now}")


def test_a_runner_that_is_lost_with_another_way_to_bring_tokens_to_experts(target):
    found = moved_placements(target, "bf16", [MODELS["qwen3-30b-a3b"]])
    failures = [of_moved(target, "bf16", moved) for moved in found.moved]
    # From 0.5.20 on, TRT-LLM's other runner is replaced by this one if tokens are dispatched.
    causes = [failure.cause.split(":")[1] for failure in failures]
    assert causes in (["modular"], ["modular", "replaced"])
    assert "--moe-a2a-backend flashinfer" in failures[0].lines[1]
    assert failures[0].lines[2].startswith("  where    on compute capability 10.0, with flashinfer")
    assert failures[0].lines[5].startswith("  now      the server does not start: AssertionError")
    assert "handle_a2a_moe" in failures[0].lines[6]


@pytest.mark.parametrize(
    ("model", "scheme", "runs"),
    [
        # gpt-oss in MXFP4 runs in CUTLASS's kernels on Hopper, if the runner is named.
        ("gpt-oss-120b", "mxfp4", True),
        ("nemotron-3-nano", "bf16", True),
        ("kimi-k3", "mxfp4", True),
        # It is in no kernel but TRT-LLM's, or nobody asks about it.
        ("deepseek-r1", "fp8_block", False),
        ("gpt-oss-20b", "mxfp4", False),
    ],
)
def test_which_models_must_reach_other_kernels(target, model, scheme, runs):
    assert target.runs_others(MODELS[model], scheme) is runs


def test_a_runner_that_is_not_lost(target):
    assert not moved_placements(target, "mxint4", [MODELS["qwen3-30b-a3b"]]).moved


@pytest.mark.parametrize(
    ("scheme", "problems"),
    [
        (
            "fp8_per_tensor",
            [
                "output1_scales_gate_scalar arrives as w1_scale * a1_scale / a2_scale, the layer "
                "has w1_scale * a1_scale",
                "output1_scales_scalar arrives as w1_scale * a1_scale, the layer has "
                "w1_scale * a1_scale / a2_scale",
            ],
        ),
        (
            "nvfp4",
            [
                "output2_scale_scalar arrives as w2_scale, the layer has w2_scale * a2_scale",
                "input_scale arrives as a1_scale, the layer has 1 / a1_scale",
            ],
        ),
        ("mxfp8", []),
    ],
)
def test_factors_that_are_not_what_the_kernel_takes_them_for(target, scheme, problems):
    record = judge(target, MODELS["qwen3-30b-a3b"], scheme).record()
    assert (record.verdict, list(sentences(record.findings))) == (
        "wrong" if problems else "exact",
        problems,
    )


def test_logits_of_a_bare_product_in_bfloat16_are_a_downcast(target):
    model = MODELS["step-3.5-flash"]
    found = compare_request(model, target.layer_request(model))
    text = "the float32 router logits are downcast to bfloat16 before the call"
    assert list(sentences(found.findings)) == [text]


def test_a_router_weight_that_is_rounded_before_the_product(target):
    model = MODELS["mimo-v2-flash"]
    found = compare_request(model, target.layer_request(model))
    text = "the router's weight, float32 in checkpoints, is downcast to bfloat16"
    assert list(sentences(found.findings)) == [text]


@pytest.mark.parametrize(("scheme", "times"), [("bf16", "twice"), ("nvfp4", None)])
def test_a_factor_that_is_applied_twice_behind_another_kernel(target, scheme, times):
    """In NVFP4, SGLang's router has it, and nothing follows the kernel."""
    call, *_ = target.other_experts(MODELS["deepseek-r1"], scheme)
    told = [text for text in sentences(call.findings) if text.startswith("routed_scaling_factor")]
    text = f"routed_scaling_factor is applied {times}; the layer applies it once"
    assert told == ([text] if times else [])
    assert call.switches == ("--moe-runner-backend flashinfer_cutlass",)


def test_a_config_that_is_made_of_mistrals_own_format(target):
    model = MODELS["mistral-large-3"]
    found = compare_request(model, target.layer_request(model))
    told = "scoring function: the model has identity, the model code asks for sigmoid"
    assert told in "\n".join(code_sentences(found))


def test_columns_of_shared_experts_are_no_logits(target):
    """Their first product is as wide as 64 logits; the gate itself is float32."""
    model = MODELS["glm-4.7-flash"]
    found = compare_request(model, target.layer_request(model))
    assert (found.request.gate_dtype, found.findings) == ("float32", ())


def test_shared_experts_that_a_server_no_longer_keeps_apart(target):
    """DeepSeek-R1 has one. In newer releases, SGLang's own router chooses among 257 experts then."""
    found = judge(target, MODELS["deepseek-r1"], "mxfp8")
    findings = found.findings
    if found.verdict is not Verdict.CRASH:
        assert found.lost_since
        findings = target.modular_findings(MODELS["deepseek-r1"], "mxfp8")
    text = "num_experts is 257, expected a multiple of 4 and more than top_k: "
    assert any(sentence.startswith(text) for sentence in sentences(findings))
    assert found.record().fails


def test_shared_experts_that_a_models_code_keeps_apart(target):
    """The code of Kimi-K2.5 does not put any among its 384 experts."""
    assert judge(target, MODELS["kimi-k2.5"], "mxfp8").call.num_experts == 384


def test_a_limit_that_is_lost_in_cutlass_kernels(target):
    """They run the experts by default: since 0.5.20 on Hopper, before on RTX Blackwell alone."""
    [wrong] = other_calls(target, "mxfp4", [MODELS["deepseek-v4-flash"]]).wrong
    text = "swiglu_limit arrives as inf, the layer has 10"
    assert list(sentences(wrong.findings)) == [text]
    device = "RTX Blackwell" if target.version() == "0.5.18" else "Hopper"
    assert (wrong.call.device, wrong.call.switches) == (device, ())


def test_biases_whose_halves_are_swapped_on_hopper(target):
    [wrong] = wrong_layouts(target, "mxfp4", [MODELS["gpt-oss-20b"]]).wrong
    at = wrong.at
    text = "fc1_expert_biases: gate and up halves are swapped"
    assert (at.device, at.switches, list(sentences(at.findings))) == (
        "Hopper",
        ("--moe-runner-backend flashinfer_mxfp4",),
        [text],
    )
    lines = of_layout(target, "mxfp4", wrong).lines
    assert lines[1].endswith("--moe-runner-backend flashinfer_mxfp4 on Hopper")


def test_sizes_that_change_places_while_weights_are_shuffled(target):
    wrong, *_ = wrong_layouts(target, "nvfp4", [MODELS["qwen3-30b-a3b"]]).wrong
    tensors = " and ".join(f"{gemm}_weights{of}" for gemm in GEMMS for of in ("", "_scale"))
    order = "its rows and columns lie in no order that a kernel reads"
    # Other mistakes are in the factors of the same call.
    assert next(sentences(wrong.at.findings)) == f"{tensors}: {order}"


def test_a_default_runner_that_cannot_serve_the_checkpoint(target):
    """What is so of GLM-4.5 by default is so of other models where the runner is named."""
    models = [MODELS["glm-4.5"], MODELS["deepseek-r1"]]
    found = {wrong.call.requests: wrong for wrong in other_calls(target, CHANNEL, models).wrong}
    assert [model.id for model in found[False].models] == ["glm-4.5"]
    assert [model.id for model in found[True].models] == ["deepseek-r1"]
    failure = of_other_experts(target, CHANNEL, found[False])
    where = "flashinfer_trtllm.py-fused_experts_none_to_flashinfer_trtllm"
    assert failure.cause == f"other-experts:raised-TypeError-in-{where}:flashinfer_trtllm-runner"
    assert "  reach    a checkpoint that anyone could produce, by default on Blackwell" in (
        failure.lines
    )
