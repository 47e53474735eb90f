"""Import a model from its Hugging Face `config.json`. All that is known is in `families.yaml`."""

from pytest_moe_routing.models.huggingface.families import keys_of
from pytest_moe_routing.models.huggingface.reader import config_file, read_config

__all__ = ["config_file", "keys_of", "read_config"]
