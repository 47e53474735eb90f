"""FlashInfer's fused MoE kernels by release: rules, signatures, and the reader of its packages."""

from pytest_moe_routing.flashinfer.grammar import KernelCall
from pytest_moe_routing.flashinfer.rules import FlashInfer, installed_release, known_releases

__all__ = ["FlashInfer", "KernelCall", "installed_release", "known_releases"]
