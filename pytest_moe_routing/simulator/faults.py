"""What has gone wrong in real kernels, as changes of the simulated ones, one at a time.

The table is read twice: `docs/gpu-faults.md` says which GPU test catches which fault, and a test
that fails on a real GPU names the faults that explain what it saw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pytest_moe_routing.simulator import changes
from pytest_moe_routing.simulator.changes import Context


@dataclass(frozen=True)
class Fault:
    """One way in which kernels have been wrong.

    Attributes:
        name: Its key in `FAULTS`.
        stage: Where in the simulator the change is made.
        change: From what is right there, and the call, to what is wrong.
        what: In words, for tables and diagnoses.
        imitates: The public report.
        test: The suite's test that is known to catch it.
    """

    name: str
    stage: str
    change: Callable[[Any, Context], Any]
    what: str
    imitates: str
    test: str


FAULTS: Mapping[str, Fault] = {
    fault.name: fault
    for fault in (
        Fault(
            "all-negative",
            "route",
            changes.all_negative,
            "unwritten slots hold 0 and beat negative logits",
            "flashinfer issue 2822",
            "test_gpu_routing.py::test_model[qwen3.5-122b-a10b-all-negative-float32-float32]",
        ),
        Fault(
            "mask-zero",
            "route",
            changes.masked_with(0.0),
            "excluded groups are masked with 0",
            "vllm PR 13474",
            "test_gpu_routing.py::test_model[deepseek-r1-bias-below-minus-1-float32-float32]",
        ),
        Fault(
            "mask-minus-one",
            "route",
            changes.masked_with(-1.0),
            "excluded groups are masked with -1",
            "flashinfer PR 2168",
            "test_gpu_routing.py::test_model[deepseek-r1-bias-below-minus-1-float32-float32]",
        ),
        Fault(
            "higher-ties",
            "route",
            changes.higher_ties,
            "equal scores go to the higher index",
            "sglang PR 31001",
            "test_gpu_routing.py::test_model[qwen3-235b-a22b-ties-at-k-float32-float32]",
        ),
        Fault(
            "nan-rows",
            "route",
            changes.nan_rows,
            "a token with a NaN logit gets expert 0 several times",
            "vllm PR 39391",
            "test_gpu_routing.py::test_model[qwen3-235b-a22b-not-finite-float32-float32]",
        ),
        Fault(
            "nan-beyond",
            "route",
            changes.nan_beyond,
            "a token of bfloat16 NaN gets experts that do not exist, below the compiled tier",
            "flashinfer 0.7.2.post1, docs/findings.md",
            "test_gpu_routing.py::test_model[gpt-oss-20b-not-finite-bfloat16-float32]",
        ),
        Fault(
            "cancelled-bias",
            "route",
            changes.cancelled,
            "weights are recovered as (score + bias) - bias",
            "flashinfer PR 3875",
            "test_gpu_routing.py::test_large_bias[kimi-k2-float32]",
        ),
        Fault(
            "bias-as-bfloat16",
            "bias",
            changes.as_bfloat16,
            "a float32 bias is read as bfloat16",
            "flashinfer PR 2909",
            "test_gpu_routing.py::test_model[deepseek-r1-plain-float32-float32]",
        ),
        Fault(
            "logits-as-float32",
            "logits",
            changes.as_float32,
            "bfloat16 logits are read as float32",
            "flashinfer PR 2889",
            "test_gpu_routing.py::test_model[deepseek-r1-plain-bfloat16-float32]",
        ),
        Fault(
            "rounded-logits",
            "logits",
            changes.rounded,
            "logits are rounded to bfloat16 before the choice",
            "sglang PR 29783",
            "test_gpu_routing.py::test_model[kimi-k2-near-ties-float32-float32]",
        ),
        Fault(
            "rounded-bias",
            "recipe",
            changes.recipe(bias_dtype="bfloat16"),
            "the bias is rounded to bfloat16 before it is added",
            "TensorRT-LLM PR 13294",
            "test_gpu_routing.py::test_model[kimi-k2-narrow-bias-float32-float32]",
        ),
        Fault(
            "no-bias",
            "recipe",
            changes.recipe(bias=False),
            "the correction bias is ignored",
            "TensorRT-LLM PR 12246",
            "test_gpu_routing.py::test_model[kimi-k2-plain-float32-float32]",
        ),
        Fault(
            "scale-one",
            "recipe",
            changes.recipe(scale=1.0),
            "the routed scaling factor is taken as 1",
            "flashinfer PR 3499",
            "test_gpu_routing.py::test_model[deepseek-r1-plain-float32-float32]",
        ),
        Fault(
            "no-groups",
            "recipe",
            changes.recipe(n_group=1, topk_group=1),
            "groups are ignored",
            "vllm PR 44007",
            "test_gpu_routing.py::test_model[deepseek-r1-plain-float32-float32]",
        ),
        Fault(
            "no-sum",
            "recipe",
            changes.no_sum,
            "weights are not divided by their sum",
            "flashinfer PR 2889",
            "test_gpu_routing.py::test_method[SigmoidRenorm-128-8-float32]",
        ),
        Fault(
            "no-epsilon",
            "recipe",
            changes.no_epsilon,
            "no epsilon: scores that all underflow to 0 make NaN",
            "flashinfer PR 3803, 3946",
            "test_gpu_routing.py::test_model[kimi-k2-below-minus-100-float32-float32]",
        ),
        Fault(
            "above-255",
            "logits",
            changes.first_256,
            "experts from 256 on are never chosen",
            "kekzl/imp PR 2056",
            "test_gpu_routing.py::test_model[kimi-k2-hot-expert-float32-float32]",
        ),
        Fault(
            "missing-tier",
            "launched",
            changes.no_tier,
            "no compiled tier is large enough, a warning, and buffers are left unwritten",
            "flashinfer 0.6.8 to 0.6.15",
            "test_gpu_routing.py::test_model[nemotron-3-super-plain-float32-float32]",
        ),
        Fault(
            "rank-0-permutation",
            "shard",
            changes.rank_0,
            "the permutation takes local experts for those of rank 0",
            "flashinfer PR 1398",
            "test_gpu_routing.py::test_expert_parallel_shard[qwen3-235b-a22b-8-1]",
        ),
        Fault(
            "zeros-off-rank-0",
            "output",
            changes.zeros_off_rank_0,
            "the output is 0 where local_expert_offset is not",
            "flashinfer issue 3547",
            "test_gpu_moe.py::test_expert_parallel_shard[bf16-1]",
        ),
        Fault(
            "global-index",
            "local",
            changes.global_index,
            "local weights are indexed by global expert numbers",
            "vllm-gaudi PR 1796, vllm PR 34270",
            "test_gpu_moe.py::test_expert_parallel_shard[fp8_block-1]",
        ),
        Fault(
            "everyone-local",
            "local",
            changes.everyone_local,
            "slots of other ranks' experts wrap around to local ones",
            "vllm PR 46408",
            "test_gpu_moe.py::test_expert_parallel_shard[nvfp4-1]",
        ),
        Fault(
            "linear-scales",
            "memory",
            changes.linear_scales,
            "weight scales in 128x4 tiles are read row by row",
            "flashinfer PR 4741",
            "test_gpu_moe.py::test_scheme[nvfp4-silu]",
        ),
        Fault(
            "tuned-scales",
            "memory",
            changes.tuned_scales,
            "a tactic under autotuning reads weight scales row by row",
            "flashinfer PR 4741",
            "test_gpu_moe.py::test_autotuned[nvfp4]",
        ),
        Fault(
            "unshuffled-rows",
            "memory",
            changes.memory(shuffled=0),
            "rows of weights are read as if they had not been shuffled",
            "flashinfer trtllm_fp8_block_scale_moe, use_shuffled_weight",
            "test_gpu_moe.py::test_layout[shuffled]",
        ),
        Fault(
            "gate-first",
            "memory",
            changes.memory(up_first=False),
            "gate rows are taken for up rows, and the reverse",
            "vllm stores [w1; w3], the kernels want [w3; w1]",
            "test_gpu_moe.py::test_scheme[bf16-silu]",
        ),
        Fault(
            "transposed-input-scales",
            "input scales",
            changes.transposed,
            "block scales of the hidden states are read transposed",
            "flashinfer launchers do not check strides",
            "test_gpu_moe.py::test_scheme[fp8_block-silu]",
        ),
        Fault(
            "one-scalar",
            "arguments",
            changes.scale_gate_only,
            "the gate's scalar is used for the product too",
            "flashinfer output1_scale_scalar, output1_scale_gate_scalar",
            "test_gpu_moe.py::test_scheme[fp8_per_tensor-silu]",
        ),
        Fault(
            "unclamped",
            "arguments",
            changes.unclamped,
            "the activation's clamp is dropped",
            "TensorRT-LLM PR 13767, vllm issue 43589",
            "test_gpu_moe.py::test_clamp[bf16]",
        ),
        Fault(
            "physical-limit",
            "arguments",
            changes.physical_limit,
            "the clamp is compared with accumulators, but is in dequantized units",
            "flashinfer batched GEMM interface, mPtrClampLimit",
            "test_gpu_moe.py::test_clamp[nvfp4]",
        ),
        Fault(
            "no-expert-bias",
            "arguments",
            changes.no_bias,
            "biases of the experts are dropped",
            "vllm PR 44007",
            "test_gpu_moe.py::test_biases_of_experts[mxfp4]",
        ),
        Fault(
            "packed-small-batch",
            "packed",
            changes.packed_small,
            "packed weights are misread in batches of up to 4 tokens",
            "flashinfer PR 2049",
            "test_gpu_moe.py::test_scheme[mxint4-silu]",
        ),
        Fault(
            "mislabelled-weights",
            "label",
            changes.mislabelled,
            "bfloat16 weights are returned as float32",
            "flashinfer issue 3595",
            "test_gpu_moe.py::test_model[deepseek-r1-fp8_block]",
        ),
        Fault(
            "unweighted",
            "finalize",
            changes.unweighted,
            "router weights are not applied",
            "vllm-xpu-kernels PR 66",
            "test_gpu_moe.py::test_scheme[mxfp8-silu]",
        ),
        Fault(
            "weighted-twice",
            "finalize",
            changes.weighted_twice,
            "router weights are applied on the input and on the output",
            "vllm PR 43694",
            "test_gpu_moe.py::test_weight_on_the_input",
        ),
        Fault(
            "scaled-again",
            "finalize",
            changes.scaled_again,
            "the routed scaling factor is applied to weights that hold it already",
            "vllm PR 24118, 45037",
            "test_gpu_moe.py::test_scheme[bf16-silu]",
        ),
        Fault(
            "second-tile",
            "rows",
            changes.large_batches,
            "rows from the second tile of tokens on are another token's",
            "flashinfer issue 3559",
            "test_gpu_moe.py::test_scheme[mxfp4-silu]",
        ),
        Fault(
            "zero-expert",
            "rows",
            changes.not_a_number,
            "an expert whose numbers are all 0 gives NaN",
            "flashinfer PR 2238",
            "test_gpu_moe.py::test_zero_expert[nvfp4]",
        ),
    )
}
