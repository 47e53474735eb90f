"""Answers of a framework's sparse mixer, against the reference."""

from __future__ import annotations

from torch import Tensor

from pytest_moe_routing.oracle.routers import WrongAnswer
from pytest_moe_routing.reference.sparse_mixer import sparse_mixer

#: Patterns of logits without ties among the best, of which the reference takes any.
UNTIED = ("plain", "all-negative", "near-ties")
_TOLERANCE = 1e-5


class WrongMixer(WrongAnswer):
    """Experts or weights that are not those of the reference."""

    kind = "weights"


def mixer_problem(weights: Tensor, ids: Tensor, logits: Tensor) -> str | None:
    """Return which token is not routed as by Phi-3.5-MoE's sparse mixer; None if all are.

    Args:
        weights, ids: `[num_tokens, 2]`.
        logits: `[num_tokens, num_experts]`.
    """
    wanted, experts = sparse_mixer(logits)
    is_wrong = (ids != experts) | ((weights - wanted).abs() > _TOLERANCE)
    tokens = is_wrong.any(1).nonzero().flatten().tolist()
    if not tokens:
        return None
    first = tokens[0]

    def told(of: Tensor, by: Tensor) -> str:
        pairs = zip(of[first].tolist(), by[first].tolist(), strict=True)
        return ", ".join(f"expert {expert} weighs {weight:.6g}" for expert, weight in pairs)

    return (
        "experts or weights are not those of the model's sparse mixer\n"
        f"{len(tokens)} of {len(logits)} tokens; token {first}: {told(ids, weights)}; "
        f"wanted {told(experts, wanted)}"
    )
