"""vLLM's compiled routers, `torch.ops._moe_C`, driven as `fused_moe/router/` drives them.

`vllm/_moe_C_stable_libtorch.abi3.so` of a wheel loads alone: it is built on torch's stable ABI.
Argument names are those of the operators' schemas, as vLLM 0.33.0 registers them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_moe_routing.kernels.routers import (
    RouterCall,
    RouterKernels,
    call_operator,
    load_library,
)
from pytest_moe_routing.models import RouterConfig
from pytest_moe_routing.targets.vllm.operators import flat_recipe, grouped_recipe

if TYPE_CHECKING:
    from torch import Tensor

_LIBRARY = "vllm/_moe_C_stable_libtorch.abi3.so"
#: Operator by scoring function, and its name in `vllm._custom_ops`.
_FLAT = {
    "softmax": ("topk_softmax", "topk_softmax"),
    "sigmoid": ("topk_sigmoid", "topk_sigmoid"),
    "sqrtsoftplus": ("topk_softplus_sqrt", "topk_hash_softplus_sqrt"),
}
#: What `grouped_topk` takes (`fused_moe/router/grouped_topk_router.py`).
_MOST_GROUPS = _MOST_EXPERTS = 32


class VllmKernels(RouterKernels):
    """The operators of one vLLM.

    Args:
        operators: In the place of `torch.ops._moe_C`, for tests.
    """

    name: ClassVar[str] = "vllm"

    def __init__(self, path: Path | None = None, operators: Any = None) -> None:
        super().__init__(path)
        if operators is None:
            import torch

            self._folder = tempfile.TemporaryDirectory()
            load_library(path, "vllm", _LIBRARY, Path(self._folder.name))
            operators = torch.ops._moe_C
        self._operators = operators

    def calls(self, router: RouterConfig) -> Iterator[RouterCall]:
        """Yield `grouped_topk` for groups with a bias, and a flat operator where there are none."""
        if router.topk_before_score and router.scoring_func != "softmax":
            # Llama 4's own function in torch.
            return
        bias = router.correction_bias is not None
        groups, kept = router.n_group, router.topk_group
        if groups is not None and kept is not None and (bias or groups > 1):
            # Without a bias, or with too many groups, vLLM routes in torch.
            if bias and groups <= _MOST_GROUPS and router.top_k <= _MOST_EXPERTS:
                recipe = grouped_recipe(
                    router.top_k,
                    groups,
                    kept,
                    renormalize=router.renormalize,
                    scale=router.routed_scaling_factor,
                    scoring_func=1,
                )
                run = partial(self._grouped, router=router)
                yield RouterCall("grouped_topk", recipe, run, "vllm-grouped")
            return
        operator, name = _FLAT[router.scoring_func]
        # topk_softmax applies no factor: the router does.
        scale = 1.0 if router.scoring_func == "softmax" else router.routed_scaling_factor
        # A softmax over the chosen is the renormalized softmax over all.
        recipe = flat_recipe(
            name, router.top_k, renormalize=router.renormalize, bias=bias, scale=scale
        )
        run = partial(self._flat, operator=operator, router=router, scale=scale)
        yield RouterCall(operator, recipe, run)

    def _flat(
        self,
        logits: Tensor,
        bias: Tensor | None,
        *,
        operator: str,
        router: RouterConfig,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        import torch

        shape, device = (len(logits), router.top_k), logits.device
        # Values that no kernel writes, so that what it leaves out shows.
        weights = torch.full(shape, torch.nan, device=device)
        ids, sources = (torch.full(shape, -7, dtype=torch.int32, device=device) for _ in range(2))
        arguments = {
            "topk_weights": weights,
            "topk_indices": ids,
            "topk_ids": ids,
            "token_expert_indices": sources,
            "gating_output": logits,
            "renormalize": router.renormalize,
            "routed_scaling_factor": scale,
            "correction_bias": bias,
            "bias": bias,
            "e_score_correction_bias": bias,
            "image_sentinel_lo": 0,
        }
        call_operator(getattr(self._operators, operator), arguments)
        return weights, ids

    def _grouped(
        self, logits: Tensor, bias: Tensor | None, *, router: RouterConfig
    ) -> tuple[Tensor, Tensor]:
        arguments = {
            "scores": logits,
            "n_group": router.n_group,
            "num_expert_group": router.n_group,
            "topk_group": router.topk_group,
            "topk": router.top_k,
            "renormalize": router.renormalize,
            "routed_scaling_factor": router.routed_scaling_factor,
            "bias": bias,
            "scoring_func": 1,
        }
        weights, ids = call_operator(self._operators.grouped_topk, arguments)
        return weights, ids
