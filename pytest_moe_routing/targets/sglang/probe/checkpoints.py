"""Asks SGLang which quantization it finds in a checkpoint, by its config, and what serves experts.

SGLang's config of a model (`configs/model_config.py`) and its loader are run as far as they read
quantization configs. What they make of a checkpoint has to be what blocks of its scheme are built
with elsewhere: the rows of `configs.yaml`.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol

import torch
from torch import nn

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.answers import ServedAnswer
from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.sglang.model_configs import configs
from pytest_moe_routing.targets.sglang.probe.configs import quant_config
from pytest_moe_routing.targets.sglang.probe.raised import raising, verdict_on
from pytest_moe_routing.targets.sglang.probe.requests import EXPERTS, module_apart, requesting
from pytest_moe_routing.targets.sglang.probe.sources import Sources
from pytest_moe_routing.targets.sglang.probe.world import choose_runner

#: The file that ModelOpt writes next to a config.json without a quantization config.
_FILE = "hf_quant_config.json"
#: How a checkpoint's files name the dtype of its experts' weights, by how its config does.
_STORED = {"fp4": "I8", "fp8": "F8_E4M3"}
#: What SGLang's config of a model has from a quantization config besides its name.
_IN_WEIGHTS: Mapping[str, Any] = {"is_fp4_experts": False, "nvfp4_moe_meta": None}
#: What decides which kernel a quantization config's experts get, and with which scales.
_FACTS = ("activation_scheme", "group_size", "is_fp4_experts", "use_mxfp8",
          "use_per_token_activation", "weight_block_size")  # fmt: skip


class Blocks(Protocol):
    """What answers about a release; see `main.Blocks`."""

    names: Names
    sources: Sources

    def __hash__(self) -> int: ...

    def method_numbers(self) -> dict[str, int]: ...


def checkpoint(
    blocks: Blocks,
    model: Mapping[str, Any],
    config: dict[str, Any],
    hf_config: Mapping[str, Any],
    prefix: str,
) -> ServedAnswer:
    """Return what SGLang makes of the experts of a checkpoint, without `--quantization`.

    The arguments are those of vLLM's question of this name.

    Raises:
        Unsupported: The release does not have what the question needs.
    """
    names = blocks.names
    names.require("checkpoints")
    if not names.expects("checkpoint-name"):
        raise Unsupported(
            f"not judged: what reads a checkpoint's config in SGLang {names.version} is not run"
        )
    blocks.method_numbers()
    asked = None
    try:
        with TemporaryDirectory() as folder:
            if is_file := "quantization" in config:
                Path(folder, _FILE).write_text(json.dumps(config))
            stated = None if is_file else deepcopy(config)
            stored = {EXPERTS: _STORED.get(str(hf_config.get("expert_dtype")))}
            with requesting(**stored):
                asked = _asked(blocks, folder, {**hf_config, "quantization_config": stated})
            made = _made(blocks, asked, config if stated is None else stated)
        served = sorted(_schemes(names, asked, made, prefix))
        method = _method(names, made, prefix)
    except Unsupported:
        raise
    except Exception as error:
        kind, text, _ = verdict_on(error, is_built=False)
        if kind != "refused":
            raise Unsupported(
                f"not judged: SGLang {names.version} reads no checkpoint: {text}"
            ) from error
        code = raising(error)
        name = "" if asked is None else asked.quantization or ""
        return ServedAnswer(
            name=name,
            method="",
            schemes=[],
            keys=[],
            source=code["source"],
            rejection=text,
            rejected_in=code["name"],
        )
    facts = [f"{name}={value}" for name, value in _facts(made).items()]
    found = [f"{name}={getattr(asked, name)}" for name in _IN_WEIGHTS]
    found += [f"{name}={value}" for name, (_, value) in _filled_in(asked).items()]
    code = type(made).__init__.__code__
    file = code.co_filename.rpartition("/sglang/")[2]
    source = f"sglang/{file}:{code.co_firstlineno}"
    return ServedAnswer(
        name=asked.quantization,
        method=type(method).__name__,
        schemes=served,
        keys=facts + found,
        source=source,
        rejection="",
        rejected_in="",
    )


def _asked(blocks: Blocks, folder: str, hf_config: Mapping[str, Any]) -> Any:
    """Return SGLang's config of a model, as far as it reads a quantization config."""
    module = _model_config(blocks)
    asked = object.__new__(module.ModelConfig)
    vars(asked).update(
        hf_config=SimpleNamespace(**hf_config),
        quantization=None,
        model_path=folder,
        revision=None,
        is_draft_model=False,
        is_draft_quantization_explicit=False,
        dtype=torch.bfloat16,
    )
    read = _part_of(blocks.sources, blocks.names, module)
    read(asked)
    asked._verify_quantization()
    return asked


@cache
def _part_of(sources: Sources, names: Names, module: ModuleType) -> Any:
    """Return the statements of a constructor that `_IN_WEIGHTS` depend on, as one."""
    spelling = names.spelling("checkpoint-name")
    owner = sources.definitions(spelling.module)[spelling.path]
    assert isinstance(owner, ast.ClassDef)
    (made,) = (n for n in owner.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    needed, kept = set(_IN_WEIGHTS), list[ast.stmt]()
    for statement in reversed(made.body):
        if needed & set(_set_in(statement)):
            kept.insert(0, statement)
            needed |= {n.id for n in ast.walk(statement) if isinstance(n, ast.Name)} - {"self"}
    made = deepcopy(made)
    made.name, made.body, made.args.kwonlyargs, made.args.kw_defaults = "read", kept, [], []
    made.args.args, made.args.defaults = made.args.args[:1], []
    space = vars(module)
    exec(compile(ast.Module([made], []), module.__file__ or spelling.module, "exec"), space)
    return space.pop("read")


def _set_in(statement: ast.stmt) -> Iterator[str]:
    """Yield the names and attributes that a statement of a constructor sets."""
    for node in ast.walk(statement):
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


class _NotRun:
    """The config of a quantization whose code is a stub: it takes no checkpoint from others."""

    @staticmethod
    def override_quantization_method(*_: Any, **__: Any) -> None:
        """Leave a checkpoint to others."""


@cache
def _registry(blocks: Blocks) -> dict[str, Any]:
    """Return the classes of quantization configs, by the names of quantizations."""
    names = blocks.names
    spelling, base = names.spelling("checkpoint-classes"), names.get("checkpoint-base")
    # The package's own file alone: of its modules, only some run.
    space: dict[str, Any] = {"__name__": spelling.module}
    exec(compile(blocks.sources.tree(spelling.module), spelling.module, "exec"), space)
    found = space[spelling.path]
    return {
        name: each if isinstance(each, type) and issubclass(each, base) else _NotRun
        for name, each in found.items()
    }


@cache
def _model_config(blocks: Blocks) -> ModuleType:
    module = module_apart(blocks.names.spelling("checkpoint-name").module)
    vars(module)[blocks.names.spelling("checkpoint-classes").path] = _registry(blocks)
    # Code that is imported later finds it in its own module, which is a stub.
    detects = blocks.names.spelling("checkpoint-weights")
    function = getattr(module_apart(detects.module), detects.path)
    setattr(import_module(detects.module), detects.path, function)
    return module


def _made(blocks: Blocks, asked: Any, stated: dict[str, Any]) -> Any:
    """Return the quantization config that SGLang's loader makes."""
    made = _registry(blocks)[asked.quantization]
    if made is _NotRun:
        raise Unsupported(f"not judged: the config of {asked.quantization} is not run")
    made = made.from_config(stated)
    spelling = blocks.names.spelling("checkpoint-loader")
    loader = module_apart(spelling.module)
    vars(loader).update(
        get_quant_config=lambda *_: made,
        get_model_architecture=lambda _: (None, ""),
    )
    return getattr(loader, spelling.path)(asked, None)


def _facts(made: Any) -> dict[str, Any]:
    return {name: getattr(made, name) for name in _FACTS if hasattr(made, name)}


def _method(names: Names, made: Any, prefix: str) -> Any:
    """Return what a quantization config serves experts with."""
    layer = object.__new__(names.get("layer"))
    nn.Module.__init__(layer)
    vars(layer).update(use_triton_kernels=False, use_flashinfer_trtllm_moe=False)
    return made.get_quant_method(layer, prefix)


def _filled_in(asked: Any) -> dict[str, tuple[Any, Any]]:
    """Return values of config.json as `configs.yaml` and SGLang have them; SGLang changes some."""
    architecture, *_ = getattr(asked.hf_config, "architectures", None) or [""]
    values: Mapping[str, Any] = configs()["filled_in"].get(architecture, {})
    kept = vars(asked.hf_config)
    return {name: (value, kept[name]) for name, value in values.items() if name in kept}


def _schemes(names: Names, asked: Any, made: Any, prefix: str) -> Iterator[str]:
    """Yield the schemes of which a row has what SGLang has made of a checkpoint."""
    in_weights = {name: getattr(asked, name) for name in _IN_WEIGHTS}
    if any(ours != theirs for ours, theirs in _filled_in(asked).values()):
        return
    for scheme, row in configs()["schemes"].items():
        for other in (
            row,
            *row.get("formats", {}).values(),
            *row.get("architectures", {}).values(),
        ):
            each = {**row, **other}
            told = each["config"]
            if told is None or "arguments" not in told:
                told = told and {**told, "in_checkpoint": each["in_checkpoint"]}
            told_of = {**_IN_WEIGHTS, **each.get("in_weights", {})}
            if each["quantization"] != asked.quantization or told_of != in_weights:
                continue
            choose_runner(each["runner"])
            usual = quant_config(names, told)
            served = (type(_method(names, each, prefix)) for each in (made, usual))
            if len({*served}) == 1 and _facts(usual) == _facts(made):
                yield scheme
                break
