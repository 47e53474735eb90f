"""Routers that no recipe expresses, by the architecture of their models.

Semantics: modeling_phimoe.py, modeling_gemma4.py and modeling_longcat_flash.py of transformers
5.19.0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_moe_routing.reference.routing import stable_topk
from pytest_moe_routing.reference.sparse_mixer import sparse_mixer


@dataclass(frozen=True)
class Choice:
    """What a router chooses for each token.

    Attributes:
        weights: float32 `[num_tokens, top_k]`, 0 for a slot whose expert does not run.
        ids: int64 `[num_tokens, top_k]`.
        unchanged: float32 `[num_tokens]`, by what the token itself is multiplied and added.
    """

    weights: Tensor
    ids: Tensor
    unchanged: Tensor


@dataclass(frozen=True)
class OwnRouter:
    """A router that no recipe expresses.

    Attributes:
        route: Takes logits `[num_tokens, num_logits]`, what the router has for each of them
            `[num_logits]`, the number of routed experts and that of chosen ones.
        each: Part of the name of the parameter with a value for each expert; "" if there is none.
        extra: Logits beyond those of routed experts, by key of the config.
    """

    route: Callable[[Tensor, Tensor, int, int], Choice]
    each: str = ""
    extra: str = ""


def _mixer(logits: Tensor, each: Tensor, experts: int, top_k: int) -> Choice:
    weights, ids = sparse_mixer(logits)
    return Choice(weights, ids, torch.zeros(len(logits)))


def _scaled_experts(logits: Tensor, each: Tensor, experts: int, top_k: int) -> Choice:
    """Normalize the chosen scores, and multiply each by its expert's own scale."""
    scores = logits.float().softmax(-1)
    ids = stable_topk(scores, top_k)
    weights = scores.gather(1, ids)
    weights = weights / weights.sum(-1, keepdim=True) * each.float()[ids]
    return Choice(weights, ids, torch.zeros(len(logits)))


def _zero_experts(logits: Tensor, each: Tensor, experts: int, top_k: int) -> Choice:
    """Choose by biased scores among experts and zero experts, which return the token unchanged."""
    scores = logits.float().softmax(-1)
    ids = stable_topk(scores + each.float(), top_k)
    weights = scores.gather(1, ids)
    is_zero = ids >= experts
    return Choice(
        weights.masked_fill(is_zero, 0.0), ids, weights.masked_fill(~is_zero, 0.0).sum(-1)
    )


#: Each router that a framework's block can be compared with.
OWN_ROUTERS: Mapping[str, OwnRouter] = {
    "PhiMoEForCausalLM": OwnRouter(_mixer),
    "Gemma4ForConditionalGeneration": OwnRouter(_scaled_experts, each="per_expert_scale"),
    "LongcatFlashForCausalLM": OwnRouter(
        _zero_experts, each="correction_bias", extra="zero_expert_num"
    ),
}
