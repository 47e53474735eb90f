"""Quantization schemes of the experts of a checkpoint. Imports no torch."""

from __future__ import annotations

from pytest_moe_routing.errors import MoERoutingError

#: Schemes that a fused MoE kernel of FlashInfer serves.
SERVED_SCHEMES = ("fp8_block", "fp8_per_tensor", "mxfp8", "nvfp4", "mxfp4", "bf16", "mxint4")
#: Schemes that checkpoints have and no fused kernel of FlashInfer serves.
OTHER_SCHEMES = ("fp8_per_channel", "w4a16_nvfp4", "int4", "int8")
SCHEMES = SERVED_SCHEMES + OTHER_SCHEMES


def check_scheme(name: str) -> str:
    """Return the name of a served scheme.

    Raises:
        MoERoutingError: No fused kernel serves a scheme of this name.
    """
    if name not in SERVED_SCHEMES:
        raise MoERoutingError(f"unknown scheme {name!r}; schemes: {', '.join(SERVED_SCHEMES)}")
    return name
