"""Which quantization scheme the experts of a checkpoint have, from what its config says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pytest_moe_routing.models.huggingface.document import Section, shorten, show
from pytest_moe_routing.schemes import SCHEMES, CheckpointNames

_ROWS: Mapping[str, CheckpointNames] = {
    name: row.checkpoint for name, row in SCHEMES.items() if row.checkpoint
}
#: Schemes by ModelOpt's `quant_algo` (vllm 0.32.0 quantization/modelopt.py reads the same names).
_ALGORITHMS: Mapping[str, str] = {a: scheme for scheme, row in _ROWS.items() for a in row.modelopt}
MIXED = "MIXED_PRECISION"

#: Schemes by the `quant_method` that names them by itself.
_METHODS: Mapping[str, str] = {
    method: scheme for scheme, row in _ROWS.items() for method in row.quant_methods
}
#: Integer weights, of as many bits as `bits` says.
INTEGER_METHODS = ("auto-round", "awq", "gptq")
_MODELOPT = ("modelopt", "modelopt_fp4", "modelopt_mixed", "modelopt_mxfp8")
_BLOCK = [128, 128]

#: Schemes by what compressed-tensors says of the weights.
_WEIGHTS: Mapping[tuple[str, int, str, int | None], str] = {
    weights: scheme for scheme, row in _ROWS.items() for weights in row.compressed_tensors
}


def scheme_of(root: Section, text: Section, beside: Section | None) -> str:
    """The scheme of the experts' weights.

    Args:
        root: The whole config.
        text: The text model's part of it, where some configs keep `quantization_config`.
        beside: ModelOpt's `hf_quant_config.json` from the same folder, which counts where the
            config itself says nothing.

    Raises:
        ModelError: A method or a combination that has no name here.
    """
    found = (
        root.section("quantization_config")
        or text.section("quantization_config")
        or root.section("compression_config")
        or (beside.section("quantization") if beside else None)
    )
    if found is None:
        return "bf16"
    # Early ModelOpt configs have a level more.
    found = found.section("quantization") or found
    if _leaves_experts_alone(found):
        return "bf16"
    method = found.get("quant_method", "")
    if not isinstance(method, str):
        found.fail("quant_method", show(method), "text")
    if method == "fp8":
        # DeepSeek-V4: FP8 everywhere but in the experts.
        expert_dtype = text.get("expert_dtype", "fp8")
        if expert_dtype not in ("fp4", "fp8"):
            text.fail("expert_dtype", show(expert_dtype), "fp4 or fp8")
        return "mxfp4" if expert_dtype == "fp4" else _fp8(found)
    if method in _METHODS:
        return _METHODS[method]
    if method in INTEGER_METHODS:
        bits = found.get("bits")
        if type(bits) is not int or bits not in (4, 8):
            found.fail("bits", show(bits), "4 or 8")
        return f"int{bits}"
    if found.get("quant_algo") is not None:
        return _modelopt(found)
    if method != "compressed-tensors" and method not in _MODELOPT:
        known = ("fp8", "compressed-tensors", *_METHODS, *INTEGER_METHODS, *_MODELOPT)
        found.fail("quant_method", show(method or None), f"one of {', '.join(sorted(known))}")
    return _compressed_tensors(found)


def _fp8(found: Section) -> str:
    block = found.get("weight_block_size")
    if block is None:
        return "fp8_per_tensor"
    if block != _BLOCK:
        found.fail("weight_block_size", shorten(str(block)), f"{_BLOCK} or null")
    return "fp8_block"


def _modelopt(found: Section) -> str:
    algorithm = found.get("quant_algo")
    where = "quant_algo"
    if algorithm == MIXED:
        where = "quantized_layers"
        layers = (found.section(where) or found).values
        if not any(_is_experts(name) for name in layers):
            found.fail(where, "no experts", f"the experts' quant_algo, as quant_algo is {MIXED}")
        algorithms = {
            str(layer.get("quant_algo")) if isinstance(layer, dict) else show(layer)
            for name, layer in layers.items()
            if _is_experts(name)
        }
        if len(algorithms) > 1:
            names = shorten(", ".join(sorted(algorithms)))
            found.fail(where, names, "one quant_algo for all routed experts")
        (algorithm,) = algorithms
    name = algorithm.upper() if isinstance(algorithm, str) else ""
    if name not in _ALGORITHMS:
        found.fail(where, show(algorithm), f"one of {', '.join(sorted(_ALGORITHMS))}")
    return _ALGORITHMS[name]


def _compressed_tensors(found: Section) -> str:
    groups = found.section("config_groups")
    if groups is None or not groups.values:
        found.fail("config_groups", "nothing", "an object with a group for the experts")
    sections = [section for key in groups.values if (section := groups.section(key))]
    of_experts = [s for s in sections if any(map(_is_experts, s.items("targets")))]
    of_all = [s for s in sections if "Linear" in s.items("targets")]
    candidates = of_experts or of_all
    if len(candidates) != 1:
        found.fail(
            "config_groups",
            f"{len(candidates)} groups for the experts",
            "one, which targets Linear or names the experts",
        )
    weights = candidates[0].section("weights")
    if weights is None:
        candidates[0].fail("weights", "nothing", "an object")
    group = weights.get("group_size")
    strategy = weights.get("strategy") or ("group" if group else "tensor")
    kind = (weights.get("type"), weights.get("num_bits"), strategy)
    try:
        scheme = _WEIGHTS.get((*kind, group)) or _WEIGHTS.get((*kind, None))
    except TypeError:  # a list or object among them
        scheme = None
    if scheme is None:
        weights.fail(
            "strategy",
            f"{show(kind[0])} of {show(kind[1])} bits by {show(strategy)}, group {show(group)}",
            "weights of a known scheme",
        )
    if scheme == "nvfp4" and candidates[0].section("input_activations") is None:
        return "w4a16_nvfp4"
    return scheme


def _is_experts(name: object) -> bool:
    """Whether a module name or pattern is about routed experts."""
    return isinstance(name, str) and "experts" in name and "shared" not in name


def _leaves_experts_alone(found: Section) -> bool:
    """Whether a pattern excludes the routed experts of all layers from quantization.

    Patterns are not run (they are somebody else's regular expressions): one that ends in the
    experts and names no layer is meant for all of them.
    """
    patterns: Iterable[object] = (
        pattern
        for key in ("modules_to_not_convert", "ignore", "ignored_layers", "exclude_modules")
        for pattern in found.items(key)
    )
    return any(
        _is_experts(pattern) and not any(c.isdigit() for c in str(pattern)) for pattern in patterns
    )
