"""`families.yaml` against the config classes of transformers: names, defaults, aliases, nesting."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path

import pytest

from pytest_moe_routing.errors import ModelError
from pytest_moe_routing.models import read_config
from pytest_moe_routing.models.huggingface.config_keys import row_of
from pytest_moe_routing.models.huggingface.families import table

transformers = pytest.importorskip("transformers", reason="the oracle is the transformers library")

import transformers_routers  # noqa: E402
from transformers_routers import config_class, is_there, make_config  # noqa: E402

CASES = [case for case in transformers_routers.CASES if is_there(case.family)]

pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own

FAMILIES = [f for f in table().families.values() if f.config and is_there(f.name)]


def look_up(config, key):
    """A key with dots, in a config and the configs in it; raises AttributeError."""
    for part in key.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_defaults_are_those_of_the_class(family):
    config = config_class(family.name)()
    for name, ours in family.defaults.items():
        keys = family.keys.get(name) or table().spellings[name]
        theirs = look_up(config, next(key for key in keys if has(config, key)))
        if theirs is None:
            theirs = table().nulls[name]
        assert theirs == ours, f"{name}: {keys}"
    for case in family.cases:
        if has(config, case.key):
            assert look_up(config, case.key) == case.default, case.key


def has(config, key):
    try:
        look_up(config, key)
    except (AttributeError, KeyError):
        return False
    return True


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_other_names_of_a_key_are_known(family):
    """Whatever alias the class has for a key that is read, is read as well."""
    for alias, key in config_class(family.name).attribute_map.items():
        for name, spellings in table().spellings.items():
            keys = family.keys.get(name) or spellings
            if key in keys and name not in family.fixed:
                assert alias in keys, f"{alias} of {key}"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_class_is_found_by_its_model_type(family):
    model_type = config_class(family.name).model_type
    assert table().by_name[model_type] is family


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_config_without_defaults_says_the_same(case, tmp_path):
    """transformers writes every key; a hand-made config has only those that differ."""
    config = make_config(case)
    config.save_pretrained(tmp_path)
    whole = read_config(tmp_path)
    width = "d_model" if case.family == "dbrx" else "hidden_size"
    short = {"model_type": config.model_type, width: config.hidden_size, **case.config}
    (tmp_path / "config.json").write_text(json.dumps(short))
    terse = read_config(tmp_path)
    assert (terse.router, terse.experts) == (whole.router, whole.experts)


#: Configs that nest the text model's: family, class, its argument for the text config.
WRAPPERS = [
    ("aria_text", "aria.AriaConfig"),
    ("deepseek_ocr2_text", "deepseek_ocr2.DeepseekOcr2Config"),
    ("ernie4_5_vl_moe_text", "ernie4_5_vl_moe.Ernie4_5_VLMoeConfig"),
    ("glm4v_moe_text", "glm4v_moe.Glm4vMoeConfig"),
    ("glm5_next_text", "glm5_next.Glm5NextConfig"),
    ("llama4_text", "llama4.Llama4Config"),
    ("minimax_m3_vl_text", "minimax_m3_vl.MiniMaxM3VLConfig"),
    ("qwen3_5_moe_text", "qwen3_5_moe.Qwen3_5MoeConfig"),
    ("qwen3_omni_moe_text", "qwen3_omni_moe.Qwen3OmniMoeThinkerConfig"),
    ("qwen3_vl_moe_text", "qwen3_vl_moe.Qwen3VLMoeConfig"),
    ("qwen4_exp_text", "qwen4_exp.Qwen4ExpConfig"),
    ("step3p5", "step3p7.Step3p7Config"),
    ("deepseek_v3", "kimi_k25.Kimi_K25Config"),
    ("mistral4", "mistral3.Mistral3Config"),
]


@pytest.mark.parametrize(("family", "wrapper"), WRAPPERS, ids=[name for _, name in WRAPPERS])
def test_nested_text_configs(family, wrapper, tmp_path):
    folder, _, name = wrapper.partition(".")
    module = importlib.import_module(f"transformers.models.{folder}.configuration_{folder}")
    case = next(case for case in CASES if case.family == family)
    text = make_config(case)
    text.save_pretrained(tmp_path)
    alone = read_config(tmp_path)
    getattr(module, name)(text_config=text.to_dict()).save_pretrained(tmp_path)
    nested = read_config(tmp_path)
    assert (nested.router, nested.experts) == (alone.router, alone.experts)


def test_qwen_omni_is_its_thinker(tmp_path):
    thinker = {"text_config": {"num_experts": 24, "num_experts_per_tok": 3}}
    transformers.Qwen3OmniMoeConfig(thinker_config=thinker).save_pretrained(tmp_path)
    spec = read_config(tmp_path)
    assert (spec.router.num_experts, spec.router.top_k) == (24, 3)
    assert "talker" in spec.notes[0]


def test_a_dense_gemma_is_refused(tmp_path):
    config_class("gemma4_text")().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"num_experts: found null.*the model has no experts"):
        read_config(tmp_path)


# -- the next release shows up by itself ----------------------------------------------------------

#: Config classes with experts that are not a language model's, or are a part of another's.
NO_LANGUAGE_MODEL = {"", "vitpose_backbone", "dots3_note_vision_encoder"}


def moe_config_classes():
    """Every config class of the installed release that has a key about experts: class, its keys."""
    common = set(transformers.PreTrainedConfig().to_dict())
    folder = Path(transformers.__file__).parent / "models"
    for path in sorted(folder.glob("*/configuration_*.py")):
        if not re.search(r"expert|moe_", path.read_text("utf-8")):
            continue
        module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        for cls in vars(module).values():
            is_config = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedConfig)
            if is_config and cls.__module__ == module.__name__:
                keys = {*inspect.get_annotations(cls), *cls.attribute_map} - common
                if any(re.search(r"experts?_|_experts?|^moe_|_moe_", key) for key in keys):
                    yield cls, keys


def test_every_architecture_with_experts_is_known():
    """One row of families.yaml each; a new release of transformers fails here with their names."""
    found = {cls.model_type for cls, _ in moe_config_classes()}
    assert len(found) >= 60
    unknown = found - table().by_name.keys() - table().refused.keys() - NO_LANGUAGE_MODEL
    assert not unknown


#: The lists of keys with which no model is judged.
OPEN = ("routing", "suspect")


def test_every_key_is_read_or_known():
    """Each key of each class is read by its family, or has a row that says what it is about.

    A key that may change the routing in an unknown way would leave every model of the class open.
    """
    unknown = {}
    for cls, keys in moe_config_classes():
        family = table().by_name.get(cls.model_type)
        if family is None:
            continue
        common = {key for names in table().spellings.values() for key in names}
        read = {*family.limits, *family.reads, *(case.key for case in family.cases)}
        for name, spellings in table().spellings.items():
            read.update(family.keys.get(name) or spellings)
        read.update(key for names in family.keys.values() for key in names)
        rows = {key: row_of(key) for key in keys - read - common}
        unread = {key for key, row in rows.items() if row is None or row.list in OPEN}
        if unread:
            unknown[cls.__name__] = sorted(unread)
    assert not unknown
