"""From a Hugging Face `config.json` to a `ModelSpec`, without transformers and without guessing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from pytest_moe_routing.models.huggingface.document import ABSENT, Section, read_json, shorten, show
from pytest_moe_routing.models.huggingface.families import REFUSE, Family, Table, raw_keys, table
from pytest_moe_routing.models.huggingface.layers import Layers, read_layers
from pytest_moe_routing.models.huggingface.quantization import scheme_of
from pytest_moe_routing.models.kinds import Kind, is_required
from pytest_moe_routing.models.spec import (
    MODEL_DTYPES,
    PARAMETERS,
    ExpertsConfig,
    ModelSpec,
    RouterConfig,
    schema,
)

CONFIG_NAME = "config.json"
QUANTIZATION_NAME = "hf_quant_config.json"


def read_config(path: Path) -> ModelSpec:
    """What a model's `config.json` says of its router and experts.

    A key that is absent has the default that the architecture's own config class has in
    transformers; nothing else is filled in. The model is named after the folder that the config
    lies in, as the config itself does not say.

    Args:
        path: The file, or the folder that holds a `config.json`.

    Raises:
        ModelError: The file cannot be read; the architecture is unknown or cannot be described; a
            key is missing, contradicts another, or has a value that it cannot have.
    """
    file = path / CONFIG_NAME if path.is_dir() else path
    root = read_json(file)
    families = table()
    text = _text_section(root, families)
    architecture, family = _family_of(root, text, families)
    beside = file.with_name(QUANTIZATION_NAME)
    scheme = scheme_of(root, text, read_json(beside) if beside.is_file() else None)
    layers = read_layers(text)
    reading = _Reading(text, family, families, layers)
    router, experts = reading.build(RouterConfig), reading.build(ExpertsConfig)
    groups = layers.groups()
    name, repository = _name_of(root, file)
    spec = ModelSpec(
        model=name,
        hf_repo=repository,
        architecture=architecture,
        router=router,
        experts=experts,
        checkpoints=(scheme,),
        sources=(f"numbers: {file.name} of {repository}", _semantics(family)),
        notes=tuple(
            dict.fromkeys((*family.notes, *reading.notes, *map(str, groups), *layers.notes))
        ),
        folder=Path(_slug(name)),
        num_layers=layers.count,
        dtype=_dtype(root, text),
        layers=groups,
        architectures=_names(root, text, "architectures"),
        model_types=_names(root, text, "model_type"),
        raw_config=raw_keys(text, families),
        defaulted=tuple(reading.defaulted),
    )
    for key, found, expected in spec.problems():
        text.fail(key, found, expected)
    return spec


def _dtype(root: Section, text: Section) -> str:
    """The dtype of the activations; configs that state none are of bfloat16 models."""
    for section in (text, root):
        for key in ("dtype", "torch_dtype"):
            value = section.get(key)
            if value is None or value == "auto":
                continue
            name = value.removeprefix("torch.") if isinstance(value, str) else value
            if name not in MODEL_DTYPES:
                section.fail(key, show(value), f"one of {', '.join(MODEL_DTYPES)}")
            return str(name)
    return "bfloat16"


def _names(root: Section, text: Section, key: str) -> tuple[str, ...]:
    """What the whole config and its text model's part state under a key, without repetition."""
    found = [name for section in (root, text) for name in _texts(section.get(key))]
    return tuple(dict.fromkeys(found))


def _texts(value: object) -> Iterator[str]:
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str) and item:
            yield item


def _text_section(root: Section, families: Table) -> Section:
    """The part of a config that describes the text model; all of it when nothing is nested."""
    section = root
    for key in families.nested:
        section = section.section(key) or section
    return section


def _family_of(root: Section, text: Section, families: Table) -> tuple[str, Family]:
    """The architecture's name and its family; the inner config's own names count first."""
    names = [*_names_in(text), *(() if text is root else _names_in(root))]
    if not names:
        root.fail("architectures", "nothing: neither it nor model_type is there", "a list of names")
    architecture = next((str(n) for n in root.items("architectures")), names[0])
    name = next((n for n in names if n in families.by_name or n in families.refused), None)
    if name is None:
        near = [
            n for name in names[:3] for n in get_close_matches(name[:99], families.by_name, n=2)
        ]
        root.fail(
            "architectures",
            " and ".join(shorten(name) for name in names[:3]),
            f"one of the {len(families.families)} known families; "
            + (f"near it are {', '.join(dict.fromkeys(near))}" if near else "none has such a name"),
        )
    if name in families.refused:
        root.fail("architectures", shorten(name), f"another: {families.refused[name]}")
    return architecture, families.by_name[name]


def _names_in(section: Section) -> Iterator[str]:
    for name in (*section.items("architectures"), section.get("model_type")):
        if isinstance(name, str) and name:
            yield name


class _Reading:
    """One config, read as one family: values by name, where each came from, and notes."""

    def __init__(self, text: Section, family: Family, families: Table, layers: Layers) -> None:
        self.text, self.family, self.table, self.layers = text, family, families, layers
        self.fixed = dict(family.fixed)
        self.defaulted: list[str] = []
        self.notes: list[str] = []
        self.origin: dict[str, str] = {}
        for case in family.cases:
            value = text.get(case.key, case.default)
            fixed = case.fixed(value)
            if fixed is None:
                text.fail(case.key, show(value), str(case))
            if REFUSE in fixed:
                text.fail(case.key, show(value), f"another value: {fixed[REFUSE]}")
            self.fixed.update(fixed)
            self.origin.update(dict.fromkeys(fixed, case.key))

    def build(self, cls: type) -> Any:
        """A section of the spec, each value checked as in `model.yaml`.

        Raises:
            ModelError: A value that cannot be; it is named by the key of the config.
        """
        values = {f.name: v for f in fields(cls) if (v := self._value(f.name, cls)) is not ABSENT}
        if cls is RouterConfig:
            # What has no meaning without its condition is not said at all.
            if values.get("n_group") is None:
                values.pop("group_score", None)
            if not values["renormalize"]:
                values.pop("renormalize_epsilon", None)
        else:
            values.setdefault("gated", True)
            self._clamp_layers(values)
            if values["activation"] not in PARAMETERS:
                # Kimi-Linear's config class has the parameters of situ, whatever hidden_act says.
                values.pop("activation_alpha", None)
                values.pop("activation_beta", None)
        built = cls(**values)
        for name, found, expected in built.problems():
            self._fail(name, found, expected)
        return built

    def _value(self, name: str, cls: type) -> Any:
        item = schema(cls)[name]
        keys = self.family.keys.get(name) or self.table.spellings.get(name, ())
        if name in self.fixed:
            self._note_contradiction(name, keys)
            return self.fixed[name]
        if not keys:
            return ABSENT
        key, value = self.text.pick(keys)
        self.origin[name] = key
        if value is ABSENT:
            value = self.family.defaults.get(name, "silu" if name == "activation" else ABSENT)
            if value is not ABSENT:
                self.defaulted.append(name)
        if value is ABSENT and not is_required(item):
            return ABSENT
        value = self._one(name, key, value, item.metadata["kind"])
        if value is None and name in self.table.nulls:
            value = self.table.nulls[name]
        if name == "activation":
            value = self._activation(key, value)
        expected = item.metadata["kind"].problem(value)
        if expected is not None:
            self.text.fail(key, show(value), expected)
        return value

    def _one(self, name: str, key: str, value: Any, kind: Kind) -> Any:
        """One value for the model, of what may be a list with one for each layer."""
        if not isinstance(value, list) or not value:
            return value
        if name in self.family.first:
            if any(v != value[0] for v in value):
                self.notes.append(f"{key} is {shorten(str(value))}; taken is the first, the text's")
            return value[0]
        return self._per_layer(name, key, value, kind)

    def _per_layer(self, name: str, key: str, values: list[Any], kind: Kind) -> Any:
        """Take in a list with one value for each layer, and return the model's value."""
        if all(v == values[0] for v in values):
            return values[0]
        count = self.layers.count
        if count is None or len(values) < count:
            layers = "num_hidden_layers is missing" if count is None else f"there are {count}"
            expected = f"one value, or one for each layer: {layers}"
            self.text.fail(key, f"{len(values)} values that differ", expected)
        for i in set(range(count)) - set(self.layers.kinds):
            problem = kind.problem(values[i])
            if problem is not None:
                self.text.fail(f"{key}.{i}", show(values[i]), problem)
        return self.layers.vary(name, values[:count])

    def _clamp_layers(self, values: dict[str, Any]) -> None:
        """Take in a list of clamp limits, one for each layer."""
        kind = schema(ExpertsConfig)["activation_limit"].metadata["kind"]
        for key, activation in self.family.limits.items():
            limits = [limit or None for limit in self.text.items(key)]
            if not any(limits):
                continue
            self.origin["activation_limit"] = key
            values["activation_limit"] = self._per_layer("activation_limit", key, limits, kind)
            problem = kind.problem(values["activation_limit"])
            if problem is not None:
                self.text.fail(key, show(values["activation_limit"]), problem)
            usual = values["activation"]
            values["activation"] = self.layers.vary(
                "activation", [activation if limit else usual for limit in limits]
            )

    def _activation(self, key: str, value: Any) -> str:
        if not isinstance(value, str) or value not in self.table.activations:
            self.text.fail(key, show(value), f"one of {', '.join(self.table.activations)}")
        return self.table.activations[value]

    def _note_contradiction(self, name: str, keys: tuple[str, ...]) -> None:
        """Note a key that the family's code does not read, where it says something else."""
        if name in self.origin:
            return
        key, value = self.text.pick(keys) if keys else ("", ABSENT)
        does = self.fixed[name]
        if name == "activation" and isinstance(value, str):
            # gpt-oss says silu, and means the one it has.
            return
        if value is ABSENT or value is None or value == does:
            return
        if name in ("n_group", "topk_group") and value in (0, 1):
            return
        self.notes.append(f"{key} is {show(value)}, which the architecture's code ignores: {does}")

    def _fail(self, name: str, found: str, expected: str) -> NoReturn:
        self.text.fail(self.origin.get(name, name), found, expected)


def _name_of(root: Section, file: Path) -> tuple[str, str]:
    """The model's name and repository: what the config says of itself, else the folder's name."""
    said = root.get("_name_or_path")
    if isinstance(said, str) and re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", said):
        return said.rpartition("/")[2], said
    folder = file.resolve().parent.name if file.name == CONFIG_NAME else file.stem
    name = re.sub(r"[^\w.-]+", "-", folder).strip("-") or "model"
    return name, f"local/{name}"


def _slug(name: str) -> str:
    """A model's id: lower-case letters, digits, dots and dashes."""
    return re.sub(r"[^a-z0-9.-]+", "-", name.lower()).strip("-.") or "model"


def _semantics(family: Family) -> str:
    if family.config is None:
        return f"semantics: the row {family.name} of families.yaml, which names its source"
    folder = family.config.partition(".")[0]
    return f"semantics: transformers 5.19.0 models/{folder}/modeling_{folder}.py"
