"""What a target rounds on the way to a kernel that would have taken it as it is.

Rounding is no other meaning, so a verdict does not change with it. But which experts are chosen may
hang on it: a bias that lies in a narrow band far from 0 has hardly a handful of values in bfloat16.
"""

from __future__ import annotations

from dataclasses import replace

from pytest_moe_routing.oracle.finding import Finding
from pytest_moe_routing.oracle.judge import Judgement

#: What shows the loss best: a pattern of `logits`.
PATTERNS = {"logits": "near-ties", "gate": "near-ties", "bias": "narrow-bias"}
_TOKENS = 256


def avoidable_downcasts(judgement: Judgement) -> list[Finding]:
    """The downcasts of a judgement that this kernel would have computed with in float32.

    None if the launcher rejects float32 there, or the kernel itself rounds.
    """
    call, flashinfer = judgement.call, judgement.flashinfer
    assert call is not None
    found = []
    for downcast in judgement.downcasts:
        if downcast.field == "bias":
            better = replace(call, bias_dtype="float32")
            takes = flashinfer.recipe(better).bias_dtype == "float32"
        else:
            better, takes = replace(call, logits_dtype="float32"), True
        if takes and not flashinfer.violations(better):
            found.append(downcast)
    return found


def share_of_tokens(judgement: Judgement, field: str) -> float:
    """Return the share of tokens that get another set of experts after the downcast."""
    import torch

    from pytest_moe_routing.logits import make
    from pytest_moe_routing.reference.routing import route

    recipe, experts = judgement.wanted, judgement.model.router.num_experts
    case = make(PATTERNS[field], recipe, num_tokens=_TOKENS, num_experts=experts)
    logits, bias = case.logits.to(torch.float32), case.bias
    right = route(logits, recipe, bias, dtype=torch.float64)
    if field == "bias":
        assert bias is not None
        bias = bias.bfloat16().to(bias.dtype)
    else:
        logits = logits.bfloat16().to(torch.float32)
    got = route(logits, recipe, bias, dtype=torch.float64)
    same = right.topk_ids.sort(1).values == got.topk_ids.sort(1).values
    return 1.0 - float(same.all(1).double().mean())
