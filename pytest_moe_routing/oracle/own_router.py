"""The router that a framework computes by itself for a config, found by running it.

A framework may read a config otherwise than its author meant it, whichever kernel runs: a scaling
factor that no backend applies, group scores that cannot be asked for. What a fused kernel computes
is compared with what the framework's own router does, so that it is not blamed for such a thing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache, lru_cache
from itertools import combinations
from typing import TYPE_CHECKING, Any

from pytest_moe_routing.errors import RecipeError, Unsupported
from pytest_moe_routing.models import RouterConfig
from pytest_moe_routing.routing import Recipe, recipe_of

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_moe_routing.oracle.routers import Router

#: Enough to tell recipes apart that agree on nine of ten tokens.
_TOKENS = 128
#: What float32 arithmetic in another order changes, by far.
_TOLERANCE = 1e-4


def _changes(config: RouterConfig) -> list[Mapping[str, Any]]:
    """Return single ways to read a config otherwise."""
    changes: list[Mapping[str, Any]] = []
    if config.routed_scaling_factor != 1.0:
        changes.append({"routed_scaling_factor": 1.0})
    if config.n_group is not None:
        changes.append({"n_group": None, "topk_group": None, "group_score": None})
    if config.group_score is not None:
        other = "max" if config.group_score == "top2_sum" else "top2_sum"
        changes.append({"group_score": other})
    changes.append({"renormalize": not config.renormalize})
    if config.correction_bias is not None:
        changes.append({"correction_bias": None})
    return changes


def _readings(config: RouterConfig) -> Iterator[Mapping[str, Any]]:
    """Yield every way to read a config, with the fewest changes first."""
    changes = _changes(config)
    for count in range(len(changes) + 1):
        for chosen in combinations(changes, count):
            merged = {name: value for change in chosen for name, value in change.items()}
            if not list(replace(config, **merged).problems()):
                yield merged


@cache
def _inputs(num_experts: int) -> tuple[Tensor, Tensor]:
    """Return random logits and a bias, the same each time; made once for each size."""
    import torch

    generator = torch.Generator().manual_seed(num_experts)
    logits = 2 * torch.randn(_TOKENS, num_experts, generator=generator)
    return logits, torch.randn(num_experts, generator=generator) / 2


@lru_cache(maxsize=32)
def _chosen(num_experts: int, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores, the chosen experts, and the order that sorts those, as `route` chooses.

    Cached, as configs that are asked for in turn differ in their weights alone.

    Raises:
        RecipeError: The recipe does not fit the number of experts.
    """
    from pytest_moe_routing.reference.routing import check_inputs, choose, choosing_keys, score

    logits, bias = _inputs(num_experts)
    # A framework may make them in bfloat16.
    logits, given = logits.float(), bias if recipe.bias else None
    check_inputs(logits, recipe, given)
    scores = score(logits, recipe.score, recipe.score_dtype)
    ids = choose(choosing_keys(scores, recipe, given), recipe)
    return scores, ids, ids.sort(1).indices


def reading_of(router: Router, config: RouterConfig) -> Mapping[str, Any]:
    """Return the settings that a framework's router has otherwise than a config.

    Args:
        router: Takes logits `[128, num_experts]` and a bias or None, returns weights and ids, both
            `[128, top_k]`.
        config: What the router was made for. The side that the weight is applied on is no matter
            of the router.

    Raises:
        Unsupported: The router raises, or computes nothing that is near the config.
    """
    import torch

    from pytest_moe_routing.reference.routing import weigh

    logits, bias = _inputs(config.num_experts)
    given = None if config.correction_bias is None else bias.clone()
    try:
        weights, ids = router(logits.clone(), given)
    except Unsupported:
        raise
    except Exception as error:
        raise Unsupported(f"{type(error).__name__}: {error}") from error
    # A router may give its weights in bfloat16, as transformers' do.
    tolerance = 2**-8 if weights.dtype == torch.bfloat16 else _TOLERANCE
    ids, order = ids.long().sort(1)
    weights = weights.float().gather(1, order)
    for changes in _readings(config):
        read = replace(recipe_of(replace(config, **changes)), weight_on="output")
        plain = replace(read, normalize="none", epsilon=0.0, scale=1.0)
        try:
            scores, chosen, order = _chosen(config.num_experts, plain)
        except RecipeError:
            continue
        if not torch.equal(chosen.gather(1, order), ids):
            continue
        wanted = weigh(logits.float(), read, chosen, scores=scores, bias=bias)
        if torch.allclose(wanted.gather(1, order), weights, rtol=tolerance, atol=1e-7):
            return changes
    raise Unsupported(
        "its router computes neither what the config states nor any known variation of it"
    )
