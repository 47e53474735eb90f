"""What the child of vLLM is asked: of each model, only what a question looks at.

Models that do not differ in it have one question. The description of a model is made and encoded
once, however many schemes and methods it is asked about with.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Any, TypeVar

from pytest_moe_routing.errors import TargetError, Unsupported
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.swept_configs import MADE_UP
from pytest_moe_routing.oracle.target import Classification
from pytest_moe_routing.targets.child import Encoded

_T = TypeVar("_T")
_Answer = TypeVar("_Answer")
#: Settings of the router that the classifier does not look at.
_NOT_CLASSIFIED_BY = ("logits_dtype", "router_weight_dtype", "weight_on")
#: What the child reads of no model. Models that differ in nothing else have one question.
_UNREAD = ("model", "checkpoints", "num_layers", "layers")
#: The only ones that gates look at.
_GATED_BY = ("num_experts", "top_k", "logits_dtype")
#: The config sweep has 3400 models.
_MODELS = 1 << 13
#: By its text, each description that gates tell apart: a few hundred.
_GATED: dict[str, Encoded] = {}


@lru_cache(_MODELS)
def classified(model: ModelSpec) -> Encoded:
    """Return what the classifier is told of a model."""
    return _without(model, _NOT_CLASSIFIED_BY)


@lru_cache(_MODELS)
def gated(model: ModelSpec) -> Encoded:
    """Return what gates are told of a model: one object for all that they cannot tell apart."""
    asked = _without(model, vars(model.router).keys() - set(_GATED_BY))
    return _GATED.setdefault(asked.text, asked)


@lru_cache(_MODELS)
def described(model: ModelSpec) -> Encoded:
    """Return all that is told of a model."""
    return _without(model, ())


def of_case(model: ModelSpec, scheme: str) -> dict[str, Any]:
    return {"model": described(model), "scheme": scheme}


def of_choice(
    model: ModelSpec, scheme: str, method: str, *, modular: bool = False
) -> dict[str, Any]:
    return {**of_case(model, scheme), "method": method, "modular": modular}


def of_choices(
    models: Iterable[ModelSpec], scheme: str, classify: Callable[[ModelSpec], Classification]
) -> Iterator[dict[str, Any]]:
    """Yield what is asked of each model that is classified."""
    for model, found in answered(models, classify):
        yield of_choice(model, scheme, found.method)


def of_gates(
    model: ModelSpec, method: str, scheme: str, *, modular: bool = False
) -> dict[str, Any]:
    asked = {"model": gated(model), "scheme": scheme, "method": method}
    return {**asked, "modular": True} if modular else asked


def of_capture(model: ModelSpec, method: str, scheme: str, *, thorough: bool) -> dict[str, Any]:
    asked = {**of_case(model, scheme), "method": method}
    return asked if thorough else {**asked, "thorough": False}


def answered(about: Iterable[_T], ask: Callable[[_T], _Answer]) -> list[tuple[_T, _Answer]]:
    """Return what has an answer, with it."""
    found = []
    for each in about:
        with suppress(Unsupported, TargetError):
            found.append((each, ask(each)))
    return found


def _without(model: ModelSpec, names: Container[str]) -> Encoded:
    """Return the description of a model without some settings of its router."""
    asked = {name: value for name, value in model.as_dict().items() if name not in _UNREAD}
    router = {n: v for n, v in asked["router"].items() if n not in names}
    # Of its repository, only whether there can be any.
    repository = MADE_UP if model.hf_repo == MADE_UP else ""
    return Encoded({**asked, "hf_repo": repository, "router": router})
