"""Import a model from its Hugging Face `config.json`. All that is known is in `families.yaml`."""

from pytest_moe_routing.models.huggingface.families import keys_of
from pytest_moe_routing.models.huggingface.reader import read_config

__all__ = ["keys_of", "read_config"]
