"""Compiled routing kernels of other projects, one adapter for each library.

An adapter says which kernel of its library the framework calls for a router, with which arguments,
and what the kernel computes of them. Others add theirs through the entry point group
`moe_routing.kernels`: a name, and a subclass of `RouterKernels`.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_moe_routing.errors import MoERoutingError, Unsupported
from pytest_moe_routing.models import RouterConfig
from pytest_moe_routing.routing import Recipe

if TYPE_CHECKING:
    from torch import Tensor

GROUP = "moe_routing.kernels"


@dataclass(frozen=True)
class RouterCall:
    """How a framework routes by one of its kernels.

    Attributes:
        kernel: Name of the kernel.
        recipe: What it computes for these arguments; its scale is the factor that it applies.
        run: Takes logits `[tokens, experts]` and a float32 bias `[experts]` or None on the GPU, and
            returns float32 weights and int32 ids, both `[tokens, top_k]`.
        precision: How it computes, a key of `compare.tolerances.PRECISIONS`.
    """

    kernel: str
    recipe: Recipe
    run: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
    precision: str = "float32"


class RouterKernels:
    """Base class of adapters.

    Args:
        path: The library, or a wheel or directory that has it; None for the installed package.

    Raises:
        Unsupported: The library does not load here, with the reason.

    Attributes:
        name: The name under which it is registered.
        device: Where tensors must lie.
    """

    name: ClassVar[str]
    device: ClassVar[str] = "cuda"

    def __init__(self, path: Path | None = None) -> None:
        self.path = path

    def __str__(self) -> str:
        return self.name if self.path is None else f"{self.name}@{self.path}"

    def environment(self) -> dict[str, Any]:
        """Describe the GPU of this process and what runs on it, for reports.

        Raises:
            Unsupported: torch finds no GPU.
        """
        import torch

        if not torch.cuda.is_available():
            raise Unsupported(f"torch {torch.__version__} finds no CUDA device")
        major, minor = torch.cuda.get_device_capability()
        return {
            "gpu": f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})",
            "uuid": str(torch.cuda.get_device_properties(0).uuid),
            "driver": "",
            "worker": os.environ.get("PYTEST_XDIST_WORKER", "no xdist"),
            "torch": torch.__version__,
            "kernels": str(self),
        }

    def calls(self, router: RouterConfig) -> Iterator[RouterCall]:
        """Yield the calls by which the framework may route for a model; none for torch alone."""
        raise NotImplementedError


def kernel_names() -> list[str]:
    """Names of all registered adapters."""
    return sorted({entry.name for entry in metadata.entry_points(group=GROUP)})


def kernel_choices() -> tuple[str, str]:
    """Return what `--moe-kernels` may be, as a regular expression and in words."""
    names = kernel_names()
    words = ["flashinfer", "simulator", "simulator:FAULT", *(f"{name}[@PATH]" for name in names)]
    pattern = rf"flashinfer|simulator(:[\w-]+)?|({'|'.join(names)})(@.+)?"
    return pattern, f"{', '.join(words[:-1])} or {words[-1]}"


def load_kernels(name: str) -> RouterKernels:
    """Make an adapter, given `NAME` or `NAME@PATH`.

    Raises:
        MoERoutingError: No adapter has this name.
        Unsupported: Its library does not load here.
    """
    registered, at, path = name.partition("@")
    for entry in metadata.entry_points(group=GROUP):
        if entry.name == registered:
            adapter: RouterKernels = entry.load()(Path(path).expanduser() if at else None)
            return adapter
    known = ", ".join(kernel_names())
    raise MoERoutingError(
        f"unknown kernels {registered!r}; kernels: {known}, each optionally with @PATH"
    )


def load_library(path: Path | None, package: str, member: str, folder: Path) -> Path:
    """Load a library of operators into torch, from where it lies.

    Args:
        path: The library itself, a wheel or a directory; None for the installed package.
        package: The package that has it.
        member: Its path in the package.
        folder: Where a library out of a wheel is put.

    Raises:
        Unsupported: There is no such library, or torch does not load it.
    """
    import torch

    if path is None:
        try:
            path = Path(str(metadata.distribution(package).locate_file("")))
        except metadata.PackageNotFoundError:
            raise Unsupported(f"{package} is not installed; name a wheel: NAME@WHEEL") from None
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            try:
                path = Path(wheel.extract(member, folder))
            except KeyError:
                raise Unsupported(f"{path} has no {member}") from None
    elif path.is_dir():
        path = path / member
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise Unsupported(f"torch {torch.__version__} does not load {path}: {error}") from error
    return path


def call_operator(operator: Any, arguments: Mapping[str, Any]) -> Any:
    """Call an operator with those of the arguments that its schema names.

    Raises:
        Unsupported: It needs an argument that is not among them.
    """
    schema = operator.default._schema
    given = []
    for argument in schema.arguments:
        if argument.name in arguments:
            given.append(arguments[argument.name])
        elif argument.has_default_value():
            given.append(argument.default_value)
        elif "?" in str(argument.type) or "Optional" in str(argument.type):
            given.append(None)
        else:
            raise Unsupported(
                f"{schema.name} needs {argument.name}, which this adapter does not know"
            )
    return operator(*given)
