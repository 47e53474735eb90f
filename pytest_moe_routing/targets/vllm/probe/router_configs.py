"""Configurations of vLLM's routers that its factory takes and no model of the zoo has.

Zero experts, simulated routing, shared experts in the router's output, groups that do not divide
the experts, and the routing functions of further models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from pytest_moe_routing.compare.routing import compare_routing
from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.logits import PATTERNS, bell, make_case
from pytest_moe_routing.oracle.routers import NOT_FINITE, Deviation
from pytest_moe_routing.routing import Recipe
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.contract import Names, Spelling
from pytest_moe_routing.targets.mixers import UNTIED, mixer_problem
from pytest_moe_routing.targets.vllm.probe import release
from pytest_moe_routing.targets.vllm.probe.router_capture import WAY, captured_by, deviations
from pytest_moe_routing.targets.vllm.probe.router_case import Case, select

_SIMULATION = "VLLM_MOE_ROUTING_SIMULATION_STRATEGY"
_TOKENS = 24


@dataclass(frozen=True)
class _Config:
    """Arguments of the factory, in a recipe's words.

    `groups` are asked for; if they cannot be made, the router chooses among all experts.
    """

    recipe: Recipe
    num_experts: int
    groups: tuple[int, int] | None = None

    def make(self, bias: Tensor | None, **more: Any) -> Any:
        recipe = self.recipe
        if recipe.bias and bias is None:
            bias = torch.zeros(self.num_experts)
        names = release.names()
        unknown = more.keys() - names.accepted("router-options", more).keys()
        if unknown:
            raise Unsupported(f"this release's routers have no {', '.join(sorted(unknown))}")
        arguments = {
            "top_k": recipe.top_k,
            "global_num_experts": self.num_experts,
            "renormalize": recipe.normalize == "sum",
            "use_grouped_topk": self.groups is not None,
            "num_expert_group": self.groups and self.groups[0],
            "topk_group": self.groups and self.groups[1],
            "scoring_func": recipe.score,
            "routed_scaling_factor": recipe.scale,
            "e_score_correction_bias": bias,
        }
        factory = names.get("router-factory")
        return factory(**names.accepted("router-factory", arguments), **more)


#: Routers that can be asked for in a simpler way, or need a step that no model needs together with
#: their score; with the groups that are asked for.
_FURTHER = (
    (Recipe(top_k=4, score="softmax", bias=True, normalize="sum", scale=2.5), None),
    (Recipe(top_k=4, score="softmax", normalize="sum", scale=2.5), (1, 1)),
    (Recipe(top_k=4, score="softmax", n_group=8, topk_group=1, group_score="max"), (8, 1)),
)


def cases(names: Names) -> Iterator[Case]:
    """Yield the configurations that the release has."""
    float32 = torch.float32
    for score, bias, scale in (
        ("sigmoid", True, 2.5),
        ("sigmoid", False, 1.0),
        ("softmax", False, 16.0),
    ):
        recipe = Recipe(top_k=4, score=score, bias=bias, normalize="sum", scale=scale)
        config = _Config(recipe, 60, groups=(8, 4))
        subject = f"{score}{' and bias' if bias else ''}, 60 experts in 8 groups, scale {scale:g}"
        yield Case(config.make, recipe, 60, float32, "cuda", subject, "no known model")
    for recipe, groups in _FURTHER:
        config = _Config(recipe, 64, groups)
        named = zip(("num_expert_group", "topk_group"), groups or (), strict=False)
        subject = ", ".join([str(recipe), *(f"{name}={value}" for name, value in named)])
        yield Case(config.make, recipe, 64, float32, "cuda", subject, "no known model")
    flat = Recipe(top_k=8, score="sigmoid", normalize="sum")
    subject = "sigmoid without a bias or groups"
    yield Case(_Config(flat, 128).make, flat, 128, float32, "cuda", subject, "no known model")
    yield from _available(
        _zero_experts,
        _shared_experts,
        *(partial(_simulated, s) for s in ("uniform_random", "normal_routing")),
        partial(_function, "routing-cohere2", "sigmoid"),
        _gemma4,
        _sparse_mixer,
        *(partial(_captured, recipe) for recipe in _CAPTURED),
    )


def _available(*makers: Callable[[], Case]) -> Iterator[Case]:
    """Yield what the release has."""
    for maker in makers:
        try:
            case = maker()
            case.make(None)
        except Unsupported:
            continue
        yield case


def _function(key: str, score: str) -> Case:
    """Return a routing function of a model's code, behind vLLM's router for such functions."""
    config = _Config(Recipe(top_k=8, score=score, normalize="sum"), 128)
    return _behind_router(config, release.names().get(key), release.names().spelling(key))


def _gemma4() -> Case:
    """Return Gemma-4's routing function, without the factor that each expert's weight has."""
    names, config = release.names(), _Config(Recipe(top_k=8, normalize="sum"), 128)
    in_torch, kernel = names.get("routing-gemma4"), names.spelling("routing-gemma4-kernel")
    # Powers of 2, as no weight is rounded by them.
    factors = 2.0 ** (torch.arange(config.num_experts) % 5)

    def function(
        hidden_states: Any, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        if names.has("routing-gemma4-method"):
            router = SimpleNamespace(per_expert_scale=factors)
            routed = names.get("routing-gemma4-method")
            module = stubs.real_module(kernel.module)
            # Triton's kernel does not run here.
            with patch.object(module, kernel.path, in_torch):
                weights, ids = routed(router, hidden_states, gating_output, topk, renormalize)
        else:
            weights, ids = in_torch(gating_output, topk, factors)
        return weights / factors[ids.long()].to(weights.dtype), ids

    return _behind_router(config, function, names.spelling("routing-gemma4"))


def _sparse_mixer() -> Case:
    """Return Phi-3.5-MoE's routing function, which is compared with a reference of its own."""
    config = _Config(Recipe(top_k=2, score="softmax"), 16)
    function = release.names().get("routing-phimoe")
    case = _behind_router(config, function, release.names().spelling("routing-phimoe"))

    def problem(case: Case, pattern: str) -> str | None:
        logits, _ = _inputs(case, pattern)
        return mixer_problem(*select(case.make(None), logits), logits)

    judge = partial(_judged, problem_of=problem, patterns=UNTIED, kind="weights")
    return replace(case, judge=judge)


def _behind_router(config: _Config, function: Callable[..., Any], spelling: Spelling) -> Case:
    make_router = partial(config.make, custom_routing_function=function)
    subject = f"{spelling.module.rpartition('.')[2]}.{spelling.path}"
    experts = config.num_experts
    return Case(make_router, config.recipe, experts, torch.float32, "cuda", subject, "model")


#: One for each class of routers that selects by itself.
_CAPTURED = (
    Recipe(top_k=4, score="softmax", normalize="sum"),
    Recipe(top_k=4, score="sigmoid", bias=True, normalize="sum"),
    Recipe(top_k=4, score="sigmoid", bias=True, n_group=8, topk_group=4, normalize="sum"),
)


def _captured(recipe: Recipe) -> Case:
    """Return a router whose expert ids are captured, on a server that places its experts."""
    experts, function = 64, captured_by()
    config = _Config(
        recipe, experts, (recipe.n_group, recipe.topk_group) if recipe.grouped else None
    )

    def judge(case: Case) -> list[Deviation]:
        return list(deviations(partial(config.make, None), experts))

    subject = f"{experts} experts, {recipe}"
    return Case(
        config.make, recipe, experts, torch.float32, WAY, subject, "opt-in",
        judge=judge, function=function,
    )  # fmt: skip


def _maker(config: _Config, more: Mapping[str, Any]) -> Callable[[Tensor | None], Any]:
    return lambda bias: config.make(bias, **more)


# -- routers whose output is not the recipe's ------------------------------------------------------


def _judged(
    case: Case,
    problem_of: Callable[[Case, str], str | None],
    patterns: Iterable[str] = PATTERNS,
    kind: str = "structure",
) -> list[Deviation]:
    for pattern in patterns:
        if pattern != NOT_FINITE:
            problem = problem_of(case, pattern)
            if problem is not None:
                return [Deviation(kind, pattern, problem, problem.splitlines()[0])]
    return []


def _inputs(case: Case, pattern: str) -> tuple[Tensor, Tensor | None]:
    made = make_case(pattern, case.recipe, num_tokens=_TOKENS, num_experts=case.num_experts)
    return made.logits, made.bias


def _zero_experts() -> Case:
    """Return LongCat-Flash's router: 256 of 768 experts return the token itself."""
    real, total = 512, 768
    recipe = Recipe(top_k=12, score="softmax", bias=True, scale=6.0)
    more: dict[str, Any] = {"zero_expert_type": "identity", "num_logical_experts": real}
    make_router = _maker(_Config(recipe, total), more)

    def problem(case: Case, pattern: str) -> str | None:
        seen: dict[str, Tensor] = {}

        def compute(expert_indices: Tensor, expert_scales: Tensor, **_: Any) -> None:
            seen.update(ids=expert_indices.clone(), weights=expert_scales.clone())

        spelling = release.names().spelling("router-zero-compute")
        module = stubs.real_module(spelling.module)
        logits, bias = _inputs(case, pattern)
        with patch.object(module, spelling.path, compute):
            weights, ids = select(make_router(bias), logits)
        found = compare_routing(
            seen["ids"], seen["weights"], logits, recipe, bias, lower_index=False
        )
        if not found.ok:
            return found.message()
        is_zero = seen["ids"] >= real
        if not bool((weights[is_zero] == 0).all() and (ids < real).all()):
            return "slots of zero experts keep a weight, or an id that no expert has"
        same = torch.equal(ids[~is_zero], seen["ids"][~is_zero].to(ids))
        if not same or not torch.equal(weights[~is_zero], seen["weights"][~is_zero]):
            return "slots of real experts are not those that were chosen"
        return None

    return Case(
        make_router, recipe, total, torch.float32, "cuda", "longcat-flash", "model",
        judge=partial(_judged, problem_of=problem),
    )  # fmt: skip


def _shared_experts() -> Case:
    """Return a router that appends shared experts to those that it chose, each with one weight."""
    experts, shared, weight = 128, 2, 0.4
    recipe = Recipe(top_k=8, score="sigmoid", bias=True, normalize="sum", scale=2.5)
    more: dict[str, Any] = {"num_fused_shared_experts": shared, "shared_expert_weight": weight}
    make_router = _maker(_Config(recipe, experts), more)

    def problem(case: Case, pattern: str) -> str | None:
        logits, bias = _inputs(case, pattern)
        weights, ids = select(make_router(bias), logits)
        wanted = torch.arange(experts, experts + shared).expand(_TOKENS, -1)
        if ids.shape[1] != recipe.top_k + shared or not torch.equal(
            ids[:, recipe.top_k :].long(), wanted
        ):
            return f"slots of shared experts hold {ids[0, recipe.top_k :].tolist()}"
        if not bool((weights[:, recipe.top_k :] == torch.tensor(weight)).all()):
            return f"shared experts weigh {weights[0, recipe.top_k :].tolist()}, not {weight}"
        routed = ids[:, : recipe.top_k], weights[:, : recipe.top_k]
        found = compare_routing(*routed, logits, recipe, bias, lower_index=False)
        return None if found.ok else found.message()

    return Case(
        make_router, recipe, experts, torch.float32, "cuda", "two fused shared experts", "opt-in",
        judge=partial(_judged, problem_of=problem),
    )  # fmt: skip


def _simulated(strategy: str) -> Case:
    """Return a router that chooses by chance: experts that exist, each once a token."""
    recipe = Recipe(top_k=8, score="softmax", normalize="sum")
    switches = {_SIMULATION: strategy}

    def make_router(bias: Tensor | None) -> Any:
        with patch.dict("os.environ", switches):
            return _Config(recipe, 128).make(bias)

    def judge(case: Case) -> list[Deviation]:
        router = make_router(None)
        if not isinstance(router, release.names().get("router-simulated")):
            raise Unsupported(f"not judged: {_SIMULATION} simulates no routing in this release")
        torch.manual_seed(0)
        weights, ids = select(router, bell(256, 128, seed=1))
        inside = (ids >= 0) & (ids < 128)
        ranked = ids.sort(1).values
        repeated = int((ranked[:, 1:] == ranked[:, :-1]).any(1).sum())
        problem = ""
        if not bool(inside.all()):
            problem = "experts that do not exist are chosen"
        elif repeated:
            problem = "an expert is chosen twice for a token"
        elif weights.shape != ids.shape or weights.dtype != torch.float32:
            problem = f"weights are {weights.dtype} {list(weights.shape)}"
        text = f"{problem}: {repeated}/256 tokens"
        return [Deviation("structure", "any", text, problem)] if problem else []

    subject = f"{_SIMULATION}={strategy}"
    return Case(make_router, recipe, 128, torch.float32, "cuda", subject, "opt-in", switches, judge)
