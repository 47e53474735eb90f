"""Where each release of vLLM keeps what serves a scheme. Names only: nothing is imported here.

Every list is in order of preference: the first that a release has is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LAYERS = "vllm.model_executor.layers"
MOE = f"{LAYERS}.fused_moe"
QUANTIZATION = f"{LAYERS}.quantization"
KEYS = f"{QUANTIZATION}.utils.quant_utils"


@dataclass(frozen=True)
class ServedScheme:
    """What serves one quantization scheme.

    Attributes:
        experts: Module below `fused_moe` (or `quantization`, when it starts with that), and class
            in it, of the monolithic experts. Before there were classes, the name is that of a
            function: all gates at once, the single ones beside it in its module.
        modular: Module and class of the experts that are given ids and weights; none before there
            were two kinds, and for MXINT4.
        keys: Names of the quantization keys of (weight, activation); "" stands for None.
        methods: Module below `quantization`, or `fused_moe` when it starts with a dot, and class
            of the layer's methods that call the experts.
        quantized: Activations as the experts get them: dtype, values a byte, values a scale (0: no
            scale), dtype of the scale.
        packed: Two weights a byte.
        quantization: What vLLM's quantization config is told: dtype of the activations, of the
            weights, and the block.
    """

    experts: tuple[tuple[str, str], ...]
    keys: tuple[str, str]
    methods: tuple[tuple[str, str], ...]
    quantized: tuple[str, int, int, str]
    packed: bool = False
    quantization: tuple[str, str, tuple[int, int] | None] = ("", "", None)
    modular: tuple[tuple[str, str], ...] = ()


_FP8 = (
    ("experts.trtllm_fp8_moe", "TrtLlmFp8ExpertsMonolithic"),
    ("experts.trtllm_fp8_moe", "TrtLlmFp8Experts"),
    ("flashinfer_trtllm_moe", "is_supported_config_trtllm_fp8"),
    ("flashinfer_trtllm_moe", "is_supported_config_trtllm"),
)
_TENSORS = "compressed_tensors.compressed_tensors_moe"
_W8A8_FP8 = (
    (f"{_TENSORS}.compressed_tensors_moe_w8a8_fp8", "CompressedTensorsW8A8Fp8MoEMethod"),
    (_TENSORS, "CompressedTensorsW8A8Fp8MoEMethod"),
)

_FP8_MODULAR = (("experts.trtllm_fp8_moe", "TrtLlmFp8ExpertsModular"),)

SCHEMES: Mapping[str, ServedScheme] = {
    "fp8_block": ServedScheme(
        _FP8,
        ("kFp8Static128BlockSym", "kFp8Dynamic128Sym"),
        (("fp8", "Fp8MoEMethod"), *_W8A8_FP8),
        ("float8_e4m3fn", 1, 128, "float32"),
        quantization=("float8_e4m3fn", "", (128, 128)),
        modular=_FP8_MODULAR,
    ),
    "fp8_per_tensor": ServedScheme(
        _FP8,
        ("kFp8StaticTensorSym", "kFp8StaticTensorSym"),
        (("modelopt", "ModelOptFp8MoEMethod"), ("fp8", "Fp8MoEMethod"), *_W8A8_FP8),
        ("float8_e4m3fn", 1, 0, "float32"),
        quantization=("float8_e4m3fn", "", None),
        modular=_FP8_MODULAR,
    ),
    "mxfp8": ServedScheme(
        _FP8,
        ("kMxfp8Static", "kMxfp8Dynamic"),
        (
            ("modelopt", "ModelOptMxFp8FusedMoE"),
            (
                f"{_TENSORS}.compressed_tensors_moe_w8a8_mxfp8",
                "CompressedTensorsW8A8Mxfp8MoEMethod",
            ),
        ),
        ("float8_e4m3fn", 1, 32, "uint8"),
        quantization=("mxfp8", "", (1, 32)),
        modular=_FP8_MODULAR,
    ),
    "nvfp4": ServedScheme(
        (
            ("experts.trtllm_nvfp4_moe", "TrtLlmNvFp4ExpertsMonolithic"),
            ("quantization.utils.flashinfer_fp4_moe", "is_supported_config_trtllm"),
        ),
        ("kNvfp4Static", "kNvfp4Dynamic"),
        (
            ("modelopt", "ModelOptNvFp4FusedMoE"),
            (
                f"{_TENSORS}.compressed_tensors_moe_w4a4_nvfp4",
                "CompressedTensorsW4A4Nvfp4MoEMethod",
            ),
            (_TENSORS, "CompressedTensorsW4A4Nvfp4MoEMethod"),
        ),
        ("uint8", 2, 16, "uint8"),
        packed=True,
        quantization=("nvfp4", "", None),
        modular=(("experts.trtllm_nvfp4_moe", "TrtLlmNvFp4ExpertsModular"),),
    ),
    "bf16": ServedScheme(
        (
            ("experts.trtllm_bf16_moe", "TrtLlmBf16ExpertsMonolithic"),
            ("experts.trtllm_bf16_moe", "TrtLlmBf16Experts"),
            ("flashinfer_trtllm_moe", "is_supported_config_trtllm_bf16"),
        ),
        ("", ""),
        ((".unquantized_fused_moe_method", "UnquantizedFusedMoEMethod"),),
        ("bfloat16", 1, 0, ""),
        modular=(("experts.trtllm_bf16_moe", "TrtLlmBf16ExpertsModular"),),
    ),
    "mxfp4": ServedScheme(
        (("experts.trtllm_mxfp4_moe", "TrtLlmMxfp4ExpertsMonolithic"),),
        ("kMxfp4Static", "kMxfp8Dynamic"),
        (("mxfp4", "GptOssMxfp4MoEMethod"), ("mxfp4", "Mxfp4MoEMethod")),
        ("float8_e4m3fn", 1, 32, "uint8"),
        packed=True,
        quantization=("mxfp8", "mxfp4", None),
        modular=(("experts.trtllm_mxfp4_moe", "TrtLlmMxfp4ExpertsModular"),),
    ),
    "mxint4": ServedScheme(
        (("experts.trtllm_mxint4_moe", "TrtLlmMxint4ExpertsMonolithic"),),
        ("kInt4Static32", ""),
        (
            (f"{_TENSORS}.compressed_tensors_moe_wna16", "CompressedTensorsWNA16MoEMethod"),
            (
                f"{_TENSORS}.compressed_tensors_moe_wna16_marlin",
                "CompressedTensorsWNA16MarlinMoEMethod",
            ),
        ),
        ("bfloat16", 1, 0, ""),
        packed=True,
        quantization=("", "int4", (0, 32)),
    ),
}
