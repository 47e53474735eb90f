"""What a model says of itself. Imports nothing else of this package, and no torch."""

from pytest_moe_routing.models.huggingface import read_config
from pytest_moe_routing.models.loader import load_model, load_models, select
from pytest_moe_routing.models.spec import SCHEMES, ExpertsConfig, ModelSpec, RouterConfig

__all__ = [
    "SCHEMES",
    "ExpertsConfig",
    "ModelSpec",
    "RouterConfig",
    "load_model",
    "load_models",
    "read_config",
    "select",
]
