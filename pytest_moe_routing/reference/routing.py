"""Runs any recipe, in torch, on any device.

Order and ties follow FlashInfer's kernels (0.2.9 to 0.7.2.post1, `RoutingKernelTopK.cuh`): experts
come in descending order of the score they were chosen by, equal scores in ascending index.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from pytest_moe_routing.errors import RecipeError
from pytest_moe_routing.routing.recipe import Recipe


@dataclass(frozen=True)
class Routing:
    """The routing of a batch of tokens.

    Attributes:
        topk_ids: int64 `[num_tokens, top_k]`, distinct in each row, best selection score first.
        topk_weights: `[num_tokens, top_k]` in the computing dtype, weight of each of `topk_ids`.
    """

    topk_ids: Tensor
    topk_weights: Tensor

    def dense(self, num_experts: int) -> Tensor:
        """Weights as `[num_tokens, num_experts]`, 0 where an expert was not chosen."""
        zeros = self.topk_weights.new_zeros(len(self.topk_ids), num_experts)
        return zeros.scatter(1, self.topk_ids, self.topk_weights)

    def with_shared(self, num_experts: int, shared: int) -> Routing:
        """Append slots of shared experts, which follow the routed ones and weigh 1."""
        rows = len(self.topk_ids)
        ids = num_experts + torch.arange(shared, device=self.topk_ids.device).expand(rows, -1)
        ones = self.topk_weights.new_ones(rows, shared)
        return Routing(torch.cat((self.topk_ids, ids), 1), torch.cat((self.topk_weights, ones), 1))


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

    Non-finite logits have a defined result, always with distinct expert indices in range: NaN
    counts as the largest score (so NaN experts are chosen first, as by the kernels' sigmoid and
    softmax methods); +inf and -inf are ordinary extremes; where every remaining score is -inf, or
    all scores are equal, the lowest indices are chosen. Weights follow IEEE arithmetic.

    Raises:
        RecipeError: Shapes, dtypes or bias do not fit the recipe.
    """
    check_inputs(logits, recipe, bias)
    with torch.no_grad():
        logits = logits.to(dtype)
        scores = score(logits, recipe.score, recipe.score_dtype)
        keys = choosing_keys(scores, recipe, bias)
        ids = choose(keys, recipe)
        return Routing(ids, weigh(logits, recipe, ids, scores=scores, bias=bias))


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
    candidates = num_experts
    if recipe.mask == -inf:
        candidates = num_experts // recipe.n_group * recipe.topk_group
    if recipe.top_k > candidates:
        raise RecipeError(f"top_k: found {recipe.top_k}, expected at most {candidates} experts")


def score(logits: Tensor, name: str, rounded_to: str = "float32") -> Tensor:
    """Apply a scoring function over the last dimension, in the dtype of the logits.

    Scores that are rounded to bfloat16 are returned in the dtype of the logits all the same.
    """
    if name == "identity":
        scores = logits
    elif name == "softmax":
        scores = logits.softmax(-1)
    elif name == "sigmoid":
        scores = logits.sigmoid()
    else:
        scores = softplus(logits).sqrt()
    return as_bfloat16(scores) if rounded_to == "bfloat16" else scores


def as_bfloat16(x: Tensor) -> Tensor:
    """Round to bfloat16 and return the result in the dtype of `x`."""
    return x.to(torch.bfloat16).to(x.dtype)


def choosing_keys(scores: Tensor, recipe: Recipe, bias: Tensor | None) -> Tensor:
    """Scores to choose by, before groups are excluded: `[num_tokens, num_experts]`."""
    if bias is None:
        return scores
    if recipe.bias_dtype == "bfloat16":
        bias = bias.to(torch.bfloat16)
    return scores + bias.to(scores)


def group_scores(keys: Tensor, recipe: Recipe) -> Tensor:
    """Return the score of each group, `[num_tokens, n_group]`."""
    grouped = keys.unflatten(-1, (recipe.n_group, -1))
    if recipe.group_score == "max":
        return grouped.amax(-1)
    if keys.is_cuda and grouped.shape[-1] > 1:
        # One launch, where the tournament's many cost a GPU far more than their work.
        return grouped.topk(2, sorted=False).values.sum(-1)
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
    """Return the ids of the chosen experts, `[num_tokens, top_k]`.

    Experts of excluded groups are candidates only with a `mask`, which is then the key of all.
    """
    if recipe.per_group:
        return _choose_per_group(keys, recipe)
    if not recipe.grouped:
        return stable_topk(keys, recipe.top_k)
    kept = stable_topk(group_scores(keys, recipe), recipe.topk_group)
    size = keys.shape[1] // recipe.n_group
    if recipe.mask != -inf:
        excluded = kept.new_ones(len(keys), recipe.n_group, dtype=torch.bool)
        excluded = excluded.scatter(1, kept, False).repeat_interleave(size, 1)
        return stable_topk(keys.masked_fill(excluded, recipe.mask), recipe.top_k)
    first = kept.sort(-1).values * size
    ids = (first.unsqueeze(-1) + torch.arange(size, device=keys.device)).flatten(1)
    return _best_of(ids, keys, recipe.top_k)


def _choose_per_group(keys: Tensor, recipe: Recipe) -> Tensor:
    """Return as many ids of each group; see `choose`."""
    grouped = keys.unflatten(-1, (recipe.n_group, -1))
    best = stable_topk(grouped.flatten(0, 1), recipe.top_k // recipe.n_group)
    first = torch.arange(recipe.n_group, device=keys.device).unsqueeze(-1) * grouped.shape[-1]
    ids = best.unflatten(0, grouped.shape[:2]) + first
    return _best_of(ids.flatten(1).sort(-1).values, keys, recipe.top_k)


def _best_of(ids: Tensor, keys: Tensor, k: int) -> Tensor:
    """Return the `k` best of the candidates `ids`, whose ascending order decides between ties."""
    return ids.gather(1, stable_topk(keys.gather(1, ids), k))


def stable_topk(keys: Tensor, k: int) -> Tensor:
    """Return indices of the `k` largest keys per row, descending; equal keys by index.

    On a CPU `torch.topk` is several times faster than a stable sort but leaves ties undefined, so
    only the rows in which a tie (or a NaN) touches the first `k` keys are sorted. On a GPU, to ask
    whether there are any takes longer than to sort all.
    """
    if keys.is_cuda:
        return keys.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    values, ids = keys.topk(min(k + 1, keys.shape[-1]))
    undecided = (values[:, 1:] >= values[:, :-1]).any(-1) | values.isnan().any(-1)
    ids = ids[:, :k]
    if undecided.any():
        order = keys[undecided].sort(dim=-1, descending=True, stable=True).indices
        ids[undecided] = order[:, :k]
    return ids


def weigh(
    logits: Tensor,
    recipe: Recipe,
    ids: Tensor,
    *,
    scores: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return the weights `[num_tokens, k]` of given experts `ids`, as the recipe weighs them.

    Args:
        logits, recipe, bias: As for `route`; the bias is needed only to weigh by `selection`.
        scores: Passes on `score(logits, recipe.score)` where it has been computed already.
    """
    if recipe.weigh_by == "selection":
        if scores is None:
            scores = score(logits, recipe.score, recipe.score_dtype)
        weights = choosing_keys(scores, recipe, bias).gather(1, ids)
    elif recipe.weigh_by == recipe.score and scores is not None:
        weights = scores.gather(1, ids)
    elif recipe.weigh_by == "softmax":
        weights = score(logits, "softmax", recipe.score_dtype).gather(1, ids)
    else:
        weights = score(logits.gather(1, ids), recipe.weigh_by, recipe.score_dtype)
    if recipe.normalize_dtype == "bfloat16":
        short = _normalize(weights.to(torch.bfloat16), recipe.normalize, 1.0, recipe.epsilon)
        weights = short.to(weights.dtype) * recipe.scale
    else:
        weights = _normalize(weights, recipe.normalize, recipe.scale, recipe.epsilon)
    return as_bfloat16(weights) if recipe.weight_dtype == "bfloat16" else weights


def _normalize(weights: Tensor, how: str, scale: float, epsilon: float) -> Tensor:
    """Normalize and scale weights in their own dtype."""
    if how == "sum":
        total = weights.sum(-1, keepdim=True)
        if epsilon:
            total = total + epsilon
        return (weights if scale == 1.0 else weights * scale) / total
    if how == "softmax":
        weights = weights.softmax(-1)
    return weights if scale == 1.0 else weights * scale
