"""Which experts and weights a correct implementation may give a token, in float64.

An expert may differ from the reference's only where the reference itself proves the choice
ambiguous: where keys lie closer than the errors of the implementation under test. Two experts of
the same logit and bias have the same key in any implementation, so there the lower index must win,
whatever the precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from pytest_moe_routing.compare.tolerances import Precision
from pytest_moe_routing.reference import routing as reference
from pytest_moe_routing.reference.routing import as_bfloat16
from pytest_moe_routing.routing.recipe import Recipe

#: Below the smallest normal float32, numbers may be lost or flushed to zero.
_TINY = 2.0**-126
#: Largest relative error of rounding to bfloat16.
_HALF_A_STEP = 2.0**-8
#: More than float32 moves a bfloat16 number that it scales.
_SCALING = 2.0**-22


class Beaten(NamedTuple):
    """A chosen expert that loses to one passed over, and by how much beyond what errors explain.

    An infinite excess has no such pair: no groups that may be kept hold all of the experts.

    Attributes:
        excess: How far the better key lies above the other one, less the errors of both.
        expert, better: The expert that was chosen, and the one that should have been.
        gap: How far the better key lies above the other one.
        tied: Both keys are made of the same inputs.
    """

    excess: float
    expert: int = -1
    better: int = -1
    gap: float = 0.0
    tied: bool = False


@dataclass(frozen=True)
class Weights:
    """What weights of given experts may be: all `[num_tokens, top_k]`.

    Attributes:
        exact: float64, the recipe's.
        low, high: float64, the smallest and the largest that are right.
        outside: bool, where the weights that were compared are neither.
        undefined: bool `[num_tokens, 1]`, where all chosen scores may underflow to zero, and no
            epsilon keeps 0/0 away.
    """

    exact: Tensor
    low: Tensor
    high: Tensor
    outside: Tensor
    undefined: Tensor


class Rows:
    """The reference's view of every token: keys, how far an implementation's may lie, its choice.

    Attributes:
        logits: float64 `[num_tokens, num_experts]`.
        bias: `[num_experts]` as given, or None.
        keys, errors: float64 `[num_tokens, num_experts]`.
        ids: int64 `[num_tokens, top_k]`.
        lower_index: Whether equal inputs must go to the lower index; `torch.topk`, on which many
            routers are built, leaves their order open.
    """

    lower_index = True

    def __init__(
        self, logits: Tensor, recipe: Recipe, bias: Tensor | None, precision: Precision
    ) -> None:
        self.recipe, self.precision = recipe, precision
        self.logits = logits.detach().cpu().to(torch.float64)
        self.bias = None if bias is None else bias.detach().cpu()
        scores, self.errors = self.score(self.logits, recipe.score)
        self.keys = reference.choosing_keys(scores, recipe, self.bias)
        if recipe.bias:
            self.errors = self.errors + precision.relative * self.keys.abs()
        self.ids = reference.choose(self.keys, recipe)

    def score(self, logits: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Return scores, and their largest errors."""
        scores = reference.score(logits, name)
        if name == "identity":
            errors = torch.zeros_like(scores)
        else:
            least = {
                "sigmoid": max(self.precision.sigmoid, _TINY),
                "softmax": _TINY,
                # The root of what underflowed.
                "sqrtsoftplus": _TINY**0.5,
            }[name]
            errors = self.precision.relative * scores.abs() + least
        if self.recipe.score_dtype == "float32":
            return scores, errors
        low, value, high = (as_bfloat16(scores + side * errors) for side in (-1, 0, 1))
        return value, torch.maximum(value - low, high - value)

    def weighing(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores that these experts are weighed by, and their largest errors."""
        name = self.recipe.weigh_by
        if name == "selection":
            return self.keys.gather(1, ids), self.errors.gather(1, ids)
        if name == "softmax":
            scores, errors = self.score(self.logits, name)
            return scores.gather(1, ids), errors.gather(1, ids)
        return self.score(self.logits.gather(1, ids), name)

    # -- the choice --------------------------------------------------------------------------------

    def are_close(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """Return for which tokens errors alone explain a choice of experts, all tokens at once.

        That is told only of a router that leaves the order of equal inputs open, of groups only
        where those excluded take no part; `beaten` tells it of any.

        Args:
            tokens: int64 `[n]`.
            ids: The choices of all tokens, int64 `[num_tokens, top_k]`, each expert once.

        Returns:
            bool `[n]`.
        """
        recipe = self.recipe
        is_masked = recipe.grouped and recipe.mask != -torch.inf
        if self.lower_index or recipe.per_group or is_masked:
            return torch.zeros_like(tokens, dtype=torch.bool)
        keys, errors, ids = self.keys[tokens], self.errors[tokens], ids[tokens]
        others = (keys - errors).scatter(1, ids, -torch.inf)
        if recipe.grouped:
            passed_over = self._passed_over(keys, errors, ids, others)
        else:
            passed_over = others.amax(1)
        # False where either is NaN.
        return passed_over <= (keys + errors).gather(1, ids).amin(1)

    def _passed_over(self, keys: Tensor, errors: Tensor, ids: Tensor, others: Tensor) -> Tensor:
        """Return a lower bound of the key of the best expert that was passed over.

        It is the minimum over all sets of groups that may have been kept; NaN without such a set.

        Args:
            keys, errors: float64 `[n, num_experts]`.
            ids: int64 `[n, top_k]`, which the kept groups hold.
            others: The least keys of all other experts, -inf for those of `ids`.
        """
        groups, topk = self.recipe.n_group, self.recipe.topk_group
        surely_above, maybe_above = self._groups_above(keys, errors)
        needed = torch.zeros_like(surely_above, dtype=torch.bool)
        needed.scatter_(1, ids // (keys.shape[1] // groups), True)
        kept, possible = needed | (maybe_above < topk), surely_above < topk
        best = others.unflatten(1, (groups, -1)).amax(2)
        # The rest are those groups that pass over the least.
        least = best.masked_fill(kept | ~possible, torch.inf).sort(1).values
        rest = topk - kept.sum(1, keepdim=True)
        least = least.gather(1, (rest - 1).clamp_min(0)).masked_fill(rest <= 0, -torch.inf)
        most = torch.maximum(best.masked_fill(~kept, -torch.inf).amax(1), least.squeeze(1))
        is_none = (kept & ~possible).any(1) | (rest.squeeze(1) < 0) | ~keys.isfinite().all(1)
        return most.masked_fill(is_none, torch.nan)

    def _groups_above(self, keys: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many groups surely, and how many maybe, have a higher score than each.

        Both are int64 `[n, n_group]`, of keys and errors `[n, num_experts]`. A bound that is
        NaN, as of an infinite key with an infinite error, may be above any other score.
        """
        scores = reference.group_scores(keys, self.recipe)
        errors = errors.unflatten(1, (self.recipe.n_group, -1)).amax(2)
        if self.recipe.group_score == "top2_sum":
            errors = 2 * errors
        low, high = scores - errors, scores + errors
        surely = (low.unsqueeze(1) > high.unsqueeze(2)).sum(2)
        return surely, (~(high.unsqueeze(1) < low.unsqueeze(2))).sum(2) - 1

    def beaten(self, token: int, ids: Tensor) -> Beaten | None:
        """Return the least that is wrong with a choice of experts; None when it may be right."""
        least = Beaten(torch.inf)
        for groups in self._admissible_groups(token, ids):
            found = self._beaten_within(token, ids, groups)
            if found is None:
                return None
            least = min(least, found)
        return least

    def _beaten_within(self, token: int, ids: Tensor, groups: tuple[int, ...]) -> Beaten | None:
        """Return the most that keeps `ids` from being the best experts of these groups."""
        keys, errors, inputs = self.keys[token], self.errors[token], self.inputs(token)
        kept = torch.zeros(self.recipe.n_group, len(keys) // self.recipe.n_group, dtype=torch.bool)
        kept[list(groups)] = True
        kept = kept.flatten()
        rest = kept.clone()
        if self.recipe.mask != -torch.inf:
            # Excluded experts take part, with one exact number as the key of all.
            rest[:] = True
            keys, errors = (
                x.masked_fill(~kept, value)
                for x, value in ((keys, self.recipe.mask), (errors, 0.0))
            )
        rest[ids] = False
        out = rest.nonzero().flatten()
        high, low = (keys[ids] + errors[ids]).unsqueeze(1), (keys[out] - errors[out]).unsqueeze(0)
        alike = (inputs[:, ids].unsqueeze(2) == inputs[:, out].unsqueeze(1)).all(0)
        alike &= kept[ids].unsqueeze(1) & kept[out].unsqueeze(0)
        beaten = low > high
        if self.lower_index:
            beaten |= ((low == high) | alike) & (out.unsqueeze(0) < ids.unsqueeze(1))
        # Routers that mask with a number call torch.topk, whose ties go to any expert.
        beaten &= kept[ids].unsqueeze(1) | kept[out].unsqueeze(0)
        if self.recipe.per_group:
            same, misplaced = self._between_groups(ids, out)
            beaten = (beaten & same) | misplaced
        if not beaten.any():
            return None
        beyond = (low - high).nan_to_num(0.0).masked_fill(~beaten, -torch.inf)
        slot, other = divmod(int(beyond.argmax()), len(out))
        expert, better = int(ids[slot]), int(out[other])
        return Beaten(
            # A tie given to the higher index is no distance at all, and wrong all the same.
            max(float(beyond.max()), 1e-300),
            expert,
            better,
            float(keys[better] - keys[expert]),
            bool(alike[slot, other]),
        )

    def _between_groups(self, ids: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """Return which chosen experts are of others' groups, and which are in the others' place.

        Each of too many in a group is in the place of one of a group that has too few.
        Both results are bool `[top_k, num_experts - top_k]`.
        """
        groups, each = self.recipe.n_group, self.recipe.top_k // self.recipe.n_group
        size = self.keys.shape[1] // groups
        count = torch.bincount(ids // size, minlength=groups)
        ours, theirs = (ids // size).unsqueeze(1), (out // size).unsqueeze(0)
        return ours == theirs, (count[ours] > each) & (count[theirs] < each)

    def inputs(self, token: int) -> Tensor:
        """Logit and bias of every expert, `[2, num_experts]`: equal inputs make equal keys."""
        logits = self.logits[token]
        bias = torch.zeros_like(logits) if self.bias is None else self.bias.to(logits)
        return torch.stack([logits, bias])

    def _admissible_groups(self, token: int, ids: Tensor) -> Iterator[tuple[int, ...]]:
        """Yield every set of groups that may have been kept and holds all of these experts.

        With a mask, experts need not be in a group that is kept.
        """
        recipe = self.recipe
        if not recipe.grouped:
            yield tuple(range(recipe.n_group))
            return
        size = self.keys.shape[1] // recipe.n_group
        surely_above, maybe_above = (
            count[0] for count in self._groups_above(self.keys[[token]], self.errors[[token]])
        )
        sure = (maybe_above < recipe.topk_group).nonzero().flatten().tolist()
        possible = (surely_above < recipe.topk_group).nonzero().flatten().tolist()
        open_ = [g for g in possible if g not in sure]
        needed = {e // size for e in ids.tolist()} if recipe.mask == -torch.inf else set()
        made_of = self.group_inputs(token)
        for extra in combinations(open_, recipe.topk_group - len(sure)):
            kept = {*sure, *extra}
            passed_over = [g for g in possible if g not in kept]
            if needed <= kept and not (
                self.lower_index
                and any(h < g and made_of[g] == made_of[h] for g in extra for h in passed_over)
            ):
                yield tuple(sorted(kept))

    def group_inputs(self, token: int) -> list[list[list[float]]]:
        """Return the inputs of each group's score: equal inputs make equal scores."""
        recipe = self.recipe
        count = 2 if recipe.group_score == "top2_sum" else 1
        keys = self.keys[token].view(recipe.n_group, -1)
        best = reference.stable_topk(keys, count)
        inputs = self.inputs(token).view(2, recipe.n_group, -1)
        made_of = inputs.gather(2, best.unsqueeze(0).expand(2, -1, -1))
        return made_of.permute(1, 2, 0).tolist()

    # -- the weights -------------------------------------------------------------------------------

    def judge_weights(self, ids: Tensor, weights: Tensor) -> Weights:
        """Compare float64 weights of these experts, right or wrong: both `[num_tokens, top_k]`."""
        ids = ids.clamp(0, self.logits.shape[1] - 1)
        low, high, undefined = self._weight_bounds(ids)
        exact = reference.weigh(self.logits, self.recipe, ids, bias=self.bias)
        if self.recipe.normalize_dtype == "bfloat16":
            # What bfloat16 arithmetic makes of exact scores is a number, and no range.
            steps = exact, as_bfloat16(exact)
            off = torch.stack([(weights - step).abs() > _SCALING * step.abs() for step in steps])
            outside = off.all(0) | weights.isnan()
            low, high = torch.minimum(*steps), torch.maximum(*steps)
        else:
            outside = ~((weights >= low) & (weights <= high))
        if self._rounds_weights():
            # Rounded after they were scaled, or before.
            finer = [
                (x - as_bfloat16(x)).abs() > _SCALING * x.abs()
                for x in (weights, weights / self.recipe.scale)
            ]
            outside |= finer[0] & finer[1]
        # NaN is right where the exact weight is NaN or may be, an infinity where it is that one.
        outside &= ~(weights.isnan() & (exact.isnan() | undefined))
        outside &= ~(weights == exact)
        return Weights(exact, low, high, outside, undefined)

    def _rounds_weights(self) -> bool:
        """Return whether weights are bfloat16 numbers, from an implementation that has others."""
        return self.recipe.weight_dtype == "bfloat16" and self.precision.weight < _HALF_A_STEP

    def _weight_bounds(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the smallest and largest weights that the implementation may give these experts.

        The third result is `Weights.undefined`.
        """
        recipe, precision = self.recipe, self.precision
        scores, errors = self.weighing(ids)
        low, high = scores - errors, scores + errors
        low = torch.where(scores >= 0, low.clamp_min(0), low)
        undefined = torch.zeros_like(low[:, :1], dtype=torch.bool)
        if recipe.normalize == "softmax":
            weights = scores.softmax(1)
            low, high = weights * (1 - precision.relative), weights * (1 + precision.relative)
        elif recipe.normalize == "sum":
            least, most = low.sum(1, keepdim=True), high.sum(1, keepdim=True)
            undefined = (least + recipe.epsilon <= 0) & (most + recipe.epsilon >= 0)
            ends = (
                low / (low + (most - high) + recipe.epsilon),
                high / (high + (least - low) + recipe.epsilon),
            )
            # Of negative scores, the larger has the smaller weight.
            low, high = torch.minimum(*ends), torch.maximum(*ends)
        low, high = low * recipe.scale, high * recipe.scale
        rounding = _HALF_A_STEP if self._rounds_weights() else precision.weight
        slack = (rounding + precision.relative) * torch.maximum(low.abs(), high.abs())
        slack = slack + _TINY * max(1.0, recipe.scale)
        # Rounding changes no sign.
        low = torch.where(low >= 0, (low - slack).clamp_min(0), low - slack)
        return low, high + slack, undefined
