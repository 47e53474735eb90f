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
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)

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
    body = re.search(
        r"enum class RoutingMethodType[^{]*\{(.*?)\}", _code(package, _INCLUDE + "runner.h"), re.S
    )
    return {n: int(v) for n, v in re.findall(r"(\w+)\s*=\s*(\d+)", body[1])} if body else None


def tiers(package: Package, method: str) -> Tiers | None:
    """Read what a method's kernel is compiled for (DeepSeekV3's without groups)."""
    policies = _code(package, _INCLUDE + "RoutingCustomPolicy.cuh")
    if policies and method in _POLICIES:
        pre, post = _POLICIES[method]
        found = re.search(
            rf"struct PolicyTraits<{pre}Preprocess, {post}Postprocess>\s*\{{"
            r"\s*using Pairs\s*=\s*TierList<(.*?)>\s*;",
            policies,
            re.S,
        )
        pairs = re.findall(r"Tier<(\d+),\s*(\d+)>", found[1]) if found else []
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
    launcher = re.search(r"class Fp8BlockScaleLauncher\b.*?\n\};", _code(package, _LAUNCHER), re.S)
    code = launcher[0] if launcher else ""
    found: dict[str, Tiers] = {}
    plain = re.search(r"RoutingMethodType::Renormalize\b[^}]*?args->top_k <= (\d+)", code)
    if plain:
        found["Renormalize"] = ((512, int(plain[1])),)
    by_size = re.search(
        r"kNumKimiK2Experts = (\d+);.*?<= kNumKimiK2Experts \? (\d+) : (\d+);", code, re.S
    )
    flat = re.search(r"args->top_k <= (\d+)[^;]*?with groups", code)
    if by_size:
        edge, small, large = map(int, by_size.groups())
        found["DeepSeekV3"] = ((edge, small), (512, large))
    elif flat:
        found["DeepSeekV3"] = ((256, int(flat[1])),)
    return found


def _code(package: Package, name: str) -> str:
    """Return a source without its comments; empty when the package has no such file."""
    return _COMMENT.sub("", package.source(name) or "")


def _constant(code: str, names: str) -> int | None:
    found = re.search(rf"constexpr int (?:{names}) = (\d+);", code)
    return int(found[1]) if found else None
