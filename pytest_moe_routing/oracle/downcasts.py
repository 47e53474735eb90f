"""What a target rounds on the way to a kernel that would have taken it as it is.

Rounding is no other meaning, so a verdict does not change with it. But which experts are chosen may
hang on it: a bias that lies in a narrow band far from 0 has hardly a handful of values in bfloat16.
"""

from __future__ import annotations

from dataclasses import replace

from pytest_moe_routing.oracle.arguments import ROUNDED
from pytest_moe_routing.oracle.judge import Judgement

#: What shows the loss best: a pattern of `logits`.
_PATTERNS = {"logits": "near-ties", "gate": "near-ties", "bias": "narrow-bias"}
_TOKENS = 256


def avoidable_downcasts(judgement: Judgement) -> list[str]:
    """The keys of `ROUNDED` in a judgement that this kernel would have computed with in float32.

    None when the launcher refuses float32 there, or the kernel itself rounds.
    """
    call, flashinfer = judgement.call, judgement.flashinfer
    assert call is not None
    found = []
    for what in judgement.rounded:
        if what == "bias":
            better = replace(call, bias_dtype="float32")
            takes = flashinfer.recipe(better).bias_dtype == "float32"
        else:
            better, takes = replace(call, logits_dtype="float32"), True
        if takes and not flashinfer.troubles(better):
            found.append(what)
    return found


def lines(judgement: Judgement, lost: list[str]) -> list[str]:
    """The message: what is rounded, and how many tokens get other experts by it."""
    found = f"{judgement.model} on {judgement.scheme}, decided by {judgement.target}"
    told = [f"{found}: less precise than its kernel"]
    for what in lost:
        told += [
            f"  rounded  {ROUNDED[what]}",
            f"  kernel   {judgement.classification.method} of {judgement.flashinfer} computes with "
            "it in float32",
            f"  shown by {_share(judgement, what):.1%} of the tokens of the logits pattern "
            f"'{_PATTERNS[what]}' get other experts",
        ]
    return told


def _share(judgement: Judgement, what: str) -> float:
    """The share of tokens whose set of experts is another one after rounding."""
    import torch

    from pytest_moe_routing.logits import make
    from pytest_moe_routing.reference.routing import route

    recipe, experts = judgement.wanted, judgement.model.router.num_experts
    case = make(_PATTERNS[what], recipe, num_tokens=_TOKENS, num_experts=experts)
    logits, bias = case.logits.to(torch.float32), case.bias
    right = route(logits, recipe, bias, dtype=torch.float64)
    if what == "bias":
        assert bias is not None
        bias = bias.bfloat16().to(bias.dtype)
    else:
        logits = logits.bfloat16().to(torch.float32)
    got = route(logits, recipe, bias, dtype=torch.float64)
    same = right.topk_ids.sort(1).values == got.topk_ids.sort(1).values
    return 1.0 - float(same.all(1).double().mean())
