"""One row per quantization scheme: its number formats, its fused kernel, its names in checkpoints.

A scheme is described here once, and every other package reads the row. Number formats are keys of
`reference.quantization.FORMATS`, dtypes are names of torch's: this module imports no torch.
Sources: FlashInfer 0.7.2.post1, `csrc/trtllm_fused_moe_runner.cu` (buffers, epilogues),
`csrc/trtllm_fused_moe_kernel_launcher.cu` (shapes, dtypes) and `flashinfer/fused_moe/core.py`;
NVIDIA Model-Optimizer (`quant_algo`); compressed-tensors 0.17 (`config_groups`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pytest_moe_routing.errors import MoERoutingError

#: Routing methods that every fused launcher accepts, Llama4 with the weight on either side.
_METHODS = frozenset(
    {
        "Default",
        "Renormalize",
        "RenormalizeNaive",
        "DeepSeekV3",
        "Llama4",
        "SigmoidRenorm",
        "Sigmoid",
        "MiniMax2",
    }
)


@dataclass(frozen=True)
class Storage:
    """The number format of each tensor of a fused MoE. `float32` rounds nothing.

    Attributes:
        weight: Both weights.
        input: Hidden states, as the kernel takes them.
        intermediate: The second GEMM's input.
        gemm1: The first GEMM's result, where it is stored before the activation.
        activated: The activation's result, where it is stored before it is quantized.
        gemm2: The second GEMM's result, before it is weighted and summed over experts.
    """

    weight: str
    input: str
    intermediate: str
    gemm1: str = "float32"
    activated: str = "float32"
    gemm2: str = "bf16"


@dataclass(frozen=True)
class KernelSpec:
    """One fused entry point of FlashInfer, as one scheme uses it.

    Since when a release has the entry point, and each activation, is in `flashinfer/releases.yaml`.

    Attributes:
        name: `<name>_moe` takes logits, `<name>_routed_moe` takes experts and weights.
        activations: Names of `reference.activation` that the newest release has kernels for.
        methods: Routing methods that the builtin target's experts accept.
        logits_dtypes: Dtypes of the router logits that the builtin target's experts accept.
        layouts: Layouts of the weights that it takes: `plain` (rows in their order), `shuffled`, or
            `blocks` (shuffled, and columns in blocks of 128 bytes). The first is what frameworks
            use.
        takes_layout: Whether the caller names the layout.
        fused_activation: Whether the first GEMM's epilogue computes the activation: then shuffled
            rows belong to tiles of 128 rows, not 64, in which up and gate rows alternate.
        weight_scales: Where block scales of the weights lie: `square` (128 x 128 blocks, as they
            are), `tiles` (128x4 tiles, in the order of the rows), `rows` (one for each row, in the
            order of the rows), or `none`.
        scale_argument: `<gemm>_<scale_argument>` is the argument that holds them.
        scale_dtype: What block scales of weights and input are labelled as.
        input_scales: Whether the input's scales lie by `token`, or by `block` (transposed); empty
            where there are none.
        token_argument: The argument for the scale of each token over its block scales; empty where
            there is none.
        scalars: How the dequantization scalars are spelled: `scale` or `scales`; empty for none.
        biases: Whether experts may have biases.
        pairs_since: The release from which the routed twin takes `(ids, weights)` unpacked.
        arguments: Whatever else makes this entry point serve this scheme.
    """

    name: str
    activations: tuple[str, ...]
    methods: frozenset[str] = _METHODS
    logits_dtypes: tuple[str, ...] = ("bfloat16", "float32")
    layouts: tuple[str, ...] = ("shuffled",)
    takes_layout: bool = False
    fused_activation: bool = True
    weight_scales: str = "none"
    scale_argument: str = "weights_scale"
    scale_dtype: str = "uint8"
    input_scales: str = ""
    token_argument: str = ""
    scalars: str = ""
    biases: bool = False
    pairs_since: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def function(self, routed: bool = False) -> str:
        """Return the name of the entry point, or of its routed twin."""
        return f"{self.name}_routed_moe" if routed else f"{self.name}_moe"


@dataclass(frozen=True)
class CheckpointNames:
    """What tells a scheme in a checkpoint.

    Attributes:
        quant_methods: Values of `quant_method` that name the scheme by themselves.
        modelopt: ModelOpt's `quant_algo`.
        compressed_tensors: Type, bits, strategy and group size of the weights in a config group;
            None for any group size.
        scale: Name of the scales next to `weight`; empty where there are none.
        global_scale: Name of the factor on top of them, where there is one.
    """

    quant_methods: tuple[str, ...] = ()
    modelopt: tuple[str, ...] = ()
    compressed_tensors: tuple[tuple[str, int, str, int | None], ...] = ()
    scale: str = ""
    global_scale: str = ""


@dataclass(frozen=True)
class Scheme:
    """One quantization scheme.

    Attributes:
        name: What models, options and goldens call it.
        storage: None for a scheme that the reference does not compute.
        kernel: None for a scheme that no fused kernel of FlashInfer serves.
        checkpoint: None for a scheme that no checkpoint has: another one's checkpoint is served so.
    """

    name: str
    storage: Storage | None = None
    kernel: KernelSpec | None = None
    checkpoint: CheckpointNames | None = None


#: Numbers of `Fp8QuantizationType`, which have never moved.
_DEEPSEEK_FP8, _MX_FP8 = 1, 2

_FP4: Mapping[str, Any] = {
    "name": "trtllm_fp4_block_scale",
    "weight_scales": "tiles",
    "scale_dtype": "float8_e4m3fn",
    "biases": True,
    "pairs_since": "0.6.12",
}

SCHEMES: Mapping[str, Scheme] = {
    row.name: row
    for row in (
        Scheme("float32", Storage("float32", "float32", "float32", gemm2="float32")),
        Scheme(
            "fp8_block",
            Storage("fp8_128x128", "fp8_1x128", "fp8_1x128", gemm1="fp8_1x128"),
            KernelSpec(
                "trtllm_fp8_block_scale",
                ("silu",),
                layouts=("plain", "shuffled", "blocks"),
                takes_layout=True,
                fused_activation=False,
                weight_scales="square",
                scale_dtype="float32",
                input_scales="block",
                pairs_since="0.6.18",
                arguments={"fp8_quantization_type": _DEEPSEEK_FP8},
            ),
            CheckpointNames(
                modelopt=("FP8_PB_WO",),
                compressed_tensors=(("float", 8, "block", None),),
                scale="weight_scale_inv",
            ),
        ),
        Scheme(
            "fp8_per_tensor",
            Storage("fp8", "fp8", "fp8"),
            KernelSpec(
                "trtllm_fp8_per_tensor_scale",
                ("silu", "relu2", "swiglustep"),
                scalars="scales",
                pairs_since="0.6.18",
            ),
            CheckpointNames(
                modelopt=("FP8",),
                compressed_tensors=(("float", 8, "tensor", None),),
                scale="weight_scale",
            ),
        ),
        Scheme(
            "mxfp8",
            Storage("mxfp8", "mxfp8", "mxfp8"),
            KernelSpec(
                "trtllm_fp8_block_scale",
                ("silu", "relu2", "gelu_tanh", "swigluoai", "swiglustep"),
                takes_layout=True,
                weight_scales="tiles",
                input_scales="token",
                pairs_since="0.6.18",
                arguments={"fp8_quantization_type": _MX_FP8},
            ),
            CheckpointNames(
                quant_methods=("mxfp8",),
                modelopt=("MXFP8",),
                compressed_tensors=(("float", 8, "group", 32),),
                scale="weight_scale",
            ),
        ),
        Scheme(
            "nvfp4",
            Storage("nvfp4", "nvfp4", "nvfp4"),
            KernelSpec(
                activations=("silu", "relu2", "gelu_tanh", "swigluoai", "swiglustep"),
                input_scales="token",
                scalars="scale",
                **_FP4,
            ),
            CheckpointNames(
                modelopt=("NVFP4",),
                compressed_tensors=(
                    ("float", 4, "group", 16),
                    ("float", 4, "tensor_group", 16),
                ),
                scale="weight_scale",
                global_scale="weight_scale_2",
            ),
        ),
        Scheme(
            "nvfp4_per_token",
            Storage("nvfp4", "nvfp4_token", "nvfp4_token", activated="bf16"),
            KernelSpec(
                # In flashinfer-cubin 0.6.13 all kernels with scales of tokens are SwiGLU's, and no
                # document gives the units of biases and limits next to them.
                activations=("silu",),
                input_scales="token",
                scalars="scale",
                token_argument="per_token_scale",
                **{**_FP4, "biases": False},
            ),
        ),
        Scheme(
            "mxfp4",
            Storage("mxfp4", "mxfp8", "mxfp8"),
            KernelSpec(
                activations=("silu", "gelu_tanh", "swigluoai"),
                input_scales="token",
                **_FP4,
            ),
            CheckpointNames(
                quant_methods=("mxfp4",),
                modelopt=("MXFP4",),
                compressed_tensors=(("float", 4, "group", 32),),
                scale="weight_scale",
            ),
        ),
        Scheme(
            "mxfp4_bf16",
            Storage("mxfp4", "bf16", "bf16"),
            KernelSpec(activations=("silu", "swigluoai"), **_FP4),
        ),
        Scheme(
            "bf16",
            Storage("bf16", "bf16", "bf16"),
            KernelSpec(
                "trtllm_bf16",
                ("silu", "relu2", "swigluoai", "swiglustep"),
                layouts=("blocks",),
                takes_layout=True,
                pairs_since="0.6.18",
            ),
            CheckpointNames(),
        ),
        Scheme(
            "mxint4",
            Storage("mxint4", "bf16", "bf16"),
            KernelSpec(
                "trtllm_mxint4_block_scale",
                ("silu",),
                layouts=("blocks",),
                weight_scales="tiles",
                scale_dtype="bfloat16",
            ),
            CheckpointNames(compressed_tensors=(("int", 4, "group", 32),)),
        ),
        Scheme(
            "fp8_per_channel",
            Storage("fp8_channel", "fp8_token", "fp8_token", activated="bf16"),
            KernelSpec(
                "trtllm_fp8_per_channel_scale",
                ("silu",),
                weight_scales="rows",
                scale_argument="per_channel_weight_scale",
                scale_dtype="float32",
                input_scales="token",
                scalars="scale",
            ),
            CheckpointNames(
                quant_methods=("fbgemm_fp8",),
                modelopt=("FP8_PER_CHANNEL_PER_TOKEN",),
                compressed_tensors=(("float", 8, "channel", None),),
                scale="weight_scale",
            ),
        ),
        Scheme("w4a16_nvfp4", checkpoint=CheckpointNames(modelopt=("W4A16_NVFP4",))),
        Scheme(
            "int4",
            checkpoint=CheckpointNames(
                compressed_tensors=(("int", 4, "group", None), ("int", 4, "channel", None))
            ),
        ),
        Scheme(
            "int8",
            checkpoint=CheckpointNames(
                compressed_tensors=(
                    ("int", 8, "group", None),
                    ("int", 8, "channel", None),
                    ("int", 8, "tensor", None),
                )
            ),
        ),
    )
}

#: Schemes that the reference computes.
COMPUTED_SCHEMES = tuple(name for name, row in SCHEMES.items() if row.storage)
#: Schemes that a fused kernel serves, among them two that no checkpoint has: `mxfp4_bf16` (MXFP4
#: with an unquantized input) and `nvfp4_per_token` (NVFP4 whose tokens have scales of their own).
KERNEL_SCHEMES = tuple(name for name, row in SCHEMES.items() if row.kernel)
#: Schemes that checkpoints have.
CHECKPOINT_SCHEMES = tuple(name for name, row in SCHEMES.items() if row.checkpoint)
#: Schemes of checkpoints that a fused kernel serves: those that are judged.
SERVED_SCHEMES = tuple(name for name in CHECKPOINT_SCHEMES if name in KERNEL_SCHEMES)


def check_scheme(name: str) -> str:
    """Return the name of a scheme that checkpoints have and a fused kernel serves.

    Raises:
        MoERoutingError: There is no such scheme, or no fused kernel serves it.
    """
    if name not in SERVED_SCHEMES:
        names = ", ".join(SERVED_SCHEMES)
        raise MoERoutingError(f"unknown scheme {name!r}; schemes: {names}, or all")
    return name


def storage_of(name: str) -> Storage:
    """Return the number formats of a scheme.

    Raises:
        MoERoutingError: There is no such scheme, or the reference does not compute it.
    """
    row = SCHEMES.get(name)
    if row is None or row.storage is None:
        raise MoERoutingError(f"unknown scheme {name!r}; schemes: {', '.join(COMPUTED_SCHEMES)}")
    return row.storage


def kernel_of(name: str) -> KernelSpec:
    """Return the fused entry point of a scheme.

    Raises:
        MoERoutingError: There is no such scheme, or no fused kernel serves it.
    """
    row = SCHEMES.get(name)
    if row is None or row.kernel is None:
        raise MoERoutingError(f"unknown scheme {name!r}; schemes: {', '.join(KERNEL_SCHEMES)}")
    return row.kernel
