"""The config classes that a framework has of its own, run without transformers.

A framework reads some models' config.json by a class of its own. Its code of the model relies on
the defaults, renamed keys and nested configs of that class. For a process of its own.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any, ClassVar

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.models.huggingface.families import Family, table
from pytest_moe_routing.models.huggingface.published import published_keys
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.layers import Config
from pytest_moe_routing.targets.model_classes import Place

#: A module of config classes.
_MODEL_TYPE = re.compile(r"^    model_type\b", re.MULTILINE)


class PretrainedConfig(Config):
    """transformers' class of this name, as far as the values of keys depend on it.

    As in configuration_utils.py of transformers 5.19.0: a class without a constructor of its own is
    a dataclass that takes further keys, and calls no inherited constructor; `attribute_map` renames
    keys.
    """

    attribute_map: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclass(cls, init=False, repr=False, eq=False)
        if "__init__" not in vars(cls):
            cls.__init__ = _set_fields  # type: ignore[method-assign]

    def __init__(self, **values: Any) -> None:
        self.__post_init__(**values)

    def __post_init__(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    def validate_layer_type(self) -> None:
        """Accept the kinds of layers, which are not about experts."""

    def __getattr__(self, name: str) -> Any:
        where = f"{type(self).__module__}.{type(self).__name__}"
        raise AttributeError(
            f"the code reads {name!r} of the model's config, which {where} does not have"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(self.attribute_map.get(name, name), value)

    def __getattribute__(self, name: str) -> Any:
        read = super().__getattribute__
        return read(name if name == "attribute_map" else read("attribute_map").get(name, name))


def _set_fields(self: Any, **values: Any) -> None:
    """Set the fields of a config, and hand over the other keys."""
    for field in fields(self):
        if field.name in values:
            setattr(self, field.name, values.pop(field.name))
        elif field.default_factory is not MISSING:
            setattr(self, field.name, field.default_factory())
        elif field.default is not MISSING:
            setattr(self, field.name, field.default)
    self.__post_init__(**values)


class _Theirs(type):
    """The type of transformers' own config classes, of which only the defaults are known."""

    def __getattr__(cls, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _AnyClass(dict[str, type]):
    """transformers' `CONFIG_MAPPING`: each class keeps the keys that it is given."""

    _extra_content: ClassVar[dict[str, type]] = {}

    def get(self, key: str, default: Any = None) -> Any:
        return PretrainedConfig

    __getitem__ = get


def stand_ins() -> dict[str, Any]:
    """Return replacements of transformers' config classes, by bare name."""
    named = {f.config.rpartition(".")[2]: f for f in table().families.values() if f.config}
    return {
        "PretrainedConfig": PretrainedConfig,
        "PreTrainedConfig": PretrainedConfig,
        "CONFIG_MAPPING": _AnyClass(),
        **{name: _class_of(name, family) for name, family in named.items()},
    }


def _class_of(name: str, family: Family) -> type:
    """Make a config class of transformers from what the importer knows of its defaults."""
    keys = published_keys(family.architectures[0]) if family.architectures else {}
    defaults = {keys[value]: v for value, v in family.defaults.items() if value in keys}
    cases = {case.key: case.default for case in family.cases if case.default is not None}
    return _Theirs(name, (PretrainedConfig,), {**cases, **defaults})


def place_of(names: Names, cls: type) -> str:
    """Return file, line and name of a class of the framework."""
    line = getattr(names.definitions.node(cls.__module__, cls.__name__), "lineno", 1)
    return f"{cls.__module__.replace('.', '/')}.py:{line} {cls.__name__}"


class ConfigClasses:
    """The config classes of one release, by the `model_type` that they are registered for.

    Args:
        package: The package that holds them.
        registry: The row of the contract for the registry.
    """

    def __init__(self, names: Names, package: str, registry: str) -> None:
        self._names, self._definitions = names, names.definitions
        self._package = package
        spelling = names.spelling(registry)
        self._registry = spelling.module, spelling.path
        self._places = dict(self._registered())
        stubs.extend(real=sorted(self._modules()))
        self._class = cache(lambda place: getattr(stubs.real_module(place[0]), place[1]))

    def make(
        self, values: Mapping[str, Any], model_type: str, key: str = ""
    ) -> tuple[Any, str] | None:
        """Make the config of a text model, as the release reads it from a config.json.

        Args:
            values: The keys of the text model's config.
            model_type: That of the whole config.
            key: Where the text model's config is in the whole; "" if it is the whole.

        Returns:
            The config, and file, line and name of its class; None if the release has no class of
            its own for it.

        Raises:
            Unsupported: The class takes no such keys, or is not made here.
        """
        place = self._places.get(model_type)
        if place is None:
            return None
        cls = self._class(place)
        try:
            made = cls(**({key: dict(values)} if key else values))
        except Exception as error:
            # Whatever the framework's code raises.
            told = f"{type(error).__name__}: {error}"
            raise Unsupported(f"{place_of(self._names, cls)} makes no config: {told}") from error
        if key:
            made = vars(made).get(key) or made.text_config
            # Frameworks turn what a class leaves as it is into a config later.
            made = PretrainedConfig(**made) if isinstance(made, dict) else made
        is_own = type(made).__module__.partition(".")[0] == place[0].partition(".")[0]
        return made, place_of(self._names, type(made) if is_own else cls)

    def _registered(self) -> Iterator[tuple[str, Place]]:
        """Yield each `model_type` in the registry that has a class of the framework's own."""
        node = self._definitions.node(*self._registry)
        # The package imports some classes only when they are asked for.
        listed = getattr(self._definitions.node(self._package, "_CLASS_TO_MODULE"), "value", None)
        modules = ast.literal_eval(listed) if isinstance(listed, ast.Dict) else {}
        for part in ast.walk(node) if node is not None else ():
            entries: list[tuple[Any, ast.expr]] = []
            if isinstance(part, ast.keyword):
                entries = [(part.arg, part.value)]
            elif isinstance(part, ast.Dict):
                entries = list(zip(map(_constant, part.keys), part.values, strict=True))
            elif isinstance(part, ast.List):
                entries = [(None, item) for item in part.elts]
            for key, value in entries:
                name = value.id if isinstance(value, ast.Name) else _constant(value)
                place = self._place(str(name), modules)
                model_type = key or (place and self._model_type(place))
                if place and model_type:
                    yield model_type, place

    def _place(self, name: str, modules: Mapping[str, str]) -> Place | None:
        """Return where a class is; None if it is not the framework's own."""
        places = self._definitions.places(modules.get(name, self._registry[0]), name)
        own = (p for p in places if isinstance(self._definitions.node(*p), ast.ClassDef))
        return next(own, None)

    def _model_type(self, place: Place) -> Any:
        for part in getattr(self._definitions.node(*place), "body", ()):
            targets = getattr(part, "targets", [getattr(part, "target", None)])
            if any(isinstance(t, ast.Name) and t.id == "model_type" for t in targets):
                return _constant(part.value)
        return None

    def _modules(self) -> set[str]:
        """Return the modules of the classes, and those of other classes that these import."""
        found = {module for module, _ in self._places.values()}
        queue = [*found]
        while queue:
            for module in self._definitions.imported(queue.pop()) - found:
                is_near = module.startswith(f"{self._package}.")
                if is_near and self._definitions.contains(module, _MODEL_TYPE):
                    found.add(module)
                    queue.append(module)
        return found - {self._registry[0]}


def _constant(node: ast.expr | None) -> Any:
    return node.value if isinstance(node, ast.Constant) else None
