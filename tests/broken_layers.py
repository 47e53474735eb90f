"""Edits vLLM's factory of layers and its runner one at a time, and prints what is found, as JSON.

`python tests/broken_layers.py ROOT FLASHINFER VERSION`, in a process of its own.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import textwrap
from contextlib import contextmanager
from unittest.mock import patch

from in_process import in_process

from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.judge import judge
from pytest_moe_routing.report.text import sentences
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.vllm.probe import main as child
from pytest_moe_routing.targets.vllm.probe import release
from pytest_moe_routing.targets.vllm.target import VllmTarget

FACTORY, SCALE, FORWARD = "FusedMoEFactory", "_maybe_apply_routed_scale_to_output", "forward"
#: The last occurrence is what the experts get, the first what the router gets.
_TO_EXPERTS = r"(?s)(.*)routed_scaling_factor=routed_scaling_factor\s+if not apply_\w+\s+else 1.0"
_TO_RUNNER = r"routed_scaling_factor=routed_scaling_factor\s+if apply_\w+\s+else 1.0"
_GROUPS = r"(?s)(.*num_expert_group=)num_expert_group(,\s+topk_group=)topk_group"
#: What is broken: the function, what is replaced in it and by what, the model and the scheme.
BROKEN = {
    "nothing": (FACTORY, "MoERunner", "MoERunner", "deepseek-r1", "fp8_block"),
    "factor to both": (
        *(FACTORY, _TO_EXPERTS, r"\1routed_scaling_factor=routed_scaling_factor"),
        *("deepseek-r1", "fp8_block"),
    ),
    "factor to neither": (
        *(FACTORY, _TO_RUNNER, "routed_scaling_factor=1.0"),
        *("deepseek-r1", "fp8_block"),
    ),
    "scaled twice": (
        *(SCALE, r"(fused_output \*= self.routed_scaling_factor)", r"\1; \1"),
        *("deepseek-r1", "nvfp4"),
    ),
    "not scaled for one token": (
        *(SCALE, r"(routed_scaling_factor != 1.0)", r"\1 and len(fused_output) > 4"),
        *("deepseek-r1", "nvfp4"),
    ),
    "not scaled for many tokens": (
        *(SCALE, r"(routed_scaling_factor != 1.0)", r"\1 and len(fused_output) <= 512"),
        *("deepseek-r1", "fp8_block"),
    ),
    "shared twice": (
        *(FORWARD, r"= shared_output \+ fused_output", "= shared_output * 2 + fused_output"),
        *("glm-4.5", "fp8_block"),
    ),
    "shared dropped": (
        *(FORWARD, r"= shared_output \+ fused_output", "= fused_output"),
        *("glm-4.5", "fp8_block"),
    ),
    "reduced twice": (
        *(
            FORWARD,
            r"= shared_output \+ fused_output",
            "= self._twice(shared_output, fused_output)",
        ),
        *("glm-4.5", "fp8_block"),
    ),
    "groups swapped": (FACTORY, _GROUPS, r"\1topk_group\2num_expert_group", "deepseek-r1", "nvfp4"),
    "weight not on input": (
        *(FACTORY, r"(apply_router_weight_on_input=)apply_router_weight_on_input", r"\1False"),
        *("llama-4-scout", "fp8_per_tensor"),
    ),
    "bias dropped": (
        *(FACTORY, r"(?s)(.*e_score_correction_bias=)[^\n]+", r"\1None,"),
        *("deepseek-r1", "nvfp4"),
    ),
    "clamp dropped": (
        *(FACTORY, r"(?s)(.*)swiglu_limit=swiglu_limit", r"\1swiglu_limit=None"),
        *("glm-5.3-flash", "fp8_block"),
    ),
    "clamp hidden": (
        *(FACTORY, r"swiglu_limit=swiglu_limit", "swiglu_limit=None"),
        *("glm-5.3-flash", "fp8_block"),
    ),
    "activation dropped": (
        *(FACTORY, r"activation=moe_activation", "activation=MoEActivation.SILU"),
        *("kimi-k3", "nvfp4"),
    ),
    "default changed": (
        *(FACTORY, 'scoring_func: str = "softmax"', 'scoring_func: str = "sigmoid"'),
        *("mixtral-8x7b", "fp8_block"),
    ),
}


def owner_of(function):
    """What holds a function, as the contract knows it."""
    if function == FACTORY:
        return stubs.real_module(release.names().spelling("layer-factory").module)
    return release.names().get("runner")


@contextmanager
def edited(function, old, new):
    """Run a function of vLLM from an edited source for a while."""
    owner = owner_of(function)
    right = getattr(owner, function)
    text = textwrap.dedent(inspect.getsource(right))
    wrong, count = re.subn(old, new, text, count=1)
    assert count == 1, (function, old)
    names = {}
    exec(compile(wrong, "edited", "exec", dont_inherit=True), right.__globals__, names)
    with patch.object(owner, function, names[function]):
        yield


def _twice(_runner, shared, fused):
    """Add other ranks' output to the shared experts' before the runner does."""
    spelling = release.names().spelling("runner")
    reduce = vars(stubs.real_module(spelling.module))["tensor_model_parallel_all_reduce"]
    return reduce(shared) + fused


def main(root, flashinfer, version):
    models = load_models(packaged_directory())
    target, _ = in_process(VllmTarget, child, root, flashinfer, version)
    owner_of(FORWARD)._twice = _twice
    found = {}
    for name, (function, old, new, model, scheme) in BROKEN.items():
        with edited(function, old, new):
            record = judge(target, models[model], scheme).record()
            modular = list(sentences(target.modular_findings(models[model], scheme)))
        found[name] = [record.verdict, list(sentences(record.findings)), modular]
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
