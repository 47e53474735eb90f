"""Routing by loops over tokens and experts, in Python floats: slow, obvious, and not ours to share."""

from __future__ import annotations

import math


def _softmax(values):
    top = max(values)
    powers = [math.exp(v - top) for v in values]
    return [p / sum(powers) for p in powers]


def _score(values, name):
    if name == "softmax":
        return _softmax(values)
    one = {
        "identity": lambda v: v,
        "sigmoid": lambda v: 1 / (1 + math.exp(-v)) if v > -700 else 0.0,
        "sqrtsoftplus": lambda v: math.sqrt(max(v, 0) + math.log1p(math.exp(-abs(v)))),
    }[name]
    return [one(v) for v in values]


def route_token(logits, recipe, bias=None):
    """Experts and weights of one token; `logits` and `bias` are lists of floats."""
    scores = _score(logits, recipe.score)
    keys = list(scores) if bias is None else [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(keys) // recipe.n_group
    groups = [list(range(g * size, (g + 1) * size)) for g in range(recipe.n_group)]

    def rank(group):
        best = sorted((keys[e] for e in group), reverse=True)
        return best[0] if recipe.group_score == "max" else best[0] + best[1]

    if recipe.topk_group < recipe.n_group:
        order = sorted(range(recipe.n_group), key=lambda g: (-rank(groups[g]), g))
        groups = [groups[g] for g in order[: recipe.topk_group]]
    candidates = [e for group in groups for e in group]
    chosen = sorted(candidates, key=lambda e: (-keys[e], e))[: recipe.top_k]
    weighing = _score(logits, recipe.weigh_by)
    weights = [weighing[e] for e in chosen]
    if recipe.normalize == "sum":
        total = sum(weights) + recipe.epsilon
        weights = [w / total for w in weights]
    elif recipe.normalize == "softmax":
        weights = _softmax(weights)
    return chosen, [w * recipe.scale for w in weights]


def route_all(logits, recipe, bias=None):
    """`route_token` for every row of a tensor."""
    bias = None if bias is None else bias.tolist()
    routed = [route_token(row, recipe, bias) for row in logits.tolist()]
    return [ids for ids, _ in routed], [weights for _, weights in routed]
