"""Compare compiled and Triton routers of vLLM and SGLang with the reference, on a GPU.

    python routers.py GOLDEN NAME@PATH...

NAME is `vllm`, `sglang` (adapters of `pytest_moe_routing.kernels`) or `vllm-triton` (PATH:
fused_moe/router/dsv4_topk.py). Each distinct router of the zoo x 12 logits patterns x 4 token counts
x 2 logits dtypes. Two calls must agree bit by bit; what deviates is printed once for each kernel and
kind, with one token.
"""

from __future__ import annotations

import importlib.util
import platform
import sys
import time
import types
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch

from pytest_moe_routing.compare.routing import compare_routing
from pytest_moe_routing.kernels.routers import RouterCall
from pytest_moe_routing.kernels.sglang import SglangKernels
from pytest_moe_routing.kernels.vllm import VllmKernels
from pytest_moe_routing.logits import PATTERNS, make_case
from pytest_moe_routing.models import load_models
from pytest_moe_routing.routing import Recipe

TOKENS = (1, 7, 64, 515)
DTYPES = (torch.float32, torch.bfloat16)


def module_of(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def stand_in(name, **members):
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        parent = sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(parts[end - 1]))
        parent.__path__ = []
    vars(sys.modules[name]).update(members)


class VllmTriton:
    """vLLM's router of DeepSeek-V4, a Triton kernel."""

    def __init__(self, path):
        import triton
        import triton.language as tl

        cuda = types.SimpleNamespace(is_cuda=lambda: True, is_arch_support_pdl=lambda: False)
        stand_in("vllm.platforms", current_platform=cuda)
        stand_in("vllm.triton_utils", tl=tl, triton=triton)
        self.module = module_of(path, "dsv4_topk")

    def calls(self, router):
        if router.scoring_func == "sqrtsoftplus" and router.top_k == 6 and router.n_group is None:
            scale = router.routed_scaling_factor
            yield RouterCall(
                "dsv4_topk",
                Recipe(6, "sqrtsoftplus", bias=True, normalize="sum", scale=scale),
                lambda logits, bias: self.module.dsv4_topk(
                    logits.float(), bias, torch.int32, scale
                ),
            )


ADAPTERS = {
    "vllm": VllmKernels,
    "sglang": SglangKernels,
    "vllm-triton": VllmTriton,
}


def judged(recipe, precision, pattern, logits, bias, ids, weights):
    """Kind of deviation, and a text."""
    compared = partial(compare_routing, ids, weights, logits, recipe, bias)
    found = compared(precision=precision)
    if found.ok:
        return "ok", ""
    lines = [*found.message().splitlines()[:3], *found.differences[0].lines(), *found.diagnosis]
    text = "\n".join(lines)
    if compared(precision=precision, lower_index=False).ok:
        return "ties go elsewhere than to the lower index", text
    structural = any(
        ("chosen" in d.problem and "instead" not in d.problem) or "is not one of" in d.problem
        for d in found.differences
    )
    if structural:
        return f"duplicate or no expert ({pattern})", text
    if pattern == "not-finite":
        return "other experts for logits that are not finite", text
    if compared(precision="flashinfer-sm90", lower_index=False).ok:
        return "precision: approximate sigmoid or bfloat16 weights", text
    if pattern == "below-minus-100":
        return "all chosen scores underflow", text
    kind = (
        "experts" if any(d.problem.startswith("experts") for d in found.differences) else "weights"
    )
    return f"wrong {kind}", text


def inputs(routers, adapter):
    """A call, its key (kernel, model, pattern, dtype, tokens), logits and bias."""
    for router, models in routers.items():
        for call, pattern in product(adapter.calls(router), PATTERNS):
            case = make_case(
                pattern, call.recipe, num_tokens=max(TOKENS), num_experts=router.num_experts
            )
            for dtype, tokens in product(DTYPES, TOKENS):
                key = (call.kernel, models[0], pattern, str(dtype).removeprefix("torch."), tokens)
                yield call, key, case.logits[:tokens].to(dtype).clone(), case.bias


def run(call, logits, bias):
    """Weights and ids on the CPU."""
    on_gpu = None if bias is None else bias.cuda()
    return [x.cpu() for x in call.run(logits.cuda(), on_gpu)]


def report(name, kinds, first, seconds):
    print(f"\n== {name}: {sum(map(len, kinds.values()))} answers, {seconds:.0f} s")
    for (kernel, kind), keys in sorted(kinds.items()):
        print(f"-- {kernel}: {kind}: {len(keys)}")
        if kind == "ok":
            continue
        for place, label in enumerate(("models", "patterns", "dtypes", "tokens"), 1):
            print(f"   {label}: {dict(Counter(key[place] for key in keys))}")
        print(f"   first: {keys[0]}")
        print("   " + first.get((kernel, kind), "").replace("\n", "\n   "))


def examine(name, adapter, routers, pool):
    start, kinds, first, jobs = time.time(), defaultdict(list), {}, []
    for call, key, logits, bias in inputs(routers, adapter):
        try:
            weights, ids = run(call, logits, bias)
            again = run(call, logits, bias)
        except Exception as error:
            kinds[key[0], f"refused: {type(error).__name__}: {str(error)[:300]}"].append(key)
            continue
        if not torch.equal(again[1], ids) or not torch.equal(
            again[0].nan_to_num(-1), weights.nan_to_num(-1)
        ):
            kinds[key[0], "two calls differ"].append(key)
        # Clones: a tensor is moved to shared memory when it is sent to another process.
        sent = [None if x is None else x.clone() for x in (logits, bias, ids, weights)]
        jobs.append((key, pool.submit(judged, call.recipe, call.precision, key[2], *sent)))
    for key, job in jobs:
        kind, text = job.result()
        kinds[key[0], kind].append(key)
        first.setdefault((key[0], kind), text)
    report(name, kinds, first, time.time() - start)


def main():
    print(
        "torch",
        torch.__version__,
        torch.cuda.get_device_name(),
        "python",
        platform.python_version(),
    )
    routers = {}
    for model in load_models(Path(sys.argv[1])).values():
        if model.router.not_expressible is None:
            routers.setdefault(model.router, []).append(model.id)
    print(len(routers), "distinct routers of", sum(map(len, routers.values())), "models")
    with ProcessPoolExecutor(
        14, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        for argument in sys.argv[2:]:
            name, _, path = argument.partition("@")
            try:
                adapter = ADAPTERS[name](Path(path))
            except Exception as error:
                print(f"== {argument}: not judged: {type(error).__name__}: {error}")
            else:
                examine(f"{name}@{Path(path).name}", adapter, routers, pool)


if __name__ == "__main__":
    main()
