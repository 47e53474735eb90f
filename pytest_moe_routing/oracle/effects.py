"""How many tokens a mistake concerns that is no other meaning: rounding, or a mask.

Whether such a mistake changes a routing hangs on a checkpoint's numbers, which no config has. So it
is shown on the logits pattern that is made for it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from pytest_moe_routing.routing import Recipe, normal_form

if TYPE_CHECKING:
    from pytest_moe_routing.compare.mistakes import Mistake

_TOKENS = 256
_BELOW_MASK = "bias-below-minus-1"


def share_rerouted(mistake: Mistake, recipe: Recipe, pattern: str, num_experts: int) -> float:
    """Return the share of a pattern's tokens that a mistake sends to another set of experts."""
    import torch

    from pytest_moe_routing.compare.mistakes import Inputs
    from pytest_moe_routing.logits import make_case
    from pytest_moe_routing.reference.routing import route
    from pytest_moe_routing.reference.threads import one_thread

    with one_thread():
        case = make_case(pattern, recipe, num_tokens=_TOKENS, num_experts=num_experts)
        inputs = Inputs(case.logits, recipe, case.bias)
        right, got = (
            route(x.logits, x.recipe, x.bias, dtype=torch.float64).topk_ids.sort(1).values
            for x in (inputs, mistake.made(inputs) or inputs)
        )
        return float((right != got).any(1).double().mean())


@lru_cache(maxsize=1024)
def mask_notes(wanted: Recipe, got: Recipe, num_experts: int) -> tuple[str, ...]:
    """Return what a kernel's mask does to a router whose bias decides whether it does anything."""
    if not got.bias or normal_form(got, num_experts).mask == wanted.mask:
        return ()
    text = f"excluded groups are masked with {got.mask:g}: "
    try:
        from pytest_moe_routing.compare.mistakes import Mistake, recipe_with
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return (text + "to see how many tokens that concerns, install torch",)
    mistake = Mistake(text, recipe_with(mask=got.mask))
    share = share_rerouted(mistake, wanted, _BELOW_MASK, num_experts)
    return (
        f"{text}{share:.1%} of the tokens of the logits pattern '{_BELOW_MASK}' get other experts; "
        f"none where every score with its bias is above {got.mask:g}",
    )
