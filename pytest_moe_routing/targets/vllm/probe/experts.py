"""What serves each quantization scheme in vLLM, by rows of the contract."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ServedScheme:
    """What serves one quantization scheme; names are keys of `contract.yaml`.

    Attributes:
        experts: The monolithic experts. In releases without such classes it is a function, all
            gates at once, with the single ones next to it in its module.
        modular: The experts that are given ids and weights; None where vLLM has none.
        keys: The quantization keys of weights and activations; None for unquantized ones.
        methods: The layer's methods that call the experts.
        modular_methods: Those that call the modular experts.
        selector: What chooses the experts of a layer.
        quantized: Activations as the experts get them: dtype, values a byte, values a scale (0: no
            scale), dtype of the scale.
        packed: Two weights a byte.
        block_scales: The dtype of scales of blocks of weights; empty if there are none.
        whole_scales: The name of a scale of a whole tensor of weights, next to which is one of the
            input; empty if there is none.
        quantization: What vLLM's quantization config is told: dtype of the activations, of the
            weights, and the block.
    """

    experts: str
    keys: tuple[str | None, str | None]
    methods: tuple[str, ...]
    quantized: tuple[str, int, int, str]
    packed: bool = False
    block_scales: str = ""
    whole_scales: str = ""
    quantization: tuple[str, str, tuple[int, int] | None] = ("", "", None)
    modular: str | None = None
    modular_methods: tuple[str, ...] = ()
    selector: str = ""


SCHEMES: dict[str, ServedScheme] = {
    "fp8_block": ServedScheme(
        "experts-fp8",
        ("keys.kFp8Static128BlockSym", "keys.kFp8Dynamic128Sym"),
        ("method-fp8", "method-w8a8-fp8"),
        ("float8_e4m3fn", 1, 128, "float32"),
        block_scales="float32",
        quantization=("float8_e4m3fn", "", (128, 128)),
        modular="modular-fp8",
        modular_methods=("hands-fp8", "hands-w8a8-fp8"),
        selector="select-fp8",
    ),
    "fp8_per_tensor": ServedScheme(
        "experts-fp8",
        ("keys-per-tensor.kFp8StaticTensorSym", "keys-per-tensor.kFp8StaticTensorSym"),
        ("method-modelopt-fp8", "method-fp8", "method-w8a8-fp8"),
        ("float8_e4m3fn", 1, 0, "float32"),
        whole_scales="weight_scale",
        quantization=("float8_e4m3fn", "", None),
        modular="modular-fp8",
        modular_methods=("hands-modelopt-fp8", "hands-fp8", "hands-w8a8-fp8"),
        selector="select-fp8",
    ),
    "mxfp8": ServedScheme(
        "experts-fp8",
        ("keys-mxfp8.kMxfp8Static", "keys-mxfp8.kMxfp8Dynamic"),
        ("method-modelopt-mxfp8", "method-w8a8-mxfp8"),
        ("float8_e4m3fn", 1, 32, "uint8"),
        block_scales="uint8",
        quantization=("mxfp8", "", (1, 32)),
        modular="modular-fp8",
        modular_methods=("hands-modelopt-mxfp8", "hands-w8a8-mxfp8"),
        selector="select-mxfp8",
    ),
    "nvfp4": ServedScheme(
        "experts-nvfp4",
        ("keys-nvfp4.kNvfp4Static", "keys-nvfp4.kNvfp4Dynamic"),
        ("method-modelopt-nvfp4", "method-w4a4-nvfp4"),
        ("uint8", 2, 16, "uint8"),
        packed=True,
        block_scales="float8_e4m3fn",
        whole_scales="weight_scale_2",
        quantization=("nvfp4", "", None),
        modular="modular-nvfp4",
        modular_methods=("hands-modelopt-nvfp4", "hands-w4a4-nvfp4"),
        selector="select-nvfp4",
    ),
    "bf16": ServedScheme(
        "experts-bf16",
        (None, None),
        ("method-unquantized",),
        ("bfloat16", 1, 0, ""),
        modular="modular-bf16",
        modular_methods=("hands-unquantized",),
        selector="select-unquantized",
    ),
    "mxfp4": ServedScheme(
        "experts-mxfp4",
        ("keys-mxfp4.kMxfp4Static", "keys-mxfp4.kMxfp8Dynamic"),
        ("method-gpt-oss-mxfp4", "method-mxfp4"),
        ("float8_e4m3fn", 1, 32, "uint8"),
        packed=True,
        block_scales="uint8",
        quantization=("mxfp8", "mxfp4", None),
        modular="modular-mxfp4",
        modular_methods=("hands-gpt-oss-mxfp4", "hands-mxfp4"),
        selector="select-mxfp4",
    ),
    "mxint4": ServedScheme(
        "experts-mxint4",
        ("keys-mxint4.kInt4Static32", None),
        ("method-wna16", "method-wna16-marlin"),
        ("bfloat16", 1, 0, ""),
        packed=True,
        block_scales="bfloat16",
        quantization=("", "int4", (0, 32)),
        selector="select-mxint4",
    ),
}

#: Schemes that vLLM serves in kernels of its own. Its selectors are asked whether they take experts
#: of FlashInfer's nevertheless.
ELSEWHERE: dict[str, ServedScheme] = {
    "fp8_per_channel": replace(
        SCHEMES["fp8_per_tensor"],
        keys=("keys-per-channel.kFp8StaticChannelSym", "keys-per-channel.kFp8DynamicTokenSym"),
    ),
}
