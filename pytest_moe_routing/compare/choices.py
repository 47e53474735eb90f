"""Every choice of experts that is as right as the reference's, where keys are too close to tell."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from pytest_moe_routing.errors import RecipeError
from pytest_moe_routing.reference.routing import (
    Routing,
    check_inputs,
    choose,
    choosing_keys,
    score,
    weigh,
)
from pytest_moe_routing.routing.recipe import Recipe

#: Experts of one token that may be ambiguous at once: 2**8 choices are tried.
_MOST = 8


def admissible_routings(
    logits: Tensor, recipe: Recipe, bias: Tensor | None = None, *, error: float = 2.5e-4
) -> Iterator[Routing]:
    """Yield routings that are correct for a kernel whose keys are off by up to `error` each.

    A token is ambiguous if errors of that size can change which experts are chosen for it. The n-th
    routing has the n-th other choice of each ambiguous token, and the reference's own choice for
    all other tokens. Nothing is yielded if no token is ambiguous. Pass the routings to
    `compare_moe` as `alternatives`.

    Args:
        logits: As for `route`.
        recipe: As for `route`.
        bias: As for `route`.
        error: Largest absolute error of a key, which is a selection score; 2.5e-4 is that of
            FlashInfer's sigmoid.

    Raises:
        RecipeError: More than eight experts of a token are ambiguous.
    """
    check_inputs(logits, recipe, bias)
    logits = logits.to(torch.float64)
    keys = choosing_keys(score(logits, recipe.score), recipe, bias)
    own = choose(keys, recipe)
    others = [_others(row, ids, recipe, error) for row, ids in zip(keys, own, strict=True)]
    for turn in range(max(map(len, others), default=0)):
        ids = torch.stack(
            [more[turn] if turn < len(more) else ids for more, ids in zip(others, own, strict=True)]
        )
        yield Routing(ids, weigh(logits, recipe, ids))


def _others(keys: Tensor, own: Tensor, recipe: Recipe, error: float) -> list[Tensor]:
    """Return other sets of experts, `[top_k]` each, to which keys within `error` can lead."""
    ambiguous = _ambiguous(keys, recipe, error)
    if len(ambiguous) > _MOST:
        raise RecipeError(
            f"selection scores: found {len(ambiguous)} experts of one token within "
            f"{error:g} of the threshold, expected at most {_MOST}"
        )
    signs = torch.tensor(list(product((-1.0, 1.0), repeat=len(ambiguous))), dtype=keys.dtype)
    moved = keys.repeat(len(signs), 1)
    moved[:, ambiguous] += error * signs
    sets = {tuple(ids.sort().values.tolist()): ids for ids in choose(moved, recipe)}
    sets.pop(tuple(own.sort().values.tolist()), None)
    return list(sets.values())


def _ambiguous(keys: Tensor, recipe: Recipe, error: float) -> list[int]:
    """Return the experts whose own error can change the choice, whatever the other keys' errors."""
    nudge = 2 * error * torch.eye(len(keys), dtype=keys.dtype)
    # One expert as high and all others as low as they can be, and the reverse.
    apart = [choose(keys + side * (nudge - error), recipe).sort(1).values for side in (1, -1)]
    alike = [choose((keys + side * error).unsqueeze(0), recipe).sort(1).values for side in (1, -1)]
    differs = (apart[0] != alike[0]).any(1) | (apart[1] != alike[1]).any(1)
    return differs.nonzero().flatten().tolist()
