"""SGLang's routers in Triton and in CUDA that nvcc builds, as its own `topk.py` calls them.

Everything is in the `sglang` wheel (since 0.5.23: `sglang/kernels/`). `layers/moe/topk.py` and the
kernels run for real; what lies around them are stubs. For use in a process of its own.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.kernels.routers import RouterCall
from pytest_moe_routing.models import RouterConfig
from pytest_moe_routing.routing import Recipe
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.contract import Contract

if TYPE_CHECKING:
    from torch import Tensor

_TOPK = "sglang.srt.layers.moe.topk"
_OPS = "sglang.kernels.ops.moe"
#: What runs for real, besides installed packages.
_REAL = (
    *(f"sglang.kernels.{name}" for name in ("jit", "kernel_api_logging", "numerics")),
    *(f"sglang.kernels.{name}" for name in ("registry", "selector", "spec")),
    *(_OPS, _TOPK, "sglang.srt.layers.moe.route_quant_handoff", "sglang.srt.environ"),
    "sglang.srt.configs.shared_experts",
)
#: What building and loading kernels needs, by module and distribution.
_NEEDS = {"triton": "triton", "tvm_ffi": "apache-tvm-ffi", "msgspec": "msgspec"}
#: Kernels without groups, by scoring function. `topk.py` of 0.5.23 calls them on other devices than
#: NVIDIA's GPUs, on which they run all the same.
_FLAT = {"softmax": "topk_softmax", "sigmoid": "topk_sigmoid"}
#: Inkling's gate: routed and shared experts, top-k, and columns of the logits in memory.
_EXPERTS, _SHARED, _TOP_K, _COLUMNS = 256, 2, 6, 264
#: By which a wheel is known to have these kernels.
MEMBER = "sglang/kernels/ops/moe/moe_fused_gate.py"


class JitRouters:
    """The routers of one release.

    Args:
        path: A wheel, or a directory that has the package in it.
        folder: Where a wheel is unpacked, as nvcc reads files.

    Raises:
        Unsupported: A package is missing that building or loading needs.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        missing = [name for module, name in _NEEDS.items() if find_spec(module) is None]
        if missing:
            raise Unsupported(f"SGLang's kernels need {', '.join(missing)}, not installed here")
        if path.is_file():
            with zipfile.ZipFile(path) as wheel:
                wheel.extractall(folder, [n for n in wheel.namelist() if not n.endswith(".so")])
            path = folder
        import torch

        # Of what torch.compile would compile, nothing is called.
        torch.compile = lambda f=None, *_, **__: f or (lambda g: g)  # type: ignore[assignment]
        contract = replace(Contract.of("sglang"), run=_REAL, third_party=())
        stubs.install(contract, str(path), {"is_cuda": lambda: True})
        self._topk = stubs.real_module(_TOPK)

    def calls(self, router: RouterConfig) -> Iterator[RouterCall]:
        """Yield the functions by which `select_experts` routes on CUDA, where a kernel does it."""
        if router.topk_before_score and router.scoring_func != "softmax":
            # Llama 4's own function in torch.
            return
        for name, arguments, is_scaled in ways(router):
            yield RouterCall(
                name,
                recipe_of_kernel(router, is_scaled=is_scaled),
                partial(self._route, name=name, router=router, arguments=arguments),
            )
        kernel = flat_kernel(router)
        if kernel is not None:
            run = partial(_fill, self._kernel(f"moe_{kernel}", kernel), router=router)
            yield RouterCall(f"moe_{kernel}", recipe_of_kernel(router), run)
        recipe = recipe_of_kernel(router, is_scaled=True)
        if recipe.score == "sigmoid" and recipe.bias and router.num_experts == _EXPERTS:
            # Inkling is not in the zoo: its gate is run for a model of as many experts.
            own = replace(recipe, top_k=_TOP_K, n_group=1, topk_group=1, normalize="sum")
            run = partial(self._inkling, scale=recipe.scale)
            yield RouterCall("sigmoid_gate_topk_renorm", own, run)

    def _kernel(self, module: str, name: str) -> Callable[..., Any]:
        kernel: Callable[..., Any] = getattr(stubs.real_module(f"{_OPS}.{module}"), name)
        return kernel

    def _route(
        self,
        logits: Tensor,
        bias: Tensor | None,
        *,
        name: str,
        router: RouterConfig,
        arguments: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        import torch

        hidden = torch.zeros(len(logits), 32, dtype=torch.bfloat16, device=logits.device)
        function = getattr(self._topk, name)
        more = arguments if bias is None else {**arguments, "correction_bias": bias}
        answer = function(hidden, logits, topk=router.top_k, **more)
        if isinstance(answer, stubs.Stub):
            raise Unsupported(f"{name} of topk.py asks {answer}, which does not run here")
        weights, ids = answer
        return weights, ids

    def _inkling(
        self, logits: Tensor, bias: Tensor | None, *, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Call Inkling's gate; its weights count shared experts in, which are left out again."""
        import torch

        padded = torch.full((len(logits), _COLUMNS), -1.0, device=logits.device)
        padded[:, :_EXPERTS] = logits
        gate = self._kernel("sigmoid_gate_topk_renorm", "sigmoid_gate_topk_renorm")
        one = torch.ones(1, device=logits.device)
        given = padded[:, : _EXPERTS + _SHARED], _TOP_K, _SHARED, scale, one, bias
        weights, ids, shared, _ = gate(*given)
        total = (weights.sum(1) + shared.sum(1)) / scale
        if not torch.allclose(total, torch.ones_like(total), rtol=1e-5):
            raise ValueError(f"all weights of a token sum to {total.min()} to {total.max()}")
        return weights / weights.sum(1, keepdim=True) * scale, ids


def ways(router: RouterConfig) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Yield functions of `topk.py`, their arguments, and whether they apply the factor."""
    bias, groups = router.correction_bias is not None, router.n_group or 1
    scale = {
        "routed_scaling_factor": router.routed_scaling_factor,
        "apply_routed_scaling_factor_on_output": True,
    }
    normed = {"renormalize": router.renormalize}
    if router.scoring_func == "softmax":
        # Groups are chosen in torch, and no bias reaches the kernel.
        if not bias and groups == 1:
            yield "fused_topk", normed, False
        return
    if bias and router.scoring_func == "sigmoid":
        grouped = {"num_expert_group": groups, "topk_group": router.topk_group or 1}
        yield "biased_grouped_topk_gpu", {**normed, **scale, **grouped}, True
    if groups == 1:
        flat = {"scoring_func": router.scoring_func, "correction_bias": None}
        yield "biased_topk_jit_kernel_impl", {**normed, **scale, **flat}, True


def flat_kernel(router: RouterConfig) -> str | None:
    """Return the kernel that scores and chooses among all experts, None where there is none."""
    kernel = _FLAT.get(router.scoring_func)
    bias = router.correction_bias is not None
    grouped = router.n_group is not None and (bias or router.n_group > 1)
    # Llama 4 has its own function in torch; no bias is passed to topk_softmax, which would add it
    # to the logits.
    own = router.topk_before_score and router.scoring_func != "softmax"
    return None if own or grouped or (bias and kernel == "topk_softmax") else kernel


def _fill(
    kernel: Callable[..., None], logits: Tensor, bias: Tensor | None, *, router: RouterConfig
) -> tuple[Tensor, Tensor]:
    """Call a kernel that writes into what it is given."""
    import torch

    shape, device = (len(logits), router.top_k), logits.device
    weights = torch.full(shape, torch.nan, device=device)
    ids = torch.full(shape, -7, dtype=torch.int32, device=device)
    kernel(weights, ids, logits, renormalize=router.renormalize, correction_bias=bias)
    return weights, ids


def recipe_of_kernel(router: RouterConfig, *, is_scaled: bool = False) -> Recipe:
    """Return what a kernel computes for a router; with its factor if the kernel applies it."""
    return Recipe(
        top_k=router.top_k,
        score=router.scoring_func,
        bias=router.correction_bias is not None,
        n_group=router.n_group or 1,
        topk_group=router.topk_group or 1,
        normalize="sum" if router.renormalize else "none",
        scale=router.routed_scaling_factor if is_scaled else 1.0,
    )
