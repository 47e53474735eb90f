"""From a Hugging Face `config.json` to a `ModelSpec`, without transformers and without guessing."""

from __future__ import annotations

import re
from pathlib import Path

from pytest_moe_routing.models.huggingface.document import Section, read_json, show
from pytest_moe_routing.models.huggingface.families import Family, table
from pytest_moe_routing.models.huggingface.layers import read_layers
from pytest_moe_routing.models.huggingface.names import check_experts, family_of, levels_of, texts
from pytest_moe_routing.models.huggingface.quantization import scheme_of
from pytest_moe_routing.models.huggingface.reading import Reading
from pytest_moe_routing.models.spec import MODEL_DTYPES, ExpertsConfig, ModelSpec, RouterConfig

CONFIG_NAME = "config.json"
QUANTIZATION_NAME = "hf_quant_config.json"


def read_config(path: Path) -> ModelSpec:
    """What a model's `config.json` states about its router and experts.

    A key that is absent has the default that the architecture's own config class has in
    transformers, and is listed in `defaulted`; nothing else is filled in. What cannot be proven,
    such as that an unknown class runs a known family's code, is listed in `unproven`. The model is
    named after the folder that the config lies in, as the config itself does not state a name.

    Args:
        path: The file, or the folder that holds a `config.json`.

    Raises:
        ModelError: The file cannot be read; the model has no experts; no name in it is known, or
            its family cannot be described; a key is missing, contradicts another, or has a value
            that it cannot have.
    """
    file = path / CONFIG_NAME if path.is_dir() else path
    root = read_json(file)
    families = table()
    levels = levels_of(root, families)
    text = levels[-1]
    check_experts(text)
    named = family_of(levels, families)
    family = named.family
    beside = file.with_name(QUANTIZATION_NAME)
    scheme = scheme_of(root, text, read_json(beside) if beside.is_file() else None)
    layers = read_layers(text)
    reading = Reading(text, family, families, layers)
    router, experts = reading.build(RouterConfig), reading.build(ExpertsConfig)
    router = reading.with_unread(router, levels[:-1])
    groups = layers.groups()
    notes = [*family.notes, *named.notes, *reading.all_notes(), *map(str, groups), *layers.notes]
    name, repository = _name_of(root, file)
    spec = ModelSpec(
        model=name,
        hf_repo=repository,
        architecture=named.architecture,
        router=router,
        experts=experts,
        checkpoints=(scheme,),
        sources=(f"numbers: {file.name} of {repository}", _semantics(family)),
        notes=tuple(dict.fromkeys(notes)),
        folder=Path(_slug(name)),
        num_layers=layers.count,
        dtype=_dtype(root, text),
        layers=groups,
        architectures=_names(levels, "architectures"),
        model_types=_names(levels, "model_type"),
        raw_config=reading.raw_config(),
        defaulted=tuple(reading.defaulted),
        contradicted=reading.contradicted,
        unproven=(*named.unproven, *reading.unproven),
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


def _names(levels: list[Section], key: str) -> tuple[str, ...]:
    """What a config and those nested in it state under a key, without repetition."""
    return tuple(dict.fromkeys(name for level in levels for name in texts(level.get(key))))


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
