"""Edits what vLLM does around an exchange of tokens over NVLink, and prints what is found, as JSON.

`python tests/broken_exchanges.py ROOT FLASHINFER VERSION`, in a process of its own.
"""

from __future__ import annotations

import json
import sys

from edited import edited
from in_process import in_process

from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.other_experts import other_calls
from pytest_moe_routing.report.text import sentences
from pytest_moe_routing.targets.vllm.probe import main as child
from pytest_moe_routing.targets.vllm.target import VllmTarget

MOE = "vllm.model_executor.layers.fused_moe"
BF16 = f"{MOE}.experts.trtllm_bf16_moe", "TrtLlmBf16ExpertsModular.apply"
STEPS = f"{MOE}.prepare_finalize.flashinfer_nvlink"
ONE_SIDED = f"{STEPS}_one_sided", "FlashInferNVLinkOneSidedPrepareAndFinalize"
PREPARE = ONE_SIDED[0], f"{ONE_SIDED[1]}.prepare"
DISPATCH = f"{STEPS}_two_sided", "flashinfer_alltoall_dispatch"
#: What is broken: the function, what is replaced in it and by what, and the scheme.
BROKEN = {
    "nothing in bf16": (*BF16, "do_finalize", "do_finalize", "bf16"),
    "nothing in nvfp4": (*BF16, "do_finalize", "do_finalize", "nvfp4"),
    "nothing in mxfp8": (*BF16, "do_finalize", "do_finalize", "mxfp8"),
    "first expert": (
        *(*BF16, r"local_expert_offset=self\.ep_rank \* self\.local_num_experts"),
        *("local_expert_offset=0", "bf16"),
    ),
    "weights of experts": (*BF16, r"\(topk_ids, topk_weights\)", "(topk_ids, topk_weights**2)", "bf16"),
    "output": (*BF16, r"output\.copy_\((.*)\)", r"output.copy_((\1) * 2)", "bf16"),
    "weights of the rank's own tokens": (
        *(*PREPARE, r"received\.topk_weights", "topk_weights", "nvfp4"),
    ),
    "ids": (*PREPARE, r"received\.topk_ids,", "received.topk_ids.flip(1),", "nvfp4"),
    "scales of the rank's own tokens": (
        *(*PREPARE, "recv_x_sf = received.hidden_states_scale", "recv_x_sf = dispatch_x_sf"),
        "mxfp8",
    ),
    "scales in tiles before they are sent": (
        *(*PREPARE, "is_scale_swizzled=False", "is_scale_swizzled=True", "nvfp4"),
    ),
    "what comes back": (
        *(ONE_SIDED[0], f"{ONE_SIDED[1]}.finalize", r"(?s)fused_expert_output,(\s+output=)"),
        *(r"fused_expert_output * 2,\1", "nvfp4"),
    ),
    "scales that two sides do not send": (*DISPATCH, "if x_sf is not None:", "if False:", "nvfp4"),
    "dtype of weights of two sides": (
        *(*DISPATCH, r"topk_weights\.view\(dtype=orig_topk_weights_dtype\)"),
        *("topk_weights.half()", "nvfp4"),
    ),
}  # fmt: skip


def main(root, flashinfer, version):
    target, handlers = in_process(VllmTarget, child, root, flashinfer, version)
    handlers["numbers"]()
    model = load_models(packaged_directory())["mixtral-8x7b"]
    found = {}
    for name, (module, path, old, new, scheme) in BROKEN.items():
        with edited(module, path, old, new):
            calls = other_calls(target, scheme, [model])
        told = [[each.call.experts, *sentences(each.findings)] for each in calls.wrong]
        found[name] = [calls.answered, *told]
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
