"""From a Hugging Face `config.json` to a `ModelSpec`, without transformers and without guessing."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from pytest_moe_routing.errors import ModelError
from pytest_moe_routing.models.huggingface.document import Section, read_json, show
from pytest_moe_routing.models.huggingface.families import Family, table
from pytest_moe_routing.models.huggingface.layers import read_layers
from pytest_moe_routing.models.huggingface.names import check_experts, family_of, levels_of, texts
from pytest_moe_routing.models.huggingface.patterns import BLOCKS, Experts
from pytest_moe_routing.models.huggingface.quantization import (
    QUANTIZATION_FILES,
    checkpoint_of,
)
from pytest_moe_routing.models.huggingface.reading import Reading
from pytest_moe_routing.models.spec import (
    MODEL_DTYPES,
    UNPUBLISHED,
    ExpertsConfig,
    ModelSpec,
    RouterConfig,
)
from pytest_moe_routing.schemes import CHECKPOINT_SCHEMES

CONFIG_NAME = "config.json"
#: Why a checkpoint of a dtype is not judged.
_DTYPES = {
    "float16": "no fused kernel accepts float16 hidden states or router logits",
    "float32": "vLLM casts the weights to bfloat16, and SGLang casts them to float16",
}


def read_config(path: Path, *, override: str | None = None) -> ModelSpec:
    """Return what a model's `config.json` states about its router and experts.

    A key that is absent has the default that the architecture's own config class has in
    transformers, and is listed in `defaulted`; nothing else is filled in. What cannot be proven,
    such as that an unknown class runs a known family's code, is listed in `unproven`. The model is
    named after the folder that the config lies in, as the config itself does not state a name.

    Args:
        path: The file, or the folder that holds a `config.json`.
        override: The experts' scheme, whatever the config states about it.

    Raises:
        ModelError: There is no such scheme. The file cannot be read; the model has no experts; no
            name in it is known, or its family cannot be described; a key is missing, contradicts
            another, or has a value that it cannot have.
    """
    if override is not None and override not in CHECKPOINT_SCHEMES:
        near = get_close_matches(override, CHECKPOINT_SCHEMES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"schemes: {', '.join(CHECKPOINT_SCHEMES)}"
        raise ModelError(f"unknown scheme {override!r}; {hint}")
    file = config_file(path)
    root = read_json(file)
    families = table()
    levels = levels_of(root, families)
    text = levels[-1]
    check_experts(text)
    named = family_of(levels, families)
    family = named.family
    layers = read_layers(text)
    routed = layers.with_experts()
    if not routed:
        raise ModelError(
            f"{text.file}: the model has no experts: each of its {layers.count} layers is dense"
        )
    reading = Reading(text, family, families, layers)
    router, experts = reading.build(RouterConfig), reading.build(ExpertsConfig)
    router = reading.with_unread(router, experts, levels[:-1])
    modules = Experts(router.num_experts, family.blocks or BLOCKS)
    checkpoint = checkpoint_of(levels, _beside(file), routed, modules)
    stated = _dtype(root, text)
    dtype = stated or "bfloat16"
    scheme, unknown = checkpoint.scheme, checkpoint.unknown
    if override is not None:
        scheme, unknown = override, None
    elif dtype != "bfloat16" and unknown is None:
        what = "unquantized" if scheme == "bf16" else scheme
        scheme, unknown = None, f"{what}, with dtype {dtype}: {_DTYPES[dtype]}"
    elif unknown is None:
        layers.take("scheme", checkpoint.own)
    if dtype == "float16" and router.logits_dtype == "bfloat16":
        router = replace(router, logits_dtype="float16")
    groups = layers.groups()
    notes = [*family.notes, *named.notes, *reading.all_notes(), *map(str, groups), *layers.notes]
    if stated is None:
        notes.append(f"not in the config, and assumed: dtype {dtype}")
    name, repository = _name_of(root, file)
    spec = ModelSpec(
        model=name,
        hf_repo=repository,
        architecture=named.architecture,
        router=router,
        experts=experts,
        checkpoints=(scheme,) if scheme else (),
        unknown_scheme=unknown,
        sources=(f"numbers: {file.name} of {repository}", _semantics(family)),
        notes=tuple(dict.fromkeys(notes)),
        folder=Path(_slug(name)),
        num_layers=layers.count,
        dtype=dtype,
        layers=groups,
        architectures=_names(levels, "architectures"),
        model_types=_names(levels, "model_type"),
        raw_config=reading.raw_config(),
        defaulted=tuple(reading.defaulted),
        contradicted=reading.contradicted,
        disputed=reading.disputed,
        unknown_architectures=named.unknown,
        read_as=named.read_as,
        unproven=(*named.unproven, *reading.unproven),
    )
    for key, found, expected in spec.problems():
        text.fail(key, found, expected)
    return spec


def config_file(path: Path) -> Path:
    """Return the config.json of a path: the file itself, or the one in the folder."""
    return path / CONFIG_NAME if path.is_dir() else path


def _beside(file: Path) -> dict[str, Section]:
    """Return the files next to a config.json that may state a quantization."""
    if file.name != CONFIG_NAME:
        return {}
    paths = (file.with_name(name) for name in QUANTIZATION_FILES)
    return {path.name: read_json(path) for path in paths if path.is_file()}


def _dtype(root: Section, text: Section) -> str | None:
    """Return the dtype of the activations; None if the config states none."""
    for section in (text, root):
        for key in ("dtype", "torch_dtype"):
            value = section.get(key)
            if value is None or value == "auto":
                continue
            name = value.removeprefix("torch.") if isinstance(value, str) else value
            if name not in MODEL_DTYPES:
                section.fail(key, show(value), f"one of {', '.join(MODEL_DTYPES)}")
            return str(name)
    return None


def _names(levels: list[Section], key: str) -> tuple[str, ...]:
    """Return the values that a config and those nested in it state for a key, each once."""
    return tuple(dict.fromkeys(name for level in levels for name in texts(level.get(key))))


def _name_of(root: Section, file: Path) -> tuple[str, str]:
    """Return the model's name and repository: those of the config, else the folder's name."""
    said = root.get("_name_or_path")
    if isinstance(said, str) and re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", said):
        return said.rpartition("/")[2], said
    folder = Path(os.path.realpath(file)).parent.name if file.name == CONFIG_NAME else file.stem
    name = re.sub(r"[^\w.-]+", "-", folder).strip("-")
    name = name if re.search(r"\w", name) else "model"
    return name, f"{UNPUBLISHED}/{name}"


def _slug(name: str) -> str:
    """Return a model's id: lower-case letters, digits, dots and dashes."""
    return re.sub(r"[^a-z0-9.-]+", "-", name.lower()).strip("-.") or "model"


def _semantics(family: Family) -> str:
    if family.config is None:
        return f"semantics: the row {family.name} of families.yaml, which names its source"
    folder = family.config.partition(".")[0]
    return f"semantics: transformers {family.since} models/{folder}/modeling_{folder}.py"
