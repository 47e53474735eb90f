"""Asks selectors of a release for a backend of the user's, and for the reasons of a refusal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pytest_moe_routing.targets.vllm.probe import server_defaults as server_defaults
from pytest_moe_routing.targets.vllm.probe.capture import on_one_gpu
from pytest_moe_routing.targets.vllm.probe.choice import Selector, selector_of
from pytest_moe_routing.targets.vllm.probe.config import NoActivation
from pytest_moe_routing.targets.vllm.probe.rejections import Rejected, rejections
from pytest_moe_routing.targets.vllm.probe.release import names

#: Values of `--moe-backend` that the selectors of most schemes know.
_BACKENDS = ("flashinfer_trtllm", "flashinfer_cutlass", "marlin", "triton")
#: Rows of the contract for methods of checkpoints that are made of the layer's config alone.
_METHODS: Mapping[str, tuple[str, ...]] = {"mxfp4": ("made-w4a4-mxfp4", "method-gpt-oss-mxfp4")}
#: What every gate answers when it is asked why.
_REASON = "kernel does not support this question"
_GATE = "is_supported_config"


def asked_of_selectors(
    model: Mapping[str, Any], scheme: str, method: str, experts: type
) -> dict[str, dict[str, Any]]:
    """Return what becomes of each request, as `around` does."""
    try:
        selector = selector_of(model, scheme, method)
    except NoActivation:
        return {}
    if selector is None:
        return {}
    found = {}
    if (reasons := _reasons(selector, experts)) is not None:
        found["reasons for choosing no experts"] = reasons
    if (backend := _backend(selector, scheme)) is not None:
        found["--moe-backend"] = backend
    return found


def _reasons(selector: Selector, experts: type) -> dict[str, Any] | None:
    """Have all experts reject the layer for one reason, and look for it in the error.

    None if the selector takes some experts without asking them.
    """
    with on_one_gpu(), _rejecting(experts):
        try:
            with rejections():
                selector(selector.config)
        except Rejected as rejected:
            error = rejected.__cause__
            name, told = selector.function.__name__, f"{type(error).__name__}: {error}"
        else:
            return None
    if _REASON in told:
        return {"answer": "honored", "why": name, "switches": []}
    return {"answer": "ignored", "why": f"{name} raises {told}", "switches": []}


@contextmanager
def _rejecting(experts: type) -> Iterator[None]:
    """Have every class of experts reject every layer."""

    def reject(*_: Any, **__: Any) -> tuple[bool, str]:
        return False, _REASON

    [*_, base] = [cls for cls in experts.__mro__ if _GATE in vars(cls)]
    classes, waiting = [], [base]
    while waiting:
        classes.append(waiting.pop())
        waiting += classes[-1].__subclasses__()
    gates = [(cls, vars(cls)[_GATE]) for cls in classes if _GATE in vars(cls)]
    try:
        for cls, _ in gates:
            setattr(cls, _GATE, staticmethod(reject))
        yield
    finally:
        for cls, gate in gates:
            setattr(cls, _GATE, gate)


def _backend(selector: Selector, scheme: str) -> dict[str, Any] | None:
    """Compare what methods of checkpoints take for each backend with what the selector takes.

    A method ignores the request if it takes the same experts whatever is requested, where the
    selector does not. None if no such method is known.
    """
    answer = None
    for key in _METHODS.get(scheme, ()):
        if not names().has(key):
            continue
        made = names().get(key)
        own, wanted = (
            [
                _outcome(take, selector.config, name)
                for name in (server_defaults.moe_backend(), *_BACKENDS)
            ]
            for take in (lambda config, made=made: made(config).experts_cls, selector)
        )
        if len(set(own)) == 1 and len(set(wanted)) > 1:
            # Which experts these are may be the doing of stubs.
            why = f"{made.__name__} uses the same experts for {', '.join(_BACKENDS)}"
            return {"answer": "ignored", "why": why, "switches": ["--moe-backend"]}
        answer = {"answer": "honored", "why": made.__name__, "switches": ["--moe-backend"]}
    return answer


def _outcome(take: Any, config: Any, backend: str) -> str:
    """Return the name of the class that is taken for a backend, or of the refusal."""
    with on_one_gpu():
        try:
            with rejections():
                taken = take(replace(config, moe_backend=backend))
        except Rejected as rejected:
            return type(rejected.__cause__).__name__
    return "no experts" if taken is None else taken.__name__
