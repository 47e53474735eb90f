"""What kernels make of calls, and the builtin target of routers, in each release: in counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import chain, combinations, product
from textwrap import shorten
from typing import Any

from pytest_moe_routing.flashinfer import FlashInfer, KernelCall, known_releases
from pytest_moe_routing.models import ExpertsConfig, ModelSpec
from pytest_moe_routing.models.spec import ACTIVATIONS
from pytest_moe_routing.oracle.judge import judge
from pytest_moe_routing.oracle.swept_configs import as_model, swept_routers
from pytest_moe_routing.oracle.target import Target
from pytest_moe_routing.routing import METHODS, Recipe, RoutingMethodType
from pytest_moe_routing.targets.builtin.target import BuiltinTarget

#: What calls take, on both sides of every limit.
_PLAIN = {"scheme": "", "method": "", "logits_dtype": "bfloat16"}
_AXES: tuple[list[dict[str, Any]], ...] = (
    [
        {"num_experts": n}
        for n in (4, 16, 62, 128, 256, 260, 384, 388, 512, 516, 1024, 1028, 2048, 2052)
    ],
    [{"top_k": k} for k in (1, 4, 8, 9, 10, 11, 22, 23, 32, 33)],
    [
        {"n_group": n, "topk_group": t}
        for n, t in ((0, 0), (1, 1), (1, 2), (2, 1), (3, 2), (8, 0), (8, 4), (8, 5), (16, 4))
    ],
    [{"bias": bias} for bias in ("none", "zeros", "router")],
    [{"bias_dtype": dtype} for dtype in ("float32", "bfloat16")],
    [{"logits_dtype": dtype} for dtype in ("float32", "bfloat16", "float16")],
    [{"weight_on": side} for side in ("output", "input")],
    [{"routed_scaling_factor": scale} for scale in (1.0, 2.5)],
)
#: Calls that are often made; logits are bfloat16 where nothing else is said.
_COMMON: tuple[dict[str, Any], ...] = (
    {"num_experts": 128, "top_k": 8, "n_group": 0, "topk_group": 0, "bias": "none"},
    {"num_experts": 128, "top_k": 8, "n_group": 0, "topk_group": 0, "logits_dtype": "float32"},
    {"num_experts": 512, "top_k": 8, "n_group": 1, "topk_group": 1, "bias": "router"},
    {
        "num_experts": 256,
        "top_k": 8,
        "n_group": 8,
        "topk_group": 4,
        "bias": "router",
        "logits_dtype": "float32",
    },
)
#: Calls that differ from a common one in two axes, but for method and scheme.
CALLS = list(
    dict.fromkeys(
        KernelCall(
            **dict(chain.from_iterable(part.items() for part in (_PLAIN, common, *changes))),
        )
        for common in _COMMON
        for axes in combinations(_AXES, 2)
        for changes in product(*axes)
    )
)


@cache
def calls(scheme: str, method: str) -> list[KernelCall]:
    return [replace(call, scheme=scheme, method=method) for call in CALLS]


def outcomes(flashinfer: FlashInfer, scheme: str, method: str) -> dict[str, int]:
    """How many calls are refused, compute garbage, or run; and of these, what is unusual in how many.

    Unusual are fields in which the recipe is not that of the method's row, and notes.
    """
    counts, unusual = Counter[str](), Counter[str]()
    for call in calls(scheme, method):
        violations = flashinfer.violations(call)
        counts[violations[0].rule.effect if violations else "runs"] += 1
        if not violations:
            unusual.update(_changes(as_bound(call), flashinfer.recipe(call)))
            unusual.update(f"note: {shorten(note, 50)}" for note in flashinfer.notes(call))
    return {**dict(sorted(counts.items())), **dict(sorted(unusual.items()))}


@cache
def as_bound(call: KernelCall) -> Recipe:
    """What a call would compute if its method were as its row says, whatever the release."""
    bound = METHODS[RoutingMethodType[call.method]].bind(
        top_k=call.top_k,
        bias=call.bias == "router",
        n_group=max(call.n_group, 1),
        topk_group=max(call.topk_group, 1) if call.n_group > 1 else 1,
        routed_scaling_factor=call.routed_scaling_factor,
        weight_on=call.weight_on,
    )
    return replace(bound, bias_dtype=call.bias_dtype) if bound.bias else bound


@cache
def _changes(row: Recipe, got: Recipe) -> list[str]:
    return [f"{name} {now} for {was}" for name, (was, now) in row.differences(got).items()]


#: One router on experts of all kinds: most schemes take some of them.
_KINDS = [
    ExpertsConfig(hidden_size=hidden, intermediate_size=768, activation=name, gated=gated)
    for name, gated, hidden in product(ACTIVATIONS, (True, False), (4096, 4104, 4132))
] + [
    ExpertsConfig(
        hidden_size=4104, latent_size=4096, intermediate_size=768, activation="silu", gated=True
    )
]
#: Of the config sweep, those that a model can have.
ROUTERS = [router for router in swept_routers(1) if not any(router.problems())]
OTHER_EXPERTS = [replace(as_model(ROUTERS[0]), experts=experts) for experts in _KINDS]


def verdicts(target: Target, scheme: str, models: Iterable[ModelSpec]) -> dict[str, int]:
    """How many models have each verdict."""
    return dict(sorted(Counter(judge(target, m, scheme).verdict for m in models).items()))


def timeline(count: Callable[[FlashInfer], dict[str, int]]) -> Iterator[str]:
    """Counts of every release, a line each, from each release on at which they change."""
    last: Any = None
    for release in known_releases():
        now = count(FlashInfer.of(release))
        if now != last:
            yield f"  {release:<12} {', '.join(f'{n} {what}' for what, n in now.items())}"
            last = now


def table(scheme: str) -> str:
    """A scheme's kernels, and the builtin target's verdicts."""
    target = f"verdicts of {BuiltinTarget.name} on"
    counted: dict[str, Callable[[FlashInfer], dict[str, int]]] = {
        method: partial(outcomes, scheme=scheme, method=method)
        for method in FlashInfer.of(known_releases()[-1]).methods
        if method != "Unspecified"
    }
    counted[f"{target} routers"] = lambda f: verdicts(
        BuiltinTarget(f), scheme, map(as_model, ROUTERS)
    )
    counted[f"{target} experts"] = lambda f: verdicts(BuiltinTarget(f), scheme, OTHER_EXPERTS)
    lines = [f"{len(CALLS)} calls of {scheme} kernels by method, from each FlashInfer release on"]
    for title, count in counted.items():
        lines += ["", title, *timeline(count)]
    return "\n".join(lines) + "\n"
