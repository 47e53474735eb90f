"""SGLang's routers on CUDA: compiled ones of `sglang-kernel`, and those that `sglang` builds.

The library is `sgl_kernel/sm90/common_ops.abi3.so` of an `sglang-kernel` wheel, whose operators are
called as `sgl_kernel/moe.py` calls them; it needs the torch that the wheel's description names
(0.4.2 to 0.4.6: 2.11). What `sglang` has itself is in `sglang_jit`.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_moe_routing.kernels.routers import (
    RouterCall,
    RouterKernels,
    call_operator,
    load_library,
)
from pytest_moe_routing.kernels.sglang_jit import (
    MEMBER,
    JitRouters,
    flat_kernel,
    recipe_of_kernel,
)
from pytest_moe_routing.models import RouterConfig

if TYPE_CHECKING:
    from torch import Tensor

_LIBRARY = "sgl_kernel/{folder}/common_ops.abi3.so"


class SglangKernels(RouterKernels):
    """The kernels of one `sglang-kernel` or of one `sglang`, whichever the path leads to.

    Args:
        operators: In the place of `torch.ops.sgl_kernel`, for tests.
    """

    name: ClassVar[str] = "sglang"

    def __init__(self, path: Path | None = None, operators: Any = None) -> None:
        super().__init__(path)
        self._folder = tempfile.TemporaryDirectory()
        self._built: JitRouters | None = None
        if operators is None:
            import torch

            folder = Path(self._folder.name)
            if (place := place_of_sources(path)) is not None:
                self._built = JitRouters(place, folder)
                return
            sm = "sm100" if torch.cuda.get_device_capability()[0] >= 10 else "sm90"
            load_library(path, "sglang-kernel", _LIBRARY.format(folder=sm), folder)
            operators = torch.ops.sgl_kernel
        self._operators = operators

    def calls(self, router: RouterConfig) -> Iterator[RouterCall]:
        """Yield the kernels that score and choose; where there is none, SGLang routes in torch."""
        if self._built is not None:
            yield from self._built.calls(router)
            return
        operator = flat_kernel(router)
        if operator is None:
            return
        recipe = recipe_of_kernel(router)
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


def place_of_sources(path: Path | None) -> Path | None:
    """Return the wheel or directory that has the sources of kernels; None for a library's."""
    if path is None:
        try:
            path = Path(str(metadata.distribution("sglang").locate_file("")))
        except metadata.PackageNotFoundError:
            return None
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return path if MEMBER in wheel.namelist() else None
    return next((p for p in (path, path / "python") if (p / MEMBER).is_file()), None)
