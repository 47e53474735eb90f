"""Prints which lines of vLLM make quantization configs or call kernels in NVFP4, as JSON.

`python tests/run_hand_overs.py ROOT FLASHINFER VERSION`, in a process of its own.
"""

from __future__ import annotations

import json
import sys

from in_process import in_process

from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.layouts import wrong_layouts
from pytest_moe_routing.targets.vllm.probe import main as child
from pytest_moe_routing.targets.vllm.target import VllmTarget


def main(root, flashinfer, version):
    target, _ = in_process(VllmTarget, child, root, flashinfer, version)
    model = load_models(packaged_directory())["mixtral-8x7b"]
    print(json.dumps(sorted(wrong_layouts(target, "nvfp4", [model]).run)))


if __name__ == "__main__":
    main(*sys.argv[1:])
