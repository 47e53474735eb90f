"""Run FlashInfer's fused launcher on Hopper, as far as it goes.

    python staged.py LAUNCHER.so GOLDEN

LAUNCHER.so is flashinfer-python 0.7.2.post1's `fused_moe_trtllm_sm100` built for sm_90a by
`build.sh`: the release's own sources, with the export headers and the manifest of
flashinfer-cubin 0.6.13, the newest on PyPI. Its only change is at link time: the launcher's question
for the compute capability is answered 10.0 if `MOE_PRETEND_SM100` is set, which this script does
after it has shown the answer without.

1. `trtllm_moe_run_routing` (the launcher's checks, its routing kernels, its buffers): experts,
   weights and permutation of every distinct router of the zoo, against the reference, as the suite
   compares the routing operator; and calls that the launcher must reject.
2. `trtllm_moe_run_finalize` on the permutation that 1 returns.
3. `trtllm_moe_run_deepseek_fp8_activation`.
4. Each whole entry point: where it stops.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
import tvm_ffi

from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.kernels.library import Kernels
from pytest_moe_routing.models import load_models
from pytest_moe_routing.reference.quantization import dequantize, quantize
from pytest_moe_routing.routing.methods import RoutingMethodType
from pytest_moe_routing.suite import gpu as suite_gpu
from pytest_moe_routing.suite.fused import Fused
from pytest_moe_routing.suite.test_gpu_moe import small_call
from pytest_moe_routing.suite.test_gpu_routing import Routed

RELEASE = "0.7.2.post1"
HIDDEN, INNER, TILE = 256, 128, 8
PATTERNS = ("plain", "all-negative", "ties-at-k", "near-ties", "hot-expert", "not-finite")
TOKENS = (1, 17, 257, 1025)

flashinfer = FlashInfer.of(RELEASE)
launcher = tvm_ffi.load_module(sys.argv[1])


def tensor(x):
    return None if x is None else torch.from_dlpack(x)


def run_routing(
    logits,
    bias,
    top_k,
    number,
    *,
    groups=(None, None),
    scale=1.0,
    shard=None,
    tile=TILE,
    hidden=None,
    **changes,
):
    """`trtllm_moe_run_routing`, poisoned: the nine arrays it returns."""
    tokens, experts = logits.shape
    hidden = (
        torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16, device="cuda")
        if hidden is None
        else hidden
    )
    none = torch.empty(0, dtype=torch.int32, device="cuda")
    offset, local = shard or (0, experts)
    given = {
        "routing_logits": logits,
        "routing_bias": bias,
        "expert_indices": none,
        "expert_weights": none.bfloat16(),
        "hidden_states": hidden,
        "gemm1_weights": None,
        "gemm2_weights": None,
        "num_experts": experts,
        "top_k": top_k,
        "n_group": groups[0],
        "topk_group": groups[1],
        "intermediate_size": INNER,
        "local_expert_offset": offset,
        "local_num_experts": local,
        "routed_scaling_factor": scale,
        "routing_method_type": number,
        "use_shuffled_weight": True,
        "weight_layout": 0,
        "enable_pdl": False,
        "moe_tactic": [tile, 0],
        "activation_type": 3,
        "norm_topk_prob": True,
        "routing_replay_out": None,
    }
    given |= changes
    found = launcher.trtllm_moe_run_routing(*given.values())
    return [tensor(x) for x in found]


class Staged:
    """Stands in the place of `flashinfer.fused_moe`: the routing operator by the launcher's stage."""

    RoutingMethodType = RoutingMethodType
    last = None

    @classmethod
    def trtllm_gen_routing(
        cls,
        routing_logits,
        routing_bias,
        top_k,
        n_group,
        topk_group,
        local_expert_offset,
        local_num_experts,
        routed_scaling_factor,
        tile_tokens_dim,
        routing_method,
        skip_check=True,
    ):
        replay = torch.full((len(routing_logits), top_k), -1, dtype=torch.int16, device="cuda")
        found = run_routing(
            routing_logits,
            routing_bias,
            top_k,
            flashinfer.number(routing_method.name),
            groups=(n_group or None, topk_group or None),
            scale=routed_scaling_factor,
            shard=(local_expert_offset, local_num_experts),
            tile=tile_tokens_dim,
            routing_replay_out=replay,
        )
        weights, rows, tokens, owners, _, _, padded = found[:7]
        rows = rows.view(len(routing_logits), top_k)
        cls.last = found
        return SimpleNamespace(
            topk_ids=replay.to(torch.int32),
            topk_weights=weights,
            total_num_padded_tokens=padded,
            cta_idx_xy_to_batch_idx=owners,
            expanded_idx_to_permuted_idx=rows,
            permuted_idx_to_token_idx=tokens,
        )


def kernels():
    return Kernels("launcher", Staged, lambda on: None, precision="flashinfer-sm90")


def routers(golden):
    """1. Every distinct router, as the suite's `test_model` compares it."""
    import pytest

    seen, counts, wrong = set(), Counter(), []
    for model in load_models(Path(golden)).values():
        if model.router in seen:
            continue
        seen.add(model.router)
        for pattern in PATTERNS:
            for logits_dtype in ("float32", "bfloat16"):
                try:
                    call = suite_gpu.call_of(model, flashinfer, logits_dtype)
                    routed = Routed(kernels(), call, flashinfer, pattern, max(TOKENS))
                except pytest.skip.Exception as reason:
                    counts[f"skipped: {str(reason)[:90]}"] += 1
                    continue
                for tokens in TOKENS:
                    try:
                        routed.check(tokens)
                        counts["right"] += 1
                    except (pytest.fail.Exception, Exception) as error:
                        counts["wrong"] += 1
                        wrong.append(
                            f"{model.id} {pattern} {logits_dtype} tokens={tokens}: {str(error)[:400]}"
                        )
                        break
    print("1. trtllm_moe_run_routing:", dict(counts))
    for line in wrong[:6]:
        print("  ", line)
    return not wrong


REJECTED = {
    "hidden states of float16": {"hidden": torch.zeros(5, HIDDEN, dtype=torch.float16)},
    "hidden states of another length": {"hidden": torch.zeros(4, HIDDEN, dtype=torch.bfloat16)},
    "an intermediate size of 192": {"intermediate_size": 192},
    "a weight layout of 3": {"weight_layout": 3},
    "top_k 0": {"top_k": 0},
    "top_k 17 of 16": {"top_k": 17},
    "experts beyond the last": {"shard": (8, 16)},
    "a replay of float32": {"routing_replay_out": torch.zeros(5, 4)},
    "a replay of int32": {"routing_replay_out": torch.zeros(5, 4, dtype=torch.int32)},
    "an activation of 99": {"activation_type": 99},
    "a tactic of one number": {"moe_tactic": [8]},
    "logits of int32": {"logits": torch.zeros(5, 16, dtype=torch.int32)},
    "logits of float16": {"logits": torch.zeros(5, 16, dtype=torch.float16)},
    "a bias of another length": {"bias": torch.zeros(8, dtype=torch.bfloat16)},
}


def rejections():
    """Calls that the launcher's checks must reject, with its words."""
    print("launcher's checks:")
    accepted = []
    for name, changes in REJECTED.items():
        changes = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in changes.items()}
        logits = changes.pop("logits", torch.randn(5, 16, device="cuda"))
        bias, top_k = changes.pop("bias", None), changes.pop("top_k", 4)
        try:
            run_routing(logits, bias, top_k, 1, **changes)
            accepted.append(name)
            print(f"   {name}: ACCEPTED")
        except Exception as error:
            print(f"   {name}: {str(error).strip().splitlines()[-1][:150]}")
    torch.cuda.synchronize()
    return accepted


def finalize():
    """2. The sum over experts, on the launcher's own permutation."""
    good = True
    for tokens, experts, top_k, hidden, shard in (
        (1, 16, 4, 256, None),
        (33, 64, 8, 2880, None),
        (300, 64, 6, 7168, (16, 16)),
        (1025, 128, 8, 512, None),
    ):
        logits = torch.randn(tokens, experts, device="cuda")
        given = torch.zeros(tokens, hidden, dtype=torch.bfloat16, device="cuda")
        found = run_routing(logits, None, top_k, 1, shard=shard, hidden=given)
        weights, rows, _, _, _, _, padded = found[:7]
        gemm2 = torch.full((len(found[8]), hidden), torch.nan, dtype=torch.bfloat16, device="cuda")
        used = rows[rows >= 0].long()
        gemm2[used] = torch.randn(len(used), hidden, device="cuda").bfloat16()
        output = torch.full((tokens, hidden), torch.nan, dtype=torch.bfloat16, device="cuda")
        launcher.trtllm_moe_run_finalize(
            gemm2,
            output,
            weights,
            rows.flatten(),
            padded,
            tokens,
            experts,
            top_k,
            hidden,
            False,
            False,
            None,
        )
        torch.cuda.synchronize()
        at = rows.view(tokens, top_k).long()
        terms = gemm2[at.clamp_min(0)].double() * weights.double().unsqueeze(2)
        terms = terms.masked_fill((at < 0).unsqueeze(2), 0)
        exact, size = terms.sum(1), terms.abs().sum(1)
        allowed = 2**-8 * exact.abs() * 1.01 + top_k * 2**-23 * size + 1e-30
        worst = float(((output.double() - exact).abs() / allowed).nan_to_num(1e30).max())
        good &= worst <= 1
        print(
            f"2. trtllm_moe_run_finalize tokens={tokens} k={top_k} hidden={hidden} shard={shard}: worst error / allowed {worst:.3f}"
        )
    return good


def activation():
    """3. DeepSeek's activation, as the launcher's stage calls it."""
    good = True
    for tokens, experts, top_k, inner in ((1, 16, 4, 128), (33, 64, 8, 512), (300, 64, 6, 2048)):
        found = run_routing(torch.randn(tokens, experts, device="cuda"), None, top_k, 1)
        rows, padded = found[1], found[6]
        count = int(padded)
        stored = quantize(torch.randn(count, 2 * inner) * 3, "fp8_1x128")
        scales = stored.scales.T.contiguous().cuda()
        used = torch.zeros(count, dtype=torch.bool)
        used[rows[rows >= 0].long().cpu()] = True
        scales[:, ~used.cuda()] = torch.nan
        out = torch.zeros(count, inner, dtype=torch.uint8, device="cuda")
        out_scales = torch.full((inner // 128, count), torch.nan, device="cuda")
        launcher.trtllm_moe_run_deepseek_fp8_activation(
            stored.data.view(torch.uint8).cuda(),
            scales,
            out,
            out_scales,
            rows.flatten(),
            padded,
            tokens,
            top_k,
            inner,
            3,
            False,
        )
        torch.cuda.synchronize()
        up, gate = dequantize(stored, torch.float64)[used].chunk(2, 1)
        exact = up * gate * torch.sigmoid(gate)
        got_scales = out_scales.cpu().T[used].double()
        blocks = exact.view(-1, inner // 128, 128)
        wanted = blocks.abs().amax(2) / 448
        got = out.cpu()[used].view(torch.float8_e4m3fn).double().view_as(
            blocks
        ) * got_scales.unsqueeze(2)
        off = float(((got_scales - wanted).abs() / wanted).nan_to_num(1e30).max())
        allowed = (
            torch.maximum(blocks.abs() * 2**-4, wanted.unsqueeze(2) * 2**-10) + 1e-4 * blocks.abs()
        )
        worst = float(((got - blocks).abs() / allowed).nan_to_num(1e30).max())
        good &= worst <= 1.01 and off < 1e-5
        print(
            f"3. trtllm_moe_run_deepseek_fp8_activation tokens={tokens} inner={inner}: scales off by {off:.2e}, worst error / allowed {worst:.3f}"
        )
    return good


def whole(scheme):
    """4. One call of an entry point by FlashInfer's own Python."""
    import flashinfer as package
    from flashinfer.fused_moe import core

    built = SimpleNamespace(
        build_and_load=lambda: launcher, get_library_paths=lambda: [Path(sys.argv[1])]
    )
    core.gen_trtllm_gen_fused_moe_sm100_module = lambda *_, **__: built
    found = Kernels("flashinfer", package.fused_moe, package.autotune, precision="flashinfer-sm90")
    layer = Fused(found, flashinfer, small_call(scheme), scheme)
    try:
        layer.check(5)
        print(f"4. {scheme}: runs, and is right")
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = " | ".join(line.strip() for line in str(error).strip().splitlines() if line.strip())
        print(
            f"4. {scheme}: {type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {text[:600]}"
        )


def main():
    if len(sys.argv) > 3:
        os.environ["MOE_PRETEND_SM100"] = "1"
        whole(sys.argv[3])
        return
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, flashinfer-python {RELEASE}")
    logits = torch.randn(5, 16, device="cuda")
    try:
        run_routing(logits, None, 4, 1)
        print("without a change: the launcher takes Hopper")
    except Exception as error:
        print(f"without a change: {str(error).strip().splitlines()[-1]}")
    os.environ["MOE_PRETEND_SM100"] = "1"
    results = []
    for part in (rejections, finalize, activation, lambda: routers(sys.argv[2])):
        try:
            results.append(part())
        except Exception:
            traceback.print_exc(file=sys.stdout)
            results.append("failed")
        sys.stdout.flush()
    print("results", results)


if __name__ == "__main__":
    sys.modules.setdefault(
        "pytest_moe_routing.kernels.hopper", SimpleNamespace(install_routing_module=lambda: None)
    )
    main()
