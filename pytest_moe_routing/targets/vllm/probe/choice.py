"""Asks the selectors of a release which experts a server on Blackwell takes for a layer.

A selector is asked with its defaults, and then with each thing that a user may switch on: the
opt-in variables of the contract, `--moe-backend`, and parallel configs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import _lru_cache_wrapper, cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from pytest_moe_routing.targets.stubs import Stub
from pytest_moe_routing.targets.vllm.probe import release as release
from pytest_moe_routing.targets.vllm.probe import server_defaults as server_defaults
from pytest_moe_routing.targets.vllm.probe.capture import on_one_gpu
from pytest_moe_routing.targets.vllm.probe.config import NoActivation, moe_config, parallel_config
from pytest_moe_routing.targets.vllm.probe.experts import ELSEWHERE, SCHEMES
from pytest_moe_routing.targets.vllm.probe.gates import declared_keys, experts_of
from pytest_moe_routing.targets.vllm.probe.rejections import Rejected, rejections
from pytest_moe_routing.targets.vllm.probe.release import names

REQUESTED = "flashinfer_trtllm"
#: Questions of vLLM's code that stubs answer, and a build for CUDA affirms.
_AFFIRMED = ("is_deep_gemm_supported()", "check_moe_marlin_supports_config()")


@dataclass(frozen=True)
class _Setting:
    """What a user switches on.

    Attributes:
        variables: Names of environment variables.
        backend: The value of `--moe-backend`; None if the flag is left out.
        parallel: Attributes of the parallel config, by the flags that set them.
    """

    variables: tuple[str, ...] = ()
    backend: str | None = None
    parallel: tuple[str, ...] = ()

    @property
    def switches(self) -> list[str]:
        """As the user writes them."""
        flags = [] if self.backend is None else [f"--moe-backend {self.backend}"]
        return [*(f"{name}=1" for name in self.variables), *flags, *self.parallel]


#: Parallel configs with which other experts are taken, by the flags that make them.
_PARALLEL: Mapping[tuple[str, ...], Mapping[str, Any]] = {
    ("--enable-expert-parallel", "--data-parallel-size 2"): {
        "all2all_backend": "allgather_reducescatter",
        "dp_size": 2,
        "dp_rank": 1,
    },
    ("--enable-expert-parallel", "--enable-eplb"): {"enable_eplb": True},
    (
        "--enable-expert-parallel",
        "--data-parallel-size 2",
        "--all2all-backend flashinfer_nvlink_one_sided",
    ): {"all2all_backend": "flashinfer_nvlink_one_sided", "dp_size": 2, "dp_rank": 1},
}


def choose(
    model: Mapping[str, Any], scheme: str, method: str, modular: bool = False
) -> dict[str, Any] | None:
    """Return what has to be switched on for the TRT-LLM experts to be taken.

    The answer has the `selector`, the `switches` (None if the selector never takes the experts),
    what it takes `instead` of them when everything is switched on, and what the `device` needs to
    be switched on whatever the layer is. None if the release has no selector for the scheme.

    Args:
        modular: Those that are given ids and weights, instead of those that route themselves.
    """
    experts = experts_of(SCHEMES[scheme], modular=modular)
    try:
        found = selector_of(model, scheme, method) if isinstance(experts, type) else None
    except NoActivation as unknown:
        return _answer(names().get(_key(model, scheme)), None, str(unknown), experts)
    if found is None:
        return None
    selector, config = found.function, found.config

    def taken(setting: _Setting) -> Any:
        asked = replace(config, moe_backend=setting.backend or server_defaults.moe_backend())
        if setting.parallel:
            parallel = replace(parallel_config(2), **_PARALLEL[setting.parallel])
            asked = replace(asked, moe_parallel_config=parallel)
        return experts_taken(found, asked, setting.variables)

    everything = [_Setting(all_switches(), REQUESTED, flags) for flags in _parallels(modular)]
    refusals = []
    for setting in everything:
        refusals.append(taken(setting))
        if refusals[-1] is experts:
            first = next(each for each in _settings(modular) if taken(each) is experts)
            return _answer(selector, first.switches, "", experts)
    instead = refusals[0] if isinstance(refusals[0], str) else refusals[0].__name__
    return _answer(selector, None, instead, experts)


@dataclass(frozen=True)
class Selector:
    """What chooses the experts of a layer.

    Attributes:
        function: The release's own.
        config: The layer's config, with the default backend.
        arguments: What the function is called with besides.
    """

    function: Any
    config: Any
    arguments: Mapping[str, Any]

    def __call__(self, config: Any) -> Any:
        """Return the class that is taken for a config; raise what the release's code raises."""
        return self.choose(config)[1]

    def choose(self, config: Any) -> tuple[Any, Any]:
        """Return the backend and the class for a config; raise what the release's code raises."""
        given = {**self.arguments, "config": config, "moe_config": config}
        backend, experts, *_ = self.function(**release.accepted(self.function, given))
        return backend, experts


def default_experts(selector: Selector) -> str:
    """Return what a selector takes by default, or why it takes nothing."""
    taken = experts_taken(selector, selector.config, ())
    told = taken if isinstance(taken, str) else f"{taken.__name__} by default"
    backend = server_defaults.moe_backend()
    return told if backend == server_defaults.AUTO else f"{told} (--moe-backend is {backend})"


def _key(model: Mapping[str, Any], scheme: str) -> str:
    """Return the row of the contract for the selector of a scheme."""
    if scheme == "mxfp4" and model["architecture"].startswith("GptOss"):
        # Their checkpoints have a quantization method of their own.
        return "select-gpt-oss-mxfp4"
    return (SCHEMES | ELSEWHERE)[scheme].selector


def selector_of(model: Mapping[str, Any], scheme: str, method: str) -> Selector | None:
    """Return the selector of a model's layers in a scheme; None if the release has none.

    Raises:
        NoActivation: The release does not know the model's activation.
    """
    key = _key(model, scheme)
    if not names().has(key):
        return None
    names().spelling("selectable")
    arguments = {
        **declared_keys(scheme, (SCHEMES | ELSEWHERE)[scheme]),
        "quant_config": SimpleNamespace(group_size=32, desc_act=False),
        "may_have_zp": False,
        "may_have_bias": False,
    }
    return Selector(names().get(key), moe_config(model, method), arguments)


def _answer(
    selector: Any, switches: list[str] | None, instead: str, experts: Any
) -> dict[str, Any]:
    return {
        "selector": selector.__name__,
        "switches": switches,
        "instead": instead,
        "device": list(_needs(experts)),
    }


@cache
def _needs(experts: Any) -> tuple[str, ...]:
    """Return the variables that experts need to run on the device at all."""
    for variables in _variables():
        with _environment(variables):
            if experts._supports_current_device():
                return tuple(f"{name}=1" for name in variables)
    return ()


def _variables() -> list[tuple[str, ...]]:
    """Variables to set: none first, all last."""
    rows = names().contract.members("switches")
    known = tuple(row.key.rpartition(".")[2] for row in rows if names().is_there(row.key))
    return list(dict.fromkeys([(), *((name,) for name in known), known]))


def all_switches() -> tuple[str, ...]:
    """Return all opt-in variables of the release."""
    return _variables()[-1]


def _parallels(modular: bool) -> list[tuple[str, ...]]:
    """Return flags of parallel configs to try; experts that route have a gate for them."""
    return [(), *_PARALLEL] if modular else [()]


def _settings(modular: bool) -> list[_Setting]:
    """Return settings to try, from the default to everything."""
    return [
        _Setting(variables, backend, parallel)
        for parallel in _parallels(modular)
        for backend in (None, REQUESTED)
        for variables in _variables()
    ]


@contextmanager
def _environment(variables: Iterable[str]) -> Iterator[None]:
    """Set these opt-in variables, and no others; functions of vLLM may have cached others."""
    before = dict(os.environ)
    others = {name: value for name, value in before.items() if name not in _switches()}
    environment = others | dict.fromkeys(variables, "1")
    is_new = environment != before
    with on_one_gpu():
        _set_environment(environment)
        try:
            if is_new:
                forget()
            yield
        finally:
            _set_environment(before)
    if is_new:
        forget()


def _set_environment(wanted: Mapping[str, str]) -> None:
    """Set what differs: `patch.dict` sets every variable again, which takes ten times as long."""
    known = dict(os.environ)
    for name in known.keys() - wanted.keys():
        del os.environ[name]
    os.environ.update({n: value for n, value in wanted.items() if known.get(n) != value})


# The contract of a release does not change.
@cache
def _switches() -> frozenset[str]:
    """Return the names of all opt-in variables of the contract."""
    return frozenset(row.key.rpartition(".")[2] for row in names().contract.members("switches"))


def experts_taken(selector: Selector, config: Any, variables: tuple[str, ...]) -> Any:
    """Return the class that a selector takes, or the text of its rejection."""
    return outcome(selector, config, variables)[1]


def outcome(selector: Selector, config: Any, variables: tuple[str, ...]) -> tuple[Any, Any]:
    """Return the backend and the class that a selector takes; or None, and why it rejects all."""
    return outcomes([(selector, config)], variables)[0]


def outcomes(
    asked: Iterable[tuple[Selector, Any]], variables: tuple[str, ...]
) -> list[tuple[Any, Any]]:
    """Return the same for many configs, each with its selector."""
    found: list[tuple[Any, Any]] = []
    with _environment(variables):
        for selector, config in asked:
            try:
                with rejections():
                    found.append(selector.choose(config))
            except Rejected as rejected:
                found.append((None, str(rejected)))
    return found


@contextmanager
def on_capability(major: int, minor: int) -> Iterator[None]:
    """Have vLLM's code find another GPU for a while, also where it has cached an answer."""
    forget()
    with release.on_device(major, minor):
        yield
    forget()


def forget() -> None:
    """Clear what functions of vLLM have cached: some read a variable once and for all."""
    for function in _caching(len(sys.modules)):
        function.cache_clear()


@cache
def _caching(_modules: int) -> list[Any]:
    """Return the functions of vLLM that cache, looked for again when modules were imported."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("vllm.")]
    values = (value for module in modules for value in list(vars(module).values()))
    return [value for value in values if isinstance(value, _lru_cache_wrapper)]


@contextmanager
def in_a_build() -> Iterator[None]:
    """Have stubs answer as a build for CUDA does, with the libraries that it contains."""
    usual = Stub.__bool__

    def answer(stub: Stub) -> bool:
        return stub.__name__.endswith(_AFFIRMED) or usual(stub)

    with patch.object(Stub, "__bool__", answer):
        yield
