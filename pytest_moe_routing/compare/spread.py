"""The reference with variances: how far a right kernel's output usually lies from it.

`compare.budget` bounds the worst that can happen to one element, so it cannot see what happens to
all elements alike. Here the same stages yield variances, from which `compare.aggregates` derives
how far sums over many elements may lie. The variances are those of Hoeffding's inequality: a
deviation within a range `r` counts as `r**2 / 4`, one that may have either sign as its square.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pytest_moe_routing.compare.budget import Arithmetic, bounded_intermediate
from pytest_moe_routing.reference.moe import (
    MoELayer,
    Stages,
    linear,
    real_input,
    real_rows,
    stored,
)
from pytest_moe_routing.reference.problem import MoEProblem
from pytest_moe_routing.reference.shard import Shard
from pytest_moe_routing.reference.slots import slots_by_expert
from pytest_moe_routing.reference.weights import Expert

#: Relative step of a numerical derivative in float64.
_STEP = 1e-6


@dataclass(frozen=True)
class Slots:
    """All tokens of one expert.

    Attributes:
        expert: Its number.
        tokens: int64 `[n]`.
        weight: `[n]`, what the second GEMM's rows are multiplied by.
        share: `[n, hidden]`, the expert's part of the output.
        inner: `[n, intermediate]`, variance of the second GEMM's input.
        shift: `[n, intermediate]`, deviation of the same that elements may have in common.
        carried: `[n, hidden]`, variance of the output that `inner` makes.
        variance: `[n, hidden]`, variance of `share`.
        drift: `[n]`, relative deviation of `share` that `shift` and other common errors make.
        pulls: Derivatives of the second GEMM's input, `[n, intermediate]`, by the logarithm of the
            gate rows of the first GEMM, and of its up rows.
        parameters: Derivatives of `share` by the logarithm of each parameter of the activation.
    """

    expert: int
    tokens: Tensor
    weight: Tensor
    share: Tensor
    inner: Tensor
    shift: Tensor
    carried: Tensor
    variance: Tensor
    drift: Tensor
    pulls: tuple[Tensor, ...]
    parameters: dict[str, Tensor]

    def divided_by(self, size: Tensor) -> Slots:
        """Return the same in units of each token's size, `[tokens of the problem, 1]`."""
        size = size[self.tokens]
        return replace(
            self,
            weight=self.weight / size.squeeze(1),
            share=self.share / size,
            carried=self.carried / size.square(),
            variance=self.variance / size.square(),
        )


@dataclass(frozen=True)
class Spread:
    """The output of right kernels.

    Attributes:
        value: `[tokens, hidden]`, the reference's.
        variance: `[tokens, hidden]`.
        drift: `[tokens, hidden]`, deviation that elements of a column may have in common.
        slots: What the output consists of, by expert.
        parameters: Derivatives of `value` by the logarithm of each parameter of the activation.
    """

    value: Tensor
    variance: Tensor
    drift: Tensor
    slots: tuple[Slots, ...]
    parameters: dict[str, Tensor]

    def divided_by(self, size: Tensor) -> Spread:
        """Return the same in units of each token's size, `[tokens, 1]`."""
        return Spread(
            self.value / size,
            self.variance / size.square(),
            self.drift / size,
            tuple(s.divided_by(size) for s in self.slots),
            {name: by / size for name, by in self.parameters.items()},
        )


def pipelines(problem: MoEProblem, arithmetic: Arithmetic) -> list[Arithmetic]:
    """Return the kinds of kernels that `Arithmetic.intermediate` allows for.

    A kernel rounds the activation's result to bfloat16 before it quantizes it, or does not: the
    same in all places. So its output is compared with either, and need not be allowed for both.
    """
    exact = replace(arithmetic, intermediate=0.0)
    storage = problem.layer.storage
    if not arithmetic.intermediate or "bf16" in (storage.activated, storage.intermediate):
        return [exact]
    return [exact, replace(exact, activated="bf16")]


def spread_moe(problem: MoEProblem, arithmetic: Arithmetic, *, output: str = "bf16") -> Spread:
    """Return the output of `reference.moe.moe` with its variances, all float64.

    Args:
        problem: What the kernel was given.
        arithmetic: How right kernels compute.
        output: Format of the result: `bf16` or `float32`.
    """
    shard = problem.shard or Shard.whole(len(problem.experts))
    with torch.no_grad():
        x = real_input(problem.hidden, problem.layer, torch.float64)
        value, variance, drift = (torch.zeros_like(x) for _ in range(3))
        slots = []
        parameters = {name: torch.zeros_like(x) for name in _parameters(problem.layer)}
        for number, tokens, weight in slots_by_expert(
            problem.routing, len(problem.experts), shard, torch.float64
        ):
            expert = problem.experts[number]
            part = _slots(x[tokens], expert, weight, problem.layer, arithmetic)
            part = replace(part, expert=number, tokens=tokens)
            value.index_add_(0, tokens, part.share)
            variance.index_add_(0, tokens, part.variance)
            drift.index_add_(0, tokens, part.share.abs() * part.drift.unsqueeze(1))
            for name, by in part.parameters.items():
                parameters[name].index_add_(0, tokens, by)
            slots.append(part)
        variance = _rounded(value, variance, output)
        return Spread(stored(value, output), variance, drift, tuple(slots), parameters)


def _slots(
    x: Tensor, expert: Expert, weight: Tensor, layer: MoELayer, arithmetic: Arithmetic
) -> Slots:
    stages, intermediate = bounded_intermediate(x, expert, layer, weight, arithmetic)
    # Where a rounding boundary is in reach, an element is off by one step, or by nothing: half the
    # step is its range, and the other half its mean, whose sign differs from element to element.
    inner = intermediate.error.square() / 2
    value, squared = intermediate.value, intermediate.value.square()
    parts = []
    for some in real_rows(expert.gemm2, x.dtype):
        columns, squares = some.T, some.T.square()
        parts.append((value @ columns, inner @ squares, squared @ squares))
    rows, carried, squares = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    if expert.bias2 is not None:
        rows = rows + expert.bias2.to(x.dtype)
    summing = arithmetic.accumulate(intermediate.value.shape[1])
    variance = carried + summing**2 * (squares + rows.square())
    variance = _rounded(rows, variance, layer.storage.gemm2)
    if layer.weight_on == "input":
        weight = torch.ones_like(weight)
    factor = weight.unsqueeze(1)
    share = stored(rows, layer.storage.gemm2) * factor
    common = arithmetic.weights + arithmetic.accumulate(x.shape[1]) + summing
    shift, pulls = _derivatives(stages, layer, arithmetic)
    shift = shift + common * stages.activated.abs()
    # Where both clamps hold, many places have the same number, and so the same rounding error.
    held = torch.stack([pull == 0 for pull in pulls]).all(0)
    shift = shift + intermediate.error * held
    parameters = {
        name: linear(pull, expert.gemm2) * factor
        for name, pull in _parameter_pulls(stages, layer).items()
    }
    relative = (shift * stages.activated.abs()).sum(1) / _sizes(stages.activated)
    return Slots(
        expert=-1,
        tokens=weight,
        weight=weight,
        share=share,
        inner=inner,
        shift=shift,
        carried=carried * factor.square(),
        # An error of the router weight is the same for all elements of one share.
        variance=variance * factor.square() + (arithmetic.weights * share).square(),
        drift=relative,
        pulls=pulls,
        parameters=parameters,
    )


def _derivatives(
    stages: Stages, layer: MoELayer, arithmetic: Arithmetic
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return what an inexact sigmoid may shift, and the pulls of `Slots`."""
    act, x = layer.activation, stages.stored1
    gate, up = x.chunk(2, -1) if act.gated else (x, torch.zeros_like(x))
    factor = act.linear(up) if act.gated else torch.ones_like(x)
    slope = act.apply(gate * (1 + _STEP)) - act.apply(gate * (1 - _STEP))
    pulls = [slope / (2 * _STEP) * factor]
    if act.gated:
        turn = act.linear(up * (1 + _STEP)) - act.linear(up * (1 - _STEP))
        pulls.append(act.apply(gate) * turn / (2 * _STEP))
    shift = torch.zeros_like(factor)
    if act.function == "silu":
        shift = arithmetic.sigmoid * (gate * factor).abs()
    return shift, tuple(pulls)


def _parameters(layer: MoELayer) -> tuple[str, ...]:
    """Return the parameters that an activation has."""
    act = layer.activation
    names = ["alpha"] if act.function == "silu" else []
    return (*names, *(name for name in ("beta", "limit") if getattr(act, name)))


def _parameter_pulls(stages: Stages, layer: MoELayer) -> dict[str, Tensor]:
    """Return derivatives of the activation by the logarithm of each of its parameters."""
    act = layer.activation
    pulls = {}
    for name in _parameters(layer):
        more, less = (
            replace(act, **{name: getattr(act, name) * (1 + side * _STEP)}) for side in (1, -1)
        )
        pulls[name] = (more(stages.stored1) - less(stages.stored1)) / (2 * _STEP)
    return pulls


def _sizes(x: Tensor) -> Tensor:
    return x.square().sum(1).clamp_min(1e-300)


def _rounded(x: Tensor, variance: Tensor, format: str) -> Tensor:
    """Return the variance of what is read back after `x` was stored in bfloat16.

    What is stored may lie on the other side of one rounding boundary: a range of one step.
    """
    if format == "float32":
        return variance
    # `frexp` has mantissas from 1/2 to 1, of which bfloat16 keeps 8 bits.
    step = torch.exp2((torch.frexp(x.abs()).exponent - 8).to(x.dtype))
    return variance + step.square() / 4
