"""Moves experts of vLLM elsewhere, one way at a time, and prints what is found, as JSON.

`python tests/broken_places.py ROOT FLASHINFER VERSION`, in a process of its own.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

from in_process import in_process

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.judge import judge
from pytest_moe_routing.oracle.moved import moved_placements
from pytest_moe_routing.oracle.other_experts import other_calls
from pytest_moe_routing.report.text import sentences
from pytest_moe_routing.suite.causes import of_other_experts
from pytest_moe_routing.suite.placements import of_moved
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.source import Source
from pytest_moe_routing.targets.vllm.probe import main as child
from pytest_moe_routing.targets.vllm.probe import (
    other_experts,
    placements,
    release,
    server_defaults,
)
from pytest_moe_routing.targets.vllm.target import VllmTarget

MODELS = load_models(packaged_directory())


def alone_only(moe_parallel_config):
    return not moe_parallel_config.use_all2all_kernels and not moe_parallel_config.enable_eplb


def gathered(moe_parallel_config):
    config = moe_parallel_config
    gathers = config.use_ag_rs_all2all_kernels and not config.is_sequence_parallel
    return not config.enable_eplb and (gathers or not config.use_all2all_kernels)


def nowhere(moe_parallel_config):
    return False


def anything(*_):
    return True


def gated(activation):
    return activation.is_gated


def on_blackwell_and_hopper():
    return True


@contextmanager
def replaced(key, name, function):
    """Replace a gate of the class that a row of the contract names, wherever it is defined."""
    cls = release.names().get(key)
    [owner] = [base for base in cls.__mro__ if name in vars(base)][:1]
    with patch.object(owner, name, staticmethod(function)):
        yield


def tritons_first():
    """Have the selector prefer other experts."""
    module = stubs.real_module(release.names().spelling("select-unquantized").module)
    right = module._get_priority_backends
    return patch.object(module, "_get_priority_backends", lambda config: right(config)[::-1])


BACKENDS = placements._all2all_backends


def one_less():
    return (name for name in BACKENDS() if name != "deepep_high_throughput")


def by_default(name, value):
    """Have a server's parallel config have another default for a while."""
    usual = server_defaults.parallel
    return patch.object(server_defaults, "parallel", lambda n: value if n == name else usual(n))


#: What is changed, and the scheme that is asked about.
MOVED = {
    "as it is": (ExitStack, "bf16"),
    "no gathered tokens": (
        lambda: replaced("experts-bf16", "_supports_parallel_config", alone_only),
        "bf16",
    ),
    "gathered tokens": (
        lambda: replaced("experts-nvfp4", "_supports_parallel_config", gathered),
        "nvfp4",
    ),
    "any placement": (
        lambda: replaced("experts-nvfp4", "_supports_parallel_config", anything),
        "nvfp4",
    ),
    "any GPU": (
        lambda: replaced("experts-nvfp4", "_supports_current_device", on_blackwell_and_hopper),
        "nvfp4",
    ),
    "no modular experts": (
        lambda: replaced("modular-fp8", "_supports_parallel_config", nowhere),
        "fp8_block",
    ),
    "no CuTe DSL": (
        lambda: replaced("modular-cutedsl", "_supports_parallel_config", nowhere),
        "nvfp4",
    ),
    "no CUTLASS on Hopper": (
        lambda: replaced("modular-flashinfer-cutlass", "_supports_parallel_config", alone_only),
        "fp8_block",
    ),
    "gated experts alone": (
        lambda: replaced("modular-flashinfer-cutlass", "_supports_activation", gated),
        "fp8_per_tensor",
    ),
    "other experts first": (tritons_first, "bf16"),
    "a backend gone": (
        lambda: patch.object(placements, "_all2all_backends", one_less),
        "nvfp4",
    ),
    "another way to gather": (
        lambda: by_default(server_defaults.ALL2ALL, "deepep_low_latency"),
        "nvfp4",
    ),
}


def moved(target, scheme):
    placements.all_placements.cache_clear()
    # The last one has experts without gates.
    models = ["qwen3-30b-a3b", "deepseek-r1", "nemotron-3-nano"]
    found = moved_placements(target, scheme, [MODELS[name] for name in models])
    told = [of_moved(target, scheme, each) for each in found.moved]
    placements.all_placements.cache_clear()
    failures = [[failure.cause, failure.rank.name, *failure.lines] for failure in told]
    return {"failures": failures, "answered": found.answered, "open": dict(found.unanswered)}


def refused(target):
    """What is found where CUTLASS experts take blocks of FP8 on any GPU."""
    other_experts.kinds_of.cache_clear()
    with replaced("modular-flashinfer-cutlass", "_supports_quant_scheme", anything):
        found = other_calls(target, "fp8_block", [MODELS["qwen3-30b-a3b"]])
    other_experts.kinds_of.cache_clear()
    told = [of_other_experts(target, "fp8_block", each) for each in found.wrong]
    return [[failure.cause, *failure.lines] for failure in told]


def placed(target):
    """What is found where a server places experts in turns unless it is told otherwise."""
    with by_default(server_defaults.PLACEMENT, "round_robin"):
        for name in ("deepseek-r1", "qwen3-30b-a3b"):
            try:
                record = judge(target, MODELS[name], "nvfp4").record()
            except Unsupported as reason:
                yield name, ["not judged", str(reason)]
            else:
                yield name, [record.verdict, *sentences(record.findings)]


def main(root, flashinfer, version):
    target, _ = in_process(VllmTarget, child, root, flashinfer, version)
    found = {}
    for name, (change, scheme) in MOVED.items():
        with change():
            found[name] = moved(target, scheme)
    # A release that is newer than all known ones.
    target.source = Source(Path(root), "99.0.0", flashinfer)
    for name in ("gathered tokens", "any placement", "any GPU"):
        change, scheme = MOVED[name]
        with change():
            found[f"{name}, newer"] = moved(target, scheme)
    target.source = Source(Path(root), version, flashinfer)
    found["refused"] = refused(target)
    found["in turns"] = dict(placed(target))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
