"""The kernels under test: FlashInfer's on a GPU, or their simulation on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pytest_moe_routing.errors import MoERoutingError
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.kernels.gpu import HOPPER, Gpu

if TYPE_CHECKING:
    from pytest_moe_routing.simulator.stages import Fault

#: What `--moe-kernels` is by default; `simulator` or `simulator:FAULT` otherwise.
FLASHINFER = "flashinfer"


@dataclass(frozen=True)
class Kernels:
    """The kernels under test.

    Attributes:
        name: As `--moe-kernels` names them.
        fused_moe: The module `flashinfer.fused_moe`, or what stands for it.
        autotune: `flashinfer.autotune`.
        device: Where tensors must lie.
        precision: How they compute, a key of `compare.tolerances.PRECISIONS`.
        lacks_fused: Why the fused entry points do not run here; empty where they do.
    """

    name: str
    fused_moe: Any
    autotune: Callable[[bool], AbstractContextManager[Any]]
    device: str = "cuda"
    precision: str = "flashinfer"
    lacks_fused: str = ""

    @property
    def simulated(self) -> bool:
        return self.name != FLASHINFER


def on_gpu(gpu: Gpu) -> Kernels:
    """FlashInfer's kernels on a GPU that has them."""
    hopper = gpu.capability[0] == HOPPER
    return Kernels(
        FLASHINFER,
        import_module("flashinfer.fused_moe"),
        lambda on: import_module("flashinfer").autotune(on),
        precision="flashinfer-sm90" if hopper else "flashinfer",
        lacks_fused=f"{gpu}: the fused kernels need Blackwell" if hopper else "",
    )


def simulated(name: str, flashinfer: FlashInfer) -> Kernels:
    """Return a release's kernels on the CPU, with the fault of `simulator:FAULT`, if any.

    Raises:
        MoERoutingError: There is no such fault.
    """
    from pytest_moe_routing.simulator.simulator import Simulator

    simulator = Simulator(flashinfer, fault_of(name))
    return Kernels(name, simulator, simulator.autotune, device="cpu")


def fault_of(name: str) -> Fault | None:
    """Return the fault of `simulator:FAULT`; None for `simulator`.

    Raises:
        MoERoutingError: There is no such fault.
    """
    from pytest_moe_routing.simulator.faults import FAULTS

    _, _, fault = name.partition(":")
    if fault and fault not in FAULTS:
        faults = ", ".join(FAULTS)
        raise MoERoutingError(f"--moe-kernels: unknown fault {fault!r}; faults: {faults}")
    return FAULTS.get(fault)
