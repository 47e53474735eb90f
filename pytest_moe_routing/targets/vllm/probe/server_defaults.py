"""What a server of a release does unless it is told otherwise, read from its options and configs.

The options' module imports the whole server, so both are read and not run.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from typing import Any

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.vllm.probe import release as release
from pytest_moe_routing.targets.vllm.probe.release import names

#: A server whose option `--moe-backend` has this value keeps what its config has.
AUTO = "auto"
#: Rows of the contract: options, and the fields of configs that they fill.
_OPTIONS, _PARALLEL, _KERNEL = "server-options", "server-parallel", "server-kernel"
_BACKENDS = "moe-backends"
#: Fields of the parallel config that the probe asks with as a server has them.
ALL2ALL, PLACEMENT = "all2all_backend", "expert_placement_strategy"
#: The exchange of tokens that the probe asks with otherwise.
ALL_TO_ALL = "allgather_reducescatter"
#: Of the parallel config, everything else is asked as of a server that does this.
_ASSUMED: Mapping[str, Any] = {
    "tensor_parallel_size": 1,
    "data_parallel_size": 1,
    "enable_expert_parallel": False,
    "enable_eplb": False,
    "enable_dbo": False,
}


@cache
def moe_backend() -> str:
    """Return the `--moe-backend` of a server; `auto` for releases without that option.

    Raises:
        Unsupported: The default cannot be read.
    """
    field, option = f"{_KERNEL}.moe_backend", f"{_OPTIONS}.moe_backend"
    if not names().has(field):
        return AUTO
    stated = _default(option, field)
    value: str = _default(field) if stated == AUTO else stated
    return value


@cache
def require_backend(*wanted: str) -> None:
    """Check that a user of this release can name experts by one of these values.

    A selector that does not know a value answers as for experts that do not support a layer.

    Raises:
        Unsupported: `--moe-backend` takes none of them, or what it takes cannot be read.
    """
    if not names().has(_BACKENDS):
        return
    spelling = names().spelling(_BACKENDS)
    if not {*wanted} & {*names().definitions.literals(spelling.module, spelling.path)}:
        raise Unsupported(
            f"not judged: --moe-backend of vLLM {names().version} does not take "
            f"{' or '.join(wanted)}"
        )


@cache
def check_parallel() -> None:
    """Check that a server is not parallel by default, and what it does when it is.

    Raises:
        Unsupported: It is otherwise, or that cannot be read.
    """
    for name, assumed in _ASSUMED.items():
        found = parallel(name)
        if found != assumed:
            option = names().spelling(f"{_OPTIONS}.{name}")
            raise Unsupported(
                f"not judged: {option} in vLLM {names().version} is {found!r} "
                f"by default; the probe asks as of a server with {assumed!r}"
            )


@cache
def parallel(name: str) -> Any:
    """Return the default of an option that fills a field of the parallel config.

    Raises:
        Unsupported: It cannot be read.
    """
    return _default(f"{_OPTIONS}.{name}", f"{_PARALLEL}.{name}")


def _default(key: str, field: str | None = None) -> Any:
    """Return the value that a row of the contract has by default.

    Args:
        field: The row that it may take its default from.

    Raises:
        Unsupported: That is no literal.
    """
    spelling = names().spelling(key)
    owner, _, name = spelling.path.partition(".")
    node = _value(names().definitions.node(spelling.module, owner), name)
    if node is not None and field and ast.unparse(node) == names().spelling(field).path:
        return _default(field)
    value = node
    if isinstance(node, ast.Call):
        # Such as `Field(default=1, ge=1)`.
        given = [*node.args[:1], *(k.value for k in node.keywords if k.arg == "default")]
        value = next(iter(given), None)
    if not isinstance(value, ast.Constant):
        found = "nothing" if node is None else ast.unparse(node)
        raise Unsupported(
            f"not judged: the default of {spelling} in vLLM {names().version} is {found}, so it is "
            "not known what a server does by default"
        )
    return value.value


def _value(cls: ast.AST | None, name: str) -> ast.expr | None:
    """Return what the body of a class assigns to a field."""
    for node in cls.body if isinstance(cls, ast.ClassDef) else ():
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name:
            return node.value
    return None
