"""Our experts: their support gates, and the call they make.

A gate answers yes, or no with a reason in words. Gates ask one FlashInfer release, so
what a release cannot do is refused, whatever the rest of the configuration says.
"""

from __future__ import annotations

from collections.abc import Iterator

from pytest_moe_routing.flashinfer.rules import FlashInfer
from pytest_moe_routing.models import ModelSpec, RouterConfig
from pytest_moe_routing.oracle.exact import BLACKWELL, Gate, kernel_call, kernel_gates
from pytest_moe_routing.routing import METHODS, RoutingMethodType
from pytest_moe_routing.schemes import kernel_of


def support_gates(
    model: ModelSpec, scheme: str, method: str, flashinfer: FlashInfer, device: int = BLACKWELL
) -> tuple[Gate, ...]:
    """Return every gate of a scheme's experts, in the order in which they are asked."""
    accepts = kernel_of(scheme)
    gates = list(kernel_gates(model, scheme, flashinfer, device))
    gates.append(
        Gate(
            "routing method",
            method in accepts.methods and flashinfer.number(method) is not None,
            f"{flashinfer} has no {method}"
            if method in accepts.methods
            else f"{scheme} does not accept {method}",
        )
    )
    if gates[-1].ok:
        lost = list(_lost(model.router, method, flashinfer))
        gates.append(Gate("router parameters", not lost, f"{method} ignores {', '.join(lost)}"))
    dtype = model.router.logits_dtype
    gates.append(
        Gate(
            "router logits dtype",
            dtype in accepts.logits_dtypes,
            f"{dtype} is not one of {', '.join(accepts.logits_dtypes)}",
        )
    )
    if all(gate.ok for gate in gates):
        violations = flashinfer.violations(kernel_call(model.router, scheme, method, flashinfer))
        reason = "; ".join(map(str, violations))
        gates.append(Gate("kernel limits", not violations, reason))
    return tuple(gates)


def _lost(router: RouterConfig, method: str, flashinfer: FlashInfer) -> Iterator[str]:
    """Return the parameters that a router needs and this method ignores."""
    if router.correction_bias is not None and not flashinfer.honors(method, "bias"):
        yield "bias"
    if (router.topk_group or 1) < (router.n_group or 1):
        if not flashinfer.honors(method, "n_group"):
            yield "n_group"
        elif router.group_score != METHODS[RoutingMethodType[method]].recipe.group_score:
            yield f"group_score {router.group_score}"
    scales = flashinfer.honors(method, "routed_scaling_factor")
    if router.routed_scaling_factor != 1.0 and not scales:
        yield "scale"
