"""The router of Phi-3.5-MoE, which no recipe expresses: a softmax for each of two experts.

Each expert's weight is its share among those whose scores are nearly as high; the second expert
competes with all but the first. Semantics: `sparsemixer` of transformers' modeling_phimoe.py, in
inference.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: `router_jitter_noise` of microsoft/Phi-3.5-MoE-instruct's config.json, half the relative distance
#: to the best score at which an expert no longer competes.
JITTER = 0.01


def sparse_mixer(logits: Tensor, jitter: float = JITTER) -> tuple[Tensor, Tensor]:
    """Route every token to two experts.

    Args:
        logits: Finite router logits `[num_tokens, num_experts]`, any floating dtype.

    Returns:
        Weights, float32, and experts, int64, both `[num_tokens, 2]`.
    """
    scores = logits.float()
    competing, weights, ids = scores, [], []
    for _ in range(2):
        best, expert = competing.max(-1, keepdim=True)
        distance = (best - scores) / torch.maximum(scores.abs(), best)
        near = competing.masked_fill(distance > 2 * jitter, -torch.inf)
        weights.append(near.softmax(-1).gather(-1, expert))
        ids.append(expert)
        competing = competing.scatter(-1, expert, -torch.inf)
    return torch.cat(weights, -1), torch.cat(ids, -1)
