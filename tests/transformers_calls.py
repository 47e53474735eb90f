"""How routers of the transformers library are made and called, where they differ from most.

A call takes the router, hidden states `[T, H]` and the bias `[E]` or None, and returns the experts,
their weights and the logits.
"""

from __future__ import annotations

import torch

#: Experts per token in all small configs.
K = 4


def logits_first(outputs):
    logits, weights, ids = outputs
    return ids, weights, logits


def either_order(router, x, bias):
    """Experts come first up to 5.19, and last from 5.24 on, as everywhere."""
    first, weights, last = router(x)
    return (last, weights, first) if first.is_floating_point() else (first, weights, last)


def bias_given(router, x, bias):
    return logits_first(router(x, bias))


def afmoe(router, x, bias):
    return logits_first(router(x.unsqueeze(0), bias))


def llama4(router, x, bias):
    """Its weights come dense, 0 where not chosen; a sigmoid of the chosen is more."""
    dense, logits = router(x)
    weights, ids = dense.topk(router.top_k)
    return ids, weights, logits


class _Weights(torch.nn.Module):
    """In the place of the experts: returns the weights that they are called with, by expert."""

    def forward(self, x, ids, weights):
        return torch.zeros_like(x).scatter(1, ids, weights.to(x.dtype))


class _Nothing(torch.nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def block(gate, *arguments):
    """Make and call a whole block, with experts that return their weights: its own doing counts."""

    def make(cls, config):
        block = cls(config, *arguments)
        block.experts = _Weights()
        if hasattr(block, "shared_experts"):
            block.shared_experts = _Nothing()
        return block

    def call(block, x, bias):
        dense = block(x.unsqueeze(0))
        dense = dense[0] if isinstance(dense, tuple) else dense
        weights, ids = dense.flatten(0, -2).topk(K)
        return ids, weights, getattr(block, gate)(x)[0]

    return {"make": make, "call": call}


def without_experts(cls, config):
    block = cls(config)
    block.experts = _Nothing()
    return block


def jamba(block, x, bias):
    """The block chooses up to 5.19, its router from 5.24 on."""
    outputs = block.router(x)
    if isinstance(outputs, tuple):
        return logits_first(outputs)
    return *block.route_tokens_to_experts(x, outputs), outputs


def dbrx(block, x, bias):
    logits = block.router(x)
    weights, ids = block.route_tokens_to_experts(logits)
    return ids, weights, logits


def jetmoe(router, x, bias):
    """It returns the (token, expert) pairs sorted by expert, and how many each expert has."""
    slots, _, gates, counts, logits = router(x)
    experts = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    ids = torch.empty_like(slots).scatter(0, slots, experts).view(len(x), -1)
    weights = torch.empty_like(gates).scatter(0, slots, gates).view(len(x), -1)
    return ids, weights, logits


def gemma(router, x, bias):
    """It returns probabilities, whose logarithms are as good as logits to a softmax."""
    probabilities, weights, ids = router(x)
    return ids, weights, probabilities.log()


def laguna(router, x, bias):
    """The logits that it returns are capped already."""
    _, weights, ids = router(x)
    return ids, weights, torch.nn.functional.linear(x, router.weight)


def inkling(router, x, bias):
    logits, weights, ids, _ = router(x)
    return ids, weights, logits
