"""Reads YAML files that users wrote: plain values only, with limits on everything.

Of YAML, this is the part that configuration needs: mappings, lists, text, numbers, true, false and
null. There are no tags, no merge keys (`<<`), no dates and no numbers of base 60, and an alias may
stand for a single value only. So a file of N bytes never means more than N bytes.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from pytest_moe_routing.errors import ModelError
from pytest_moe_routing.escape import one_line, shorten
from pytest_moe_routing.inputs import read_text

MAX_BYTES = 1_000_000
#: Values in a file, keys included. A ledger of a thousand entries has 15,000.
MAX_NODES = 50_000
MAX_DEPTH = 20
#: Digits of a number. No key takes a larger one, and `int` refuses thousands.
_MAX_DIGITS = 100

_PREFIX = "tag:yaml.org,2002:"
_RESOLVED = {
    "null": (re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    "bool": (
        re.compile("yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF"),
        list("yYnNtTfFoO"),
    ),
    "int": (re.compile(r"[-+]?(?:0|[1-9][0-9_]*)"), list("-+0123456789")),
    "float": (
        re.compile(
            r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+][0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
        ),
        list("-+.0123456789"),
    ),
}


class _LimitError(Exception):
    """Something that is YAML and not read here; the message begins with the line."""

    def __init__(self, event: yaml.NodeEvent, key: object, found: str, expected: str) -> None:
        line = event.start_mark.line + 1 if event.start_mark else 1
        about = f" {shorten(key.value)}:" if isinstance(key, yaml.ScalarNode) else ""
        super().__init__(f"{line}:{about} found {found}, expected {expected}")


class _Loader(
    yaml.reader.Reader,
    yaml.scanner.Scanner,
    yaml.parser.Parser,
    yaml.composer.Composer,
    yaml.resolver.BaseResolver,
):
    """Composes nodes, and stops at the first that is beyond a limit."""

    def __init__(self, text: str) -> None:
        yaml.reader.Reader.__init__(self, text)
        yaml.scanner.Scanner.__init__(self)
        yaml.parser.Parser.__init__(self)
        yaml.composer.Composer.__init__(self)
        yaml.resolver.BaseResolver.__init__(self)
        self._depth = self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: yaml.NodeEvent = self.peek_event()  # type: ignore[no-untyped-call]
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise _LimitError(event, index, "more values", f"at most {MAX_NODES}")
        if (tag := getattr(event, "tag", None)) is not None:
            raise _LimitError(event, index, f"the tag {shorten(tag)}", "a plain value")
        if self._depth >= MAX_DEPTH:
            raise _LimitError(event, index, "deeper nesting", f"at most {MAX_DEPTH} levels")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent) and not isinstance(node, yaml.ScalarNode):
            found = f"an alias (*{shorten(str(event.anchor))}) of {show(node)}"
            raise _LimitError(event, index, found, "the values themselves")
        return node


for _name, (_pattern, _first) in _RESOLVED.items():
    _whole = re.compile(rf"(?:{_pattern.pattern})\Z")
    _Loader.add_implicit_resolver(_PREFIX + _name, _whole, _first)


def compose(file: Path) -> yaml.Node | None:
    """Return the root of a YAML file; None when there is nothing in it.

    Raises:
        ModelError: The file cannot be read, is too large, is not UTF-8 text, is not YAML, or uses
            a part of YAML that is not read.
    """
    text = read_text(file, MAX_BYTES, ModelError)
    try:
        return _compose(text)
    except _LimitError as error:
        raise ModelError(f"{file}:{error}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        is_alias = "alias" in f"{error.context} {error.problem}"
        hint = "; text that starts with * needs quotes" if is_alias else ""
        problem = shorten(error.problem or "", 200)
        raise ModelError(f"{file}:{line}: not valid YAML: {problem}{hint}") from error
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        character = f"the character #x{error.character:04x}"
        raise ModelError(f"{file}:{line}: not valid YAML: found {character}") from error
    except yaml.YAMLError as error:
        raise ModelError(f"{file}: not valid YAML: {one_line(str(error))}") from error


# A model that others are like is read for each of them, and runs in one process read all again.
@lru_cache(maxsize=256)
def _compose(text: str) -> yaml.Node | None:
    """Return the root of a text. Nobody changes a node."""
    node: yaml.Node | None = _Loader(text).get_single_node()
    return node


def construct(node: yaml.Node) -> Any:
    """Return the plain value of a node.

    Raises:
        ValueError: A number of absurdly many digits.
    """
    if isinstance(node, yaml.SequenceNode):
        return [construct(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return {str(key.value): construct(value) for key, value in node.value}
    text = node.value
    kind = node.tag.removeprefix(_PREFIX)
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() in ("yes", "true", "on")
    if kind in ("int", "float"):
        if len(text) > _MAX_DIGITS:
            raise ValueError(f"a number of {len(text)} characters")
        digits = text.replace("_", "")
        return int(digits) if kind == "int" else float(re.sub(r"\.(?=[inIN])", "", digits))
    return text


def show(node: yaml.Node | None) -> str:
    """Return what a node is, for a message."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return repr(node.value[:60]) if node is not None and node.value else "nothing"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
