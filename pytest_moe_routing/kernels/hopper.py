"""FlashInfer's routing kernels on Hopper, without a change to FlashInfer.

The fused kernels need Blackwell, the routing kernels in front of them do not: their sources carry
no architecture gate and compile for sm_90a (FlashInfer 0.7.0 to 0.7.2.post1). Only the build's
filter on compute capability and the front end's device check say no; the one is widened while the
module is built, the other has a documented `skip_check`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from pytest_moe_routing.errors import Unsupported

#: Path of a module built elsewhere, for machines that cannot compile or download.
PREBUILT = "MOE_ROUTING_MODULE"


class _AnyMajor:
    """FlashInfer's compilation context, taking the GPU that is here."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def get_nvcc_flags_list(self, supported_major_versions: Any = None, **kwargs: Any) -> Any:
        majors = [9, *(supported_major_versions or ())]
        return self._context.get_nvcc_flags_list(supported_major_versions=majors, **kwargs)


@contextmanager
def _widened() -> Iterator[None]:
    jit = import_module("flashinfer.jit.fused_moe")
    with patch.object(
        jit, "current_compilation_context", _AnyMajor(jit.current_compilation_context)
    ):
        yield


@cache
def install_routing_module() -> None:
    """Give `flashinfer.fused_moe.trtllm_gen_routing` a module for Hopper, built now or before.

    Building takes some minutes and FlashInfer's own download of headers; FlashInfer caches it.

    Raises:
        Unsupported: It cannot be built here, or the prebuilt module does not load.
    """
    front_end: Any = import_module("flashinfer.fused_moe.trtllm_gen_routing")
    prebuilt = os.environ.get(PREBUILT)
    try:
        if prebuilt:
            module = import_module("tvm_ffi").load_module(prebuilt)
        else:
            with _widened():
                module = front_end.gen_trtllm_gen_routing_module().build_and_load()
    except Exception as error:
        # FlashInfer and its compiler fail in many ways; each means no routing kernel here.
        what = f"loading {prebuilt}" if prebuilt else "building FlashInfer's routing module"
        raise Unsupported(
            f"Hopper: {what} failed: {type(error).__name__}: {error} (the build needs nvcc and "
            f"FlashInfer's header download; {PREBUILT} may name a module built elsewhere)"
        ) from error
    front_end.get_trtllm_gen_routing_module.cache_clear()
    built = SimpleNamespace(build_and_load=lambda: module)
    front_end.gen_trtllm_gen_routing_module = lambda: built
