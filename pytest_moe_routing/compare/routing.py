"""Compare a routing with the reference, aware of ties.

An expert may differ from the reference's only where the reference itself proves the choice
ambiguous: where keys lie closer than the errors of the implementation under test. Everywhere else
any difference is a failure. Two experts of the same logit and bias have the same key in any
implementation, so there the lower index must win, whatever the precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from pytest_moe_routing.compare.tolerances import PRECISIONS, Precision
from pytest_moe_routing.errors import RecipeError
from pytest_moe_routing.reference import routing as reference
from pytest_moe_routing.routing.recipe import Recipe

_WORST = 8
#: Below the smallest normal float32, numbers may be lost or flushed to zero.
_TINY = 2.0**-126


@dataclass(frozen=True)
class Difference:
    """One token that is routed wrongly."""

    token: int
    problem: str
    wanted: str
    got: str
    #: How far beyond the allowance, for ranking; structural problems come first.
    excess: float


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        num_tokens: Tokens compared.
        ambiguous: Tokens with other experts than the reference's, within proven ambiguity.
        unordered: Tokens with NaN scores, of which only the structure is compared.
        differences: Tokens that are wrong, worst first.
    """

    num_tokens: int
    ambiguous: int
    unordered: int
    differences: tuple[Difference, ...]
    recipe: Recipe
    precision: str

    @property
    def ok(self) -> bool:
        return not self.differences

    def message(self) -> str:
        """n/N, and the worst tokens with what was wanted and got."""
        wrong, total = len(self.differences), self.num_tokens
        lines = [
            f"{wrong}/{total} tokens ({100 * wrong / max(total, 1):.1f} %) are routed wrongly",
            f"  recipe     {self.recipe}",
            f"  precision  {self.precision}; {self.ambiguous} tokens differ within it, "
            f"{self.unordered} have NaN scores",
        ]
        for item in self.differences[:_WORST]:
            lines += [
                f"  token {item.token}: {item.problem}",
                f"    wanted {item.wanted}",
                f"    got    {item.got}",
            ]
        if wrong > _WORST:
            lines.append(f"  ... and {wrong - _WORST} more tokens")
        return "\n".join(lines)


def assert_routing(
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    logits: Tensor,
    recipe: Recipe,
    bias: Tensor | None = None,
    *,
    precision: str = "float32",
) -> Comparison:
    """`compare_routing`, raising `AssertionError` with the whole message on any difference."""
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
) -> Comparison:
    """Compare chosen experts and their weights with the reference, computed in float64.

    Args:
        topk_ids: Integers `[num_tokens, top_k]`, in any order within a row.
        topk_weights: Floating `[num_tokens, top_k]`, or None to compare experts alone.
        logits: The router logits `[num_tokens, num_experts]` exactly as the implementation read
            them, in their dtype.
        recipe: What the implementation should compute.
        bias: As for `reference.routing.route`.
        precision: A key of `PRECISIONS`: how the implementation computes.

    Raises:
        RecipeError: Shapes or dtypes do not fit; that is misuse, not a difference.
    """
    if precision not in PRECISIONS:
        raise RecipeError(f"precision: found {precision!r}, expected {', '.join(PRECISIONS)}")
    reference.check_inputs(logits, recipe, bias)
    _check_output("topk_ids", topk_ids, logits, recipe, floating=False)
    if topk_weights is not None:
        _check_output("topk_weights", topk_weights, logits, recipe, floating=True)
        topk_weights = topk_weights.detach().cpu().to(torch.float64)
    row = _Rows(logits, recipe, bias, PRECISIONS[precision])
    ids = topk_ids.detach().cpu().to(torch.int64)
    num_experts = logits.shape[1]

    broken = ((ids < 0) | (ids >= num_experts)).any(1)
    ranked = ids.sort(1).values
    broken |= (ranked[:, 1:] == ranked[:, :-1]).any(1)
    unordered = row.keys.isnan().any(1) & ~broken
    wanted = row.ids.sort(1).values
    other = (ranked != wanted).any(1) & ~broken & ~unordered

    found = [_structural(ids[t], num_experts, row, t) for t in broken.nonzero().flatten().tolist()]
    ambiguous = 0
    for token in other.nonzero().flatten().tolist():
        excess = row.excess(token, ids[token])
        if excess is None:
            ambiguous += 1
        else:
            found.append(row.wrong_experts(token, ids[token], excess))
            broken[token] = True
    if topk_weights is not None:
        found += row.wrong_weights(ids, topk_weights, skip=broken | unordered)
    found.sort(key=lambda item: -item.excess)
    return Comparison(len(ids), ambiguous, int(unordered.sum()), tuple(found), recipe, precision)


def _check_output(name: str, x: Tensor, logits: Tensor, recipe: Recipe, floating: bool) -> None:
    shape = [logits.shape[0], recipe.top_k]
    if list(x.shape) != shape or x.is_floating_point() != floating or x.dtype == torch.bool:
        kind = "floating" if floating else "integer"
        raise RecipeError(f"{name}: found {x.dtype} {list(x.shape)}, expected {kind} {shape}")


def _structural(ids: Tensor, num_experts: int, row: _Rows, token: int) -> Difference:
    chosen = ids.tolist()
    outside = [e for e in chosen if not 0 <= e < num_experts]
    repeated = sorted({e for e in chosen if chosen.count(e) > 1})
    problem = (
        f"expert {outside[0]} is not one of {num_experts}"
        if outside
        else f"expert {repeated[0]} is chosen {chosen.count(repeated[0])} times"
    )
    return Difference(token, problem, str(row.ids[token].tolist()), str(chosen), torch.inf)


class _Rows:
    """The reference's view of every token, in float64: keys, their errors, and its choice."""

    def __init__(
        self, logits: Tensor, recipe: Recipe, bias: Tensor | None, precision: Precision
    ) -> None:
        self.recipe, self.precision = recipe, precision
        self.logits = logits.detach().cpu().to(torch.float64)
        self.bias = None if bias is None else bias.detach().cpu()
        scores = reference.score(self.logits, recipe.score)
        self.keys = reference.choosing_keys(scores, recipe, self.bias)
        self.errors = self._score_error(scores, recipe.score)
        if recipe.bias:
            self.errors = self.errors + precision.relative * self.keys.abs()
        self.ids = reference.choose(self.keys, recipe)

    def _score_error(self, scores: Tensor, name: str) -> Tensor:
        if name == "identity":
            return torch.zeros_like(scores)
        return (
            self.precision.relative * scores.abs()
            + {
                "sigmoid": self.precision.sigmoid,
                "softmax": _TINY,
                # The root of what underflowed.
                "sqrtsoftplus": _TINY**0.5,
            }[name]
        )

    def excess(self, token: int, ids: Tensor) -> float | None:
        """How far beyond ambiguity these experts are; None when they may have been chosen."""
        least = torch.inf
        for groups in self._admissible_groups(token, ids):
            least = min(least, self._excess_within(token, ids, groups))
            if least <= 0:
                return None
        return least

    def _excess_within(self, token: int, ids: Tensor, groups: tuple[int, ...]) -> float:
        """How far `ids` are from being the best of these groups; 0 when they may be."""
        keys, errors = self.keys[token], self.errors[token]
        rest = torch.zeros(self.recipe.n_group, len(keys) // self.recipe.n_group, dtype=torch.bool)
        rest[list(groups)] = True
        rest = rest.flatten()
        rest[ids] = False
        out = rest.nonzero().flatten()
        high, low = (keys[ids] + errors[ids]).unsqueeze(1), (keys[out] - errors[out]).unsqueeze(0)
        inputs = self._inputs(token)
        tied = (low == high) | (inputs[:, ids].unsqueeze(2) == inputs[:, out].unsqueeze(1)).all(0)
        beaten = (low > high) | (tied & (out.unsqueeze(0) < ids.unsqueeze(1)))
        if not beaten.any():
            return 0.0
        # A tie given to the higher index is no distance at all, and wrong all the same.
        return max(float((low - high)[beaten].max()), 1e-300)

    def _inputs(self, token: int) -> Tensor:
        """Logit and bias of every expert, `[2, num_experts]`: equal inputs make equal keys."""
        logits = self.logits[token]
        bias = torch.zeros_like(logits) if self.bias is None else self.bias.to(logits)
        return torch.stack([logits, bias])

    def _admissible_groups(self, token: int, ids: Tensor) -> Iterator[tuple[int, ...]]:
        """Every set of groups that may have been kept and holds all of these experts."""
        recipe = self.recipe
        if not recipe.grouped:
            yield tuple(range(recipe.n_group))
            return
        size = self.keys.shape[1] // recipe.n_group
        scores = reference.group_scores(self.keys[token].unsqueeze(0), recipe)[0]
        errors = self.errors[token].view(-1, size).amax(1)
        if recipe.group_score == "top2_sum":
            errors = 2 * errors
        low, high = scores - errors, scores + errors
        surely_above = (low.unsqueeze(0) > high.unsqueeze(1)).sum(1)
        maybe_above = (high.unsqueeze(0) >= low.unsqueeze(1)).sum(1) - 1
        sure = (maybe_above < recipe.topk_group).nonzero().flatten().tolist()
        possible = (surely_above < recipe.topk_group).nonzero().flatten().tolist()
        open_ = [g for g in possible if g not in sure]
        needed = {e // size for e in ids.tolist()}
        made_of = self._group_inputs(token)
        for extra in combinations(open_, recipe.topk_group - len(sure)):
            kept = {*sure, *extra}
            passed_over = [g for g in possible if g not in kept]
            if needed <= kept and not any(
                h < g and made_of[g] == made_of[h] for g in extra for h in passed_over
            ):
                yield tuple(sorted(kept))

    def _group_inputs(self, token: int) -> list[list[list[float]]]:
        """The inputs that make each group's score: equal inputs make equal scores."""
        recipe = self.recipe
        count = 2 if recipe.group_score == "top2_sum" else 1
        keys = self.keys[token].view(recipe.n_group, -1)
        best = reference.stable_topk(keys, count)
        inputs = self._inputs(token).view(2, recipe.n_group, -1)
        made_of = inputs.gather(2, best.unsqueeze(0).expand(2, -1, -1))
        return made_of.permute(1, 2, 0).tolist()

    def wrong_experts(self, token: int, ids: Tensor, excess: float) -> Difference:
        wanted, got = self.ids[token].tolist(), ids.tolist()
        extra = [e for e in got if e not in wanted]
        lacking = [e for e in wanted if e not in got]
        keys = self.keys[token]
        margin = min(keys[e].item() for e in lacking) - max(keys[e].item() for e in extra)
        problem = (
            f"experts {extra} instead of {lacking}; their keys are {margin:.3g} apart, "
            f"errors explain {2 * self.errors[token].max().item():.1g}"
        )

        def show(experts: list[int]) -> str:
            return "  ".join(f"{e}: {keys[e].item():.6g}" for e in experts) + "  (expert: key)"

        return Difference(token, problem, show(wanted), show(got), excess)

    def _weight_bounds(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The smallest and largest weights that the implementation may give these experts.

        The third result, `[num_tokens, 1]`, tells where the weights may be undefined: where all
        chosen scores may underflow to zero, and no epsilon keeps 0/0 away.
        """
        recipe, precision = self.recipe, self.precision
        if recipe.weigh_by == "softmax":
            scores = reference.score(self.logits, "softmax").gather(1, ids)
        else:
            scores = reference.score(self.logits.gather(1, ids), recipe.weigh_by)
        error = self._score_error(scores, recipe.weigh_by)
        low, high = scores - error, scores + error
        if recipe.weigh_by != "identity":
            low = low.clamp_min(0)
        undefined = torch.zeros_like(low[:, :1], dtype=torch.bool)
        if recipe.normalize == "softmax":
            weights = scores.softmax(1)
            low, high = weights * (1 - precision.relative), weights * (1 + precision.relative)
        elif recipe.normalize == "sum":
            undefined = low.sum(1, keepdim=True) + recipe.epsilon <= 0
            others_high = high.sum(1, keepdim=True) - high
            others_low = low.sum(1, keepdim=True) - low
            low, high = (
                low / (low + others_high + recipe.epsilon),
                high / (high + others_low.clamp_min(0) + recipe.epsilon),
            )
        low, high = low * recipe.scale, high * recipe.scale
        slack = (precision.weight + precision.relative) * torch.maximum(low.abs(), high.abs())
        slack = slack + _TINY * max(1.0, recipe.scale)
        return low - slack, high + slack, undefined

    def wrong_weights(self, ids: Tensor, weights: Tensor, *, skip: Tensor) -> list[Difference]:
        safe_ids = ids.clamp(0, self.logits.shape[1] - 1)
        low, high, undefined = self._weight_bounds(safe_ids)
        exact = reference.weigh(self.logits, self.recipe, safe_ids)
        outside = ~((weights >= low) & (weights <= high))
        # NaN is right where the exact weight is NaN or may be, an infinity where it is that one.
        outside &= ~(weights.isnan() & (exact.isnan() | undefined))
        outside &= ~(weights == exact)
        beyond = torch.maximum(low - weights, weights - high).nan_to_num(torch.inf, torch.inf)
        found = []
        for token in (outside.any(1) & ~skip).nonzero().flatten().tolist():
            slot = int(beyond[token].masked_fill(~outside[token], -torch.inf).argmax())
            ratio = (weights[token] / exact[token]).tolist()
            problem = (
                f"expert {ids[token, slot]} weighs {weights[token, slot].item():.6g}, allowed "
                f"{low[token, slot].item():.6g} to {high[token, slot].item():.6g}"
            )
            if max(ratio) - min(ratio) < 0.01 * abs(ratio[0]) and abs(ratio[0] - 1) > 0.01:
                problem += f"; all weights are {ratio[0]:.4g} times the wanted ones"
            found.append(
                Difference(
                    token,
                    problem,
                    _show_weights(ids[token], exact[token]),
                    _show_weights(ids[token], weights[token]),
                    beyond[token, slot].item(),
                )
            )
        return found


def _show_weights(ids: Tensor, weights: Tensor) -> str:
    pairs = zip(ids.tolist(), weights.tolist(), strict=True)
    return "  ".join(f"{e}: {w:.6g}" for e, w in pairs) + "  (expert: weight)"
