"""The child of the vLLM target.

It is run by `targets.server` with the arguments ROOT FLASHINFER, and serves questions about the
vLLM in ROOT, a directory or a wheel, beside that release of FlashInfer.
"""

from __future__ import annotations

import sys

from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.targets.server import serve
from pytest_moe_routing.targets.vllm.probe import capture as vllm_capture
from pytest_moe_routing.targets.vllm.probe import gates as vllm_gates
from pytest_moe_routing.targets.vllm.probe import release as release


def main() -> None:
    root, flashinfer = sys.argv[1:]
    release.install(root, FlashInfer.of(flashinfer))
    serve(
        {
            "numbers": release.numbers,
            "classify": release.classify,
            "gates": vllm_gates.gates,
            "capture": vllm_capture.capture,
            "capture_modular": vllm_capture.capture_modular,
        }
    )
