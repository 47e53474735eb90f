"""Models as their configs describe them. Imports no torch."""

from pytest_moe_routing.models.huggingface import config_file, read_config
from pytest_moe_routing.models.layer_groups import LayerGroup
from pytest_moe_routing.models.loader import (
    load_all,
    load_any,
    load_incomplete,
    load_model,
    load_models,
    load_named,
    misnamed_files,
    model_files,
    select,
)
from pytest_moe_routing.models.spec import (
    ExpertsConfig,
    IncompleteModel,
    ModelSpec,
    RouterConfig,
)
from pytest_moe_routing.models.writer import dump_model

__all__ = [
    "ExpertsConfig",
    "IncompleteModel",
    "LayerGroup",
    "ModelSpec",
    "RouterConfig",
    "config_file",
    "dump_model",
    "load_all",
    "load_any",
    "load_incomplete",
    "load_model",
    "load_models",
    "load_named",
    "misnamed_files",
    "model_files",
    "read_config",
    "select",
]
