"""The child of the vLLM target: `python -m pytest_moe_routing.targets.probes.vllm ROOT FLASHINFER`.

Serves questions about the vLLM in ROOT, a directory or a wheel, beside that release of FlashInfer.
"""

from __future__ import annotations

import sys

from pytest_moe_routing.backends import FlashInfer
from pytest_moe_routing.targets.probes import vllm_capture, vllm_gates
from pytest_moe_routing.targets.probes import vllm_release as release
from pytest_moe_routing.targets.probes.server import serve


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


if __name__ == "__main__":
    main()
