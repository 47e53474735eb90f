"""A smallest token that two recipes route differently, found by running both.

Whether there is one is decided by `normal_form`. The token here has as few experts as show the
difference, and logits that a person can check by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import inf, lcm
from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.errors import RecipeError
from pytest_moe_routing.logits import integers
from pytest_moe_routing.reference import routing
from pytest_moe_routing.reference.threads import one_thread
from pytest_moe_routing.routing.normal_form import normal_form, same
from pytest_moe_routing.routing.recipe import Recipe

#: Logits and biases are multiples of this.
_STEP = 0.5
#: Values that do not lie further apart count as a tie that rounding may break.
_TIE = 1e-6
#: How much weights must differ, relatively: visibly at first, then beyond float64's rounding.
_VISIBLE = (1e-3, 1e-9)
#: Tokens tried at a time, and how often, for each number of experts.
_TOKENS = 2048
_ROUNDS = 8


@dataclass(frozen=True)
class Counterexample:
    """One token that two recipes route differently.

    Attributes:
        logits, bias: Of every expert of the token; the bias is empty when neither recipe has one.
        wanted, got: Weight by chosen expert.
        sides: What the weight multiplies, (wanted, got).
    """

    logits: tuple[float, ...]
    bias: tuple[float, ...]
    wanted: dict[int, float]
    got: dict[int, float]
    sides: tuple[str, str] = ("output", "output")

    @property
    def num_experts(self) -> int:
        return len(self.logits)

    def as_dict(self) -> dict[str, Any]:
        """Return the token as JSON; `wanted` and `got` as pairs of an expert and its weight."""
        return {
            "logits": list(self.logits),
            "bias": list(self.bias),
            "wanted": [list(pair) for pair in self.wanted.items()],
            "got": [list(pair) for pair in self.got.items()],
            "sides": list(self.sides),
        }


@one_thread()
def counterexample(wanted: Recipe, got: Recipe, num_experts: int) -> Counterexample | None:
    """Return a smallest token that both recipes route differently; None if they mean the same.

    A recipe without bias is given none, which is the same as zeros. The token has at most
    `num_experts` experts, and is the same in every run.

    Raises:
        RecipeError: A recipe cannot run on so many experts.
    """
    row = torch.zeros(1, num_experts)
    for recipe in (wanted, got):
        routing.check_inputs(row, recipe, row[0] if recipe.bias else None)
    if same(wanted, got, num_experts):
        return None
    forms = normal_form(wanted, num_experts), normal_form(got, num_experts)
    for size in _sizes(*forms, num_experts):
        if (token := _token(*forms, size)) is not None:
            return token
    raise RecipeError(f"no token was found that {wanted} and {got} route differently")


def _sizes(wanted: Recipe, got: Recipe, num_experts: int) -> Iterator[int]:
    """Numbers of experts for which both recipes mean what they mean for `num_experts`."""
    step = lcm(wanted.n_group, got.n_group)
    for size in range(step, num_experts + 1, step):
        fits = all(
            (recipe.top_k <= size // recipe.n_group * recipe.topk_group or recipe.mask != -inf)
            # The sum of two needs two.
            and size // recipe.n_group >= min(2, num_experts // recipe.n_group)
            for recipe in (wanted, got)
            if recipe.grouped
        )
        if fits and max(wanted.top_k, got.top_k) <= size and not same(wanted, got, size):
            yield size


@dataclass(frozen=True)
class _Routed:
    """What a recipe makes of tokens: weights by expert (0 where not chosen), and the chosen."""

    weights: Tensor
    chosen: Tensor
    #: Tokens whose choice does not hang on rounding, with finite weights.
    sound: Tensor


def _route(recipe: Recipe, logits: Tensor, bias: Tensor) -> _Routed:
    """Route float64 tokens `[T, E]` that have a bias `[T, E]` each."""
    scores = routing.score(logits, recipe.score)
    keys = routing.choosing_keys(scores, recipe, bias if recipe.bias else None)
    ids = routing.choose(keys, recipe)
    weights = routing.weigh(logits, recipe, ids, scores=scores, bias=bias)
    # Equal inputs tie on any machine; other ties are left to rounding.
    inputs = torch.stack([logits, bias if recipe.bias else torch.zeros_like(bias)], -1)
    sound = weights.isfinite().all(1) & _settled(keys, inputs)
    if recipe.mask != -inf:
        sound &= ((keys - recipe.mask).abs() > _TIE).all(1)
    if recipe.grouped and recipe.n_group < logits.shape[1]:
        best = keys.unflatten(-1, (recipe.n_group, -1)).sort(-1, descending=True).values
        sound &= _settled(routing.group_scores(keys, recipe), best[..., :2])
    dense = torch.zeros_like(logits).scatter(1, ids, weights)
    return _Routed(dense, torch.zeros_like(logits).scatter(1, ids, 1.0).bool(), sound)


def _settled(values: Tensor, inputs: Tensor) -> Tensor:
    """Whether all values `[T, N]` that (nearly) tie come from equal inputs `[T, N, 2]`."""
    values, order = values.sort(1)
    inputs = inputs.gather(1, order.unsqueeze(-1).expand_as(inputs))
    apart = values.diff(dim=1).abs() > _TIE
    return (apart | (inputs.diff(dim=1).abs().amax(-1) == 0)).all(1)


def _differs(wanted: Recipe, got: Recipe, tokens: Tensor, visible: float) -> Tensor:
    """Which tokens `[T, 2, E]` (logits, bias) both recipes route soundly and differently."""
    one, other = (_route(recipe, tokens[:, 0], tokens[:, 1]) for recipe in (wanted, got))
    largest = torch.maximum(one.weights.abs(), other.weights.abs())
    differs = (one.chosen != other.chosen) | (
        (one.weights - other.weights).abs() > visible * largest
    )
    if wanted.weight_on != got.weight_on:
        differs |= one.chosen & ((one.weights - 1).abs() > visible)
    return one.sound & other.sound & differs.any(1)


@lru_cache(maxsize=4096)
def _token(wanted: Recipe, got: Recipe, num_experts: int) -> Counterexample | None:
    biased = wanted.bias or got.bias
    for visible in _VISIBLE:
        for seed in range(_ROUNDS):
            tokens = _random_tokens(num_experts, seed, biased)
            found = tokens[_differs(wanted, got, tokens, visible)]
            if len(found):
                token = _simplified(wanted, got, found[_cost(found).argmin()], visible)
                return _example(wanted, got, token, biased)
    return None


@lru_cache(maxsize=16)
def _random_tokens(num_experts: int, seed: int, biased: bool) -> Tensor:
    """Tokens `[T, 2, E]` of all sizes of values, and with all shares of zeros."""
    shape = (_TOKENS, 2, num_experts)
    draw, row = integers(*shape, seed=seed), torch.arange(_TOKENS)
    largest = torch.stack([row % 16, row // 16 % 16], 1).unsqueeze(-1) + 1
    share = (row // 256 % 8).view(-1, 1, 1)
    values = draw // 8 % (2 * largest + 1) - largest
    values = torch.where(draw % 8 < share, 0, values).to(torch.float64) * _STEP
    if not biased:
        values[:, 1] = 0
    return values


def _cost(tokens: Tensor) -> Tensor:
    """How hard a token `[..., 2, E]` is to check by hand."""
    return (tokens.abs() + _STEP * (tokens != 0)).sum((-1, -2))


def _simplified(wanted: Recipe, got: Recipe, token: Tensor, visible: float) -> Tensor:
    """Return the token `[2, E]`, moved towards zero by single values while the difference stays."""
    while True:
        nearer = torch.stack(
            [
                torch.zeros_like(token),
                (token / 2 / _STEP).trunc() * _STEP,
                token - _STEP * token.sign(),
            ]
        )
        places = token.flatten().nonzero().flatten()
        moves = token.flatten().repeat(3, len(places), 1)
        moves[:, torch.arange(len(places)), places] = nearer.flatten(1)[:, places]
        moves = moves.view(-1, *token.shape)
        moves = moves[_differs(wanted, got, moves, visible)]
        if not len(moves):
            return token
        token = moves[_cost(moves).argmin()]


def _example(wanted: Recipe, got: Recipe, token: Tensor, biased: bool) -> Counterexample:
    logits, bias = token
    weights = []
    for recipe in (wanted, got):
        routed = routing.route(
            logits.unsqueeze(0), recipe, bias if recipe.bias else None, dtype=torch.float64
        )
        ids, values = routed.topk_ids[0].tolist(), routed.topk_weights[0].tolist()
        weights.append(dict(sorted(zip(ids, values, strict=True))))
    return Counterexample(
        logits=tuple(logits.tolist()),
        bias=tuple(bias.tolist()) if biased else (),
        wanted=weights[0],
        got=weights[1],
        sides=(wanted.weight_on, got.weight_on),
    )
