"""Is there a GPU here that can run FlashInfer's routing kernels, and if not, why not."""

from __future__ import annotations

import ctypes
import inspect
from dataclasses import dataclass
from functools import cache

from pytest_moe_routing.backends import FlashInfer, installed_release

#: The standalone routing operator came with this release.
NEEDS_FLASHINFER = "0.7.0"


@dataclass(frozen=True)
class Gpu:
    """A GPU with everything that the routing kernels need, or the reason why there is none."""

    missing: str = ""
    name: str = ""
    capability: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        return self.missing or f"{self.name} (compute capability {'.'.join(map(str, self.capability))})"


@cache
def find_gpu() -> Gpu:
    """The current GPU. Asks the cheap questions first: no torch where there is no driver."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Gpu("no NVIDIA driver: libcuda.so.1 is not there")
    import torch

    if not torch.cuda.is_available():
        return Gpu("torch finds no CUDA device")
    major, minor = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    release = installed_release()
    if release is None:
        return Gpu(f"{name}: flashinfer-python is not installed")
    flashinfer = FlashInfer.of(release)
    if not flashinfer.has(NEEDS_FLASHINFER):
        return Gpu(f"{name}: trtllm_gen_routing needs FlashInfer {NEEDS_FLASHINFER}, not {release}")
    if major not in flashinfer.devices:
        majors = ", ".join(f"{m}.x" for m in flashinfer.devices)
        return Gpu(f"{name}: compute capability {major}.{minor}, but {flashinfer} wants {majors}")
    return Gpu("", name, (major, minor))


def check_signature(function: object, names: list[str]) -> None:
    """Raise `TypeError` unless an entry point takes every argument that is passed by name."""
    takes = inspect.signature(function).parameters  # type: ignore[arg-type]
    unknown = [name for name in names if name not in takes]
    if unknown:
        raise TypeError(f"{function} takes no {', '.join(unknown)}; it takes {', '.join(takes)}")
