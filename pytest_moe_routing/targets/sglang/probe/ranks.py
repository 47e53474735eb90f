"""The ranks that share out a layer's experts, and what was decided about its shared experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.sglang.probe.configs import ModelConfig
from pytest_moe_routing.targets.sglang.probe.raised import verdict_on
from pytest_moe_routing.targets.shares import rank_of

#: Ranks that share out the experts, unless models treat a single one otherwise.
EP_SIZE = 2


@dataclass
class Ranks:
    """Where a layer runs, and how SGLang's server has been set up for it.

    Attributes:
        count: Ranks that experts are shared out to, of which the last one is run.
        parts: Ranks that have a part of each expert, of which one is run, see `rank_of`.
        apart: Whether the server keeps shared experts apart from the routed ones.
        shared: What the model's code has decided about its shared experts, as SGLang has it.
        kept: What SGLang's code keeps of that elsewhere.
    """

    count: int = EP_SIZE
    parts: int = 1
    apart: bool = True
    shared: Any = None
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def part(self) -> int:
        """The rank that is run, of those that have a part of each expert."""
        return rank_of(self.parts)


#: Those of the layer that is being made or run: SGLang's functions find them without an argument.
RANKS = Ranks()


@contextmanager
def _changed(**changes: Any) -> Iterator[None]:
    """Change attributes of `RANKS` for a while."""
    before = vars(RANKS).copy()
    vars(RANKS).update({"kept": {}, **changes})
    try:
        yield
    finally:
        vars(RANKS).update(before)


def sharing_out(count: int) -> AbstractContextManager[None]:
    """Have so many ranks share out the experts."""
    return _changed(count=count)


def splitting(parts: int) -> AbstractContextManager[None]:
    """Have ranks split each expert, rather than share out the experts."""
    return _changed(count=1, parts=parts)


@contextmanager
def fusing(
    names: Names, model: Any, values: Mapping[str, Any], quantization: Any
) -> Iterator[None]:
    """Have a server leave shared experts to the model's code, on one rank that has all experts.

    Models put none among the routed experts where several ranks share those out. The arguments are
    those of `_decide`.

    Raises:
        Unsupported: SGLang's code does not decide here.
    """
    capability = patch.object(torch.cuda, "get_device_capability", lambda *_: (10, 0))
    with _changed(count=1, apart=False), capability:
        _decide(names, model, values, quantization)
        yield


def _decide(names: Names, model: Any, values: Mapping[str, Any], quantization: Any) -> None:
    """Have the code of a model decide about its shared experts, as SGLang's loader does.

    Args:
        model: The model's class.
        values: Attributes of its config. Those of the config of its text model, in `text_config`,
            are the same but for what is there.
        quantization: The config of its quantization.

    """
    text = ModelConfig({**values, **values["text_config"]})
    replaced: dict[str, Any] = {}
    if names.has("shared-experts"):
        # The base of the class, of a package that is not here, would keep what it is made with.
        own = {"__init__": lambda shared, **given: shared.__dict__.update(given)}
        kept = type("Shared", (names.get("shared-experts"),), own)
        replaced[names.spelling("shared-experts").path] = kept
    module = vars(import_module(names.spelling("shared-experts-decided").module))
    config = ModelConfig({**values, "text_config": text})
    try:
        with patch.dict(module, replaced):
            RANKS.shared = names.get("shared-experts-decided")(model, config, quantization)
    except Exception as error:
        why = verdict_on(error, is_built=False)[1]
        raise Unsupported(f"whether shared experts are among the routed ones: {why}") from error
