"""Makes the MoE blocks of transformers' models, from small configs of their own classes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import nn

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.models import RouterConfig

#: Widths that routing does not depend on, other than any number of experts.
_WIDTH = 24


def block_maker(
    config: str, keys: Mapping[str, Any], router: RouterConfig, hidden_size: int = 0
) -> tuple[Callable[[], nn.Module], Any]:
    """Return what makes the one MoE block of a model's module, with small widths, and its config.

    Args:
        config: The config class, as `folder.Class`.
        keys: Keys of a config, with their values; the class has some of them.
        hidden_size: Width of the hidden states; the number of experts if it is 0.

    Raises:
        Unsupported: The release has no such class, or its block cannot be built here.
    """
    folder, _, name = config.rpartition(".")
    try:
        configuration = import_module(f"transformers.models.{folder}.configuration_{folder}")
        modeling = import_module(f"transformers.models.{folder}.modeling_{folder}")
        made = getattr(configuration, name)()
    except (ImportError, AttributeError) as missing:
        raise Unsupported(f"this release has no {config}: {missing}") from missing
    for key, value in {**keys, **_widths(hidden_size or router.num_experts)}.items():
        if hasattr(made, key):
            try:
                # A value may be one for each kind of token.
                usual = getattr(made, key)
                setattr(made, key, [value] * len(usual) if isinstance(usual, list) else value)
            except Exception as error:
                raise Unsupported(f"{name} does not accept {key}={value!r}: {error}") from error
    classes = list(_classes(modeling))
    if len(classes) != 1:
        found = ", ".join(cls.__name__ for cls in classes) or "none"
        raise Unsupported(f"{modeling.__name__} has not one class with experts: {found}")
    given = {"config": made, "layer_idx": 1, "intermediate_size": _WIDTH}
    names = inspect.signature(classes[0].__init__).parameters

    def maker() -> nn.Module:
        try:
            block = classes[0](**{name: given[name] for name in names if name in given})
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            raise Unsupported(f"{classes[0].__name__} cannot be built here: {told}") from error
        return block.eval()

    return maker, made


def _widths(hidden_size: int) -> dict[str, Any]:
    inner = (
        *("intermediate_size", "moe_intermediate_size", "expert_ffn_hidden_size"),
        "shared_expert_intermediate_size",
    )
    return {"hidden_size": hidden_size, "d_model": hidden_size, **dict.fromkeys(inner, _WIDTH)}


def _classes(module: ModuleType) -> Iterator[Callable[..., nn.Module]]:
    """Yield the classes of a module whose constructor makes experts."""
    for value in vars(module).values():
        is_module = inspect.isclass(value) and issubclass(value, nn.Module)
        if not is_module or value.__module__ != module.__name__ or "__init__" not in vars(value):
            continue
        if "self.experts =" in inspect.getsource(value.__init__):
            yield value
