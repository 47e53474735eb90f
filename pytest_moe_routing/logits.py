"""Named router logits and biases that separate right routing from wrong routing.

Every number comes from a counter-based integer hash and is a dyadic rational, so the same bits
come out on every machine, device and torch version. Each pattern says which known defect it is for;
plain random logits with a zero bias show next to none of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pytest_moe_routing.errors import RecipeError
from pytest_moe_routing.routing.recipe import Recipe

_MASK = 0xFFFFFFFF


def integers(*shape: int, seed: int, bits: int = 24) -> Tensor:
    """Uniform integers in `[0, 2**bits)` as int64, by position and seed alone.

    A 32-bit multiply-xorshift hash (the constants are C. Wellons' "lowbias32") of the index; every
    intermediate fits int64, so there is no overflow to differ between platforms.
    """
    count = 1
    for size in shape:
        count *= size
    x = torch.arange(count, dtype=torch.int64)
    for salt in (seed & _MASK, (seed >> 32) & _MASK):
        if salt:
            x.add_(salt * 0x9E3779B1 & _MASK).bitwise_and_(_MASK)
        for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
            x.bitwise_xor_(x >> shift).mul_(factor).bitwise_and_(_MASK)
        x.bitwise_xor_(x >> 15)
    return (x >> (32 - bits)).view(shape)


def bell(*shape: int, seed: int) -> Tensor:
    """Return bell-shaped float32 numbers within +-4, standard deviation 1.15, steps of 2**-15."""
    parts = integers(*shape, 2, seed=seed, bits=32)
    # The sum of four 16-bit uniforms, centered.
    total = (parts & 0xFFFF).sum(-1) + (parts >> 16).sum(-1) - 2 * 0xFFFF
    return total.to(torch.float32) / 2**15


def loud(tokens: int, hidden: int, *, seed: int) -> Tensor:
    """Return hidden states, float32 `[tokens, hidden]`; every other token is four times as loud.

    With weights that keep the size of what they multiply, the activation reads numbers of about 2
    for quiet tokens, where its curvature shows, and of about 9 for loud ones, beyond a clamp of 7.
    """
    sizes = 2.0 * 4.0 ** (torch.arange(tokens) % 2)
    return bell(tokens, hidden, seed=seed) * sizes.unsqueeze(1)


#: Factor on logits with which the experts of a token have nearly equal weights.
EVEN = 1 / 16


def distinct(rows: int, columns: int, *, seed: int) -> Tensor:
    """Return a random permutation of `0..columns-1` in each row, int64."""
    return integers(rows, columns, seed=seed, bits=32).argsort(dim=1, stable=True)


@dataclass(frozen=True)
class Shape:
    """What a pattern is made for."""

    num_tokens: int
    num_experts: int
    recipe: Recipe
    seed: int

    @property
    def group_size(self) -> int:
        return self.num_experts // self.recipe.n_group

    def bell(self, salt: int = 0) -> Tensor:
        return bell(self.num_tokens, self.num_experts, seed=self.seed + salt)

    def bias(self, low: float, high: float) -> Tensor:
        """Return a uniform bias `[num_experts]` in [low, high], in steps of 2**-20 of the width."""
        steps = integers(self.num_experts, seed=self.seed + 7919, bits=20).to(torch.float64)
        return (low + (high - low) * steps / 2**20).to(torch.float32)


@dataclass(frozen=True)
class RoutingCase:
    """Inputs of one routing.

    Attributes:
        logits: float32 `[num_tokens, num_experts]`.
        bias: float32 `[num_experts]`, or None where the recipe has no bias.
        recipe: The router that they are for.
    """

    logits: Tensor
    bias: Tensor | None
    recipe: Recipe

    def to(self, device: torch.device | str) -> RoutingCase:
        """Return the same inputs on a device."""
        bias = None if self.bias is None else self.bias.to(device)
        return RoutingCase(self.logits.to(device), bias, self.recipe)


@dataclass(frozen=True)
class Pattern:
    """A way to make logits, and the defect that it shows.

    Attributes:
        name: Its key in `PATTERNS`.
        shows: The defect that it shows.
        make: Make logits `[num_tokens, num_experts]` and a bias `[num_experts]`.
        needs: What a recipe must have for the pattern to show more than `plain` does: a `bias`,
            `groups`, or a stated result for `not-finite` logits, which no recipe states.
    """

    name: str
    shows: str
    make: Callable[[Shape], tuple[Tensor, Tensor]]
    needs: str = ""

    def suits(self, recipe: Recipe) -> bool:
        """Whether every implementation of a recipe must agree on this pattern."""
        return {"": True, "bias": recipe.bias, "groups": recipe.grouped}.get(self.needs, False)


def _plain(s: Shape) -> tuple[Tensor, Tensor]:
    return s.bell(), s.bias(-0.25, 0.25)


def _all_negative(s: Shape) -> tuple[Tensor, Tensor]:
    return s.bell() - 8, s.bias(-0.25, 0.25)


def _deep_negative_high_bias(s: Shape) -> tuple[Tensor, Tensor]:
    return s.bell() - 16, s.bias(11.125, 11.375)


def _below_minus_100(s: Shape) -> tuple[Tensor, Tensor]:
    return s.bell() - 112, s.bias(-0.25, 0.25)


def _saturated(s: Shape) -> tuple[Tensor, Tensor]:
    return s.bell() + 24, s.bias(0.0, 0.0)


def _ties_at_k(s: Shape) -> tuple[Tensor, Tensor]:
    """Make a few levels, so that more experts than fit tie around place k; no bias hides it."""
    rank = distinct(s.num_tokens, s.num_experts, seed=s.seed)
    level = torch.clamp((rank - s.recipe.top_k // 2) // max(s.recipe.top_k, 2), max=3)
    return 2.0 - level.to(torch.float32), s.bias(0.0, 0.0)


def _ties_at_groups(s: Shape) -> tuple[Tensor, Tensor]:
    """Every group holds the same values in another order: all group scores tie."""
    size, groups = s.group_size, s.recipe.n_group
    values = distinct(s.num_tokens, size, seed=s.seed)
    order = distinct(groups * s.num_tokens, size, seed=s.seed + 1).view(-1, groups, size)
    tied = values.unsqueeze(1).expand(-1, groups, -1).gather(2, order).flatten(1)
    return tied.to(torch.float32) / 16 - 1, s.bias(0.0, 0.0)


def _near_ties(s: Shape) -> tuple[Tensor, Tensor]:
    """Logits near 1 that differ by 2**-12: bfloat16 (steps of 2**-7) cannot tell them apart."""
    rank = distinct(s.num_tokens, s.num_experts, seed=s.seed)
    return 1 + rank.to(torch.float32) / 4096, s.bias(0.0, 0.0)


def _hot_expert(s: Shape) -> tuple[Tensor, Tensor]:
    """All tokens want the last expert: every index must be reachable, and one segment is full."""
    logits = s.bell() - 4
    logits[:, -1] += 16
    return logits, s.bias(-0.0625, 0.0625)


def _bias_below_minus_one(s: Shape) -> tuple[Tensor, Tensor]:
    return s.bell(), s.bias(-3.5, -2.125)


def _narrow_bias(s: Shape) -> tuple[Tensor, Tensor]:
    return s.bell() - 4, s.bias(6.8125, 7.0625)


def _not_finite(s: Shape) -> tuple[Tensor, Tensor]:
    """Rows cycle through: one NaN, all NaN, one +inf, all -inf, fewer finite than k."""
    logits = s.bell()
    column = integers(s.num_tokens, seed=s.seed + 3) % s.num_experts
    for row in range(s.num_tokens):
        expert, kind = int(column[row]), row % 5
        if kind == 0:
            logits[row, expert] = torch.nan
        elif kind == 1:
            logits[row] = torch.nan
        elif kind == 2:
            logits[row, expert] = torch.inf
        elif kind == 3:
            logits[row] = -torch.inf
        else:
            finite = logits[row, expert].item()
            logits[row] = -torch.inf
            logits[row, expert] = finite
    return logits, s.bias(0.0, 0.0)


PATTERNS: Mapping[str, Pattern] = {
    pattern.name: pattern
    for pattern in (
        Pattern("plain", "the everyday case: a wrong method, scale, bias or group limit", _plain),
        Pattern(
            "all-negative",
            "uninitialized slots beat negative logits (flashinfer issue 2822, <= 0.6.6)",
            _all_negative,
        ),
        Pattern(
            "deep-negative-high-bias",
            "weight recovered as (score + bias) - bias (flashinfer PR 3875, 0.6.8-0.6.17); "
            "a bias downcast before the kernel (sglang PR 31001)",
            _deep_negative_high_bias,
            needs="bias",
        ),
        Pattern(
            "below-minus-100",
            "all chosen scores underflow to 0 and 0/0 is NaN (flashinfer PR 3803, 3946)",
            _below_minus_100,
        ),
        Pattern(
            "saturated",
            "float32 sigmoid is 1.0 above 17: order falls to the index (Sigmoid, TopKSigmoid)",
            _saturated,
        ),
        Pattern(
            "ties-at-k",
            "equal scores around place k: lower index first, no expert twice (vllm PR 54403)",
            _ties_at_k,
        ),
        Pattern(
            "ties-at-groups",
            "equal group scores: lower group first (sglang PR 31001)",
            _ties_at_groups,
            needs="groups",
        ),
        Pattern(
            "near-ties",
            "logits rounded to bfloat16 before the choice (sglang PR 29783, 33764)",
            _near_ties,
        ),
        Pattern("hot-expert", "experts never reached or counted wrongly (imp 2056)", _hot_expert),
        Pattern(
            "bias-below-minus-1",
            "excluded groups masked with 0 or -1 (vllm PR 13474, flashinfer PR 2168)",
            _bias_below_minus_one,
            needs="bias",
        ),
        Pattern(
            "narrow-bias",
            "a bias band of 0.25 at 7 collapses when rounded to bfloat16 (sglang PR 31213)",
            _narrow_bias,
            needs="bias",
        ),
        Pattern(
            "not-finite",
            "NaN or infinite rows give repeated or out-of-range experts (vllm PR 39391)",
            _not_finite,
            needs="not-finite",
        ),
    )
}


def make_case(name: str, recipe: Recipe, *, num_tokens: int, num_experts: int) -> RoutingCase:
    """Make a pattern's inputs for a recipe.

    Args:
        name: A key of `PATTERNS`.
        recipe: The router that the inputs are for.
        num_tokens: Rows of the logits.
        num_experts: Columns of the logits.

    Returns:
        Float32 logits `[num_tokens, num_experts]` and a float32 bias `[num_experts]`; the bias is
        None exactly when the recipe has none.

    Raises:
        RecipeError: No pattern has this name.
    """
    if name not in PATTERNS:
        raise RecipeError(f"no logits pattern {name!r}; patterns: {', '.join(PATTERNS)}")
    logits, bias = _made(name, Shape(num_tokens, num_experts, recipe, _seed(name)))
    return RoutingCase(logits.clone(), bias.clone() if recipe.bias else None, recipe)


def _seed(name: str) -> int:
    # Python's own hash of a string differs from run to run.
    return zlib.crc32(name.encode())


# A router is run with the same patterns in several ways; there are fewer patterns than this.
@lru_cache(maxsize=16)
def _made(name: str, shape: Shape) -> tuple[Tensor, Tensor]:
    return PATTERNS[name].make(shape)


#: Tokens of the cases of one recipe: on both sides of usual tile and launch-size limits.
_TOKENS = (1, 4, 5, 16, 17, 64, 65, 256, 257, 1025)
_PER_PATTERN = 33


def case_names(recipe: Recipe) -> list[tuple[str, int]]:
    """Return the pattern and number of tokens of every case that an implementation must pass."""
    patterns = [pattern.name for pattern in PATTERNS.values() if pattern.suits(recipe)]
    return [("plain", tokens) for tokens in _TOKENS] + [(name, _PER_PATTERN) for name in patterns]
