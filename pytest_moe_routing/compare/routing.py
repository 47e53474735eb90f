"""Compare a routing with the reference, aware of ties: see `compare.rows`.

What differs is told token by token, worst first; then a mistake is looked for that explains it all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.compare.messages import Difference, structural, wrong_experts, wrong_weights
from pytest_moe_routing.compare.mistakes import diagnose
from pytest_moe_routing.compare.rows import Rows
from pytest_moe_routing.compare.tolerances import PRECISIONS
from pytest_moe_routing.errors import RecipeError
from pytest_moe_routing.reference import routing as reference
from pytest_moe_routing.routing.recipe import Recipe

_WORST = 8
#: The largest relative error of rounding to bfloat16, and of float32 arithmetic before it.
_HALF_A_STEP = 1.01 * 2.0**-8


@dataclass(frozen=True)
class RoutingComparison:
    """The differences between a routing and the reference.

    Attributes:
        num_tokens: Tokens compared.
        ambiguous: Tokens with other experts than the reference's, within proven ambiguity.
        unordered: Tokens with NaN scores, of which only the structure is compared.
        differences: Tokens that are wrong, worst first.
        diagnosis: A known mistake that explains all that is wrong; or one for the experts, and one
            for the weights.
    """

    num_tokens: int
    ambiguous: int
    unordered: int
    differences: tuple[Difference, ...]
    recipe: Recipe
    precision: str
    diagnosis: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether no token is wrong."""
        return not self.differences

    def message(self) -> str:
        """Return n/N, the worst tokens with expected and actual values, and what explains them."""
        wrong, total = len(self.differences), self.num_tokens
        lines = [
            f"{wrong}/{total} tokens ({100 * wrong / max(total, 1):.1f} %) are routed wrongly",
            f"  recipe     {self.recipe}",
            f"  precision  {self.precision}; {self.ambiguous} tokens differ within it, "
            f"{self.unordered} have NaN scores",
        ]
        for item in self.differences[:_WORST]:
            lines += item.lines()
        if wrong > _WORST:
            lines.append(f"  ... and {wrong - _WORST} more tokens")
        return "\n".join([*lines, *(f"  diagnosis  {name}" for name in self.diagnosis)])


def assert_routing(
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    logits: Tensor,
    recipe: Recipe,
    bias: Tensor | None = None,
    *,
    precision: str = "float32",
) -> RoutingComparison:
    """Assert that a routing is the reference's, up to choices that are proven ambiguous.

    Args:
        topk_ids: Chosen experts, integers `[num_tokens, top_k]`, in any order within a row.
        topk_weights: Their weights, floating `[num_tokens, top_k]`; None compares experts alone.
        logits: Router logits, floating `[num_tokens, num_experts]`, exactly as the kernel read
            them, in their dtype.
        recipe: What the kernel should compute.
        bias: `e_score_correction_bias`, floating `[num_experts]`; required exactly when the recipe
            has a bias.
        precision: How the kernel computes, a key of `PRECISIONS`: it decides which choices are
            ambiguous, and how far weights may be off.

    Returns:
        The comparison, with the number of tokens whose choice is ambiguous.

    Raises:
        AssertionError: A token is routed wrongly. The message shows the worst tokens, and names a
            known mistake that explains all of them, if there is one.
        RecipeError: Shapes or dtypes do not fit, which is misuse and not a difference.
    """
    __tracebackhide__ = True
    result = compare_routing(topk_ids, topk_weights, logits, recipe, bias, precision=precision)
    if not result.ok:
        raise AssertionError(result.message())
    return result


def compare_routing(
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    logits: Tensor,
    recipe: Recipe,
    bias: Tensor | None = None,
    *,
    precision: str = "float32",
    lower_index: bool = True,
    explain: bool = True,
) -> RoutingComparison:
    """Compare chosen experts and their weights with the reference, computed in float64.

    Args:
        topk_ids: Integers `[num_tokens, top_k]`, in any order within a row.
        topk_weights: Floating `[num_tokens, top_k]`, or None to compare experts alone.
        logits: Router logits, floating `[num_tokens, num_experts]`, exactly as the kernel read
            them, in their dtype.
        recipe: What the kernel should compute.
        bias: `e_score_correction_bias`, floating `[num_experts]`; required exactly when the recipe
            has a bias.
        precision: How the kernel computes, a key of `PRECISIONS`.
        lower_index: Whether equal inputs must go to the lower index, as in FlashInfer's kernels;
            False for kernels built on `torch.topk`, which leaves their order open.
        explain: Whether to look for a known mistake, which takes longer than the comparison.

    Returns:
        What differs. Nothing is raised for a difference: see `RoutingComparison.ok`.

    Raises:
        RecipeError: Shapes or dtypes do not fit, which is misuse and not a difference.
    """
    rows, ids, topk_weights = _prepared(
        (topk_ids, topk_weights), logits, recipe, bias, precision, lower_index
    )
    broken, sound, other, ambiguous = _choices(rows, ids)
    unordered = ~broken & ~sound

    found = [structural(rows, token, ids[token]) for token in broken.nonzero().flatten().tolist()]
    for token in other.nonzero().flatten().tolist():
        beaten = rows.beaten(token, ids[token])
        if beaten is None:
            ambiguous += 1
            other[token] = False
        else:
            found.append(wrong_experts(rows, token, ids[token], beaten))
    misweighed = torch.zeros_like(sound)
    if topk_weights is not None:
        may = rows.judge_weights(ids, topk_weights)
        misweighed = may.outside.any(1) & sound
        for token in (misweighed & ~other).nonzero().flatten().tolist():
            found.append(wrong_weights(token, ids[token], topk_weights[token], may))
    found.sort(key=lambda item: -item.excess)
    worst = [item.token for item in found if sound[item.token]][:_WORST]
    diagnosis: tuple[str, ...] = ()
    if worst and explain:
        diagnosis = diagnose(
            rows,
            ids,
            topk_weights,
            sound.nonzero().flatten(),
            torch.tensor(worst),
            (other, misweighed),
        )
    return RoutingComparison(
        len(ids), ambiguous, int(unordered.sum()), tuple(found), recipe, precision, diagnosis
    )


def agrees(
    topk_ids: Tensor,
    topk_weights: Tensor,
    logits: Tensor,
    recipe: Recipe,
    bias: Tensor | None,
    *,
    precision: str,
    lower_index: bool,
) -> bool:
    """Return whether `compare_routing` finds no difference: a fraction of its work if it does.

    Raises:
        RecipeError: As `compare_routing` does.
    """
    rows, ids, weights = _prepared(
        (topk_ids, topk_weights), logits, recipe, bias, precision, lower_index
    )
    broken, sound, other, _ = _choices(rows, ids)
    if broken.any() or (rows.judge_weights(ids, weights).outside.any(1) & sound).any():
        return False
    tokens = other.nonzero().flatten().tolist()
    return all(rows.beaten(token, ids[token]) is None for token in tokens)


def _prepared(
    routing: tuple[Tensor, Tensor | None],
    logits: Tensor,
    recipe: Recipe,
    bias: Tensor | None,
    precision: str,
    lower_index: bool,
) -> tuple[Rows, Tensor, Any]:
    """Return the reference's view, and the experts and weights of a routing to compare with it."""
    if precision not in PRECISIONS:
        raise RecipeError(f"precision: found {precision!r}, expected {', '.join(PRECISIONS)}")
    reference.check_inputs(logits, recipe, bias)
    ids, weights = routing
    _check_output("topk_ids", ids, logits, recipe, floating=False)
    if weights is not None:
        _check_output("topk_weights", weights, logits, recipe, floating=True)
        weights = weights.detach().cpu().to(torch.float64)
    rows = Rows(logits, recipe, bias, PRECISIONS[precision])
    rows.lower_index = lower_index
    return rows, ids.detach().cpu().to(torch.int64), weights


def _choices(rows: Rows, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Classify the choices of experts of all tokens at once.

    Returns:
        Three bool tensors `[num_tokens]`: whether an expert does not exist or repeats; whether the
        choice can be compared; whether it differs from the reference's without an explanation by
        `Rows.are_close`. And the number of tokens whose difference `Rows.are_close` explains.
    """
    broken = ((ids < 0) | (ids >= rows.logits.shape[1])).any(1)
    ranked = ids.sort(1).values
    broken |= (ranked[:, 1:] == ranked[:, :-1]).any(1)
    sound = ~broken & ~rows.keys.isnan().any(1)
    other = (ranked != rows.ids.sort(1).values).any(1) & sound
    differing = other.nonzero().flatten()
    close = differing[rows.are_close(differing, ids)]
    other[close] = False
    return broken, sound, other, len(close)


def _check_output(name: str, x: Tensor, logits: Tensor, recipe: Recipe, floating: bool) -> None:
    shape = [logits.shape[0], recipe.top_k]
    if list(x.shape) != shape or x.is_floating_point() != floating or x.dtype == torch.bool:
        kind = "floating" if floating else "integer"
        raise RecipeError(f"{name}: found {x.dtype} {list(x.shape)}, expected {kind} {shape}")


def are_rounded_once(
    topk_ids: Tensor, topk_weights: Tensor, logits: Tensor, recipe: Recipe, bias: Tensor | None
) -> bool:
    """Return whether weights are the recipe's in bfloat16, rather than computed in bfloat16.

    The arguments are those of `compare_routing`.
    """
    wanted, order = reference.route(logits, recipe, bias), topk_ids.sort(1).indices
    right = wanted.topk_ids.sort(1)
    if not torch.equal(topk_ids.gather(1, order), right.values.to(topk_ids.dtype)):
        return False
    got = topk_weights.float().gather(1, order)
    exact = wanted.topk_weights.float().gather(1, right.indices)
    is_near = (got - exact).abs() <= _HALF_A_STEP * exact.abs()
    return bool(is_near.all()) and torch.equal(got, got.bfloat16().float())
