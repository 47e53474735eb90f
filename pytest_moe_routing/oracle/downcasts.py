"""What a target downcasts before a kernel that would have taken it as it is.

Rounding is no other meaning, so a verdict does not change with it. But which experts are chosen may
hang on it: a bias that lies in a narrow band far from 0 has hardly a handful of values in bfloat16.
"""

from __future__ import annotations

from dataclasses import replace

from pytest_moe_routing.oracle.effects import share_rerouted
from pytest_moe_routing.oracle.finding import Finding
from pytest_moe_routing.oracle.judgement import Judgement

#: What shows the loss best: a pattern of `logits`.
PATTERNS = {"logits": "near-ties", "gate": "near-ties", "bias": "narrow-bias"}


def avoidable_downcasts(judgement: Judgement) -> list[Finding]:
    """Return the downcasts of a judgement that this kernel would have accepted in float32.

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
    from pytest_moe_routing.compare.mistakes import BFLOAT16_BIAS, BFLOAT16_LOGITS

    mistake = BFLOAT16_BIAS if field == "bias" else BFLOAT16_LOGITS
    experts = judgement.model.router.num_experts
    return share_rerouted(mistake, judgement.wanted, PATTERNS[field], experts)
