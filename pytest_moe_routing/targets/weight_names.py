"""Which halves of a gated expert the code of a model loads its checkpoint's weights into.

Checkpoints name the three matrices of an expert gate_proj, up_proj and down_proj, or w1, w3 and w2
(transformers 5.6.2: modeling_mixtral.py up to 4.x, conversion_mapping.py since). Frameworks stack
gate and up in one tensor, and say which is which in three ways:

- keywords of what makes a mapping: `ckpt_gate_proj_name="gate_proj"`, or `ckpt_names` with gate,
  down and up;
- rows of a mapping: parameter, weight and shard, which is 0 or w1 for gate, and 1 or w3 for up; or
  the weight as a key, and the others as its value;
- lists of what is stacked: `"gate_up_proj": ["gate_proj", "up_proj"]`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from pytest_moe_routing.oracle.misnamed import MisnamedWeight

_GATE, _UP, _DOWN = "gate", "up", "down"
_ROLES = {
    "gate_proj": _GATE,
    "w1": _GATE,
    "up_proj": _UP,
    "w3": _UP,
    "down_proj": _DOWN,
    "w2": _DOWN,
}
#: What a shard of a stacked tensor is. The second matrix is not stacked: its shard is w2, or none.
_SHARDS: dict[object, str] = {0: _GATE, "w1": _GATE, 1: _UP, "w3": _UP, "w2": _DOWN}
_KEYWORDS = {
    "ckpt_gate_proj_name": _GATE,
    "ckpt_up_proj_name": _UP,
    "ckpt_down_proj_name": _DOWN,
}
#: In the order of this keyword's tuple.
_NAMES, _ORDER = "ckpt_names", (_GATE, _DOWN, _UP)
#: Names of the parameter that gate and up are stacked in.
_STACKED = ("gate_up_proj", "w13", "w13_weight")


def misnamed_weights(definition: ast.AST) -> Iterator[MisnamedWeight]:
    """Yield the weights that a definition of a model's code loads into another matrix's place."""
    for node in ast.walk(definition):
        if isinstance(node, ast.Call):
            yield from _of_call(node)
        elif isinstance(node, ast.Tuple) and len(node.elts) == 3:
            yield from _of_row(*node.elts)
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(value, ast.List) and _text(key).endswith(_STACKED):
                    yield from _of_order(value, (_GATE, _UP))
                elif isinstance(value, ast.Tuple) and len(value.elts) == 2 and key is not None:
                    yield from _of_row(value.elts[0], key, value.elts[1])


def _of_call(call: ast.Call) -> Iterator[MisnamedWeight]:
    named = {k.arg: k.value for k in call.keywords if k.arg}
    if isinstance(names := named.get(_NAMES), ast.Tuple):
        has_gate = len(names.elts) == len(_ORDER) and bool(_text(names.elts[2]))
        yield from _of_order(names, _ORDER if has_gate else (_UP, _DOWN), must_be_known=True)
    found = {role: named[keyword] for keyword, role in _KEYWORDS.items() if keyword in named}
    both = _text(found.get(_GATE))
    if both and both not in _ROLES and both == _text(found.get(_UP)):
        # The checkpoint has gate and up in one tensor.
        found = {role: name for role, name in found.items() if role == _DOWN}
    if not _text(found.get(_UP)) and _GATE in found:
        # An expert without a gate has its one matrix in the place of the gate's.
        found[_UP] = found.pop(_GATE)
    for role, name in found.items():
        yield from _unless(name, role, must_be_known=True)


def _of_row(parameter: ast.expr, name: ast.expr, place: ast.expr) -> Iterator[MisnamedWeight]:
    """Yield a weight unless it is that of the shard which it is loaded as."""
    shard = place.value if isinstance(place, ast.Constant) else None
    is_shard = isinstance(shard, int | str) and shard in _SHARDS
    if is_shard and _text(name) and _is_stack(_text(parameter)):
        yield from _unless(name, _SHARDS[shard])


def _of_order(
    names: ast.List | ast.Tuple, roles: tuple[str, ...], *, must_be_known: bool = False
) -> Iterator[MisnamedWeight]:
    for name, role in zip(names.elts, roles, strict=False):
        yield from _unless(name, role, must_be_known=must_be_known)


def _unless(name: ast.expr, role: str, *, must_be_known: bool = False) -> Iterator[MisnamedWeight]:
    """Yield a weight unless its name is that of a matrix.

    Args:
        role: The matrix.
        must_be_known: Whether a name of no matrix is one of an expert's, too.
    """
    text = _text(name)
    usual = "" if must_be_known else role
    own = next((_ROLES[part] for part in reversed(text.split(".")) if part in _ROLES), usual)
    if own != role:
        yield MisnamedWeight(text or ast.unparse(name), own, role, name.lineno)


def _is_stack(parameter: str) -> bool:
    """Return whether a parameter is one of a layer whose weights have shards."""
    return any(part in (*_STACKED, "w2_weight") for part in parameter.split("."))


def _text(node: ast.expr | None) -> str:
    """Return a string, without what is put into it; nothing of what is none."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
