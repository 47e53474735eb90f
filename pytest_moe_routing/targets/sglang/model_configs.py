"""The configs from which SGLang builds a model's MoE block; see `configs.yaml`."""

from __future__ import annotations

from functools import cache
from typing import Any

from pytest_moe_routing.data import read_data
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.models.huggingface.published import published_keys, stated_keys


@cache
def configs() -> dict[str, Any]:
    data: dict[str, Any] = read_data(__package__, "configs.yaml")
    return data


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
    pairs = data["twice"].get(architecture, ())
    return {**values, **{name: [values[name]] * 2 for name in pairs}}


def deciding_of(model: ModelSpec) -> dict[str, Any]:
    """Return what else of a config code may read that decides about a model's shared experts."""
    text = configs()["text_architectures"].get(model.architecture)
    return {
        "architectures": [model.architecture],
        "encoder_only": False,
        "text_config": {"architectures": [text]} if text else {},
    }


def published_of(model: ModelSpec, without: str) -> dict[str, Any]:
    """Return the keys that a model's config.json has, with the sizes of the block that is built."""
    data, latent = configs(), published_keys(model.architecture).get("latent_size")
    sizes = {
        **data["sizes"],
        **({latent: data["latent_size"]} if model.experts.latent_size else {}),
    }
    stated = {key: value for key, value in stated_keys(model).items() if key not in sizes}
    values = {**sizes, **data["published"].get(model.architecture, {}), **stated}
    return {key: value for key, value in values.items() if key != without}
