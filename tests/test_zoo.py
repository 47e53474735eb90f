"""The packaged models, and what a file may say of them: like another, incomplete, written back."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_moe_routing.errors import ModelError
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import (
    ExpertsConfig,
    LayerGroup,
    ModelSpec,
    RouterConfig,
    dump_model,
    load_incomplete,
    load_model,
    load_models,
    read_config,
)
from pytest_moe_routing.models.huggingface.families import table
from pytest_moe_routing.models.spec import MODEL_DTYPES, schema
from pytest_moe_routing.oracle.judge import open_questions
from pytest_moe_routing.schemes import CHECKPOINT_SCHEMES

ZOO = load_models(packaged_directory())

BASE = """\
model: Base
hf_repo: someone/Base
architecture: BaseForCausalLM
router:
  num_experts: 8
  top_k: 2
  scoring_func: sigmoid
  correction_bias: float32
  renormalize: true
  logits_dtype: float32
experts: {hidden_size: 64, intermediate_size: 32, activation: silu, gated: true}
checkpoints: [nvfp4]
sources: ["made up for this test"]
"""
LIKE = """\
model: Like
hf_repo: someone/Like
architecture: BaseForCausalLM
like: base
checkpoints: [fp8_block]
sources: ["made up for this test"]
"""
INCOMPLETE = """\
model: Partial
architecture: BaseForCausalLM
incomplete: "everything but the number of experts"
router: {num_experts: 8}
sources: ["made up for this test"]
"""


@pytest.fixture
def write(tmp_path):
    def write(id_, text):
        path = tmp_path / id_ / "model.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    write("base", BASE)
    return write


# -- like another model ---------------------------------------------------------------------------


def test_like_takes_router_and_experts(write):
    base, like = load_model(write("base", BASE)), load_model(write("like", LIKE))
    assert (like.router, like.experts) == (base.router, base.experts)
    assert (like.id, like.model, like.checkpoints) == ("like", "Like", ("fp8_block",))


def test_own_keys_count_one_by_one(write):
    like = load_model(
        write(
            "like",
            LIKE + "router:\n  top_k: 4\n  n_group: 2\n  topk_group: 1\n  group_score: max\n",
        )
    )
    assert (like.router.top_k, like.router.n_group, like.router.num_experts) == (4, 2, 8)
    assert like.experts.hidden_size == 64


def test_like_one_that_is_like_another(write):
    write("middle", LIKE.replace("Like", "Middle") + "router: {top_k: 4}\n")
    like = load_model(write("like", LIKE.replace("base", "middle") + "router: {num_experts: 16}\n"))
    assert (like.router.top_k, like.router.num_experts) == (4, 16)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ("nobody", "found 'nobody', expected the id of a model in"),
        ("..", "found '..', expected the id of a model in"),
        ("../tmp/base", "expected the id of a model in"),
        (
            "like",
            "found 'like', expected a model that does not inherit, directly or indirectly, from this one",
        ),
        (
            "circle",
            "found 'like', expected a model that does not inherit, directly or indirectly, from this one",
        ),
    ],
)
def test_like_what_cannot_be(write, other, expected):
    write("circle", LIKE.replace("base", "like").replace("Like", "Circle"))
    path = write("like", LIKE.replace("base", other))
    with pytest.raises(ModelError, match=r"model.yaml:4: like: ") as caught:
        load_model(path)
    assert expected in str(caught.value)


def test_an_error_is_where_the_key_stands(write):
    base = write("base", BASE.replace("num_experts: 8", "num_experts: eight"))
    path = write("like", LIKE)
    with pytest.raises(ModelError) as caught:
        load_model(path)
    assert str(caught.value).startswith(f"{base.resolve()}:5: router.num_experts: found 'eight'")
    write("base", BASE)
    path = write("like", LIKE + "router:\n  top_k: 9\n")
    with pytest.raises(ModelError) as caught:
        load_model(path)
    assert str(caught.value).startswith(f"{path}:8: router.top_k: found 9")


# -- incomplete models ----------------------------------------------------------------------------


def test_incomplete_models_are_kept_apart(write, tmp_path):
    path = write("partial", INCOMPLETE)
    assert list(load_models(tmp_path)) == ["base"]
    (partial,) = load_incomplete(tmp_path).values()
    assert (partial.id, partial.router, partial.experts) == ("partial", {"num_experts": 8}, {})
    with pytest.raises(ModelError, match="incomplete, so it cannot be judged: everything but"):
        load_model(path)


def test_a_later_directory_can_complete_a_model(write, tmp_path):
    write("partial", INCOMPLETE)
    later = tmp_path / "later" / "partial" / "model.yaml"
    later.parent.mkdir(parents=True)
    later.write_text(BASE)
    assert set(load_models(tmp_path, later.parents[1])) == {"base", "partial"}
    assert not load_incomplete(tmp_path, later.parents[1])


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("num_experts: 8", "num_experts: -8", ":4: router.num_experts: found '-8'"),
        (
            "num_experts: 8",
            "num_expert: 8",
            ":4: router.num_expert: unknown key; did you mean num_experts?",
        ),
        ("architecture: BaseForCausalLM\n", "", ":1: architecture: found no key of this name"),
        ("incomplete:", "hf_repo: x\nincomplete:", ":3: hf_repo: found 'x', expected owner/name"),
    ],
)
def test_what_is_known_of_an_incomplete_model_is_checked(write, tmp_path, old, new, expected):
    write("partial", INCOMPLETE.replace(old, new))
    with pytest.raises(ModelError) as caught:
        load_incomplete(tmp_path)
    assert expected in str(caught.value)


# -- written back ---------------------------------------------------------------------------------


def values(cls):
    """Keyword arguments of a section, each valid by itself."""

    def one(kind):
        strategies = {
            int: st.integers(int(kind.minimum or 0), 64),
            float: st.floats(kind.minimum or 2**-70, max(kind.minimum or 0, 1.0)),
            bool: st.booleans(),
            str: st.sampled_from(kind.choices) if kind.choices else st.text(min_size=1),
        }
        return strategies[kind.type] | (st.none() if kind.nullable else st.nothing())

    return {name: one(item.metadata["kind"]) for name, item in schema(cls).items()}


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
groups = st.lists(
    st.sampled_from(
        [
            LayerGroup(layers="0-2", kind="dense"),
            LayerGroup(layers="5", kind="hash_moe"),
            LayerGroup(layers="7, 9-11", experts={"shared_experts": 3, "latent_size": None}),
        ]
    ),
    unique_by=lambda group: group.layers,
).map(tuple)
texts = st.lists(st.text(min_size=1), min_size=1, max_size=3, unique=True).map(tuple)
specs = st.builds(
    ModelSpec,
    router=st.builds(RouterConfig, **values(RouterConfig)).filter(lambda s: not list(s.problems())),
    experts=st.builds(ExpertsConfig, **values(ExpertsConfig)).filter(
        lambda s: not list(s.problems())
    ),
    model=st.from_regex(r"\w[\w .,:+()/-]{0,40}", fullmatch=True).map(str.strip),
    hf_repo=st.just("someone/Model"),
    architecture=st.from_regex(r"[A-Za-z_]\w{0,40}", fullmatch=True),
    checkpoints=st.lists(st.sampled_from(CHECKPOINT_SCHEMES), min_size=1, unique=True).map(tuple),
    sources=texts,
    notes=texts | st.just(()),
    num_layers=st.none() | st.integers(12, 200),
    dtype=st.sampled_from(MODEL_DTYPES),
    layers=groups,
    architectures=texts | st.just(()),
    raw_config=st.dictionaries(st.text(), json_values, max_size=3),
    defaulted=texts | st.just(()),
)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
    deadline=None,
)
@given(spec=specs)
def test_any_model_is_read_back(write, spec):
    assert load_model(write("written", dump_model(spec))) == spec


@pytest.mark.parametrize("model", ZOO.values(), ids=str)
def test_packaged_models_are_read_back(write, model):
    written = load_model(write("written", dump_model(model)))
    assert written.as_dict() == model.as_dict()
    assert (written.sources, written.notes) == (model.sources, model.notes)


# -- the packaged models --------------------------------------------------------------------------


def config_of(model):
    """A config.json with the model's numbers, under the first spelling of each key."""
    family = table().by_name[model.architecture]
    config = {"architectures": [model.architecture]}
    numbers = {**vars(model.router), **vars(model.experts)}
    for name, spellings in table().spellings.items():
        if name not in family.fixed and numbers[name] is not None:
            *outer, key = (family.keys.get(name) or spellings)[0].split(".")
            inner = config
            for part in outer:
                inner = inner.setdefault(part, {})
            inner[key] = numbers[name]
    if family.name == "deepseek_v2" and (model.router.n_group or 1) > 1:
        config["topk_method"] = "group_limited_greedy"
    if family.name == "k2_horizon":
        config |= {"moe_gate_bias": True, "norm_topk_prob": True, "router_score_func": "sigmoid"}
    if family.name in ("bailing_moe_linear", "param2moe"):
        config |= {"moe_router_enable_expert_bias": True, "score_function": "sigmoid"}
    if family.name == "bailing_moe_v2":
        config |= {"moe_router_enable_expert_bias": True, "router_dtype": "fp32"}
    if family.name == "cohere2_moe":
        config["expert_selection_fn"] = model.router.scoring_func
    if family.name == "llada2_moe":
        config |= {"moe_router_enable_expert_bias": True, "score_function": "sigmoid"}
    if family.name in ("deepseek_v3", "deepseek_v32", "glm_moe_dsa", "glm5_next_text"):
        config |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    if family.name == "interns1_pro":
        config["router_n_groups"] = model.router.router_n_groups
    if family.name == "gemma4_text":
        config["enable_moe_block"] = True
    return config


IN_FAMILIES = [model for model in ZOO.values() if model.architecture in table().by_name]


@pytest.mark.parametrize("model", IN_FAMILIES, ids=str)
def test_a_model_is_what_its_family_computes(model, tmp_path):
    """Fixed values of a family (scores, bias, epsilon, order, side) hold in every model of it."""
    (tmp_path / "config.json").write_text(json.dumps(config_of(model)))
    imported = read_config(tmp_path)
    assert imported.router == model.router
    assert imported.experts == model.experts
    assert open_questions(imported) == []


def test_models_of_no_family():
    """Architectures that wrap another, so that a flat config would not name the family."""
    others = {model.id for model in ZOO.values()} - {model.id for model in IN_FAMILIES}
    wrappers = {"kimi-k2.5", "kimi-k2.6", "kimi-k2.7-code", "kimi-k3", "deepseek-vl2-tiny"}
    assert others == wrappers


def test_every_model_names_its_sources():
    assert len(ZOO) >= 90
    assert not load_incomplete(packaged_directory())
    for model in ZOO.values():
        assert any(source.startswith("numbers: ") for source in model.sources), model.id
    for model in ZOO.values():
        assert any(source.startswith("checkpoints: ") for source in model.sources), model.id
