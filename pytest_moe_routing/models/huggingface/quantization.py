"""Which quantization scheme the experts of a checkpoint have, from what its config states.

A config may state the scheme in several places. The most specific one counts:

1. `quantized_layers` that name experts, layer by layer (ModelOpt)
2. `moe_quant_algo` (ModelOpt)
3. `config_groups` whose targets cover the experts (compressed-tensors)
4. `quant_algo` (ModelOpt)
5. `quant_method` with its parameters, and `expert_dtype`

They are read from `quantization_config`, else `compression_config`, else a file next to the config.
Experts that an ignore list covers are not quantized, unless 1 names them.

Places 1 to 4 and the file next to the config must not contradict each other about the weights; in
whether activations are quantized as well they may differ, and the more specific one counts. Place 5
is about the rest of the model where one of 1 to 4 is about the experts.

A contradiction, or a method that is not known, is no error: the router is read all the same, and
the scheme is not judged, for that reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from pytest_moe_routing.escape import shorten
from pytest_moe_routing.models.huggingface.document import Section, show
from pytest_moe_routing.models.huggingface.patterns import (
    Covers,
    Experts,
    PatternError,
    Patterns,
    deadline,
)
from pytest_moe_routing.models.huggingface.weights import (
    ALGORITHMS,
    INTEGER_METHODS,
    METHODS,
    UnknownWeights,
    auto_round,
    fp8,
    group_scheme,
)

#: Files next to a config.json that may state a quantization, in the order in which they count.
QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
MIXED = "MIXED_PRECISION"
_MODELOPT = ("modelopt", "modelopt_fp4", "modelopt_mixed", "modelopt_mxfp8")
_IGNORE = ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules")
_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d{1,4})\.")


@dataclass(frozen=True)
class Checkpoint:
    """What a config states about the experts' scheme.

    Attributes:
        scheme: The commonest among the layers; None when it is not known.
        own: The layers with another scheme.
        unknown: Why it is not known.
    """

    scheme: str | None
    own: Mapping[int, str] = field(default_factory=dict)
    unknown: str | None = None


def checkpoint_of(
    levels: list[Section],
    files: Mapping[str, Section],
    layers: list[int],
    experts: Experts,
) -> Checkpoint:
    """Read the scheme of the routed experts' weights.

    Args:
        levels: The config and those nested in it.
        files: The files next to the config that may state a quantization, by name.
        layers: The layers with routed experts, as far as they are known.
        experts: Where a layer has its routed experts.

    Raises:
        ModelError: Something else than an object or a list stands where one must.
    """
    try:
        return _common(_schemes(levels, files, layers, experts))
    except (PatternError, UnknownWeights) as error:
        return Checkpoint(None, unknown=str(error))


def _schemes(
    levels: list[Section], files: Mapping[str, Section], layers: list[int], experts: Experts
) -> dict[int, str]:
    root, text = levels[0], levels[-1]
    found = (
        root.section("quantization_config")
        or text.section("quantization_config")
        or root.section("compression_config")
    )
    stated = {found.name: found} if found else {}
    if found is None and root.section("quantization") is not None:
        raise UnknownWeights("the mlx format (key quantization)")
    read = {
        name: _Stated(section.section("quantization") or section, text, layers, experts)
        for name, section in {**stated, **files}.items()
    }
    schemes = {name: stated.resolve() for name, stated in read.items()}
    if not schemes:
        return dict.fromkeys(layers, "bf16")
    (first, counting), *others = schemes.items()
    for name, other in others:
        if other != counting:
            ours, theirs = _common(counting).scheme, _common(other).scheme
            raise UnknownWeights(f"{first} states {ours}, and {name} next to it states {theirs}")
    return counting


def _common(schemes: Mapping[int, str]) -> Checkpoint:
    values = list(schemes.values())
    usual = max(dict.fromkeys(values), key=values.count)
    return Checkpoint(usual, {layer: s for layer, s in schemes.items() if s != usual})


class _Stated:
    """One object that states a quantization."""

    def __init__(self, found: Section, text: Section, layers: list[int], experts: Experts) -> None:
        self.found, self.text, self.experts = found, text, experts
        self.layers = layers
        self.deadline = deadline()
        self.method = found.get("quant_method", "")
        if not isinstance(self.method, str):
            found.fail("quant_method", show(self.method), "text")

    def resolve(self) -> dict[int, str]:
        """Return the scheme of each layer's experts.

        Raises:
            UnknownWeights: It is not known.
            PatternError: A pattern cannot be decided.
        """
        named = self._named()
        excluded = self._excluded(named)
        specific = [
            (place, schemes)
            for place, schemes in (
                ("quantized_layers", named),
                ("moe_quant_algo", self._algorithm("moe_quant_algo")),
                ("config_groups", self._groups(excluded)),
                ("quant_algo", self._algorithm("quant_algo")),
            )
            if schemes
        ]
        for (place, schemes), (other, others) in combinations(specific, 2):
            for layer in sorted((set(schemes) & set(others)) - excluded):
                if _weights(schemes[layer]) != _weights(others[layer]):
                    raise UnknownWeights(
                        f"{place} states {schemes[layer]}, and {other} {others[layer]}"
                    )
        found = {} if specific else self._by_method()
        for _, schemes in reversed(specific):
            found |= schemes
        return {
            layer: "bf16" if layer in excluded else found.get(layer, "bf16")
            for layer in self.layers
        }

    def _named(self) -> dict[int, str]:
        """Return what `quantized_layers` states about experts, by layer."""
        section = self.found.section("quantized_layers")
        by_layer: dict[int, set[str]] = {}
        for name, value in (section.values if section else {}).items():
            match = _LAYER.search(name)
            if match and is_experts(name):
                algorithm = value.get("quant_algo") if isinstance(value, dict) else value
                by_layer.setdefault(int(match[1]), set()).add(show(algorithm).strip('"').upper())
        for layer, algorithms in by_layer.items():
            if len(algorithms) > 1:
                names = shorten(" and ".join(sorted(algorithms)))
                raise UnknownWeights(f"the experts of layer {layer} are of several kinds: {names}")
        elsewhere = self.found.get("moe_quant_algo") is not None
        if not by_layer and self.found.get("quant_algo") == MIXED and not elsewhere:
            raise UnknownWeights(f"quant_algo is {MIXED}, and quantized_layers names no experts")
        if len(self.layers) == 1 and by_layer:
            self.layers = sorted(by_layer)  # the config does not state how many there are
        return {layer: _modelopt(*algorithms) for layer, algorithms in by_layer.items()}

    def _algorithm(self, key: str) -> dict[int, str]:
        algorithm = self.found.get(key)
        if algorithm is None or algorithm == MIXED:
            return {}
        scheme = _modelopt(algorithm)
        groups = self.found.section("config_groups")
        given = [group.get("input_activations", 0) for group in _objects(groups)]
        if scheme == "nvfp4" and given and all(inputs is None for inputs in given):
            # vllm 0.33.0 modelopt.py: the algorithm is of the weights alone.
            scheme = "w4a16_nvfp4"
        return dict.fromkeys(self.layers, scheme)

    def _groups(self, excluded: set[int]) -> dict[int, str]:
        """Return what `config_groups` state about experts, by layer; only those with targets do.

        A group of an unknown kind is no problem of layers whose experts are excluded.
        """
        groups = self.found.section("config_groups")
        sections = [s for key in groups.values if (s := groups.section(key))] if groups else []
        if self.method == "compressed-tensors" and not sections:
            raise UnknownWeights("compressed-tensors without config_groups")
        targets = [[*s.items("targets")] for s in sections]
        asked = [Patterns(t, self.experts, self.deadline) for t in targets]
        found = dict.fromkeys(excluded, "bf16") if sections else {}
        for layer in sorted(set(self.layers) - excluded):
            covering = [
                (s, c)
                for s, p in zip(sections, asked, strict=True)
                if (c := p.covers(layer)) is not Covers.NONE
            ]
            if any(c is Covers.SOME for _, c in covering) or len(covering) > 1:
                raise UnknownWeights(
                    f"several config_groups cover the experts of layer {layer}, or parts of them"
                )
            by_class = [s for s, t in zip(sections, targets, strict=True) if "Linear" in t]
            group = covering[0][0] if covering else next(iter(by_class), None)
            if group is not None:
                found[layer] = group_scheme(group)
            elif any(targets):
                found[layer] = "bf16"
        return found

    def _by_method(self) -> dict[int, str]:
        method = self.method
        if method == "fp8":
            scheme = fp8(self.found, self.text)
        elif method in ("auto-round", "auto_round", "inc"):
            scheme = auto_round(self.found)
            extra = self.found.section("extra_config")
            names = [name for name in (extra.values if extra else {}) if is_experts(name)]
            if names:
                raise UnknownWeights(f"auto-round with an extra_config for {shorten(names[0])}")
        elif method in METHODS:
            scheme = METHODS[method]
        elif method in INTEGER_METHODS or (not method and "w_bit" in self.found.values):
            bits = self.found.get("bits", self.found.get("w_bit"))
            if type(bits) is not int or bits not in (4, 8):
                raise UnknownWeights(f"{method or 'weights'} of {show(bits)} bits")
            dynamic = self.found.section("dynamic")
            if dynamic is not None and dynamic.values:
                raise UnknownWeights(f"{method} with dynamic rules for modules")
            scheme = f"int{bits}"
        else:
            raise UnknownWeights(f"{method or 'no quant_method'} is not known")
        return dict.fromkeys(self.layers, scheme)

    def _excluded(self, named: Mapping[int, str]) -> set[int]:
        """Return the layers whose experts an ignore list covers."""
        listed = [item for key in _IGNORE for item in self.found.items(key)]
        patterns = Patterns(listed, self.experts, self.deadline)
        excluded = set()
        for layer in self.layers:
            covers = Covers.NONE if layer in named else patterns.covers(layer)
            if covers is Covers.SOME:
                pattern, _ = patterns.first(layer)
                raise UnknownWeights(
                    f"{shorten(str(pattern))} excludes some experts of layer {layer}"
                )
            if covers is Covers.ALL:
                excluded.add(layer)
        return excluded


def _objects(section: Section | None) -> list[dict[str, Any]]:
    return [v for v in section.values.values() if isinstance(v, dict)] if section else []


def _weights(scheme: str) -> str:
    """Return the format of a scheme's weights, whether or not activations are quantized as well."""
    return scheme.removeprefix("w4a16_")


def _modelopt(algorithm: object) -> str:
    name = algorithm.upper() if isinstance(algorithm, str) else show(algorithm)
    if name not in ALGORITHMS:
        raise UnknownWeights(f"the quant_algo {shorten(name)} is not known")
    return ALGORITHMS[name]


def is_experts(name: str) -> bool:
    """Whether a module's name is about routed experts."""
    return "experts" in name and "shared" not in name
