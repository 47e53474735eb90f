"""The runner that a server uses instead of the one that `--moe-runner-backend` names.

Before 0.5.18, the code that adjusts a server's arguments to a model assigns runners directly, for
some models without a look at what was asked for. The code is read, not run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pytest_moe_routing.errors import Unsupported

_FIELD = "moe_runner_backend"
#: A condition, and whether it holds where a statement is run.
Condition = tuple[ast.expr, bool]


@dataclass(frozen=True)
class Told:
    """What is known of a server: its model, its `--quantization` and its runner."""

    architecture: str
    quantization: str | None
    runner: str

    def replacement(self, statements: Iterable[ast.stmt]) -> tuple[str, int] | None:
        """Return the runner that code assigns instead of the one that was named, and the line.

        Raises:
            Unsupported: It depends on something else whether the code of this model assigns one.
        """
        for statement, conditions in _assignments(statements, ()):
            asked = [(self._holds(test), positive) for test, positive in conditions]
            # Branches for other models may come first, with conditions of any kind.
            needed = [holds for holds, positive in asked if positive]
            if any(holds is (not positive) for holds, positive in asked):
                continue
            if None in needed and not any(self._names(test) for test, yes in conditions if yes):
                continue
            if None in needed:
                raise Unsupported(
                    f"not judged: line {statement.lineno} of the server's arguments may replace "
                    f"the runner of {self.architecture}"
                )
            runner = ast.literal_eval(statement.value)
            if runner != self.runner:
                return runner, statement.lineno
        return None

    def _names(self, test: ast.expr) -> bool:
        """Return whether a condition is one on this model."""
        parts = test.values if isinstance(test, ast.BoolOp) else [test]
        return any("model_arch" in ast.unparse(part) and self._holds(part) for part in parts)

    def _holds(self, test: ast.expr) -> bool | None:
        """Return whether a condition holds; None if that is not known."""
        match test:
            case ast.BoolOp(op=op, values=values):
                decisive = isinstance(op, ast.Or)
                parts = [self._holds(value) for value in values]
                if decisive in parts:
                    return decisive
                return None if None in parts else not decisive
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                holds = self._holds(operand)
                return None if holds is None else not holds
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return self._compares(left, op, right)
        return None

    def _compares(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> bool | None:
        if ast.unparse(right) == "model_arch" and isinstance(left, ast.Constant):
            return str(left.value) in self.architecture if isinstance(op, ast.In) else None
        known = {
            "model_arch": self.architecture,
            "quantization": self.quantization,
            _FIELD: self.runner,
        }
        name = ast.unparse(left).rpartition(".")[2]
        try:
            value = ast.literal_eval(right)
        except ValueError:
            return None
        if name not in known:
            return None
        match op:
            case ast.Eq() | ast.Is():
                return bool(known[name] == value)
            case ast.NotEq() | ast.IsNot():
                return bool(known[name] != value)
            case ast.In():
                return known[name] in value
            case ast.NotIn():
                return known[name] not in value
        return None


def _assignments(
    statements: Iterable[ast.stmt], conditions: tuple[Condition, ...]
) -> Iterator[tuple[ast.Assign, tuple[Condition, ...]]]:
    """Return each assignment of a constant to the field, with its conditions."""
    for statement in statements:
        if isinstance(statement, ast.If):
            yield from _assignments(statement.body, (*conditions, (statement.test, True)))
            yield from _assignments(statement.orelse, (*conditions, (statement.test, False)))
        elif isinstance(statement, ast.ClassDef | ast.FunctionDef):
            yield from _assignments(statement.body, conditions)
        elif isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
            targets = [t.attr for t in statement.targets if isinstance(t, ast.Attribute)]
            if _FIELD in targets:
                yield statement, conditions
