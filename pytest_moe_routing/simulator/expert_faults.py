"""Faults behind the routing: expert parallelism, weights in memory, the weighted sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.reference.shard import Shard
from pytest_moe_routing.simulator.stages import Context, Fault, Stage


def _rank_0(shard: Shard, _: Context) -> Shard:
    return replace(shard, local_expert_offset=0)


def _zeros_off_rank_0(output: Tensor, c: Context) -> Tensor:
    return torch.zeros_like(output) if c.shard.local_expert_offset else output


def _global_index(local: Tensor, c: Context) -> Tensor:
    """Local weights are indexed with the expert's global number."""
    return local + c.shard.local_expert_offset


def _everyone_local(local: Tensor, c: Context) -> Tensor:
    return local % c.shard.local_num_experts


def _memory(**fields: Any) -> Callable[[Any, Context], Any]:
    def change(memory: Any, _: Context) -> Any:
        return replace(memory, **fields)

    return change


def _linear_scales(memory: Any, _: Context) -> Any:
    return replace(memory, scales="linear") if memory.scales == "tiles" else memory


def _tuned_scales(memory: Any, c: Context) -> Any:
    return _linear_scales(memory, c) if c.tuning else memory


def _transposed(scales: Tensor, c: Context) -> Tensor:
    if c.scheme != "fp8_block":
        return scales
    return scales.T.contiguous().view(scales.shape)


def _unclamped(given: dict[str, Any], _: Context) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name != "gemm1_clamp_limit"}


def _physical_limit(given: dict[str, Any], _: Context) -> dict[str, Any]:
    """Take the limit as one of dequantized numbers, though accumulators are compared."""
    limit, gate = given.get("gemm1_clamp_limit"), given.get("output1_scale_gate_scalar")
    if limit is None or gate is None:
        return given
    return {**given, "gemm1_clamp_limit": limit * gate}


def _scale_gate_only(given: dict[str, Any], _: Context) -> dict[str, Any]:
    """One scalar dequantizes both halves, and the intermediate is not quantized with its own."""
    for name in ("scale", "scales"):
        if given.get(f"output1_{name}_gate_scalar") is not None:
            gate = given[f"output1_{name}_gate_scalar"]
            return {**given, f"output1_{name}_scalar": gate}
    return given


def _no_bias(given: dict[str, Any], _: Context) -> dict[str, Any]:
    return {**given, "gemm1_bias": None, "gemm2_bias": None}


def _packed_small(topk: Tensor, _: Context) -> Tensor:
    """In a small batch the bits of weights are taken from the next slot."""
    if len(topk) > 4:
        return topk
    return (topk >> 16 << 16) | (topk.roll(1, 1) & 0xFFFF)


def _mislabelled(weights: Tensor, _: Context) -> Tensor:
    """bfloat16 bits in a buffer that is called float32."""
    half = weights.contiguous().view(torch.int16).flatten()
    padded = torch.cat((half, torch.zeros_like(half)))
    return padded.view(torch.float32).view(weights.shape)


def _unweighted(weights: Tensor, _: Context) -> Tensor:
    return torch.ones_like(weights)


def _weighted_twice(weights: Tensor, c: Context) -> Tensor:
    """Apply the weight on the input, and once more on the output."""
    assert c.routing is not None
    if not c.given.get("use_routing_scales_on_input"):
        return weights
    return c.routing.topk_weights.to(torch.float32)


def _scaled_again(weights: Tensor, c: Context) -> Tensor:
    return weights * (c.given["routed_scaling_factor"] or 1.0) if c.routed else weights


def _large_batches(rows: Tensor, _: Context) -> Tensor:
    """From the second tile of tokens on, rows are those of the token one tile before."""
    return torch.cat((rows[:8], rows[:-8])) if len(rows) > 8 else rows


def _not_a_number(rows: Tensor, _: Context) -> Tensor:
    """Where an expert's numbers are all 0, its scale is 0 too, and 0 / 0 is not."""
    return rows.masked_fill((rows == 0).all(-1, keepdim=True), torch.nan)


EXPERT_FAULTS = (
    Fault(
        "rank-0-permutation",
        Stage.SHARD,
        _rank_0,
        "the permutation treats local experts as those of rank 0",
        "flashinfer PR 1398",
        "test_gpu_routing.py::test_expert_parallel_shard[qwen3-235b-a22b-8-1]",
    ),
    Fault(
        "zeros-off-rank-0",
        Stage.OUTPUT,
        _zeros_off_rank_0,
        "the output is 0 whenever local_expert_offset is not 0",
        "flashinfer issue 3547",
        "test_gpu_moe.py::test_expert_parallel_shard[bf16-1]",
    ),
    Fault(
        "global-index",
        Stage.LOCAL,
        _global_index,
        "local weights are indexed by global expert numbers",
        "vllm-gaudi PR 1796, vllm PR 34270",
        "test_gpu_moe.py::test_expert_parallel_shard[fp8_block-1]",
    ),
    Fault(
        "everyone-local",
        Stage.LOCAL,
        _everyone_local,
        "slots of other ranks' experts wrap around to local ones",
        "vllm PR 46408",
        "test_gpu_moe.py::test_expert_parallel_shard[nvfp4-1]",
    ),
    Fault(
        "linear-scales",
        Stage.MEMORY,
        _linear_scales,
        "weight scales in 128x4 tiles are read row by row",
        "flashinfer PR 4741",
        "test_gpu_moe.py::test_scheme[nvfp4-silu]",
    ),
    Fault(
        "tuned-scales",
        Stage.MEMORY,
        _tuned_scales,
        "a tactic under autotuning reads weight scales row by row",
        "flashinfer PR 4741",
        "test_gpu_moe.py::test_autotuned[nvfp4]",
    ),
    Fault(
        "unshuffled-rows",
        Stage.MEMORY,
        _memory(shuffled=0),
        "rows of weights are read as if they had not been shuffled",
        "flashinfer trtllm_fp8_block_scale_moe, use_shuffled_weight",
        "test_gpu_moe.py::test_layout[shuffled]",
    ),
    Fault(
        "gate-first",
        Stage.MEMORY,
        _memory(up_first=False),
        "gate rows are read as up rows, and vice versa",
        "vllm stores [w1; w3], the kernels want [w3; w1]",
        "test_gpu_moe.py::test_scheme[bf16-silu]",
    ),
    Fault(
        "transposed-input-scales",
        Stage.INPUT_SCALES,
        _transposed,
        "block scales of the hidden states are read transposed",
        "flashinfer launchers do not check strides",
        "test_gpu_moe.py::test_scheme[fp8_block-silu]",
    ),
    Fault(
        "one-scalar",
        Stage.ARGUMENTS,
        _scale_gate_only,
        "the gate's scale is also used for the product",
        "flashinfer output1_scale_scalar, output1_scale_gate_scalar",
        "test_gpu_moe.py::test_scheme[fp8_per_tensor-silu]",
    ),
    Fault(
        "unclamped",
        Stage.ARGUMENTS,
        _unclamped,
        "the activation's clamp is dropped",
        "TensorRT-LLM PR 13767, vllm issue 43589",
        "test_gpu_moe.py::test_clamp[bf16]",
    ),
    Fault(
        "physical-limit",
        Stage.ARGUMENTS,
        _physical_limit,
        "the clamp is in dequantized units, but is compared with raw accumulators",
        "flashinfer batched GEMM interface, mPtrClampLimit",
        "test_gpu_moe.py::test_clamp[nvfp4]",
    ),
    Fault(
        "no-expert-bias",
        Stage.ARGUMENTS,
        _no_bias,
        "biases of the experts are dropped",
        "vllm PR 44007",
        "test_gpu_moe.py::test_biases_of_experts[mxfp4]",
    ),
    Fault(
        "packed-small-batch",
        Stage.PACKED,
        _packed_small,
        "packed weights are misread in batches of up to 4 tokens",
        "flashinfer PR 2049",
        "test_gpu_moe.py::test_scheme[mxint4-silu]",
    ),
    Fault(
        "mislabeled-weights",
        Stage.LABEL,
        _mislabelled,
        "bfloat16 weights are returned as float32",
        "flashinfer issue 3595",
        "test_gpu_moe.py::test_model[deepseek-r1-fp8_block]",
    ),
    Fault(
        "unweighted",
        Stage.FINALIZE,
        _unweighted,
        "router weights are not applied",
        "vllm-xpu-kernels PR 66",
        "test_gpu_moe.py::test_scheme[mxfp8-silu]",
    ),
    Fault(
        "weighted-twice",
        Stage.FINALIZE,
        _weighted_twice,
        "router weights are applied on the input and on the output",
        "vllm PR 43694",
        "test_gpu_moe.py::test_weight_on_the_input",
    ),
    Fault(
        "scaled-again",
        Stage.FINALIZE,
        _scaled_again,
        "the routed scaling factor is applied to weights that already include it",
        "vllm PR 24118, 45037",
        "test_gpu_moe.py::test_scheme[bf16-silu]",
    ),
    Fault(
        "second-tile",
        Stage.ROWS,
        _large_batches,
        "from the second tile of tokens on, each token gets another token's rows",
        "flashinfer issue 3559",
        "test_gpu_moe.py::test_scheme[mxfp4-silu]",
    ),
    Fault(
        "zero-expert",
        Stage.ROWS,
        _not_a_number,
        "an expert whose weights are all 0 outputs NaN",
        "flashinfer PR 2238",
        "test_gpu_moe.py::test_zero_expert[nvfp4]",
    ),
)
