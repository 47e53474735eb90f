"""Has experts of vLLM accept other quantization keys, and prints what is found, as JSON.

`python tests/broken_keys.py ROOT FLASHINFER VERSION`, in a process of its own.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path

from broken_places import anything, replaced
from in_process import in_process

from pytest_moe_routing.oracle.changed_keys import changed_keys
from pytest_moe_routing.suite.accepted_keys import of_changed_keys
from pytest_moe_routing.targets.source import Source
from pytest_moe_routing.targets.vllm.probe import main as child
from pytest_moe_routing.targets.vllm.probe import release
from pytest_moe_routing.targets.vllm.target import VllmTarget


def weight_only(weight_key, activation_key):
    """Accept all that vLLM 0.33.0 does, and activations that are not quantized."""
    names = release.names()
    keys = sys.modules[names.get("quant-key").__module__]
    known = (None, keys.kNvfp4Dynamic, getattr(keys, "kNvfp4DynamicToken", None))
    return weight_key == keys.kNvfp4Static and activation_key in known


def per_tensor(weight_key, activation_key):
    keys = sys.modules[release.names().get("quant-key").__module__]
    right = (keys.kFp8StaticTensorSym,) * 2, (keys.kMxfp8Static, keys.kMxfp8Dynamic)
    return (weight_key, activation_key) in right


def gate(key, function):
    return replaced(key, "_supports_quant_scheme", function)


CHANGES = {
    "as it is": ExitStack,
    # The gate of the experts that are given ids and weights is the same.
    "weights alone": lambda: gate("experts-nvfp4", weight_only),
    "no blocks of FP8": lambda: gate("experts-fp8", per_tensor),
    "anything": lambda: gate("batched-cutedsl", anything),
}


def changed(target):
    found = changed_keys(target)
    told = [of_changed_keys(target, each) for each in found.changed]
    failures = [[failure.cause, *failure.lines] for failure in told]
    return {"failures": failures, "answered": found.answered, "open": dict(found.unanswered)}


def main(root, flashinfer, version):
    target, _ = in_process(VllmTarget, child, root, flashinfer, version)
    found = {}
    for name, change in CHANGES.items():
        with change():
            found[name] = changed(target)
    # A release that is newer than all known ones.
    target.source = Source(Path(root), "99.0.0", flashinfer)
    with CHANGES["weights alone"]():
        found["weights alone, newer"] = changed(target)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
