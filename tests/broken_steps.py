"""Breaks steps of vLLM around its experts one at a time, and prints what is found, as JSON.

`python tests/broken_steps.py ROOT FLASHINFER VERSION`, in a process of its own.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
from contextlib import contextmanager
from unittest.mock import patch

import torch
from broken_kernels import elsewhere, other_kernels
from in_process import in_process

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.judge import judge
from pytest_moe_routing.report.text import sentences
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.vllm.probe import main as child
from pytest_moe_routing.targets.vllm.probe import release, server_defaults
from pytest_moe_routing.targets.vllm.target import VllmTarget


def square(given):
    given["topk_weights"] = given["topk_weights"] ** 2


def scale(given):
    given["topk_weights"] = given["topk_weights"] * 2.0


def swap_slots(given):
    given["topk_ids"] = given["topk_ids"].flip(1)


def widen_weights(given):
    given["topk_weights"] = given["topk_weights"].double()


def halve_scales(given):
    given["a1q_scale"] = given["a1q_scale"][:, ::2].contiguous()


def double_input(given):
    given["a1"] = given["a1"] * 2


def mix_tokens(given):
    given["a1"] = given["a1"].flip(0)


def drop_output(given):
    given["fused_expert_output"].zero_()


def halve_output(given):
    given["fused_expert_output"].mul_(0.5)


def move_shard(given):
    given["self"].ep_rank = 0


#: What is broken: the row of the contract for the class, its method, how, the model and the scheme.
BROKEN = {
    "nothing": ("modular-nvfp4", "apply", lambda given: None, "deepseek-r1", "nvfp4"),
    "llama-4-scout nvfp4": ("modular-nvfp4", "apply", lambda given: None, "llama-4-scout", "nvfp4"),
    "llama-4-scout fp8_block": (
        *("modular-fp8", "apply", lambda given: None),
        *("llama-4-scout", "fp8_block"),
    ),
    "weights squared": ("modular-fp8", "apply", square, "deepseek-r1", "fp8_block"),
    "scaled again": ("modular-nvfp4", "apply", scale, "minimax-m3", "nvfp4"),
    "slots swapped": ("modular-fp8", "apply", swap_slots, "deepseek-r1", "fp8_block"),
    "weights in float64": ("modular-mxfp4", "apply", widen_weights, "gpt-oss-20b", "mxfp4"),
    "half of the scales": ("modular-nvfp4", "apply", halve_scales, "deepseek-r1", "nvfp4"),
    "shard of another rank": ("modular-fp8", "apply", move_shard, "deepseek-r1", "fp8_block"),
    "input doubled": ("PREPARE", "prepare", double_input, "deepseek-r1", "nvfp4"),
    "tokens mixed": ("PREPARE", "prepare", mix_tokens, "deepseek-r1", "fp8_block"),
    "output dropped": ("PREPARE", "finalize", drop_output, "deepseek-r1", "fp8_block"),
    "output halved": ("PREPARE", "finalize", halve_output, "deepseek-r1", "fp8_block"),
}


@contextmanager
def broken(cls, method, how):
    """Change the arguments of a method, whether they are given by name or by position."""
    right = getattr(cls, method)
    signature = inspect.signature(right)

    def wrong(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        how(bound.arguments)
        return right(*bound.args, **bound.kwargs)

    wrong.__wrapped__ = right
    wrong.__qualname__ = right.__qualname__
    with patch.object(cls, method, wrong):
        yield


#: Models and schemes whose experts are chosen, and whether the modular ones are asked for.
CHOSEN = (
    ("deepseek-r1", "nvfp4", False),
    ("kimi-k2.5", "mxint4", False),
    ("olmoe-1b-7b", "nvfp4", False),
    ("olmoe-1b-7b", "nvfp4", True),
    ("llama-4-scout", "nvfp4", True),
    ("llama-4-scout", "fp8_block", True),
    ("deepseek-r1", "fp8_block", True),
)


def choices(target, models):
    for model, scheme, modular in CHOSEN:
        method = target.classify(models[model]).method
        choice = target.choice(models[model], scheme, method, modular=modular)
        yield f"{model} {scheme}{' modular' * modular}", [choice.switches, choice.instead]
    with patch.object(server_defaults, "moe_backend", lambda: "triton"):
        choice = target.choice(models["deepseek-r1"], "fp8_block", "DeepSeekV3")
        rule = target.rule(models["deepseek-r1"], "fp8_block", "DeepSeekV3", "")
        yield "deepseek-r1 fp8_block by Triton", [choice.switches, choice.instead]
        yield "rule by Triton", rule.instead


def contradictions(target, models):
    """A selector that forgets the experts, and one that does not ask their gates."""
    modular = release.names().get("modular-nvfp4")
    selector = stubs.real_module(release.names().spelling("select-nvfp4").module)
    with patch.object(selector, "backend_to_kernel_cls", lambda backend: [modular]):
        yield "forgotten", judge(target, models["deepseek-r1"], "nvfp4").record()
    monolithic = release.names().get("experts-nvfp4")
    with patch.object(monolithic, "is_supported_config", staticmethod(lambda *_: (True, None))):
        yield "not asked", judge(target, models["olmoe-1b-7b"], "nvfp4").record()


def drop_replay(given):
    given["routing_replay_out"] = None


def raise_in_forward(given):
    raise ValueError("no such shape")


def fail_to_bind(model, capturer):
    return {}["runner"]


def requests(target, models):
    """What becomes of requests besides routing, as vLLM is and with each broken."""

    def asked():
        try:
            found = target.around(models["deepseek-r1"], "nvfp4", "DeepSeekV3")
        except Unsupported as reason:
            return str(reason)
        return {name: [response.answer, response.why] for name, response in found.items()}

    experts = release.names().get("experts-nvfp4")
    placement = release.names().spelling("placement")
    yield "as it is", asked()
    with broken(experts, "apply", drop_replay):
        yield "capture dropped", asked()
    with patch.object(experts, "supports_routing_replay_capture", lambda _: False):
        yield "no capture", asked()
    with broken(experts, "apply", raise_in_forward):
        yield "forward pass raises", asked()
    bind = release.names().spelling("bind-capturer")
    with patch.object(stubs.real_module(bind.module), bind.path, fail_to_bind):
        yield "start fails", asked()
    with patch.object(experts, "_supports_parallel_config", staticmethod(lambda _: True)):
        yield "any parallel config", asked()
    module = stubs.real_module(placement.module)
    with patch.object(module, placement.path, lambda **_: "linear"):
        yield "always linear", asked()


def by_device(function, *, answer):
    """Return a function that answers so on compute capability 10.3 alone."""
    platform = release.names().get("current-platform")

    @functools.wraps(function)
    def changed(*args, **kwargs):
        if platform.get_device_capability() == (10, 3):
            return answer
        return function(*args, **kwargs)

    return changed


def devices(target, models):
    """What becomes of another device, as vLLM is and where gates or a selector look at it."""
    names = release.names()
    platform = names.get("current-platform")

    def asked():
        found = target.around(models["deepseek-r1"], "nvfp4", "DeepSeekV3")
        response = found["compute capability 10.3"]
        return [response.answer, response.why, response.source]

    experts, modular = names.get("experts-nvfp4"), names.get("modular-nvfp4")
    spelling = names.spelling("select-nvfp4")
    selector = stubs.real_module(spelling.module)
    right = getattr(selector, spelling.path)
    [base] = [cls for cls in experts.__mro__ if "_supports_current_device" in vars(cls)][:1]
    yield "as it is", asked()

    def one_device():
        return platform.is_cuda() and platform.is_device_capability(100)

    with patch.object(base, "_supports_current_device", staticmethod(one_device)):
        yield "one device", asked()
    one_shape = by_device(modular._supports_activation, answer=False)
    with patch.object(modular, "_supports_activation", staticmethod(one_shape)):
        yield "modular experts", asked()
    with patch.object(selector, spelling.path, by_device(right, answer=("backend", modular))):
        yield "selector", asked()


def weigh_nothing(given):
    given["topk_weights"] = torch.ones_like(given["topk_weights"])


def weights_on_input(target, models):
    """How often CUTLASS experts weigh the input of Llama 4, as they are and when they do not."""

    def asked():
        found = target.around(models["llama-4-scout"], "nvfp4", "Llama4")
        response = found["router weight already on the input"]
        return [response.answer, response.why, response.switches]

    yield "as they are", asked()
    with broken(release.names().get("modular-cutlass-nvfp4"), "apply", weigh_nothing):
        yield "right", asked()


def main(root, flashinfer, version):
    models = load_models(packaged_directory())
    target, _ = in_process(VllmTarget, child, root, flashinfer, version)
    factory = release.names().spelling("prepare-factory").module.rpartition(".")[0]
    steps = stubs.real_module(f"{factory}.prepare_finalize.no_dp_ep")
    found = {}
    for name, (row, method, how, model, scheme) in BROKEN.items():
        is_step = row == "PREPARE"
        cls = steps.MoEPrepareAndFinalizeNoDPEPModular if is_step else release.names().get(row)
        with broken(cls, method, how):
            found[name] = list(sentences(target.modular_findings(models[model], scheme)))
    found["requests"] = dict(requests(target, models))
    found["devices"] = dict(devices(target, models))
    found["weights on the input"] = dict(weights_on_input(target, models))
    found["other kernels"] = dict(other_kernels(target, models))
    found["elsewhere"] = dict(elsewhere(target, models))
    found["choices"] = dict(choices(target, models))
    for name, record in contradictions(target, models):
        found[name] = [record.verdict, record.rejected_by, list(sentences(record.findings))]
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
