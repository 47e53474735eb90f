"""The child that answers questions about the code of vLLM's models.

It is run by `targets.server` with the arguments ROOT FLASHINFER VERSION PLACE; see `blocks`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from pytest_moe_routing.targets.server import serve
from pytest_moe_routing.targets.vllm.probe import blocks
from pytest_moe_routing.targets.vllm.probe.sequence_parallel import split_shared_experts


def main() -> None:
    blocks.install(*sys.argv[1:])
    handlers: dict[str, Callable[..., Any]] = {
        "layer_request": blocks.layer_request,
        "split_shared_experts": split_shared_experts,
    }
    serve(handlers, "vllm")
