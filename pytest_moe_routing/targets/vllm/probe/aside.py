"""Another child of the vLLM target, which answers the same questions as the first one.

The first is asked for kernel calls, of which there are many. See `main`.
"""

from __future__ import annotations

from pytest_moe_routing.targets.vllm.probe.main import main

__all__ = ["main"]
