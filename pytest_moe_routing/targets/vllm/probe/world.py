"""What surrounds the code of vLLM's models: all of an installed vLLM, or stand-ins (`apart`)."""

from __future__ import annotations

import atexit
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, patch

from torch import Tensor, nn

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.config_classes import place_of
from pytest_moe_routing.targets.contract import Contract, Names


class World:
    """Where the code of models is run. The base class describes it; its two kinds differ in all.

    Attributes:
        names: The contract's names in the release.
        root: The directory or wheel file that holds vLLM.
    """

    names: Names
    root: str

    @property
    def vllm_config(self) -> Any:
        """The one config of a server for all blocks.

        Raises:
            Unsupported: vLLM does not run here.
        """
        raise NotImplementedError

    def current(self, vllm_config: Any) -> AbstractContextManager[Any]:
        """Have vLLM's code find this config meanwhile."""
        raise NotImplementedError

    def module(self, name: str) -> ModuleType:
        """Import a module of models.

        Raises:
            Unsupported: The release has none, or it does not import.
        """
        raise NotImplementedError

    def config(
        self,
        kind: str | None,
        nested: Sequence[str],
        values: Mapping[str, Any],
        stated: Mapping[str, Any],
        computed: Mapping[str, Any],
    ) -> tuple[Any, str]:
        """Return a model's config object, as vLLM reads it from a config.json with these keys.

        Args:
            kind: The `model_type` of the text model.
            nested: That of the whole config, and the key of the text model's in it; see `nesting`.
            values: The keys with the values that they have in transformers' class.
            stated: Those that the config.json states, for a class of vLLM's own.
            computed: Attributes that transformers' class computes of other keys.

        Returns:
            The object, and file, line and name of its class if it is vLLM's own, else "".
        """
        raise NotImplementedError

    def linear_layers(self, block: type) -> AbstractContextManager[Any]:
        """Have the linear layers of a block computed with torch meanwhile."""
        raise NotImplementedError


class Installed(World):
    """An installed vLLM, told that it runs on a CPU, with a group of this one process."""

    def __init__(self, root: str, version: str) -> None:
        sys.path.insert(0, root)
        self.root = root
        definitions = stubs.definitions("vllm", root)
        self.names = Names(Contract.of("vllm"), version, definitions, import_module)

    @property
    def vllm_config(self) -> Any:
        config, failure = self._started
        if failure:
            raise Unsupported(failure)
        return config

    @cached_property
    def _started(self) -> tuple[Any, str]:
        """Start vLLM once: its config, or the reason why it does not run here."""
        try:
            return _start(), ""
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            return None, f"models' code needs a vllm that runs here: {text}"

    def current(self, vllm_config: Any) -> AbstractContextManager[Any]:
        from vllm.config import set_current_vllm_config

        context: AbstractContextManager[Any] = set_current_vllm_config(vllm_config)
        return context

    def module(self, name: str) -> ModuleType:
        # transformers looks once for what is installed, and must not see what follows.
        import transformers  # noqa: F401

        # Some models' modules import their vision part as well, which is not used here.
        if find_spec("torchvision") is None:
            for part in ("", ".transforms", ".transforms.v2", ".transforms.functional", ".ops"):
                sys.modules.setdefault(f"torchvision{part}", MagicMock())
        try:
            return import_module(name)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            raise Unsupported(
                f"this release has no {name}, or it does not import: {text}"
            ) from error
        finally:
            for stub in [key for key, m in sys.modules.items() if isinstance(m, MagicMock)]:
                del sys.modules[stub]

    def config(
        self,
        kind: str | None,
        nested: Sequence[str],
        values: Mapping[str, Any],
        stated: Mapping[str, Any],
        computed: Mapping[str, Any],
    ) -> tuple[Any, str]:
        from transformers import CONFIG_MAPPING, PreTrainedConfig
        from vllm.transformers_utils.config import _CONFIG_REGISTRY

        outer, key = nested
        if key and outer in _CONFIG_REGISTRY:
            made = _CONFIG_REGISTRY[outer].from_dict({key: dict(stated)}).get_text_config()
            return made, place_of(self.names, type(made))
        if kind is None:
            cls = PreTrainedConfig
        elif kind in _CONFIG_REGISTRY:
            cls = _CONFIG_REGISTRY[kind]
        elif kind in CONFIG_MAPPING:
            cls = CONFIG_MAPPING[kind]
        else:
            raise Unsupported(f"neither vllm nor transformers has a config class {kind}")
        where = place_of(self.names, cls) if cls.__module__.startswith("vllm.") else ""
        return cls.from_dict(dict(values)), where

    def linear_layers(self, block: type) -> AbstractContextManager[Any]:
        # A platform chooses its own way when weights are loaded, which they are not.
        spelling = self.names.spelling("code-linear")
        method = getattr(import_module(spelling.module), spelling.path.partition(".")[0])
        return patch.object(method, "apply", _linear)


# One release per process.
_world: World | None = None


def world() -> World:
    """Return what surrounds the code of models in this process."""
    assert _world is not None
    return _world


def set_world(found: World) -> None:
    """Have the code of models surrounded by this from now on."""
    global _world
    _world = found


def _start() -> Any:
    """Return a server's config; vLLM's groups, of this one process, are there from now on."""
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    # On a machine with GPUs too: what the model code asks of its layer is the same.
    vllm.platforms.current_platform = CpuPlatform()
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    config = VllmConfig()
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    store = Path(folder.name) / "store"
    with set_current_vllm_config(config):
        init_distributed_environment(
            world_size=1,
            rank=0,
            local_rank=0,
            distributed_init_method=store.as_uri(),
            backend="gloo",
        )
        initialize_model_parallel(1)
    return config


def _linear(_method: Any, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    weight, dtype = layer.weight, getattr(layer, "out_dtype", None)
    if dtype is not None:
        # A gate's kernels give what they sum up in, and do not round it first.
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return nn.functional.linear(x, weight, bias)
