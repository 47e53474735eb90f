"""Routing by loops over tokens and experts, in Python floats: slow, obvious, and not ours to share."""

from __future__ import annotations

import math
import struct


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


def bfloat16(value):
    """Round to the nearest bfloat16, ties to even."""
    (bits,) = struct.unpack("I", struct.pack("f", value))
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return struct.unpack("f", struct.pack("I", bits & 0xFFFFFFFF))[0]


def route_token(logits, recipe, bias=None):
    """Experts and weights of one token; `logits` and `bias` are lists of floats."""
    store = bfloat16 if recipe.score_dtype == "bfloat16" else float
    scores = [store(score) for score in _score(logits, recipe.score)]
    keys = list(scores) if bias is None else [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(keys) // recipe.n_group
    groups = [list(range(g * size, (g + 1) * size)) for g in range(recipe.n_group)]

    def rank(group):
        best = sorted((keys[e] for e in group), reverse=True)
        return best[0] if recipe.group_score == "max" else best[0] + best[1]

    candidates, masked = list(range(len(keys))), list(keys)
    if recipe.topk_group < recipe.n_group:
        order = sorted(range(recipe.n_group), key=lambda g: (-rank(groups[g]), g))
        kept = {e for g in order[: recipe.topk_group] for e in groups[g]}
        if recipe.mask == -math.inf:
            candidates = sorted(kept)
        masked = [keys[e] if e in kept else recipe.mask for e in range(len(keys))]
    if recipe.per_group:
        each = recipe.top_k // recipe.n_group
        candidates = [e for g in groups for e in sorted(g, key=lambda e: (-keys[e], e))[:each]]
    chosen = sorted(candidates, key=lambda e: (-masked[e], e))[: recipe.top_k]
    if recipe.weigh_by == "selection":
        weights = [keys[e] for e in chosen]
    else:
        weights = [store(_score(logits, recipe.weigh_by)[e]) for e in chosen]
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
