"""The reference with error bars: how far a right kernel's output may lie from the exact one.

Every stage of `reference.moe` is run in float64, and next to it goes, element by element, the
largest deviation of a kernel that computes the same thing with its own order of summation, its own
sigmoid and its own roundings. Where a number is stored, the deviation becomes what storing can make
of it: nothing at all where no rounding boundary is in reach, a whole step where one is. So the
budget is exact where formats are coarse, and no constant in here was fitted to a kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_moe_routing.reference.layouts import unpack_nibbles
from pytest_moe_routing.reference.moe import (
    MoELayer,
    Stages,
    real_input,
    real_rows,
    run_expert,
    static,
    stored,
)
from pytest_moe_routing.reference.quantization import Quantized, dequantize, find_format, quantize
from pytest_moe_routing.reference.routing import Routing
from pytest_moe_routing.reference.shard import Shard
from pytest_moe_routing.reference.slots import slots_by_expert
from pytest_moe_routing.reference.weights import Expert, Experts


@dataclass(frozen=True)
class Arithmetic:
    """How a right kernel computes between the points where it stores numbers.

    Attributes:
        unit: Rounding unit of its accumulators: 2**-23, as tensor cores cut off what float32
            arithmetic would round.
        sigmoid: Largest absolute error of its sigmoid: FlashInfer is built with fast math, where it
            is made of `tanh.approx.f32`, whose relative error is 2**-11 (PTX ISA): 2.5e-4 here.
        intermediate: Relative error of the activation's result before it is quantized: half a step
            of bfloat16, which kernels with a separate activation go through.
        scaling: Relative error of a quotient by a scale: two approximate reciprocals.
        weights: Relative error of router weights: 0 where the kernel is given them, 2**-8 where it
            rounds its own to bfloat16.
        activated: Format that the activation's result is known to go through before it is
            quantized, as opposed to `intermediate`, which allows for any.
    """

    unit: float = 2.0**-23
    sigmoid: float = 2.5e-4
    intermediate: float = 2.0**-8
    scaling: float = 2.0**-22
    weights: float = 0.0
    activated: str = "float32"

    def accumulate(self, length: int) -> float:
        """Error of a sum of this many products, in units of the largest partial sum.

        Rounding adds up like a random walk; cutting off always goes one way, once for each step of
        an MMA instruction, which takes 16 products or more.
        """
        return self.unit * (math.sqrt(length) + length / 16)


#: What FlashInfer's kernels do when they are given the router weights.
FLASHINFER = Arithmetic()

#: A random walk stays below this many standard deviations; real steps are far below their bounds.
_DEVIATIONS = 4.0

#: Largest second derivative of x * sigmoid(x) (1/2) and gelu (0.8), halved: Taylor's remainder.
_CURVATURE = 0.4


@dataclass(frozen=True)
class Bounded:
    """Numbers and, element by element, how far a right kernel's may lie from them."""

    value: Tensor
    error: Tensor


def bounded_moe(
    hidden: Tensor | Quantized,
    experts: Experts,
    routing: Routing,
    layer: MoELayer,
    arithmetic: Arithmetic = FLASHINFER,
    *,
    shard: Shard | None = None,
    output: str = "bf16",
) -> Bounded:
    """Run `reference.moe.moe` in float64 with error bars: two tensors `[tokens, hidden]`.

    Arguments as for `moe`; `output` is the format of the result.
    """
    shard = shard or Shard.whole(len(experts))
    with torch.no_grad():
        x = real_input(hidden, layer, torch.float64)
        value, error, size = (torch.zeros_like(x) for _ in range(3))
        for number, tokens, weight in slots_by_expert(routing, len(experts), shard, torch.float64):
            rows = _expert(x[tokens], experts[number], layer, weight, arithmetic)
            if layer.weight_on == "output":
                weight = weight.unsqueeze(1)
                slip = arithmetic.weights * rows.value.abs()
                rows = Bounded(rows.value * weight, (rows.error + slip) * weight.abs())
            value.index_add_(0, tokens, rows.value)
            error.index_add_(0, tokens, rows.error)
            size.index_add_(0, tokens, rows.value.abs())
        error += arithmetic.unit * routing.topk_ids.shape[1] * size
        return _store(value, error, output, None, arithmetic)


def _expert(
    x: Tensor, expert: Expert, layer: MoELayer, weight: Tensor, arithmetic: Arithmetic
) -> Bounded:
    """One expert's stored rows for its tokens."""
    stages, intermediate = bounded_intermediate(x, expert, layer, weight, arithmetic)
    error = _product_error(
        intermediate.value, intermediate.error, expert.gemm2, stages.gemm2, arithmetic
    )
    return _store(stages.gemm2, error, layer.storage.gemm2, None, arithmetic)


def bounded_intermediate(
    x: Tensor, expert: Expert, layer: MoELayer, weight: Tensor, arithmetic: Arithmetic
) -> tuple[Stages, Bounded]:
    """Return the second GEMM's input, `[tokens, intermediate]`, and the exact reference's stages.

    Args:
        x: Real hidden states of the expert's tokens, float64 `[tokens, hidden]`.
        expert: Its weights.
        layer: What is computed.
        weight: Router weights `[tokens]`.
        arithmetic: How a right kernel computes.
    """
    storage, on_input = layer.storage, layer.weight_on == "input"
    stages = run_expert(x, expert, layer, weight if on_input else None)
    error1 = _product_error(x, None, expert.gemm1, stages.gemm1, arithmetic)
    if on_input:
        error1 = error1 * weight.abs().unsqueeze(1) + arithmetic.weights * stages.gemm1.abs()
    gemm1 = _store(stages.gemm1, error1, storage.gemm1, None, arithmetic)
    error = _activation_error(gemm1, layer, stages, arithmetic)
    result = Bounded(stages.activated, error)
    for format in (storage.activated, arithmetic.activated):
        result = _store(result.value, result.error, format, None, arithmetic)
    scale = expert.intermediate_scale
    return stages, _store(result.value, result.error, storage.intermediate, scale, arithmetic)


def _product_error(
    x: Tensor, error: Tensor | None, weight: Quantized, result: Tensor, arithmetic: Arithmetic
) -> Tensor:
    """Error of `x @ weight.T`: what the input brings, and what summation adds.

    Partial sums are about as large as the result, or as the sum of as many random products. Errors
    of the input's elements are either alike, which shifts the result by their relative size, or
    they are not, and add up like a random walk; in no case to more than the sum of all.
    """
    squares, walks, most = [], [], []
    for rows in real_rows(weight, torch.float64):
        squares.append(x.square() @ rows.T.square())
        if error is not None:
            walks.append(error.square() @ rows.T.square())
            most.append(error @ rows.T.abs())
    partial = result.abs() + _DEVIATIONS * torch.cat(squares, 1).sqrt()
    total = arithmetic.accumulate(weight.shape[1]) * partial
    if error is None:
        return total
    alike = error.sum(1, keepdim=True) / x.abs().sum(1, keepdim=True).clamp_min(1e-300)
    walk = alike * result.abs() + _DEVIATIONS * torch.cat(walks, 1).sqrt()
    return total + torch.minimum(walk, torch.cat(most, 1))


def _activation_error(
    x: Bounded, layer: MoELayer, stages: Stages, arithmetic: Arithmetic
) -> Tensor:
    """Error of the activation, from that of what it reads, its sigmoid and its own rounding."""
    act = layer.activation
    if act.gated:
        (gate, up), (gate_error, up_error) = x.value.chunk(2, -1), x.error.chunk(2, -1)
    else:
        gate, gate_error = x.value, x.error
    value = act.apply(gate)
    ends = [(act.apply(gate + side * gate_error) - value).abs() for side in (-1, 1)]
    error = torch.maximum(*ends) + _CURVATURE * max(act.alpha, 1.0) * gate_error.square()
    if act.function == "silu":
        error = error + arithmetic.sigmoid * (gate.abs() + gate_error)
    if act.gated:
        linear = act.linear(up)
        ends = [(act.linear(up + side * up_error) - linear).abs() for side in (-1, 1)]
        linear_error = torch.maximum(*ends)
        error = error * (linear.abs() + linear_error) + value.abs() * linear_error
    if layer.storage.activated != "float32":
        # Where the result is stored is known, and accounted for there.
        return error
    return error + arithmetic.intermediate * stages.activated.abs()


def _store(
    x: Tensor, error: Tensor, format: str, scale: float | None, arithmetic: Arithmetic
) -> Bounded:
    """Bound what is read back after a number within `error` of `x` was stored in a format."""
    if format == "float32":
        return Bounded(x, error)
    value = stored(x, format, scale)
    if format == "bf16":
        ends = [stored(x + side * error, format) for side in (-1, 1)]
        return Bounded(value, torch.maximum(*((end - value).abs() for end in ends)))
    error = error + arithmetic.scaling * x.abs()
    given = static(format, scale)
    if "scales" in given:
        ends = [stored(x + side * error, format, scale) for side in (-1, 1)]
        return Bounded(value, torch.maximum(*((end - value).abs() for end in ends)))
    return Bounded(value, _block_error(x, error, value, format, given))


def _block_error(
    x: Tensor, error: Tensor, value: Tensor, format: str, given: dict[str, Tensor]
) -> Tensor:
    """Deviation where a block's scale follows from the block, and may itself come out otherwise."""
    fmt = find_format(format)
    # Blocks that are all as small, and all as large, as they can be: the ends of their scales.
    small, large = (x.abs() - error).clamp_min(0), x.abs() + error
    overalls = [given.get("global_scale")]
    if fmt.by_row:
        overalls = [_overall(end, format) for end in (small, large)]
    elif fmt.scale == "e4m3" and not given:
        overalls = [_overall(x, format)]
    scales = [
        quantize(end, fmt, global_scale=overall).scales
        for end, overall in zip((small, large), (overalls[-1], overalls[0]), strict=True)
    ]
    ends = [
        quantize(x + side * error, fmt, scales=scale, global_scale=overall)
        for side in (-1, 1)
        for scale in scales
        for overall in overalls
    ]
    worst = torch.stack([(dequantize(end, x.dtype) - value).abs() for end in ends]).amax(0)
    if fmt.scale == "float32" or fmt.by_row:
        # Such a scale moves with its block's largest element, and all elements with it: where one
        # is rounded otherwise before that, the scale may be that of any place between the ends.
        continuous = overalls if fmt.by_row else scales
        low, high = (scale.to(x.dtype) for scale in continuous)  # type: ignore[union-attr]
        moves = ((high - low) / low).repeat_interleave(x.shape[-1] // low.shape[-1], -1)
        codes = torch.stack([end.data.view(torch.uint8) for end in ends])
        codes = unpack_nibbles(codes) if fmt.packed else codes
        worst = worst + moves * value.abs() * (codes != codes[0]).any(0)
    return worst


def _overall(x: Tensor, format: str) -> Tensor:
    found = quantize(x, format).global_scale
    assert found is not None
    return found
