"""Aggregates: directions in which defects move many elements of a fused MoE's output.

A factor on everything moves the output along itself; a wrong router weight moves one token along
the share of one expert; a wrong block scale moves all tokens of an expert along one row's
contribution. The residual of a kernel is projected on each of these directions, as a regression
does, in units of each token's standard deviation. For a right kernel the projection stays within
a bound that follows from `compare.spread`; where it does not, the direction says what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pytest_moe_routing.compare.spread import Slots, Spread
from pytest_moe_routing.reference.problem import MoEProblem
from pytest_moe_routing.reference.quantization import Quantized, dequantize

#: Probability that any aggregate of one family raises an alarm for a right kernel.
FALSE_ALARM = 1e-8

#: Columns of the output that count as one block: those of a kernel's tile.
_TILE = 128


@dataclass(frozen=True)
class Aggregate:
    """One aggregate of an output.

    Attributes:
        family: The sort of aggregate, as in `Family.name`.
        kind: `slope`, of the residual on the aggregate's own contribution to the output; or
            `mean`, of the residual in units of the output's root mean square.
        name: What was summed over.
        found: The slope or mean.
        bound: The largest absolute value that a right kernel's has.
    """

    family: str
    kind: str
    name: str
    found: float
    bound: float

    @property
    def use(self) -> float:
        """Share of the bound that is used; above 1 it is wrong."""
        return abs(self.found) / max(self.bound, 1e-300)

    def __str__(self) -> str:
        percent = f"{abs(100 * self.found):.3g} %"
        limit = f"a correct kernel stays within {100 * self.bound:.2g} %"
        if self.kind == "mean":
            side = "high" if self.found > 0 else "low"
            return (
                f"the mean of {self.name} is too {side} by {percent} of the output's size; {limit}"
            )
        return f"{self.name}: {percent} too {'large' if self.found > 0 else 'small'}; {limit}"


@dataclass(frozen=True)
class Family:
    """All aggregates of one kind over the same sort of elements.

    Attributes:
        name: The sort.
        kind: As in `Aggregate`.
        found: float64 `[n]`.
        deviation: `[n]`, standard deviation of `found` for right kernels.
        drift: `[n]`, what a right kernel's may be off by beyond that.
        label: The name of the aggregate at one place.
    """

    name: str
    kind: str
    found: Tensor
    deviation: Tensor
    drift: Tensor
    label: Callable[[int], str]

    @property
    def bound(self) -> Tensor:
        """Hoeffding's bound, shared by all aggregates of the family."""
        count = max(1, len(self.found))
        return self.drift + math.sqrt(2 * math.log(2 * count / FALSE_ALARM)) * self.deviation

    @property
    def use(self) -> Tensor:
        return self.found.abs() / self.bound.clamp_min(1e-300)

    def worst(self) -> Aggregate:
        """Return the aggregate that uses most of its bound."""
        place = int(self.use.argmax())
        found, bound = self.found[place].item(), self.bound[place].item()
        return Aggregate(self.name, self.kind, self.label(place), found, bound)


class _Sums(NamedTuple):
    """Sums of a direction times a residual, their variance and drift, and the square norm."""

    product: Tensor
    variance: Tensor
    drift: Tensor
    norm: Tensor

    @classmethod
    def of(cls, v: Tensor, d: Tensor, variance: Tensor, drift: Tensor) -> _Sums:
        """Return the sums of single elements."""
        return cls(v * d, v.square() * variance, v.abs() * drift, v.square())

    def each(self, change: Callable[[Tensor], Tensor]) -> _Sums:
        return _Sums(*map(change, self))

    @classmethod
    def joined(cls, parts: Iterable[_Sums]) -> _Sums:
        return cls(*(torch.cat(fields) for fields in zip(*parts, strict=True)))

    def over(self, dim: int, *, keepdim: bool = False) -> _Sums:
        return self.each(lambda x: x.sum(dim, keepdim=keepdim))

    def blocks(self, size: int) -> _Sums:
        """Sum over blocks of the last dimension."""
        return self.each(lambda x: x.unflatten(-1, (-1, size)).sum(-1))

    def plus(self, carried: Tensor) -> _Sums:
        """Add what comes through the second GEMM: variance and drift."""
        return self._replace(variance=self.variance + carried[0], drift=self.drift + carried[1])

    def family(self, name: str, kind: str, label: Callable[[int], str]) -> Family:
        product, variance, drift, norm = self.each(torch.flatten)
        # A direction that is zero has no slope.
        norm = norm.masked_fill(norm == 0, torch.inf)
        return Family(name, kind, product / norm, variance.sqrt() / norm, drift / norm, label)


def fitted(
    output: Tensor, spreads: Iterable[Spread], problem: MoEProblem, tokens: Sequence[int]
) -> list[Family]:
    """Return every aggregate of an output, against the one of several spreads that it fits best.

    Args:
        output: What the kernel returned, float64 `[tokens, hidden]`, finite.
        spreads: What right kernels return, by kind of kernel; the first that fits is taken.
        problem: What the kernel was given.
        tokens: The number of each token in messages.
    """
    fits: list[tuple[float, list[Family]]] = []
    for spread in spreads:
        tried = list(families(output, spread, problem, tokens))
        use = max(float(family.use.max()) for family in tried)
        if use <= 1:
            return tried
        fits.append((use, tried))
    return min(fits, key=lambda fit: fit[0])[1]


def families(
    output: Tensor, spread: Spread, problem: MoEProblem, tokens: Sequence[int]
) -> Iterator[Family]:
    """Yield every aggregate of an output; arguments as for `fitted`."""
    # In units of each token's deviation, so that loud tokens do not drown the others.
    size = spread.variance.mean(1, keepdim=True).sqrt().clamp_min(1e-150)
    scaled = spread.divided_by(size)
    d = (output - spread.value) / size
    yield from _of_output(d, scaled, problem, tokens)
    if scaled.slots:
        yield from _of_experts(d, scaled, problem, tokens)


def _of_output(
    d: Tensor, spread: Spread, problem: MoEProblem, tokens: Sequence[int]
) -> Iterator[Family]:
    """Yield what does not depend on experts: all, tokens, columns, and the activation's numbers."""
    value = spread.value
    tile = _TILE if value.shape[1] % _TILE == 0 else value.shape[1]
    directions = {"slope": value, "mean": torch.ones_like(value), **spread.parameters}
    whole = {name: value.new_zeros(2, len(value)) for name in directions}
    tiles = {name: value.new_zeros(2, len(value), value.shape[1] // tile) for name in directions}
    free = spread.variance.clone()
    for s in spread.slots:
        weight = dequantize(problem.experts[s.expert].gemm2)
        free.index_add_(0, s.tokens, -s.carried)
        for name, v in directions.items():
            parts = _carried(v[s.tokens], s, weight, tile)
            whole[name].index_add_(1, s.tokens, parts[0])
            tiles[name].index_add_(1, s.tokens, parts[1])
    for name, v in directions.items():
        sums = _Sums.of(v, d, free.clamp_min(0), torch.zeros_like(v))
        if name == "mean":
            sums = sums._replace(norm=value.square().mean(1, keepdim=True).sqrt().expand_as(v))
        by_token = sums.over(1).plus(whole[name])
        if name in spread.parameters:
            yield by_token.over(0).family(name, "slope", f"the activation's {name}".format)
            continue
        yield by_token.over(0).family("output", name, "the whole output".format)
        yield by_token.family("token", name, lambda i: f"token {tokens[i]}")
        by_tile = sums.blocks(tile).plus(tiles[name])
        yield by_tile.over(0).family("columns", name, lambda i: _range("column", i, tile))


def _of_experts(
    d: Tensor, spread: Spread, problem: MoEProblem, tokens: Sequence[int]
) -> Iterator[Family]:
    """Yield experts, experts of single tokens, and rows of both GEMMs."""
    shares, first, second = [], [], []
    for s in spread.slots:
        expert, mine = problem.experts[s.expert], (d[s.tokens], spread.variance[s.tokens])
        weight = dequantize(expert.gemm2)
        sums = _Sums.of(s.share, *mine, spread.drift[s.tokens])
        # Other experts' deviations have nothing to do with this one's share.
        others = _Sums.of(
            s.share, mine[0], (mine[1] - s.carried).clamp_min(0), torch.zeros_like(s.share)
        )
        high = _height(expert.gemm2)
        whole, blocks = _carried(s.share, s, weight, high)
        shares.append(others.over(1).plus(whole))
        second.append((sums if high == 1 else others.blocks(high).plus(blocks)).over(0))
        first.append(_first_gemm(s, weight, *mine).blocks(_height(expert.gemm1)))
    experts = [s.expert for s in spread.slots]
    slots = [(s.expert, tokens[t]) for s in spread.slots for t in s.tokens.tolist()]
    by_expert = _Sums.joined(sums.over(0, keepdim=True) for sums in shares)
    yield by_expert.family("expert", "slope", lambda i: f"expert {experts[i]}")
    yield _Sums.joined(shares).family(
        "expert of a token", "slope", lambda i: "expert {} of token {}".format(*slots[i])
    )
    for ordinal, parts, gemm in (("first", first, "gemm1"), ("second", second, "gemm2")):
        yield _rows(ordinal, parts, _height(getattr(problem.experts[0], gemm)), experts)


def _carried(v: Tensor, s: Slots, weight: Tensor, high: int) -> tuple[Tensor, Tensor]:
    """Return variance and drift of a direction's product that come through the second GEMM.

    Of each token, `[2, n]`, and of each of its blocks of columns, `[2, n, hidden / high]`; blocks
    of one column are not asked for, and are all in one.
    """
    high = v.shape[1] if high == 1 else high
    blocks = v.to(weight.dtype).unflatten(1, (-1, high)).transpose(0, 1)
    pulled = blocks @ weight.unflatten(0, (-1, high))
    factor = s.weight.abs().unsqueeze(1)
    variance, drift = (x.to(weight.dtype) for x in (factor.square() * s.inner, factor * s.shift))

    def carried(pulled: Tensor) -> Tensor:
        parts = (pulled.square() * variance).sum(-1), (pulled.abs() * drift).sum(-1)
        return torch.stack(parts).to(v.dtype)

    return carried(pulled.sum(0)), carried(pulled).transpose(1, 2)


def _first_gemm(s: Slots, weight: Tensor, d: Tensor, variance: Tensor) -> _Sums:
    """Return sums over the tokens of an expert, for each row of its first GEMM."""
    squares = weight.square()
    product, others, norm = (
        x.to(d.dtype)
        for x in (d.to(weight.dtype) @ weight, variance.to(weight.dtype) @ squares, squares.sum(0))
    )
    factor = s.weight.unsqueeze(1)
    variance = others + (factor * norm).square() * s.inner
    drift = (factor * norm).abs() * s.shift
    parts = []
    for pull in s.pulls:
        v = factor * pull
        sums = _Sums(v * product, v.square() * variance, v.abs() * drift, v.square() * norm)
        parts.append(sums.over(0))
    return _Sums.joined(parts)


def _rows(ordinal: str, parts: list[_Sums], high: int, experts: list[int]) -> Family:
    """Return a family of rows, or of blocks of rows that share scales."""
    count = len(parts[0].product)

    def label(i: int) -> str:
        return f"{_range('row', i % count, high)} of expert {experts[i // count]}'s {ordinal} GEMM"

    return _Sums.joined(parts).family(f"row of the {ordinal} GEMM", "slope", label)


def _height(weight: Quantized) -> int:
    """Return how many rows of a weight share scales."""
    return weight.format.block[0] or 1


def _range(name: str, i: int, size: int) -> str:
    return f"{name} {i}" if size == 1 else f"{name}s {i * size} to {(i + 1) * size - 1}"
