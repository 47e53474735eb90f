"""The configs from which SGLang builds a model's MoE block; see `configs.yaml`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from packaging.version import Version

from pytest_moe_routing.data import read_data
from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.models.huggingface.published import (
    in_config,
    published_keys,
    stated_keys,
)

#: What a way to a kernel is if `configs.yaml` does not say otherwise.
_USUAL_WAY: Mapping[str, Any] = {"device": "Blackwell", "options": {}, "is_default": False}


@cache
def configs() -> dict[str, Any]:
    data: dict[str, Any] = read_data(__package__, "configs.yaml")
    return data


def served_as(architecture: str) -> str:
    """Return the architecture whose code runs a model that has this one in its config."""
    return str(configs()["served_as"].get(architecture, architecture))


def config_of(model: ModelSpec) -> dict[str, Any]:
    """Attributes of the config object from which SGLang builds a model's MoE block."""
    data, architecture = configs(), model.architecture
    further = (data[name].get(architecture, {}) for name in ("published", "filled_in"))
    values = {key: value for part in (data["sizes"], *further) for key, value in part.items()}
    for section, names in data["names"].items():
        for key, attributes in names.items():
            value = getattr(getattr(model, section), key)
            if value is not None:
                values.update(dict.fromkeys(attributes, data.get(key, value)))
    return in_config(architecture, values) | _parts(model, values)


def _parts(model: ModelSpec, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the parts of a model's config that have some of its values."""
    parts = configs()["parts"].get(model.architecture, {})
    return {part: {name: values[name] for name in names} for part, names in parts.items()}


def rewriting_of(model: ModelSpec) -> dict[str, Any] | None:
    """Return what to ask about the config that SGLang makes of a model's params.json.

    None if the model has no params.json.
    """
    function = configs()["rewrite"].get(model.architecture)
    if function is None:
        return None
    inner = configs()["sizes"]["moe_intermediate_size"]
    return {"function": function, "experts": {**stated_keys(model), "expert_hidden_dim": inner}}


def rewritten_config(model: ModelSpec, made: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a config that SGLang has made of a params.json."""
    data, router = configs(), model.router
    # By these, a block is built, whatever names its code reads.
    known = {"num_experts": router.num_experts, "num_experts_per_tok": router.top_k}
    filled_in = data["filled_in"].get(model.architecture, {})
    return {**data["sizes"], **known, **filled_in, **made}


def deciding_of(architecture: str) -> dict[str, Any]:
    """Return what else of a config code may read that decides about a model's shared experts."""
    text = configs()["text_architectures"].get(architecture)
    return {
        "architectures": [architecture],
        "encoder_only": False,
        "text_config": {"architectures": [text]} if text else {},
    }


def published_of(model: ModelSpec, without: str) -> dict[str, Any]:
    """Return the keys that a model's config.json has, with the sizes of the block that is built.

    Raises:
        Unsupported: The model stands for layers that differ from its others.
    """
    if model.variant:
        raise Unsupported(f"sglang: not judged: code of {model.architecture} for some layers")
    data, latent = configs(), published_keys(model.architecture).get("latent_size")
    narrower = {latent: data["latent_size"]} if model.experts.latent_size else {}
    sizes = {**data["sizes"], **narrower}
    stated = {key: value for key, value in stated_keys(model).items() if key not in sizes}
    values = {**sizes, **data["published"].get(model.architecture, {}), **narrower, **stated}
    values |= _parts(model, config_of(model))
    return {key: value for key, value in values.items() if key != without}


def other_ways(
    scheme: str, release: Version | None, served: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the ways of a release to kernels that are not TRT-LLM's; see `configs.yaml`.

    Args:
        release: None for one that is newer than all.
        served: What is otherwise with a checkpoint of another format.
    """
    usual = {**_USUAL_WAY, "stored": scheme, "is_restricted": True}
    ways = {**configs()["schemes"].get(scheme, {}), **served}.get("others", ())
    rows = [usual | row for row in ways]
    # The child is not told since when.
    return [
        {name: value for name, value in row.items() if name != "since"}
        for row in rows
        if release is None or release >= Version(row.get("since", "0"))
    ]


def server_of(
    model: ModelSpec, row: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a server to which no runner was named.

    Args:
        config: Attributes of the model's config object.
        row: SGLang's view of the checkpoint, of `schemes` in `configs.yaml`.
    """
    in_checkpoint = row["in_checkpoint"]
    is_said = in_checkpoint is not None and in_checkpoint["quant_method"] != row["quantization"]
    return {
        "architecture": model.architecture,
        "config": config,
        "quantization": row["quantization"] if is_said else None,
        "in_checkpoint": in_checkpoint,
        "detected": row["quantization"],
        "stated": row["stated"] if is_said else [],
        "flagged": [
            runner
            for runner, architectures in row.get("flagged", {}).items()
            if model.architecture in architectures or not architectures
        ],
        "in_weights": row.get("in_weights", {}),
    }


def told_of(
    server: Mapping[str, Any],
    row: Mapping[str, Any],
    ways: Iterable[Mapping[str, Any]],
    *,
    elsewhere: bool,
) -> dict[str, Any]:
    """Return what a question about runners is told; see `probe.other_ways`.

    Args:
        server: The arguments of a server to which no runner was named.
        elsewhere: Whether the row is one of `elsewhere` in `configs.yaml`.
    """
    ways = list(ways)
    known = {*(way["runner"] for way in ways), row.get("runner"), row.get("routed")}
    return {
        "ways": ways,
        "server": server,
        "quantization": row["quantization"],
        "elsewhere": elsewhere,
        "known": sorted(known - {None}),
        "unjudged": row.get("unjudged", {}),
    }


def ways_of_flashinfer(scheme: str, default: str) -> list[dict[str, Any]]:
    """Return the ways to each runner of FlashInfer's that a server may take, the default first."""
    usual = {**_USUAL_WAY, "stored": scheme}
    runners = dict.fromkeys((default, *configs()["runners"]))
    return [usual | {"runner": name, "is_restricted": name != default} for name in runners]
