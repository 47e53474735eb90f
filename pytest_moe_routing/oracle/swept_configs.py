"""The configs of the config sweep: routers around every known family, with or without a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from itertools import chain, combinations, product
from pathlib import Path
from threading import Lock
from typing import Any

from pytest_moe_routing.models import ExpertsConfig, ModelSpec, RouterConfig
from pytest_moe_routing.schemes import SERVED_SCHEMES

#: The dtype of the logits where a model's code tells its layer none: they are then the model's.
UNTOLD = "none"
#: The repository of a swept model, of which no framework has the code.
MADE_UP = "none/none"
#: The folder of the sweep's models, which have none.
_FOLDER = Path("config-sweep")
#: Held by the thread that makes the sweep's models: what is known of a model is found fastest by
#: the same object, so there is one of each.
_MAKING = Lock()

_Values = Mapping[str, Any]


def _groups(n_group: int | None, topk_group: int | None, group_score: str | None) -> _Values:
    return {"n_group": n_group, "topk_group": topk_group, "group_score": group_score}


#: What each axis takes: limits of kernels, and what models have, on both sides.
_AXES: tuple[tuple[_Values, ...], ...] = (
    # 60 is no multiple of 8, and 257 of nothing: neither ranks nor groups divide them.
    tuple({"num_experts": n} for n in (8, 60, 64, 128, 160, 256, 257, 384, 512, 1024, 2048)),
    tuple({"top_k": k} for k in (1, 2, 6, 8, 10, 22, 32)),
    tuple({"scoring_func": name} for name in ("softmax", "sigmoid", "sqrtsoftplus")),
    ({"renormalize": False}, {"renormalize": True}),
    tuple({"correction_bias": dtype} for dtype in (None, "float32", "bfloat16")),
    tuple({"routed_scaling_factor": scale} for scale in (1.0, 1.5, 2.5)),
    (
        _groups(None, None, None),
        _groups(1, 1, None),
        _groups(2, 1, "max"),
        _groups(4, 2, "top2_sum"),
        _groups(8, 4, "top2_sum"),
        _groups(8, 4, "max"),
        _groups(8, 8, "top2_sum"),
        _groups(16, 4, "top2_sum"),
    ),
    tuple({"logits_dtype": name} for name in ("float32", "bfloat16", "float16", UNTOLD)),
    ({"topk_before_score": False}, {"topk_before_score": True}),
    ({"weight_on": "output"}, {"weight_on": "input"}),
)

_PLAIN: _Values = {name: value for axis in _AXES for name, value in axis[0].items()}
_BIASED: _Values = {"scoring_func": "sigmoid", "renormalize": True, "correction_bias": "float32"}
#: The families of routers that models have: the sweep surrounds each.
_FAMILIES: tuple[_Values, ...] = (
    {"top_k": 2},
    {"top_k": 8, "num_experts": 128, "renormalize": True, "logits_dtype": "bfloat16"},
    {"top_k": 8, "num_experts": 64, "topk_before_score": True, "renormalize": True},
    {"top_k": 6, "num_experts": 64, "scoring_func": "sigmoid"},
    {"top_k": 8, "num_experts": 128, "scoring_func": "sigmoid", "renormalize": True},
    {"top_k": 8, "num_experts": 256, **_BIASED},
    {
        "top_k": 8,
        "num_experts": 256,
        **_BIASED,
        "routed_scaling_factor": 2.5,
        **_groups(8, 4, "top2_sum"),
    },
    {
        "top_k": 6,
        "num_experts": 256,
        **_BIASED,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
    },
    {
        "top_k": 1,
        "num_experts": 16,
        "scoring_func": "sigmoid",
        "weight_on": "input",
        "topk_before_score": True,
    },
)

#: Experts that every scheme takes, so that only the router decides.
USUAL_EXPERTS = ExpertsConfig(
    hidden_size=4096, intermediate_size=2048, activation="silu", gated=True
)
#: Experts of other kinds, as models have them; each with the families' own routers.
_OTHER_EXPERTS = (
    replace(USUAL_EXPERTS, activation_limit=10.0),
    replace(USUAL_EXPERTS, activation="gelu"),
    replace(USUAL_EXPERTS, activation="gelu_tanh"),
    replace(USUAL_EXPERTS, activation="relu2", gated=False),
    replace(
        USUAL_EXPERTS,
        activation="swigluoai",
        activation_limit=7.0,
        activation_alpha=1.702,
        activation_beta=1.0,
    ),
    replace(USUAL_EXPERTS, activation="swiglustep", activation_limit=7.0),
    replace(USUAL_EXPERTS, activation="situ", activation_alpha=4.0, activation_beta=25.0),
)


@cache
def swept_routers(distance: int = 2) -> tuple[RouterConfig, ...]:
    """Every router that differs from a family in at most `distance` axes, smallest first."""
    routers = {
        RouterConfig(**dict(chain(_PLAIN.items(), family.items(), *(c.items() for c in changes))))
        for family in _FAMILIES
        for axes in combinations(_AXES, distance)
        for changes in product(*axes)
    }
    return tuple(sorted(filter(_can_be_asked_for, routers), key=_size))


def _can_be_asked_for(router: RouterConfig) -> bool:
    """Whether a config can be written down, even if no router can be what it says.

    Groups that do not divide the experts are something that a framework has to do something about.
    A weight on the input of several experts is not: no framework has it.
    """
    if router.weight_on == "input" and router.top_k > 1:
        return False
    rest = router.num_experts % (router.n_group or 1)
    return not any(replace(router, num_experts=router.num_experts - rest or 1).problems())


def _size(router: RouterConfig) -> tuple[int, int, int, int, str]:
    """Small and plain routers first; any order will do among equals, but always the same."""
    unlike = sum(getattr(router, name) != value for name, value in _PLAIN.items())
    groups = router.n_group or 0
    return router.num_experts, router.top_k, groups, unlike, repr(router)


def swept_models(routers: Iterable[RouterConfig] | None = None) -> tuple[ModelSpec, ...]:
    """Return a model of each router; by default the sweep's, with experts of all kinds."""
    if routers is not None:
        return tuple(map(as_model, routers))
    with _MAKING:
        return _all_models()


@cache
def _all_models() -> tuple[ModelSpec, ...]:
    families = [RouterConfig(**{**_PLAIN, **family}) for family in _FAMILIES]
    return (
        *map(as_model, swept_routers()),
        *(as_model(router, experts) for router, experts in product(families, _OTHER_EXPERTS)),
        *(replace(as_model(router), dtype="float16") for router in families),
    )


def as_model(router: RouterConfig, experts: ExpertsConfig = USUAL_EXPERTS) -> ModelSpec:
    """Return a model with this router, and by default experts that every scheme takes."""
    sigmoid_top1 = router.topk_before_score and router.scoring_func == "sigmoid"
    llama4 = sigmoid_top1 and router.weight_on == "input"
    llama4 = llama4 and not (router.renormalize or router.n_group)
    return ModelSpec(
        router=router,
        experts=experts,
        model="a router of the config sweep",
        hf_repo=MADE_UP,
        # By which frameworks know the one router that they do not tell from its parameters.
        architecture="Llama4ForConditionalGeneration" if llama4 else "AnyMoeForCausalLM",
        checkpoints=tuple(SERVED_SCHEMES),
        sources=("made up",),
        folder=_FOLDER,
    )


@cache
def _near() -> frozenset[RouterConfig]:
    return frozenset(swept_routers(1))


def is_far(model: ModelSpec) -> bool:
    """Whether a model is one of the sweep's whose router is two steps away from all families."""
    return model.folder is _FOLDER and model.router not in _near()


def by_distance(models: Iterable[ModelSpec]) -> Iterator[tuple[list[ModelSpec], bool]]:
    """Yield the models near a family and those far from all, and whether every way is asked for."""
    parts: dict[bool, list[ModelSpec]] = {False: [], True: []}
    for model in models:
        parts[is_far(model)].append(model)
    for far, part in parts.items():
        yield part, not far
