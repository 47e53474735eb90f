"""SGLang's compiled routers, `torch.ops.sgl_kernel`, as `sgl_kernel/moe.py` calls them.

The library is `sgl_kernel/sm90/common_ops.abi3.so` of an `sglang-kernel` wheel; it needs the torch
that the wheel's description names (0.4.2 to 0.4.6: 2.11).
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
from pytest_moe_routing.routing import Recipe

if TYPE_CHECKING:
    from torch import Tensor

_LIBRARY = "sgl_kernel/{folder}/common_ops.abi3.so"
_FLAT = {"softmax": "topk_softmax", "sigmoid": "topk_sigmoid"}


class SglangKernels(RouterKernels):
    """The operators of one sglang-kernel.

    Args:
        operators: In the place of `torch.ops.sgl_kernel`, for tests.
    """

    name: ClassVar[str] = "sglang"

    def __init__(self, path: Path | None = None, operators: Any = None) -> None:
        super().__init__(path)
        if operators is None:
            import torch

            folder = "sm100" if torch.cuda.get_device_capability()[0] >= 10 else "sm90"
            self._folder = tempfile.TemporaryDirectory()
            member = _LIBRARY.format(folder=folder)
            load_library(path, "sglang-kernel", member, Path(self._folder.name))
            operators = torch.ops.sgl_kernel
        self._operators = operators

    def calls(self, router: RouterConfig) -> Iterator[RouterCall]:
        """Yield the operator that scores and chooses among all experts; others are not compiled."""
        if router.topk_before_score and router.scoring_func != "softmax":
            # Llama 4's own function in torch.
            return
        operator = _FLAT.get(router.scoring_func)
        bias = router.correction_bias is not None
        grouped = router.n_group is not None and (bias or router.n_group > 1)
        # SGLang passes no bias to topk_softmax, which would add it to the logits.
        if operator is None or grouped or (bias and operator == "topk_softmax"):
            return
        recipe = Recipe(
            top_k=router.top_k,
            score=router.scoring_func,
            bias=bias,
            normalize="sum" if router.renormalize else "none",
        )
        yield RouterCall(operator, recipe, partial(self._flat, operator=operator, router=router))

    def _flat(
        self, logits: Tensor, bias: Tensor | None, *, operator: str, router: RouterConfig
    ) -> tuple[Tensor, Tensor]:
        import torch

        shape, device = (len(logits), router.top_k), logits.device
        weights = torch.full(shape, torch.nan, device=device)
        ids = torch.full(shape, -7, dtype=torch.int32, device=device)
        arguments = {
            "topk_weights": weights,
            "topk_indices": ids,
            "topk_ids": ids,
            "gating_output": logits,
            "renormalize": router.renormalize,
            "moe_softcapping": 0.0,
            "correction_bias": bias,
        }
        call_operator(getattr(self._operators, operator), arguments)
        return weights, ids
