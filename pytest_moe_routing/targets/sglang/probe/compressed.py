"""Stand-ins for what SGLang shuffles weights with, and reads compressed-tensors' configs with.

With them SGLang's own code makes its MXFP4 and MXINT4 layers, and prepares the former's weights.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pytest_moe_routing.flashinfer import preparation
from pytest_moe_routing.targets import compressed_tensors, stubs


def _same(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _prepared(
    gemm1: Tensor, gemm2: Tensor, scales1: Tensor, scales2: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, ...]:
    return gemm1, scales1, gemm2, scales2


def stand_ins() -> dict[str, Any]:
    """Return replacements by bare name, as `world.stand_ins` does."""
    # SGLang keeps indices of rows: they are right from the first call on.
    return {
        **compressed_tensors.STAND_INS,
        "_maybe_get_cached_w3_w1_permute_indices": preparation.w3_w1_indices,
        "get_w2_permute_indices_with_cache": preparation.w2_indices,
        "block_scale_interleave": _same,
        "nvfp4_block_scale_interleave": _same,
        "prepare_static_weights_for_trtllm_fp4_moe": _prepared,
        "reorder_rows_for_gated_act_gemm": _same,
        "shuffle_matrix_a": _same,
        "swap_w13_to_w31": _same,
        # A tensor, not the parameter itself, of which another parameter is made.
        "swizzle_blockscale": lambda scale: scale.data,
        "reorder_w1w3_to_w3w1": lambda weight, scale, *_, **__: (weight, scale),
        # A kind of number, and all kinds by name, which other schemes than these read.
        "get_scalar_types": lambda: (stubs.Stub("ScalarType"), stubs.Stub("scalar_types")),
        # Nothing outside the layer waits for its output.
        "zero_copy_context": stubs.known(
            "zero_copy_context", get_moe_output_spec=lambda *_, **__: None
        ),
    }
