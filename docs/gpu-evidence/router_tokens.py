"""Print two tokens that were computed by hand, as SGLang's kernels route them: findings 14.

python router_tokens.py SGLANG_WHEEL
"""

import sys
from pathlib import Path

import torch

from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.kernels.sglang import SglangKernels
from pytest_moe_routing.models import load_models

models = load_models(packaged_directory())
kernels = SglangKernels(Path(sys.argv[1]))


def call(model, kernel):
    return next(c for c in kernels.calls(models[model].router) if c.kernel == kernel)


print("torch", torch.__version__, torch.cuda.get_device_name())
for run in (1, 2):
    bias = -2 - torch.arange(288, device="cuda") / 1024
    weights, ids = call("step-3.5-flash", "moe_topk_sigmoid").run(
        torch.zeros(1, 288, device="cuda"), bias
    )
    print(
        f"run {run}: moe_topk_sigmoid, 288 experts, logits 0, bias -2 - e/1024:",
        ids.tolist(),
        weights.tolist(),
    )
    # Group 0 has experts 0 and 1 with logits 8, groups 1 to 4 two experts each with 1 and 0.
    logits = torch.full((1, 256), -8.0, device="cuda")
    logits[0, :2] = 8.0
    for expert in (32, 64, 96, 128):
        logits[0, expert], logits[0, expert + 1] = 1.0, 0.0
    weights, ids = call("deepseek-r1", "biased_grouped_topk_gpu").run(
        logits, torch.zeros(256, device="cuda")
    )
    print(
        f"run {run}: biased_grouped_topk_gpu, experts 0 and 1 tie at 8 in group 0:",
        sorted(ids[0].tolist()),
        weights.tolist(),
    )
