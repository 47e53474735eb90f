"""Read `model.yaml` files. Every mistake is one `ModelError`: file, line, key, found, expected."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn

import yaml

from pytest_moe_routing.errors import ModelError
from pytest_moe_routing.models.spec import (
    SECTIONS,
    IncompleteModel,
    ModelSpec,
    is_required,
    schema,
)

FILE_NAME = "model.yaml"
MAX_BYTES = 1_000_000
_ID = re.compile(r"[a-z0-9][a-z0-9.-]*")


@dataclass(frozen=True)
class _Entry:
    """A key's value, and where it stands."""

    node: yaml.Node
    file: Path
    line: int


class _Section:
    """A YAML mapping that remembers where every key stands, over one that it inherits keys from."""

    def __init__(
        self,
        file: Path,
        node: yaml.Node,
        name: str = "",
        line: int = 1,
        under: _Section | None = None,
    ) -> None:
        self.file, self.name, self.line = file, name, line
        #: For the whole file: the one whose sections it inherits, key by key.
        self.like: _Section | None = None
        if not isinstance(node, yaml.MappingNode):
            _fail(file, line, name or "the file", _show(node), "a mapping of keys to values")
        own: dict[str, _Entry] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in own:
                first = own[key].line
                where = self._path(key)
                _fail(file, line, where, "the key again", f"it once; it stands on line {first}")
            own[key] = _Entry(value_node, file, line)
        self.entries: dict[str, _Entry] = {**(under.entries if under else {}), **own}

    def fail(self, key: str, found: str, expected: str) -> NoReturn:
        entry = self.entries.get(key)
        file, line = (entry.file, entry.line) if entry else (self.file, self.line)
        _fail(file, line, self._path(key), found, expected)

    def _path(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key

    def section(self, key: str) -> _Section | None:
        """The mapping under a key, over the same one of the file that this file is like."""
        under = self.like.section(key) if self.like else None
        entry = self.entries.get(key)
        return _Section(entry.file, entry.node, key, entry.line, under) if entry else under

    def build(self, cls: type, *, partial: bool = False) -> Any:
        """Make the dataclass from its keys, checked; with `partial`, sections may lack keys."""
        values = self.values(cls, partial=partial)
        for key, item in schema(cls).items():
            if key not in values and is_required(item):
                expected = item.metadata.get("kind", "a mapping of keys to values")
                self.fail(key, "nothing: the key is missing", str(expected))
        built = cls(**values)
        for key, found, expected in built.problems():
            self.fail(key, found, expected)
        return built

    def values(self, cls: type, *, partial: bool = False) -> dict[str, Any]:
        """The keys that are there, each checked; sections are built unless `partial`."""
        keys = schema(cls)
        for key in self.entries:
            if key not in keys:
                near = get_close_matches(key, keys, n=1)
                hint = f"did you mean {near[0]}?" if near else f"valid keys: {', '.join(keys)}"
                self.fail(key, "an unknown key", hint)
        values: dict[str, Any] = {}
        for key, item in keys.items():
            if key in SECTIONS:
                if section := self.section(key):
                    of = SECTIONS[key]
                    values[key] = section.values(of) if partial else section.build(of)
            elif key in self.entries:
                values[key] = self.value(key, item.metadata["kind"])
        return values

    def value(self, key: str, kind: Any) -> Any:
        """The value of a key that is there, checked.

        Raises:
            ModelError: It is not of this kind.
        """
        node = self.entries[key].node
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
        ModelError: the file cannot be read, or anything in it is not as the schema says; or the
            model is incomplete, and the message says what is missing.
    """
    file = path / FILE_NAME if path.is_dir() else path
    model = _load(file)
    if isinstance(model, IncompleteModel):
        raise ModelError(f"{file}: incomplete, so it cannot be judged: {model.incomplete}")
    return model


def _load(file: Path) -> ModelSpec | IncompleteModel:
    root = _read(file)
    folder = file.resolve().parent
    if "incomplete" in root.entries:
        incomplete: IncompleteModel = root.build(IncompleteModel, partial=True)
        return replace(incomplete, folder=folder)
    spec: ModelSpec = root.build(ModelSpec)
    return replace(spec, folder=folder)


def _read(file: Path, likes: tuple[Path, ...] = ()) -> _Section:
    """A file's keys, over those of the file that it is like."""
    folder = file.resolve().parent
    if not _ID.fullmatch(folder.name):
        raise ModelError(
            f"{file}: the folder's name is the model's id: found {folder.name!r}, "
            "expected lower-case letters, digits, dots and dashes"
        )
    root = _compose(file)
    if root is None:
        _fail(file, 1, "the file", "nothing", "a mapping with the keys of a model")
    section = _Section(file, root)
    if "like" in section.entries:
        like = section.value("like", schema(ModelSpec)["like"].metadata["kind"])
        other = folder.parent / like / FILE_NAME
        if not _ID.fullmatch(like) or not other.is_file():
            section.fail("like", repr(like), f"the id of a model in {folder.parent}")
        if other in (*likes, folder / FILE_NAME):
            section.fail("like", repr(like), "a model that is not, by way of others, like this one")
        section.like = _read(other, (*likes, folder / FILE_NAME))
    return section


def _compose(file: Path) -> yaml.Node | None:
    try:
        raw = file.read_bytes()
        if len(raw) > MAX_BYTES:
            raise ModelError(f"{file}: found {len(raw)} bytes, expected at most {MAX_BYTES}")
        return yaml.compose(raw.decode("utf-8"), Loader=yaml.SafeLoader)
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


def load_models(*directories: Path) -> dict[str, ModelSpec]:
    """Read every complete model of the directories; a later one's model replaces an earlier's.

    Returns the models by id, sorted.

    Raises:
        ModelError: a directory is missing or holds no model, a model is wrong, or two folders of
            one directory describe a model under the same name.
    """
    return {
        id_: model for id_, model in _load_all(directories).items() if isinstance(model, ModelSpec)
    }


def load_incomplete(*directories: Path) -> dict[str, IncompleteModel]:
    """The models of the directories that say what is missing, by id. They cannot be judged.

    Raises:
        ModelError: as for `load_models`.
    """
    return {
        id_: model
        for id_, model in _load_all(directories).items()
        if isinstance(model, IncompleteModel)
    }


def _load_all(directories: Iterable[Path]) -> dict[str, ModelSpec | IncompleteModel]:
    models: dict[str, ModelSpec | IncompleteModel] = {}
    for directory in directories:
        files = sorted(directory.glob(f"*/{FILE_NAME}")) if directory.is_dir() else []
        if not files:
            raise ModelError(f"{directory}: found no */{FILE_NAME}, expected a golden directory")
        names: dict[str, Path] = {}
        for file in files:
            model = _load(file)
            if model.model in names:
                raise ModelError(
                    f"{file}: model: found {model.model!r} again, "
                    f"expected a name of its own; it is also in {names[model.model]}"
                )
            names[model.model] = file
            models[model.id] = model
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
