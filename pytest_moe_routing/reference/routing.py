"""Runs any recipe, in torch, on any device. The only place where routing is computed.

Order and ties follow FlashInfer's kernels (0.2.9 to 0.7.2.post1, `RoutingKernelTopK.cuh`): experts
come in descending order of the score they were chosen by, equal scores in ascending index.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from pytest_moe_routing.errors import RecipeError
from pytest_moe_routing.routing.recipe import Recipe


@dataclass(frozen=True)
class Routing:
    """The routing of a batch of tokens.

    Attributes:
        topk_ids: int64 `[num_tokens, top_k]`, distinct in each row, best choosing score first.
        topk_weights: `[num_tokens, top_k]` in the computing dtype, weight of each of `topk_ids`.
    """

    topk_ids: Tensor
    topk_weights: Tensor

    def dense(self, num_experts: int) -> Tensor:
        """Weights as `[num_tokens, num_experts]`, 0 where an expert was not chosen."""
        zeros = self.topk_weights.new_zeros(len(self.topk_ids), num_experts)
        return zeros.scatter(1, self.topk_ids, self.topk_weights)


def route(
    logits: Tensor,
    recipe: Recipe,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Routing:
    """Route every token.

    Args:
        logits: Router logits `[num_tokens, num_experts]`, any floating dtype.
        recipe: What to compute.
        bias: `e_score_correction_bias` `[num_experts]`; required exactly when `recipe.bias`.
        dtype: float32, or float64 for an exact answer to rounding questions.

    Not finite logits have a defined result, always with distinct expert indices in range: NaN
    counts as the largest score (so NaN experts are chosen first, as by the kernels' sigmoid and
    softmax methods); +inf and -inf are ordinary extremes; where every remaining score is -inf, or
    all scores are equal, the lowest indices are chosen. Weights follow IEEE arithmetic.

    Raises:
        RecipeError: Shapes, dtypes or bias do not fit the recipe.
    """
    check_inputs(logits, recipe, bias)
    with torch.no_grad():
        logits = logits.to(dtype)
        scores = score(logits, recipe.score)
        keys = choosing_keys(scores, recipe, bias)
        ids = choose(keys, recipe)
        return Routing(ids, weigh(logits, recipe, ids, scores))


def check_inputs(logits: Tensor, recipe: Recipe, bias: Tensor | None) -> None:
    """Raise `RecipeError` unless these tensors can be routed by this recipe."""
    if logits.ndim != 2 or not logits.is_floating_point():
        shape = list(logits.shape)
        raise RecipeError(
            f"logits: found {logits.dtype} {shape}, expected floating [num_tokens, num_experts]"
        )
    num_experts = logits.shape[1]
    if recipe.bias != (bias is not None):
        found = "none" if bias is None else "one"
        raise RecipeError(f"bias: found {found}, but the recipe has bias={recipe.bias}")
    if bias is not None and (tuple(bias.shape) != (num_experts,) or not bias.is_floating_point()):
        raise RecipeError(
            f"bias: found {bias.dtype} {list(bias.shape)}, expected floating [{num_experts}]"
        )
    if num_experts % recipe.n_group:
        raise RecipeError(f"n_group: found {recipe.n_group}, which does not divide {num_experts}")
    in_kept_groups = num_experts // recipe.n_group * recipe.topk_group
    if recipe.top_k > in_kept_groups:
        raise RecipeError(f"top_k: found {recipe.top_k}, expected at most {in_kept_groups} experts")


def score(logits: Tensor, name: str) -> Tensor:
    """Apply a scoring function over the last dimension, in the dtype of the logits."""
    if name == "identity":
        return logits
    if name == "softmax":
        return logits.softmax(-1)
    if name == "sigmoid":
        return logits.sigmoid()
    return softplus(logits).sqrt()


def choosing_keys(scores: Tensor, recipe: Recipe, bias: Tensor | None) -> Tensor:
    """Scores to choose by, before groups are excluded: `[num_tokens, num_experts]`."""
    if bias is None:
        return scores
    if recipe.bias_dtype == "bfloat16":
        bias = bias.to(torch.bfloat16)
    return scores + bias.to(scores)


def group_scores(keys: Tensor, recipe: Recipe) -> Tensor:
    """The score of each group, `[num_tokens, n_group]`."""
    grouped = keys.unflatten(-1, (recipe.n_group, -1))
    if recipe.group_score == "max":
        return grouped.amax(-1)
    # A tournament, half against half: many times faster than topk(2) over short rows.
    best, second = grouped, torch.full_like(grouped, -torch.inf)
    while best.shape[-1] > 1:
        if best.shape[-1] % 2:
            best, second = (pad(x, (0, 1), value=-torch.inf) for x in (best, second))
        one, other = best.chunk(2, -1)
        second = torch.maximum(torch.minimum(one, other), torch.maximum(*second.chunk(2, -1)))
        best = torch.maximum(one, other)
    return (best + second).squeeze(-1)


def choose(keys: Tensor, recipe: Recipe) -> Tensor:
    """Ids of the chosen experts, `[num_tokens, top_k]`; excluded groups are no candidates."""
    if not recipe.grouped:
        return stable_topk(keys, recipe.top_k)
    kept = stable_topk(group_scores(keys, recipe), recipe.topk_group)
    # In ascending order, so that equal keys still go to the lower expert index.
    kept = kept.sort(-1).values
    size = keys.shape[1] // recipe.n_group
    candidates = keys.unflatten(-1, (recipe.n_group, size))
    candidates = candidates.gather(1, kept.unsqueeze(-1).expand(-1, -1, size)).flatten(1)
    place = stable_topk(candidates, recipe.top_k)
    return kept.gather(1, place // size) * size + place % size


def stable_topk(keys: Tensor, k: int) -> Tensor:
    """Indices of the `k` largest keys per row, descending, equal keys in ascending index.

    `torch.topk` is several times faster than a stable sort but leaves ties undefined, so only the
    rows in which a tie (or a NaN) touches the first `k` keys are sorted.
    """
    values, ids = keys.topk(min(k + 1, keys.shape[-1]))
    undecided = (values[:, 1:] >= values[:, :-1]).any(-1) | values.isnan().any(-1)
    ids = ids[:, :k]
    if undecided.any():
        order = keys[undecided].sort(dim=-1, descending=True, stable=True).indices
        ids[undecided] = order[:, :k]
    return ids


def weigh(logits: Tensor, recipe: Recipe, ids: Tensor, scores: Tensor | None = None) -> Tensor:
    """Weights `[num_tokens, k]` of given experts `ids`, as the recipe weighs them.

    `scores` may pass on `score(logits, recipe.score)` when it has been computed already.
    """
    if recipe.weigh_by == recipe.score and scores is not None:
        weights = scores.gather(1, ids)
    elif recipe.weigh_by == "softmax":
        weights = score(logits, "softmax").gather(1, ids)
    else:
        weights = score(logits.gather(1, ids), recipe.weigh_by)
    if recipe.normalize == "softmax":
        weights = weights.softmax(-1)
    elif recipe.normalize == "sum":
        weights = weights * recipe.scale / (weights.sum(-1, keepdim=True) + recipe.epsilon)
    if recipe.normalize != "sum" and recipe.scale != 1.0:
        weights = weights * recipe.scale
    if recipe.weight_dtype == "bfloat16":
        weights = weights.to(torch.bfloat16).to(weights.dtype)
    return weights
