"""Compare vLLM's Triton and Marlin fused experts with the MoE reference, on a GPU.

    python fused_experts.py VLLM LIBRARY [SCHEME...]

VLLM is a folder with the package `vllm` of a wheel (its Python files), LIBRARY the wheel's
`_moe_C_stable_libtorch.abi3.so`. vLLM's own Python code runs: `fused_experts_impl` launches its
Triton kernel, `fused_marlin_moe` its compiled one, and `moe_align_block_size` and `moe_sum` are
compiled. Operators of the other library, `_C`, are too large to carry; in their place run, in torch,
`silu_and_mul`, the FP8 quantization, and the repacking of Marlin's weights, which is vLLM's own test
code (`marlin_utils_test.py`).

Each case is then run with mistakes, all of which the comparison must catch.
"""

from __future__ import annotations

import math
import sys
import time
import traceback
from dataclasses import dataclass, replace
from importlib import import_module

import torch

from pytest_moe_routing.compare.budget import Arithmetic
from pytest_moe_routing.compare.moe import compare_moe
from pytest_moe_routing.logits import bell, distinct
from pytest_moe_routing.reference.layouts import unpack_nibbles
from pytest_moe_routing.reference.moe import MoELayer
from pytest_moe_routing.reference.problem import MoEProblem
from pytest_moe_routing.reference.quantization import Quantized, dequantize, find_format, quantize
from pytest_moe_routing.reference.routing import Routing
from pytest_moe_routing.reference.shard import Shard
from pytest_moe_routing.reference.weights import GeneratedExperts, static_scale
from pytest_moe_routing.schemes import SCHEMES, Scheme, Storage
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.contract import Contract

DEVICE = "cuda"
EXPERTS, HIDDEN, INNER, TOP_K = 16, 512, 256, 4
TOKENS = (1, 7, 64, 300)

LAYERS, UTILS = "vllm.model_executor.layers.", "vllm.model_executor.layers.quantization.utils."
MOE = LAYERS + "fused_moe."
REAL = (
    *(
        MOE + name
        for name in ("fused_moe", "moe_align_block_size", "activation", "utils", "config")
    ),
    *(MOE + name for name in ("modular_kernel", "experts.marlin_moe", "topk_weight_and_reduce")),
    *(UTILS + name for name in ("fp8_utils", "int8_utils", "marlin_utils", "marlin_utils_test")),
    *(UTILS + name for name in ("marlin_utils_fp4", "quant_utils")),
    *("vllm." + name for name in ("_custom_ops", "scalar_type")),
    "vllm.utils.math_utils",
)


class Hopper:
    """vLLM's platform object, on a machine of compute capability 9.0."""

    device_type, device_name = "cuda", "NVIDIA H100 80GB HBM3"

    def is_device_capability(self, capability, *_):
        return capability in (90, (9, 0))

    def has_device_capability(self, capability, *_):
        number = capability if isinstance(capability, int) else capability[0] * 10 + capability[1]
        return number <= 90

    def fp8_dtype(self):
        return torch.float8_e4m3fn

    def get_device_name(self, *_):
        return self.device_name

    def num_compute_units(self, *_):
        return torch.cuda.get_device_properties(0).multi_processor_count

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: name in ("is_cuda", "is_cuda_alike", "supports_fp8")


#: The quantized numbers that each kernel of the last call was given.
SEEN: list[Quantized] = []


def silu_and_mul(out, x):
    gate, up = x.float().chunk(2, -1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def static_scaled_fp8_quant(out, x, scale, group_shape=None):
    out.copy_((x.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn))
    SEEN.append(Quantized(find_format("fp8"), out.cpu().clone(), scale.view(1, 1).cpu()))


def per_token_group_fp8_quant(x, out, scales, group, *_):
    found = quantize(x.cpu(), "fp8_1x128")
    out.copy_(found.data.to(out.device))
    scales.copy_(found.scales.to(scales.device))
    SEEN.append(found)


def load(root, library):
    """Import vLLM's modules; every other module of vLLM is a stub."""
    stubs.install(Contract.of("vllm"), root)
    stubs.extend(real=REAL)
    platforms = import_module("vllm.platforms")
    platforms.current_platform = Hopper()
    import_module("vllm.utils.platform_utils").get_device_name_as_file_name = lambda: (
        "NVIDIA_H100_80GB_HBM3"
    )
    import_module("vllm.utils.platform_utils").num_compute_units = Hopper().num_compute_units
    import_module("vllm.utils.import_utils").has_triton_kernels = lambda: False
    import triton
    from triton import language

    vars(import_module("vllm.triton_utils")).update(triton=triton, tl=language, HAS_TRITON=True)
    import_module("vllm.v1.worker.workspace").is_workspace_manager_initialized = lambda: False
    moe = import_module(MOE[:-1])
    moe.get_config = lambda: None
    envs = import_module("vllm.envs")
    for name in ("VLLM_BATCH_INVARIANT", "VLLM_USE_DEEP_GEMM", "VLLM_TRITON_USE_TD"):
        setattr(envs, name, False)
    envs.VLLM_TUNED_CONFIG_FOLDER = None
    torch.ops.load_library(library)
    torch.ops._C.silu_and_mul = silu_and_mul
    torch.ops._C.static_scaled_fp8_quant = static_scaled_fp8_quant
    torch.ops._C.per_token_group_fp8_quant = per_token_group_fp8_quant
    for name in REAL:
        stubs.real_module(name)
    import_module(UTILS + "fp8_utils").is_deep_gemm_e8m0_used = lambda: False


#: What these kernels store: both GEMMs' rows in bfloat16, the second's after its router weight. The
#: rounding of a weighted row is in `Arithmetic.weights`.
def storage(weight, input="bf16", intermediate="bf16"):
    return Storage(weight, input, intermediate, gemm1="bf16", activated="bf16", gemm2="float32")


#: bfloat16 rounds by 2**-8 of a number at most.
HALF = 2.0**-8


@dataclass(frozen=True)
class Case:
    """One scheme of one kernel.

    `units` are rounding units of its accumulators, from float32 to the 14 bits that Hopper's FP8
    tensor cores keep (DeepSeek-V3's report, arXiv 2412.19437, 3.3.2); the first that fits is told.
    `roundings` is how often a row is rounded to bfloat16 while it is weighted.
    """

    name: str
    kernel: str
    storage: Storage
    units: tuple[float, ...] = (2.0**-23,)
    roundings: int = 1
    # Relative error of the activation's result, where more than its own rounding is allowed.
    activation: float = 0.0
    biases: bool = False
    top_k: int = TOP_K
    weight_on: str = "output"
    shard: Shard | None = None

    def compare(self, got, problem, **how):
        """The comparison with the first unit that fits, and the unit."""
        for unit in self.units:
            arithmetic = Arithmetic(
                unit=unit, weights=self.roundings * HALF, intermediate=self.activation
            )
            found = compare_moe(got, problem, arithmetic=arithmetic, **how)
            if found.ok:
                break
            how = {"diagnose": False}
        return found, unit


FP8 = (2.0**-23, 2.0**-20, 2.0**-17, 2.0**-13)
WHOLE = [
    Case("bf16", "triton", storage("bf16")),
    Case("bf16-biases", "triton", storage("bf16"), biases=True),
    Case("bf16-on-the-input", "triton", storage("bf16"), top_k=1, weight_on="input"),
    Case("bf16-shard", "triton", storage("bf16"), shard=Shard(4, 8)),
    Case("fp8-per-tensor", "triton", storage("fp8", "fp8", "fp8"), units=FP8),
    Case("fp8-block", "triton", storage("fp8_128x128", "fp8_1x128", "fp8_1x128"), units=FP8),
    # Marlin rounds a row, and its product with the router weight, which is exact in bfloat16 here.
    Case("nvfp4", "marlin", storage("nvfp4"), roundings=2),
    Case("mxfp4", "marlin", storage("mxfp4"), roundings=2),
    # Marlin rounds a row to bfloat16 before it adds the bias to it: gate and up move by half a step
    # each before the activation, and a row once more.
    Case(
        "mxfp4-biases",
        "marlin",
        replace(storage("mxfp4"), activated="float32"),
        roundings=3,
        activation=4 * HALF,
        biases=True,
    ),
    Case("mxfp4-shard", "marlin", storage("mxfp4"), roundings=2, shard=Shard(4, 8)),
    # Marlin multiplies element and scale in bfloat16.
    Case("int4", "marlin", storage("mxint4"), roundings=2),
]


def rounded(weight):
    """A weight as its elements times scales, rounded to bfloat16."""
    return Quantized(find_format("bf16"), dequantize(weight).to(torch.bfloat16))


def stacked(experts, name):
    return torch.stack([getattr(e, name).data for e in experts])


def biases_of(experts, name):
    if getattr(experts[0], name) is None:
        return None
    return torch.stack([getattr(e, name) for e in experts]).to(DEVICE, torch.bfloat16)


def parallel(case):
    """Which experts a rank has, and the arguments that say so."""
    shard = case.shard or Shard.whole(EXPERTS)
    if not case.shard:
        return shard.experts, {}
    local = torch.full((EXPERTS,), -1, dtype=torch.int32)
    local[list(shard.experts)] = torch.arange(len(shard.experts), dtype=torch.int32)
    return shard.experts, {"expert_map": local.to(DEVICE), "global_num_experts": EXPERTS}


def triton_call(case, hidden, routing, experts, mistake=None):
    run = import_module(MOE + "fused_moe").fused_experts_impl
    own, arguments = parallel(case)
    mine = [experts[e] for e in own]
    fmt = find_format(case.storage.weight)
    w1, w2 = stacked(mine, "gemm1").to(DEVICE), stacked(mine, "gemm2").to(DEVICE)
    if fmt.scale != "none":
        scales = [
            torch.stack([getattr(e, n).scales for e in mine]).to(DEVICE) for n in ("gemm1", "gemm2")
        ]
        if fmt.block == (0, 0):
            scales = [s.flatten() for s in scales]
            given = quantize(hidden.cpu(), "fp8").scales.flatten().to(DEVICE)
            arguments |= {
                "a1_scale": given,
                "a2_scale": torch.tensor([mine[0].intermediate_scale], device=DEVICE),
            }
        else:
            arguments["block_shape"] = [128, 128]
        arguments |= {"use_fp8_w8a8": True, "w1_scale": scales[0], "w2_scale": scales[1]}
    arguments |= {"w1_bias": biases_of(mine, "bias1"), "w2_bias": biases_of(mine, "bias2")}
    arguments["apply_router_weight_on_input"] = case.weight_on == "input"
    given = {
        "hidden_states": hidden,
        "w1": w1,
        "w2": w2,
        "topk_weights": routing.topk_weights.float().to(DEVICE),
        "topk_ids": routing.topk_ids.to(DEVICE, torch.int32),
        **arguments,
    }
    if mistake:
        given = mistake(dict(given))
    return run(**given)


def marlin_call(case, hidden, routing, experts, mistake=None):
    marlin = import_module(MOE + "experts.marlin_moe").fused_marlin_moe
    own, given = parallel(case)
    mine = [experts[e] for e in own]
    types = import_module("vllm.scalar_type").scalar_types
    integer = case.storage.weight == "mxint4"
    for number, name in ((1, "gemm1"), (2, "gemm2")):
        weights = [getattr(e, name) for e in mine]
        packed, scales, overall = zip(*(marlin_weight(w) for w in weights), strict=True)
        given[f"w{number}"] = torch.stack(packed).to(DEVICE)
        given[f"w{number}_scale"] = torch.stack(scales).to(DEVICE)
        if overall[0] is not None:
            given[f"global_scale{number}"] = torch.stack(overall).to(DEVICE)
        bias = biases_of(mine, f"bias{number}")
        permute = import_module(UTILS + "marlin_utils").marlin_permute_bias
        given[f"bias{number}"] = None if bias is None else torch.stack([permute(b) for b in bias])
    given |= {
        "hidden_states": hidden,
        "topk_weights": routing.topk_weights.float().to(DEVICE),
        "topk_ids": routing.topk_ids.to(DEVICE, torch.int32),
        "quant_type_id": (types.uint4b8 if integer else types.float4_e2m1f).id,
    }
    if mistake:
        given = mistake(dict(given))
    return marlin(**given)


def marlin_weight(weight):
    """One expert's weight in Marlin's layout: elements, scales, global scale or None."""
    test, utils, fp4 = (
        import_module(UTILS + n) for n in ("marlin_utils_test", "marlin_utils", "marlin_utils_fp4")
    )
    rows, columns = weight.shape
    codes = unpack_nibbles(weight.data).to(torch.int32).T.contiguous()
    if weight.format.element == "int4":
        codes = (codes + 8) & 15  # from two's complement to uint4b8
    packed = test.marlin_weights(codes, columns, rows, 4, test.get_weight_perm(4))
    group = weight.format.block[1]
    scales = weight.scales
    if weight.format.scale == "ue8m0":
        scales = scales.view(torch.float8_e8m0fnu)
    scales = utils.marlin_permute_scales(scales.to(torch.bfloat16).T, columns, rows, group)
    if weight.format.scale == "ue8m0":
        return packed, fp4.mxfp4_marlin_process_scales(scales), None
    if weight.format.scale == "e4m3":
        scales, factor = fp4.nvfp4_marlin_process_scales(scales, a_dtype=torch.bfloat16)
        overall = fp4.nvfp4_marlin_process_global_scale(weight.global_scale.float(), torch.bfloat16)
        return packed, scales, overall.reshape(()) / factor
    return packed, scales, None


def halves(x):
    return torch.cat(x.chunk(2, 1)[::-1], 1)


def changed(name, change):
    return lambda given: {**given, name: change(given[name])}


def one_block(scales):
    scales = scales.clone()
    flat = scales.view(torch.uint8) if scales.dtype.itemsize == 1 else scales
    flat[0] = flat[0].roll(1, -1) if flat.ndim > 1 else flat[1]
    return scales


#: What is broken in a call; each must be caught.
MISTAKES = {
    "another expert's weights": changed(
        "w2",
        lambda w: w.flip(0) if w.dtype.itemsize > 1 else w.view(torch.uint8).flip(0).view(w.dtype),
    ),
    "a slot's weight doubled": changed(
        "topk_weights", lambda w: torch.cat((w[:, :1] * 2, w[:, 1:]), 1)
    ),
    "weights permuted within a token": changed("topk_weights", lambda w: w.roll(1, 1)),
    "a token's experts shifted": changed("topk_ids", lambda ids: (ids + 1) % EXPERTS),
    "scales of a block at its neighbour": changed("w1_scale", one_block),
}


def check(case):
    torch.manual_seed(0)
    SCHEMES[case.name] = Scheme(case.name, case.storage)
    layer = replace(MoELayer.of(case.name), weight_on=case.weight_on)
    experts = GeneratedExperts(
        EXPERTS,
        HIDDEN,
        INNER,
        case.storage.weight,
        biases=case.biases,
        intermediate_scale=static_scale(case.storage.intermediate),
    )
    experts = [experts[e] for e in range(EXPERTS)]
    if case.biases:
        experts = [replace(e, bias1=e.bias1.bfloat16(), bias2=e.bias2.bfloat16()) for e in experts]
    wanted = experts
    if case.storage.weight == "mxint4":
        wanted = [replace(e, gemm1=rounded(e.gemm1), gemm2=rounded(e.gemm2)) for e in experts]
    call = triton_call if case.kernel == "triton" else marlin_call
    good = True
    for count in TOKENS:
        hidden = bell(count, HIDDEN, seed=3).bfloat16()
        ids = distinct(count, EXPERTS, seed=4)[:, : case.top_k].contiguous()
        weights = (bell(count, case.top_k, seed=5).abs() + 0.1).bfloat16().float()
        routing = Routing(ids, weights)
        SEEN.clear()
        started = time.monotonic()
        got = call(case, hidden.to(DEVICE), routing, experts).cpu()
        first = time.monotonic() - started
        again = call(case, hidden.to(DEVICE), routing, experts).cpu()
        problem = MoEProblem.of(
            SEEN[0] if case.storage.input != "bf16" else hidden,
            wanted,
            layer,
            routing,
            shard=case.shard,
        )
        found, unit = case.compare(got, problem)
        print(
            f"{case.kernel} {case.name} tokens={count}: {'right' if found.ok else 'WRONG'}, uses "
            f"{found.use:.3f} of its budget (median {100 * found.tightness:.2g} % of the output), unit 2**{math.log2(unit):.0f}, "
            f"two runs {'equal' if torch.equal(got, again) else 'DIFFERENT'}, {first:.1f} s",
            flush=True,
        )
        good &= found.ok
        if not found.ok:
            print(found.message(), flush=True)
    caught, missed = [], []
    for name, mistake in MISTAKES.items():
        if ("scale" in name and find_format(case.storage.weight).block in ((0, 0),)) or (
            "within a token" in name and case.top_k == 1
        ):
            continue
        if "shifted" in name and case.shard:
            continue
        bad = call(case, hidden.to(DEVICE), routing, experts, mistake).cpu()
        ok = case.compare(bad, problem, diagnose=False)[0].ok
        (missed if ok else caught).append(name)
    print(
        f"  mistakes caught: {', '.join(caught)}; missed: {', '.join(missed) or 'none'}", flush=True
    )
    return good and not missed


def main():
    root, library, *names = sys.argv[1:]
    load(root, library)
    import triton

    gpu = torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, triton {triton.__version__}, {gpu}", flush=True)
    bad = []
    for case in WHOLE:
        if names and case.name not in names:
            continue
        try:
            good = check(case)
        except Exception as error:
            traceback.print_exc()
            good = False
            print(f"{case.kernel} {case.name}: {type(error).__name__}: {error}"[:300], flush=True)
        if not good:
            bad.append(case.name)
    print(f"not as expected: {', '.join(bad)}" if bad else "all right, every mistake caught")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
