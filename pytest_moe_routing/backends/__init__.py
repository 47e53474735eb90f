"""Expert backends, their support gates, and what each FlashInfer release's kernels can do."""

from pytest_moe_routing.backends.experts import (
    BACKENDS,
    Backend,
    Gate,
    exact_calls,
    find_backend,
    kernel_call,
    same_calls,
    support_gates,
)
from pytest_moe_routing.backends.flashinfer import (
    FlashInfer,
    KernelCall,
    installed_release,
    known_releases,
)

__all__ = [
    "BACKENDS",
    "Backend",
    "FlashInfer",
    "Gate",
    "KernelCall",
    "exact_calls",
    "find_backend",
    "installed_release",
    "kernel_call",
    "known_releases",
    "same_calls",
    "support_gates",
]
