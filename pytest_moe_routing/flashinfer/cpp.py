"""Operators that a C++ source exports through TVM FFI, and the names of their parameters.

The source is read as text, without a compiler. What cannot be read has a reason, never a guess.
Defaults of C++ parameters are dropped on purpose: TVM FFI calls a typed function with exactly as
many arguments as the function has parameters (tvm-ffi, `function_details.h`, `unpack_call`).
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain

_TOKENS = re.compile(
    r'R"(?P<raw>[^()\s\\]{0,16})\((?:.*?\)(?P=raw)"|.*\Z)'
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'(?:\\.|[^'\\\n])'"
    r"|(?P<comment>//(?:\\\n|[^\n])*|/\*.*?(?:\*/|\Z))",
    re.DOTALL,
)
_BRACKETS = re.compile(r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'|[()<>{}\[\],=]')
_EXPORT = re.compile(r"^[ \t]*TVM_FFI_DLL_EXPORT_TYPED_FUNC\s*\(", re.MULTILINE)
#: A method of a `tvm::ffi::Module`: `if (name == "run") { return Function::FromTyped([..](..)`.
_METHOD = re.compile(r'\bname\s*==\s*"(\w+)"\s*\)\s*\{')
_LAMBDA = re.compile(r"\s*return\s+(?:\w+::)*Function::FromTyped\s*\(\s*\[[^\]]{0,1000}\]\s*\(")
#: What may stand between the end of the statement before a function and the function's name.
_TYPE = re.compile(r"[\w\s:<>,&*\[\]()]*[\w>&*\]]\s*(?:\w+\s*::\s*)*")
_STATEMENTS = re.compile(r"\b(?:return|else|new|throw|case|delete|goto|if|while|for|switch)\b|=")
_AFTER = re.compile(r"\s*(?:const\b\s*|noexcept\b\s*|override\b\s*|final\b\s*)*([{;])")
#: Words that end a type and are no name of a parameter.
_TYPE_WORDS = {"bool", "char", "const", "double", "float", "int", "long", "short", "signed"} | {
    "unsigned",
    "volatile",
}
#: The longest parameter list, or type before a name, in characters: a file may be hostile.
_LONGEST = 20_000
#: Seconds of CPU time for one source; real ones take milliseconds.
_TIME = 2.0
_PAIRS = {")": "(", ">": "<", "}": "{", "]": "["}


@dataclass(frozen=True)
class Operator:
    """An exported operator.

    Attributes:
        parameters: Names in order, empty for a parameter without a name; None if unreadable.
        where: File and line of the parameters, or of the export.
        why: Why the parameters are not readable.
    """

    name: str
    parameters: tuple[str, ...] | None
    where: str
    why: str = ""


class _Unreadable(Exception):
    pass


def operators(file: str, text: str) -> Mapping[str, Operator]:
    """Return the operators that a source exports, by the name that Python calls.

    Args:
        file: What to call the source in `Operator.where`.
        text: The source.
    """
    code = _TOKENS.sub(_without_comment, text)
    found: dict[str, Operator] = {}
    end = time.process_time() + _TIME
    for operator in chain(_exports(file, code, end), _methods(file, code)):
        if time.process_time() > end:
            found[operator.name] = replace(operator, parameters=None, why="the file takes too long")
            break
        other = found.get(operator.name, operator)
        if other.parameters != operator.parameters:
            why = f"another export at {other.where} has other parameters"
            operator = Operator(operator.name, None, operator.where, why)
        found[operator.name] = operator
    return found


def _without_comment(token: re.Match[str]) -> str:
    """Replace a comment by blanks, line breaks kept; leave a literal alone."""
    if token["comment"] is None:
        return token[0]
    return re.sub(r"[^\n]", " ", token[0])


def _exports(file: str, code: str, end: float) -> Iterator[Operator]:
    for export in _EXPORT.finditer(code):
        where = f"{file}:{_line(code, export.start())}"
        try:
            parts = _split(_inside(code, export.end()))
        except _Unreadable as error:
            yield Operator("?", None, where, str(error))
            continue
        name = parts[0] if parts else "?"
        function = re.fullmatch(r"&?\s*((?:\w+::)*\w+)(?:<.*>)?", ",".join(parts[1:]), re.DOTALL)
        if function is None:
            yield Operator(name, None, where, f"its export names no function: {parts[1:]}")
            continue
        try:
            parameters, start = _function(code, function[1].split("::")[-1], end)
        except _Unreadable as error:
            yield Operator(name, None, where, str(error))
        else:
            yield Operator(name, parameters, f"{file}:{_line(code, start)}")


def _methods(file: str, code: str) -> Iterator[Operator]:
    for method in _METHOD.finditer(code):
        where = f"{file}:{_line(code, method.start())}"
        typed = _LAMBDA.match(code, method.end())
        if typed is None:
            yield Operator(method[1], None, where, "it is not a Function::FromTyped of a lambda")
            continue
        try:
            yield Operator(method[1], _parameters(_inside(code, typed.end())), where)
        except _Unreadable as error:
            yield Operator(method[1], None, where, str(error))


def _function(code: str, name: str, end: float) -> tuple[tuple[str, ...], int]:
    """Return the parameters of the one function of that name, and where it is.

    Raises:
        _Unreadable: There is none, there are overloads, or its parameters cannot be read.
    """
    definitions: list[tuple[str, int]] = []
    declarations: list[tuple[str, int]] = []
    # Without a \\b before it, the name is a prefix that the search is fast for.
    for call in re.finditer(rf"{name}\s*\(", code):
        if time.process_time() > end:
            raise _Unreadable("the file takes too long")
        if code[call.start() - 1 : call.start()].isidentifier():
            continue
        try:
            inside = _inside(code, call.end())
        except _Unreadable:
            continue
        after = _AFTER.match(code, call.end() + len(inside) + 1)
        if after and _is_type(code, call.start()):
            chosen = definitions if after[1] == "{" else declarations
            chosen.append((inside, call.start()))
    found = definitions or declarations
    if not found:
        raise _Unreadable(f"there is no function {name} in this file")
    read = [_parameters(inside) for inside, _ in found]
    if len(set(read)) > 1:
        raise _Unreadable(f"there are {len(read)} functions {name}")
    return read[0], found[0][1]


def _is_type(code: str, end: int) -> bool:
    """Return whether a type stands before a name: a declaration, and no call."""
    least = max(0, end - _LONGEST)
    start = max(code.rfind(mark, least, end) for mark in ";{}")
    if start < 0 < least:
        return False
    before = code[start + 1 : end]
    # A preprocessor line ends the statement before it.
    lines = before.split("\n")
    directives = [place for place, line in enumerate(lines) if line.lstrip().startswith("#")]
    before = "\n".join(lines[directives[-1] + 1 :] if directives else lines)
    return _TYPE.fullmatch(before) is not None and not _STATEMENTS.search(before)


def _inside(code: str, start: int) -> str:
    """Return what is between a parenthesis that ends before `start` and its partner.

    Raises:
        _Unreadable: It has none.
    """
    depth = 1
    for mark in _BRACKETS.finditer(code, start, start + _LONGEST):
        depth += {"(": 1, ")": -1}.get(mark[0], 0)
        if depth == 0:
            return code[start : mark.start()]
    raise _Unreadable("a parenthesis is not closed")


def _split(text: str, at: str = ",") -> list[str]:
    """Split at the commas (or other marks) that no brackets enclose.

    Raises:
        _Unreadable: The brackets do not match.
    """
    parts, begin = [], 0
    opened: list[str] = []
    for mark in _BRACKETS.finditer(text):
        if mark[0] in _PAIRS.values():
            opened.append(mark[0])
        elif mark[0] in _PAIRS:
            if not opened or opened.pop() != _PAIRS[mark[0]]:
                raise _Unreadable("the brackets in its parameters do not match")
        elif mark[0] == at and not opened:
            parts.append(text[begin : mark.start()].strip())
            begin = mark.end()
    if opened:
        raise _Unreadable("the brackets in its parameters do not match")
    last = text[begin:].strip()
    return [*parts, last] if parts or last else []


def _parameters(text: str) -> tuple[str, ...]:
    if len(text) > _LONGEST:
        raise _Unreadable(f"its parameters are {len(text)} characters long")
    if "#" in text:
        raise _Unreadable("its parameters depend on the preprocessor")
    parts = _split(text)
    return () if parts == ["void"] else tuple(map(_name, parts))


def _name(parameter: str) -> str:
    """Return the name of one parameter, empty if it has none."""
    declared = _split(parameter, "=")[0] if parameter else ""
    named = re.fullmatch(r"(?P<type>.*[\w>&*\s])\b(?P<name>[A-Za-z_]\w*)", declared, re.DOTALL)
    if not declared or "(" in declared or declared.endswith("..."):
        raise _Unreadable(f"one of its parameters is {' '.join(parameter.split())!r}")
    if named is None or named["name"] in _TYPE_WORDS:
        return ""
    kind = re.sub(r"\bconst\b|\bvolatile\b", "", named["type"]).strip()
    # `std::string` alone, or `const int64_t`, is a type without a name.
    return "" if not kind or declared.endswith(f"::{named['name']}") else named["name"]


def _line(code: str, place: int) -> int:
    return code.count("\n", 0, place) + 1
