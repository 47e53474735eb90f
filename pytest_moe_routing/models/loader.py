"""Read `model.yaml` files. Every mistake is one `ModelError`: file, line, key, found, expected."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

import yaml

from pytest_moe_routing.errors import ModelError
from pytest_moe_routing.models.spec import SECTIONS, ModelSpec, is_required, schema

FILE_NAME = "model.yaml"
MAX_BYTES = 1_000_000
_ID = re.compile(r"[a-z0-9.-]+")


class _Section:
    """A YAML mapping that remembers the line of every key."""

    def __init__(self, path: Path, node: yaml.Node, name: str = "", line: int = 1) -> None:
        self.path, self.name, self.line = path, name, line
        if not isinstance(node, yaml.MappingNode):
            _fail(path, self.line, name or "the file", _show(node), "a mapping of keys to values")
        self.nodes: dict[str, yaml.Node] = {}
        self.lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in self.nodes:
                first = self.lines[key]
                self.fail(key, "the key again", f"it once; it stands on line {first}", line)
            self.nodes[key], self.lines[key] = value_node, line

    def fail(self, key: str, found: str, expected: str, line: int | None = None) -> NoReturn:
        where = f"{self.name}.{key}" if self.name else key
        _fail(self.path, line or self.lines.get(key, self.line), where, found, expected)

    def build(self, cls: type) -> Any:
        keys = schema(cls)
        for key in self.nodes:
            if key not in keys:
                near = get_close_matches(key, keys, n=1)
                hint = f"did you mean {near[0]}?" if near else f"valid keys: {', '.join(keys)}"
                self.fail(key, "an unknown key", hint)
        values: dict[str, Any] = {}
        for key, item in keys.items():
            if key not in self.nodes:
                if is_required(item):
                    expected = item.metadata.get("kind", "a mapping of keys to values")
                    self.fail(key, "nothing: the key is missing", str(expected))
            elif key in SECTIONS:
                section = _Section(self.path, self.nodes[key], key, self.lines[key])
                values[key] = section.build(SECTIONS[key])
            else:
                values[key] = self._value(key, item.metadata["kind"])
        built = cls(**values)
        for key, found, expected in built.problems():
            self.fail(key, found, expected)
        return built

    def _value(self, key: str, kind: Any) -> Any:
        node = self.nodes[key]
        try:
            value = yaml.SafeLoader("").construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError) as error:
            self.fail(key, f"{_show(node)} ({error})", str(kind))
        expected = kind.problem(value)
        if expected is not None:
            if kind.type is float and isinstance(value, str) and _is_number(value):
                expected += f" (YAML reads {value} as text; write {float(value)!r} with a dot)"
            self.fail(key, _show(node), expected)
        return tuple(value) if kind.many else value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _show(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return f"{node.value[:60]!r}" if node.value else "nothing"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _fail(path: Path, line: int, key: str, found: str, expected: str) -> NoReturn:
    raise ModelError(f"{path}:{line}: {key}: found {found}, expected {expected}")


def load_model(path: Path) -> ModelSpec:
    """Read one `model.yaml`, given the file or its folder.

    Raises:
        ModelError: the file cannot be read, or anything in it is not as the schema says.
    """
    file = path / FILE_NAME if path.is_dir() else path
    folder = file.resolve().parent
    if not _ID.fullmatch(folder.name):
        raise ModelError(
            f"{file}: the folder's name is the model's id: found {folder.name!r}, "
            "expected lower-case letters, digits, dots and dashes"
        )
    try:
        raw = file.read_bytes()
        if len(raw) > MAX_BYTES:
            raise ModelError(f"{file}: found {len(raw)} bytes, expected at most {MAX_BYTES}")
        root = yaml.compose(raw.decode("utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ModelError(f"{file}:{line}: found bytes that are not UTF-8 text") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ModelError(f"{file}:{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ModelError(f"{file}:1: not valid YAML: {error}") from error
    if root is None:
        _fail(file, 1, "the file", "nothing", "a mapping with the keys of a model")
    spec: ModelSpec = _Section(file, root).build(ModelSpec)
    return replace(spec, folder=folder)


def load_models(*directories: Path) -> dict[str, ModelSpec]:
    """Read every model folder of the directories; a later directory's model replaces an earlier's.

    Returns the models by id, sorted.

    Raises:
        ModelError: a directory is missing or holds no model, a model is wrong, or two folders of
            one directory describe a model under the same name.
    """
    models: dict[str, ModelSpec] = {}
    for directory in directories:
        files = sorted(directory.glob(f"*/{FILE_NAME}")) if directory.is_dir() else []
        if not files:
            raise ModelError(f"{directory}: found no */{FILE_NAME}, expected a golden directory")
        names: dict[str, Path] = {}
        for file in files:
            spec = load_model(file)
            if spec.model in names:
                raise ModelError(
                    f"{file}: model: found {spec.model!r} again, "
                    f"expected a name of its own; it is also in {names[spec.model]}"
                )
            names[spec.model] = file
            models[spec.id] = spec
    return dict(sorted(models.items()))


def select(models: dict[str, ModelSpec], patterns: Iterable[str]) -> list[ModelSpec]:
    """The models whose id matches any of the shell patterns; all of them without patterns.

    Raises:
        ModelError: a pattern matches no model.
    """
    patterns = list(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(model, pattern) for model in models):
            raise ModelError(f"no model matches {pattern!r}; models: {', '.join(models)}")
    return [
        spec
        for model, spec in models.items()
        if not patterns or any(fnmatchcase(model, pattern) for pattern in patterns)
    ]
