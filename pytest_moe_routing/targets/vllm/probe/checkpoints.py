"""Asks vLLM which quantization method serves the experts of a checkpoint, by its config."""

from __future__ import annotations

import inspect
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.answers import ServedAnswer
from pytest_moe_routing.targets.vllm.probe import factory, release
from pytest_moe_routing.targets.vllm.probe.accepted_keys import known_keys
from pytest_moe_routing.targets.vllm.probe.capture import on_one_gpu, raised, refusal
from pytest_moe_routing.targets.vllm.probe.config import layer_arguments
from pytest_moe_routing.targets.vllm.probe.experts import ELSEWHERE, SCHEMES
from pytest_moe_routing.targets.vllm.probe.gates import declared_keys
from pytest_moe_routing.targets.vllm.probe.layer import HIDDEN, INTERMEDIATE
from pytest_moe_routing.targets.vllm.probe.loaded import surroundings
from pytest_moe_routing.targets.vllm.probe.ranks import Ranks, Surroundings
from pytest_moe_routing.targets.vllm.probe.release import names
from pytest_moe_routing.targets.vllm.probe.rule import rule_of

#: Rows of the contract: what chooses the experts of a layer.
_SELECTORS = "select-"
#: How selectors call the quantization keys of weights and of activations.
_KEYS = ("weight_key", "activation_key")
#: What vLLM's code raises of a checkpoint that it rejects.
_DELIBERATE = (AssertionError, NotImplementedError, RuntimeError, ValueError)
#: The function that finds the config of a quantization.
_CONFIG = "checkpoint-config"
#: A selector's row of the contract, and the keys that it is asked with.
_Chosen = tuple[str, dict[str, Any]]
#: The class of another package, which the package itself has from that one.
_DEEPSEEK_V4 = "checkpoint-deepseek-v4"


def checkpoint(
    model: Mapping[str, Any],
    config: dict[str, Any],
    hf_config: Mapping[str, Any],
    prefix: str,
) -> ServedAnswer:
    """Return what vLLM makes of the experts of a checkpoint.

    Args:
        model: Any model that has such experts.
        config: The quantization config of the checkpoint.
        hf_config: What else its config.json has.
        prefix: The name of the layer's experts.

    Raises:
        Unsupported: The release does not have what the question needs.
    """
    names().require("checkpoints")
    if not names().expects("checkpoint-name"):
        raise Unsupported(
            f"not judged: what reads a checkpoint's config in vLLM {names().version} is not run"
        )
    _enter()
    chosen: list[_Chosen] = []
    name, kept = "", SimpleNamespace(**hf_config)
    try:
        name = _named(config, kept)
        quantization = _configs().own(name).from_config(config)
        with _recording(chosen):
            method = _method(model, quantization, kept, prefix)
    except Exception as error:
        if _is_rejection(error):
            found = raised(error)
            rejection = f"{found['type']}: {found['message']}", found["code"]
            return _answer(name, "", (), found["where"], *rejection)
        # Another reason than the checkpoint cannot be excluded.
        raise Unsupported(
            f"not judged: vLLM {names().version} makes no experts of a checkpoint here: "
            f"{refusal(error)}"
        ) from error
    return _answer(name, method.__name__, chosen, rule_of(method.__init__)["source"])


def _is_rejection(error: Exception) -> bool:
    """Return whether a statement of vLLM raises an error, rather than what the statement calls."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    is_raised = (last.line or "").startswith(("raise ", "assert "))
    # vLLM looks up the config of a quantization by its name.
    is_unknown = isinstance(error, KeyError) and last.name == names().spelling(_CONFIG).path
    is_deliberate = isinstance(error, _DELIBERATE) and is_raised
    return (is_deliberate or is_unknown) and release.is_of_vllm(last.filename)


def _answer(
    name: str,
    method: str,
    chosen: Sequence[_Chosen],
    source: str,
    rejection: str = "",
    rejected_in: str = "",
) -> ServedAnswer:
    return {
        "name": name,
        "method": method,
        "schemes": sorted({scheme for each in chosen for scheme in _schemes(*each)}),
        "keys": [f"{key} {_told(value)}" for _, keys in chosen for key, value in keys.items()],
        "source": source,
        "rejection": rejection,
        "rejected_in": rejected_in,
    }


def _told(key: Any) -> str:
    """Return the name of a quantization key, or else what it consists of."""
    return next((name for name, known in known_keys().items() if known == key), str(key))


def _method(
    model: Mapping[str, Any], quantization: Any, hf_config: SimpleNamespace, prefix: str
) -> Any:
    """Return the class of the method that vLLM gives a layer's experts."""
    ranks, arguments = Ranks(), layer_arguments(model, (HIDDEN, INTERMEDIATE), None)
    server = ranks.config(arguments["params_dtype"])
    server.model_config.hf_config = hf_config
    with surroundings(), on_one_gpu():
        layer = factory.make_layer(arguments, ranks, server, quantization, prefix)
    return type(layer.routed_experts.quant_method)


def _named(config: Mapping[str, Any], hf_config: SimpleNamespace) -> str:
    """Return vLLM's name for the quantization that a checkpoint's config states."""
    asked = Surroundings(
        quantization=None,
        model_arch_config=Surroundings(quantization_config=config),
        hf_config=hf_config,
        allow_deprecated_quantization=False,
    )
    names().get("checkpoint-name._verify_quantization")(asked)
    name: str = asked.quantization
    return name


class _NotRun:
    """The config of a quantization whose code is a stub: it takes no checkpoint from others."""

    @staticmethod
    def override_quantization_method(*_: Any, **__: Any) -> None:
        """Leave a checkpoint to others."""


@cache
def _configs() -> Any:
    """Return vLLM's package of quantizations, with the configs whose code runs here."""
    package = stubs.run_apart(names().spelling(_CONFIG).module)
    base = names().get("checkpoint-base")

    def config_of(name: str) -> Any:
        try:
            found = package.get_quantization_config(name)
        except KeyError:
            # The package reads some names from a module that is a stub: no checkpoint has them.
            return _NotRun
        return found if isinstance(found, type) and issubclass(found, base) else _NotRun

    return SimpleNamespace(
        QUANTIZATION_METHODS=package.QUANTIZATION_METHODS,
        DEPRECATED_QUANTIZATION_METHODS=package.DEPRECATED_QUANTIZATION_METHODS,
        QuantizationMethods=package.QuantizationMethods,
        get_quantization_config=config_of,
        own=package.get_quantization_config,
    )


@cache
def _enter() -> None:
    """Put what vLLM's code finds around it in the place of stubs."""
    factory.enter()
    if names().has(_DEEPSEEK_V4):
        spelling = names().spelling(_DEEPSEEK_V4)
        module = vars(stubs.real_module(spelling.module))
        module.update({n: value for n, value in factory.stand_ins().items() if n in module})
        package = import_module(spelling.module.rpartition(".")[0])
        setattr(package, spelling.path, names().get(_DEEPSEEK_V4))
    # That module's patterns are plain ones: the package that it has for them need not be installed.
    vars(stubs.real_module(names().spelling("checkpoint-patterns").module))["re"] = re
    model = stubs.real_module(names().spelling("checkpoint-name").module)
    vars(model)["me_quant"] = _configs()


@contextmanager
def _recording(chosen: list[_Chosen]) -> Iterator[None]:
    """Note which selectors are asked for experts, and with which quantization keys."""
    rows = [key for key in names().contract.rows if key.startswith(_SELECTORS)]
    selectors = {key: names().get(key) for key in rows if "(" not in key and names().has(key)}
    notes = {key: partial(_note, chosen, key, function) for key, function in selectors.items()}
    for key, function in selectors.items():
        _exchange(names().spelling(key).path, function, notes[key])
    try:
        yield
    finally:
        # In modules that were imported meanwhile as well.
        for key, function in selectors.items():
            _exchange(names().spelling(key).path, notes[key], function)


def _exchange(name: str, before: Any, after: Any) -> None:
    """Have each module of vLLM that has one value under a name another one."""
    for module in [m for n, m in list(sys.modules.items()) if n.startswith("vllm.")]:
        if vars(module).get(name) is before:
            vars(module)[name] = after


def _note(chosen: list[_Chosen], key: str, function: Any, *args: Any, **options: Any) -> Any:
    bound = inspect.signature(function).bind(*args, **options)
    bound.apply_defaults()
    chosen.append((key, {n: value for n, value in bound.arguments.items() if n in _KEYS}))
    return function(*args, **options)


def _schemes(selector: str, keys: Mapping[str, Any]) -> Iterator[str]:
    """Yield the schemes whose experts a selector is asked for with these quantization keys."""
    row = names().contract.rows[selector]
    for scheme, served in (SCHEMES | ELSEWHERE).items():
        if selector != served.selector and scheme not in (row.schemes or ()):
            continue
        expected = declared_keys(scheme, served)
        if all(value == expected[name] for name, value in keys.items()):
            yield scheme
