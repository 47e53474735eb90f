"""What the kernels' sources in a package say of their own limits, read with regular expressions.

What is not found is `None`, never a guess: sources move between releases.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pytest_moe_routing.flashinfer.package import Package

_INCLUDE = "include/flashinfer/trtllm/fused_moe/"
_BACKEND = "csrc/fused_moe/trtllm_backend/"
_LAUNCHER = "csrc/trtllm_fused_moe_kernel_launcher.cu"
#: Sources may be hostile: a search that fails must not begin again at every place.
_COMMENT = re.compile(r"//[^\n]*|/\*.*?(?:\*/|\Z)", re.DOTALL)
_NUMBER = r"(\d{1,9})"

#: (pre-process, post-process) of the methods that the `routingCustom` kernels serve.
_POLICIES = {
    "Default": ("Softmax", "NoOp"),
    "Renormalize": ("NoOp", "Softmax"),
    "RenormalizeNaive": ("NoOp", "Softmax"),
    "DeepSeekV3": ("SigmoidBias", "ScaledSumNormalize"),
    "MiniMax2": ("SigmoidBias", "ScaledSumNormalize"),
    "TopK": ("NoOp", "NoOp"),
    "SigmoidRenorm": ("Sigmoid", "SumNormalize"),
    "Sigmoid": ("Sigmoid", "SumNormalize"),
    "TopKSigmoid": ("NoOp", "Sigmoid"),
}
#: Where kernels of one method state their limits as constants; before the tiers, for most.
_KERNELS = {
    "Llama4": ("trtllm_fused_moe_routing_llama4.cu",),
    "Renormalize": (
        "trtllm_fused_moe_routing_renormalize.cu",
        "routingRenormalize/RoutingRenormalizeCommon.cuh",
    ),
}
_KERNELS["RenormalizeNaive"] = _KERNELS["TopK"] = _KERNELS["Renormalize"]

#: (experts, top_k) that a kernel is compiled for; it takes what is not larger than one of them.
Tiers = tuple[tuple[int, int], ...]


def methods(package: Package) -> Mapping[str, int] | None:
    """Read the C++ twin of `RoutingMethodType`."""
    code = _code(package, _INCLUDE + "runner.h")
    body = _between(_between(code, "enum class RoutingMethodType"), r"\{", r"\}")
    members = re.findall(rf"\b(\w{{1,100}})\s*=\s*{_NUMBER}\b", body or "")
    return {name: int(value) for name, value in members} or None


def tiers(package: Package, method: str) -> Tiers | None:
    """Read what a method's kernel is compiled for (DeepSeekV3's without groups)."""
    policies = _code(package, _INCLUDE + "RoutingCustomPolicy.cuh")
    if policies and method in _POLICIES:
        pre, post = _POLICIES[method]
        header = rf"struct PolicyTraits<{pre}Preprocess, {post}Postprocess>\s*\{{"
        listed = _between(policies, rf"{header}\s*using Pairs\s*=\s*TierList<", r">\s*;")
        pairs = re.findall(rf"Tier<{_NUMBER},\s*{_NUMBER}>", f"{listed}>" if listed else "")
        return tuple((int(experts), int(top_k)) for experts, top_k in pairs) or None
    for name in _KERNELS.get(method, ()):
        code = _code(package, _BACKEND + name) or _code(package, f"csrc/{name}")
        experts = _constant(code, "NumExpertsLimit|MaxSupportedExperts")
        top_k = _constant(code, "MaxNumTopExperts|MaxSupportedTopExperts")
        if experts and top_k:
            return ((experts, top_k),)
    return None


def groups(package: Package) -> tuple[int, int] | None:
    """How many groups the DeepSeek kernel takes, and how many of them it keeps."""
    name = "trtllm_fused_moe_routing_deepseek.cu"
    places = (
        _BACKEND + name,
        f"csrc/{name}",
        _BACKEND + "routingDeepSeek/RoutingDeepSeekCommon.cuh",
    )
    for place in places:
        code = _code(package, place)
        n_group, topk_group = _constant(code, "MaxNumGroups"), _constant(code, "MaxNumTopGroups")
        if n_group and topk_group:
            return n_group, topk_group
    return None


def block_scale_top_k(package: Package) -> Mapping[str, Tiers]:
    """Read the block-scale launcher's own bounds on top_k, by method, as far as they are found."""
    code = _between(_code(package, _LAUNCHER), r"class Fp8BlockScaleLauncher\b", r"\n\};") or ""
    found: dict[str, Tiers] = {}
    for block in code.split("}"):
        taken = re.search(
            rf"args->top_k <= {_NUMBER}", _between(block, r"RoutingMethodType::Renormalize\b") or ""
        )
        if taken:
            found["Renormalize"] = ((512, int(taken[1])),)
            break
    edge = re.search(rf"kNumKimiK2Experts = {_NUMBER};", code)
    sizes = rf"<= kNumKimiK2Experts \? {_NUMBER} : {_NUMBER};"
    if edge:
        by_size = re.compile(sizes).search(code, edge.end())
        if by_size:
            small, large = map(int, by_size.groups())
            found["DeepSeekV3"] = ((int(edge[1]), small), (512, large))
            return found
    for statement in code.split(";"):
        flat = re.search(rf"args->top_k <= {_NUMBER}", statement)
        if flat and "with groups" in statement[flat.end() :]:
            found["DeepSeekV3"] = ((256, int(flat[1])),)
            break
    return found


def _between(code: str | None, start: str, end: str = "") -> str | None:
    """Return what lies between the first match of a pattern and the next of another, or the end.

    None where there is no such place, so that calls can be nested.
    """
    begin = re.search(start, code or "")
    if code is None or begin is None:
        return None
    stop = re.compile(end).search(code, begin.end()) if end else None
    if end and stop is None:
        return None
    return code[begin.end() : stop.start() if stop else len(code)]


def _code(package: Package, name: str) -> str:
    """Return a source without its comments; empty when the package has no such file."""
    return _COMMENT.sub("", package.source(name) or "")


def _constant(code: str, names: str) -> int | None:
    found = re.search(rf"constexpr int (?:{names}) = {_NUMBER};", code)
    return int(found[1]) if found else None
