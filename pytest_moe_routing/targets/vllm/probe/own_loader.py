"""Splits a checkpoint of gpt-oss over ranks by the code of vLLM's model.

Its checkpoints have the weights of all experts in one tensor. What a rank has of it is decided by
`GptOssModel._load_weights_mxfp4` in vLLM's models/gpt_oss.py. That module imports all of a model;
here, its functions are run without it, among stand-ins for what surrounds a rank.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.syntax import parse
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.vllm.probe.ranks import Ranks
from pytest_moe_routing.targets.vllm.probe.release import accepted, names

#: The row of the contract for the function.
_LOADS = "weight-gpt-oss"
#: Modules that are real, by the ends of their names; all others are stubs.
_APART = ("ocp_mx_utils",)
_LAYER = "layers.3.mlp.experts."


def load_split(
    tensors: Mapping[str, Tensor],
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    inner: int,
    ranks: Ranks,
) -> None:
    """Load a rank's part of a checkpoint's tensors into a layer.

    Args:
        tensors: Those of all experts, by the names of the layer's parameters.
        parameters: Those of the layer.
        inner: The intermediate size of the checkpoint.

    Raises:
        Unsupported: The release does not have the function.
    """
    if not names().has(_LOADS):
        raise Unsupported("not judged: the code of the model splits a checkpoint of gpt-oss")
    function, around = _functions()
    around |= _surroundings(ranks)
    count = len(next(iter(tensors.values())))
    model = SimpleNamespace(
        config=SimpleNamespace(num_local_experts=count, intermediate_size=inner),
        parallel_config=SimpleNamespace(enable_expert_parallel=False),
        named_parameters=lambda: [(f"{_LAYER}{name}", each) for name, each in parameters],
        _try_load_streamed_expert=lambda *_: False,
    )
    weights = [(f"{_LAYER}{name}", tensor.clone()) for name, tensor in tensors.items()]
    given = {
        "self": model,
        "ep_rank_end": count,
        "ep_rank_start": 0,
        "weights": weights,
        "stacked_params_mapping": [],
        # Of attention, in releases before 0.33.
        "heads_per_rank": 0,
        "head_start": 0,
    }
    try:
        loaded = function(**accepted(function, given))
    except (AttributeError, NameError) as error:
        raise Unsupported(
            f"not judged: {names().spelling(_LOADS).path} of vLLM {names().version} asks for "
            f"something that is not known: {error}"
        ) from error
    if missing := {name for name, _ in weights} - set(loaded):
        raise Unsupported(f"not judged: {names().spelling(_LOADS).path} loads no {min(missing)}")


def _surroundings(ranks: Ranks) -> dict[str, Any]:
    """Return what the function finds of ranks that have a part of each expert."""
    return {
        "get_tensor_model_parallel_rank": lambda: ranks.rank,
        "get_tensor_model_parallel_world_size": lambda: ranks.count,
        "get_dp_group": lambda: SimpleNamespace(world_size=1, rank_in_group=0),
        "get_pcp_group": lambda: SimpleNamespace(world_size=1, rank_in_group=0),
        "remap_moe_expert_weights": lambda weights, _: weights,
        "is_pp_missing_parameter": lambda *_: False,
        # Parameters of experts have a loader of their own.
        "default_weight_loader": None,
        "torch": torch,
    }


@cache
def _functions() -> tuple[Any, dict[str, Any]]:
    """Return the function, and the names of its module that it finds."""
    spelling = names().spelling(_LOADS)
    tree = parse(stubs.installed_source_of(spelling.module))
    owner, _, name = spelling.path.partition(".")
    [cls] = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == owner]
    own = [n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == name]
    helpers = [n for n in tree.body if isinstance(n, ast.FunctionDef) and not n.decorator_list]
    future = ast.parse("from __future__ import annotations").body
    code = ast.Module([*future, *helpers, *own], [])
    known = dict(_imported(tree))
    exec(compile(code, f"{spelling.module.replace('.', '/')}.py", "exec"), known)
    return known[name], known


def _imported(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    """Yield what a module imports of modules that are real here."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            module: Any = sys.modules.get(node.module)
            if node.module.endswith(_APART):
                module = stubs.run_apart(node.module)
            for each in node.names:
                if each.name in vars(module or SimpleNamespace()):
                    yield each.asname or each.name, vars(module)[each.name]
