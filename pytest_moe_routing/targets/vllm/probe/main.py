"""The child of the vLLM target.

It is run by `targets.server` with the arguments ROOT FLASHINFER VERSION, and serves questions
about the vLLM in ROOT, a directory or a wheel, with that release of FlashInfer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.server import serve
from pytest_moe_routing.targets.vllm.hand_overs import hand_overs
from pytest_moe_routing.targets.vllm.probe import accepted_keys as vllm_keys
from pytest_moe_routing.targets.vllm.probe import around as vllm_around
from pytest_moe_routing.targets.vllm.probe import capture as vllm_capture
from pytest_moe_routing.targets.vllm.probe import checkpoints as vllm_checkpoints
from pytest_moe_routing.targets.vllm.probe import choice as vllm_choice
from pytest_moe_routing.targets.vllm.probe import factory as vllm_factory
from pytest_moe_routing.targets.vllm.probe import gates as vllm_gates
from pytest_moe_routing.targets.vllm.probe import layouts as vllm_layouts
from pytest_moe_routing.targets.vllm.probe import modular as vllm_modular
from pytest_moe_routing.targets.vllm.probe import other_experts as vllm_other
from pytest_moe_routing.targets.vllm.probe import placements as vllm_placements
from pytest_moe_routing.targets.vllm.probe import release as release
from pytest_moe_routing.targets.vllm.probe import taken as vllm_taken
from pytest_moe_routing.targets.vllm.probe.rule import rule


def handlers(root: str, flashinfer: str, version: str) -> dict[str, Callable[..., Any]]:
    """Install a vLLM in this process, and return what answers questions about it."""
    release.install(root, FlashInfer.of(flashinfer), version)
    # Importing it takes seconds. Answers must not depend on it: where it is not installed, it is a
    # stub as well, since vLLM requires it.
    stubs.extend(absent=["transformers"])
    return {
        "numbers": release.numbers,
        "classify": vllm_factory.classify,
        "gates": vllm_gates.gates,
        "around": vllm_around.around,
        "choose": vllm_choice.choose,
        "rule": rule,
        "placements": vllm_placements.placements,
        "placement_rule": vllm_placements.placement_rule,
        "taken_experts": vllm_taken.taken_experts,
        "kept_out_by": vllm_taken.kept_out_by,
        "accepted_keys": vllm_keys.accepted_keys,
        "checkpoint": vllm_checkpoints.checkpoint,
        "capture": vllm_capture.capture,
        "capture_modular": vllm_modular.capture_modular,
        "other_experts": vllm_other.other_experts,
        "layouts": vllm_layouts.layouts,
        "other_layouts": vllm_layouts.other_layouts,
        "split_layouts": vllm_layouts.split_layouts,
        "hand_overs": lambda: [asdict(each) for each in hand_overs(root)],
    }


def main() -> None:
    serve(handlers(*sys.argv[1:]), "vllm")
