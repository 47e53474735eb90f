"""What a target is: something that classifies routers and gates them, in one release."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pytest_moe_routing.backends import FlashInfer, Gate, KernelCall, kernel_call
from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.routing import Classification


class Target:
    """Base class of targets: answers nothing, so that a subclass answers what it can.

    A question that a target cannot answer raises `Unsupported` with a reason, which becomes a
    skip. A target is made with the FlashInfer release that its decisions are judged against.
    """

    name: ClassVar[str]

    def __init__(self, flashinfer: FlashInfer) -> None:
        self.flashinfer = flashinfer

    @classmethod
    def check_installed(cls) -> None:
        """Raise `TargetNotInstalled` if the package is not here. Asked at start: must be cheap.

        The module of a target is imported for this: it imports what it tests later, when made.
        """

    def version(self) -> str:
        """The release of what is tested."""
        raise Unsupported(f"{self.name} does not say its version")

    def method_numbers(self) -> Mapping[str, int]:
        """The number that the target passes to FlashInfer for each routing method, by name."""
        raise Unsupported(f"{self.name} has no routing method numbers")

    def classify(self, model: ModelSpec) -> Classification:
        """The routing method that the target gives to a model's router."""
        raise Unsupported(f"{self.name} does not classify routers")

    def gates(self, model: ModelSpec, backend: str, method: str) -> tuple[Gate, ...]:
        """The gates that a backend's fused experts put before this method, with their answers."""
        raise Unsupported(f"{self.name} has no gates for {backend}")

    def kernel_call(self, model: ModelSpec, backend: str, method: str) -> KernelCall:
        """The routing arguments that reach the kernel.

        A target that does not record its real calls is taken to pass what the model says.
        """
        return kernel_call(model.router, backend, method, self.flashinfer)

    def __str__(self) -> str:
        return f"{self.name} {self.version()}"
