"""The kernel calls that mean what a model's router means, and what kernels can do for a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf

from pytest_moe_routing.flashinfer.grammar import EntryPoint, KernelCall
from pytest_moe_routing.flashinfer.rules import FlashInfer
from pytest_moe_routing.models import ExpertsConfig, ModelSpec, RouterConfig
from pytest_moe_routing.routing import Recipe, RoutingMethodType, recipe_of, same
from pytest_moe_routing.schemes import kernel_of

#: Major compute capability that verdicts are about: no GPU is needed to judge one.
BLACKWELL = 10


@dataclass(frozen=True)
class Gate:
    """One question that a scheme's experts ask of a configuration, and the answer.

    Attributes:
        reason: Why the answer is no.
        by_choice: Whether a no means that the target routes by itself on purpose.
    """

    name: str
    ok: bool
    reason: str = ""
    by_choice: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {'yes' if self.ok else 'no, ' + self.reason}"


def kernel_call(
    router: RouterConfig, scheme: str, method: str, flashinfer: FlashInfer
) -> KernelCall:
    """Return the routing arguments that a router needs, passed to a scheme's kernel.

    DeepSeekV3 takes groups, one of all experts when the router has none; a method that reads a
    bias gets zeros when the router has none, in bfloat16, which every launcher takes. The scaling
    factor is always the kernel's to apply.
    """
    grouped = method == RoutingMethodType.DeepSeekV3.name
    entry = flashinfer.entry_point(scheme)
    on_input = router.weight_on == "input" and entry is not None and "input" in entry.weight_on
    unbiased = "zeros" if flashinfer.honors(method, "bias") else "none"
    return KernelCall(
        scheme=scheme,
        method=method,
        num_experts=router.num_experts,
        top_k=router.top_k,
        logits_dtype=router.logits_dtype,
        n_group=(router.n_group or 1) if grouped else 0,
        topk_group=(router.topk_group or 1) if grouped else 0,
        bias="router" if router.correction_bias else unbiased,
        bias_dtype=router.correction_bias or "bfloat16",
        routed_scaling_factor=router.routed_scaling_factor,
        weight_on="input" if on_input else "output",
    )


def kernel_gates(
    model: ModelSpec, scheme: str, flashinfer: FlashInfer, device: int = BLACKWELL
) -> tuple[Gate, ...]:
    """Return what the kernels of a release can do for a model whatever the routing method."""
    router = model.router
    about = model.experts, router.weight_on, router.not_expressible
    return _kernel_gates(*about, scheme, flashinfer, device)


@lru_cache(maxsize=1 << 12)
def _kernel_gates(
    experts: ExpertsConfig,
    weight_on: str,
    not_expressible: str | None,
    scheme: str,
    flashinfer: FlashInfer,
    device: int,
) -> tuple[Gate, ...]:
    return tuple(_kernel_answers(experts, weight_on, not_expressible, scheme, flashinfer, device))


def _kernel_answers(
    experts: ExpertsConfig,
    weight_on: str,
    not_expressible: str | None,
    scheme: str,
    flashinfer: FlashInfer,
    device: int,
) -> Iterator[Gate]:
    entry = flashinfer.entry_point(scheme)
    if not_expressible is not None:
        yield Gate("router", False, not_expressible)
    yield Gate("quantization scheme", entry is not None, f"{flashinfer} has no kernel for {scheme}")
    majors = flashinfer.devices
    yield Gate(
        "device",
        device in majors,
        f"compute capability {device}.x is not in {', '.join(f'{m}.x' for m in majors)}",
    )
    if entry is None:
        return
    function = kernel_of(scheme).function()
    gated_as_needed = experts.gated == (experts.activation != "relu2")
    since = entry.activations.get(experts.activation)
    yield Gate(
        "activation",
        gated_as_needed and since is not None and flashinfer.has(since),
        f"no {function} kernel for {experts.activation}, "
        f"{'gated' if experts.gated else 'not gated'}, in {flashinfer}",
    )
    yield from _parameter_gates(experts, entry, function, flashinfer)
    yield Gate(
        "router weight side",
        weight_on in entry.weight_on,
        f"{function} cannot apply the router weight on the expert {weight_on}",
    )
    sizes = {
        "hidden_size": experts.latent_size or experts.hidden_size,
        "intermediate_size": experts.intermediate_size,
    }
    odd = [f"{name} {size}" for name, size in sizes.items() if size % entry.multiple_of]
    yield Gate("shape", not odd, f"{' and '.join(odd)} not a multiple of {entry.multiple_of}")


def _parameter_gates(
    experts: ExpertsConfig, entry: EntryPoint, function: str, flashinfer: FlashInfer
) -> Iterator[Gate]:
    """Whether the entry point takes what the experts have besides their weights."""
    if experts.activation_limit is not None and experts.gated:
        since = entry.activation_limit.get(experts.activation)
        yield Gate(
            "activation limit",
            since is not None and flashinfer.has(since),
            f"{function} does not accept a clamp of {experts.activation} in {flashinfer}",
        )
    if experts.bias:
        signature = flashinfer.signature(function)
        yield Gate(
            "expert biases",
            signature is not None and "gemm1_bias" in signature.parameters,
            f"{function} does not accept expert biases in {flashinfer}",
        )


@lru_cache(maxsize=1 << 12)
def meaning(got: Recipe) -> Recipe:
    """Return a kernel's recipe, less a mask that does nothing without a bias that is low enough.

    No config tells whether a checkpoint's bias is. `effects.mask_notes` says what the mask can do.
    """
    return replace(got, mask=-inf) if got.bias else got


def exact_calls(
    model: ModelSpec, scheme: str, flashinfer: FlashInfer, methods: Iterable[str] | None = None
) -> list[KernelCall]:
    """Every kernel call that means what the model's router means: computed, not classified.

    Args:
        methods: Only the calls with these methods.
    """
    if not all(gate.ok for gate in kernel_gates(model, scheme, flashinfer)):
        return []
    return same_calls(model.router, scheme, flashinfer, methods)


def same_calls(
    router: RouterConfig, scheme: str, flashinfer: FlashInfer, methods: Iterable[str] | None = None
) -> list[KernelCall]:
    """Every call of a scheme's kernel that means what a router means, whatever the experts are."""
    if router.not_expressible is not None:
        return []
    wanted = recipe_of(router)
    chosen = [m for m in flashinfer.methods if methods is None or m in methods]
    calls = (kernel_call(router, scheme, method, flashinfer) for method in chosen)
    return [
        call
        for call in calls
        if call.method != "Unspecified"
        and same(wanted, meaning(flashinfer.recipe(call)), router.num_experts)
        and not flashinfer.violations(call)
    ]
