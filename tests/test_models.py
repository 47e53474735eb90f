"""model.yaml: every mistake is one error with file, line, key, found and expected."""

from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_moe_routing.errors import ModelError
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_model, load_models

GOOD = """\
model: Tiny
hf_repo: someone/Tiny
architecture: TinyForCausalLM
router:
  num_experts: 8
  top_k: 2
  scoring_func: sigmoid
  correction_bias: null
  n_group: 4
  topk_group: 2
  group_score: top2_sum
  renormalize: true
  routed_scaling_factor: 2
  logits_dtype: float32
experts:
  hidden_size: 64
  intermediate_size: 32
  activation: silu
  gated: true
checkpoints: [nvfp4]
sources: ["made up for this test"]
"""


def write(tmp_path, text, folder="tiny"):
    path = tmp_path / folder / "model.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_good_file(tmp_path):
    spec = load_model(write(tmp_path, GOOD))
    assert (spec.id, spec.router.top_k, spec.router.routed_scaling_factor) == ("tiny", 2, 2)
    assert spec.experts.shared_experts == 0
    assert spec.checkpoints == ("nvfp4",)


def edit(old, new):
    assert old in GOOD
    return GOOD.replace(old, new)


MISTAKES = {
    "unknown key": (
        edit("  top_k: 2", "  topk: 2"),
        6,
        "router.topk",
        "unknown key",
        "did you mean top_k?",
    ),
    "unknown key, nothing near": (
        edit("  top_k: 2", "  zzz: 2"),
        6,
        "router.zzz",
        "unknown key",
        "valid keys: num_experts",
    ),
    "missing key": (
        edit("  top_k: 2\n", ""),
        4,
        "router.top_k",
        "no key of this name",
        "an integer >= 1",
    ),
    "missing section": (
        GOOD[: GOOD.index("\nexperts:") + 1] + GOOD[GOOD.index("checkpoints") :],
        1,
        "experts",
        "missing",
        "a mapping",
    ),
    "text for a number": (edit("top_k: 2", "top_k: two"), 6, "router.top_k", "'two'", "an integer"),
    "float for a count": (edit("top_k: 2", "top_k: 2.0"), 6, "router.top_k", "'2.0'", "an integer"),
    "true for a count": (
        edit("top_k: 2", "top_k: true"),
        6,
        "router.top_k",
        "'true'",
        "an integer",
    ),
    "number for a flag": (
        edit("renormalize: true", "renormalize: 1"),
        12,
        "router.renormalize",
        "'1'",
        "true or false",
    ),
    "a float that YAML reads as text": (
        edit("routed_scaling_factor: 2", "routed_scaling_factor: 1e1"),
        13,
        "router.routed_scaling_factor",
        "'1e1'",
        "write 10.0 with a dot",
    ),
    "not a number": (
        edit("factor: 2", "factor: .nan"),
        13,
        "router.routed_scaling_factor",
        "'.nan'",
        "a number >= 1e-06",
    ),
    "not a number, as a key of a config": (
        edit("router:\n", "raw_config: {rope: [1.0, .nan]}\nrouter:\n"),
        1,
        "raw_config.rope[1]",
        "NaN",
        "a number",
    ),
    "subnormal": (
        edit("factor: 2", "factor: 5.0e-324"),
        13,
        "router.routed_scaling_factor",
        "'5.0e-324'",
        "a number >= 1e-06",
    ),
    "infinite": (
        edit("factor: 2", "factor: .inf"),
        13,
        "router.routed_scaling_factor",
        "'.inf'",
        "<= 1e+06",
    ),
    "negative": (
        edit("num_experts: 8", "num_experts: -8"),
        5,
        "router.num_experts",
        "'-8'",
        ">= 1",
    ),
    "absurd": (
        edit("num_experts: 8", f"num_experts: {10**30}"),
        5,
        "router.num_experts",
        "'1000",
        "<=",
    ),
    "nothing": (edit("top_k: 2", "top_k:"), 6, "router.top_k", "nothing", "an integer"),
    "wrong choice": (
        edit("scoring_func: sigmoid", "scoring_func: relu"),
        7,
        "router.scoring_func",
        "'relu'",
        "one of softmax, sigmoid, sqrtsoftplus",
    ),
    "list for a value": (edit("top_k: 2", "top_k: [2]"), 6, "router.top_k", "a list", "an integer"),
    "value for a section": (
        GOOD[: GOOD.index("\nexperts:") + 1] + "experts: 3\n" + GOOD[GOOD.index("checkpoints") :],
        15,
        "experts",
        "'3'",
        "a mapping",
    ),
    "duplicate key": (
        edit("  top_k: 2\n", "  top_k: 2\n  top_k: 2\n"),
        7,
        "router.top_k",
        "the key twice",
        "the first is on line 6",
    ),
    "empty list": (
        edit("[nvfp4]", "[]"),
        20,
        "checkpoints",
        "an empty list",
        "a scheme, or unknown_",
    ),
    "unknown checkpoint": (
        edit("[nvfp4]", "[int3]"),
        20,
        "checkpoints",
        "a list",
        "each item one of fp8_block",
    ),
    "repeated checkpoint": (
        edit("[nvfp4]", "[nvfp4, nvfp4]"),
        20,
        "checkpoints",
        "a list",
        "without repetition",
    ),
    "groups do not divide": (
        edit("n_group: 4", "n_group: 3"),
        9,
        "router.n_group",
        "3",
        "a divisor of num_experts (8)",
    ),
    "more experts than kept": (
        edit("top_k: 2", "top_k: 5"),
        6,
        "router.top_k",
        "5",
        "at most the 4 experts of the kept groups",
    ),
    "more experts than there are": (
        edit("top_k: 2", "top_k: 9"),
        6,
        "router.top_k",
        "9",
        "at most num_experts (8)",
    ),
    "more groups kept than there are": (
        edit("topk_group: 2", "topk_group: 5"),
        10,
        "router.topk_group",
        "5",
        "at most n_group (4)",
    ),
    "half a grouping": (
        edit("  topk_group: 2\n", ""),
        4,
        "router.topk_group",
        "nothing",
        "come together",
    ),
    "groups of one": (
        edit("n_group: 4", "n_group: 8").replace("top_k: 2", "top_k: 1"),
        9,
        "router.n_group",
        "8",
        "two or more experts",
    ),
    "no group score": (
        edit("group_score: top2_sum", "group_score: null"),
        11,
        "router.group_score",
        "null",
        "one of top2_sum, max",
    ),
    "epsilon of nothing": (
        edit("renormalize: true", "renormalize: false\n  renormalize_epsilon: 0.1"),
        13,
        "router.renormalize_epsilon",
        "0.1",
        "0 without renormalize",
    ),
    "a gate that is none": (
        edit("activation: silu\n  gated: true", "activation: swigluoai\n  gated: false"),
        19,
        "experts.gated",
        "false",
        "true for swigluoai",
    ),
    "a picture in a name": (
        edit("model: Tiny", 'model: "![i](http://evil/p.png)"'),
        1,
        "model",
        "'![i](http://evil/p.png)'",
        "a name of at most 100 letters, digits, spaces and .,:+()/-",
    ),
    "an escape sequence in a name": (
        edit("model: Tiny", 'model: "a\\e[2Jb"'),
        1,
        "model",
        "'a\\x1b[2Jb'",
        "a name of at most",
    ),
    "half of a surrogate pair in a name": (
        edit("model: Tiny", 'model: "\\ud800"'),
        1,
        "model",
        "'\\ud800'",
        "a name of at most",
    ),
    "an architecture that is no class": (
        edit("architecture: Tiny", "architecture: <b>"),
        3,
        "architecture",
        "'<b>ForCausalLM'",
        "the name of a class",
    ),
    "a long key": (
        edit("  top_k: 2", f"  {'k' * 500}: 2"),
        6,
        f"router.{'k' * 110}...",
        "unknown key",
        "valid keys: num_experts",
    ),
    "repository": (edit("someone/Tiny", "Tiny"), 2, "hf_repo", "Tiny", "owner/name"),
    "not a mapping": ("- a\n- b\n", 1, "the file", "a list", "a mapping"),
    "empty": ("", 1, "the file", "nothing", "a mapping"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(tmp_path, mistake):
    text, line, key, found, expected = MISTAKES[mistake]
    path = write(tmp_path, text)
    with pytest.raises(ModelError) as caught:
        load_model(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: {key}: ")
    assert found in message
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"model: T\xff\n", ":1: found bytes that are not UTF-8"),
        (b"a: b\nmodel: [1, 2\n", "not valid YAML"),
        (
            b"model: !!python/object:os.system x\n" + GOOD.encode()[12:],
            ":1: model: found the tag tag:yaml.org,2002:python/object:os.system, expected a plain",
        ),
        (b"[" * 5000, "found deeper nesting, expected at most 20 levels"),
        (b"x" * 1_000_001, "expected at most 1000000"),
    ],
    ids=["encoding", "syntax", "python tag", "nesting", "size"],
)
def test_broken_files(tmp_path, text, expected):
    path = write(tmp_path, text)
    with pytest.raises(ModelError) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)


def test_a_missing_file(tmp_path):
    (tmp_path / "tiny").mkdir()
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        load_model(tmp_path / "tiny")


@pytest.mark.parametrize("folder", ["Tiny", "tiny model", "tiny_model"])
def test_the_folder_is_the_id(tmp_path, folder):
    with pytest.raises(ModelError, match="lower-case letters, digits, dots and dashes"):
        load_model(write(tmp_path, GOOD, folder))


def test_two_folders_with_one_name(tmp_path):
    write(tmp_path, GOOD, "one")
    write(tmp_path, GOOD, "two")
    with pytest.raises(ModelError, match="found 'Tiny', expected a unique name"):
        load_models(tmp_path)


def test_a_directory_without_models(tmp_path):
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ModelError, match="expected a golden directory"):
            load_models(directory)


def test_a_later_directory_replaces_a_model(tmp_path):
    write(tmp_path, GOOD.replace("top_k: 2", "top_k: 3"), "minimax-m2")
    models = load_models(packaged_directory(), tmp_path)
    assert models["minimax-m2"].router.top_k == 3
    assert "deepseek-r1" in models


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_damage_is_an_error_or_still_a_model(tmp_path, data):
    """Cutting, doubling or replacing any piece of a file never ends in anything but `ModelError`."""
    start = data.draw(st.integers(0, len(GOOD)))
    end = data.draw(st.integers(start, min(len(GOOD), start + 40)))
    piece = data.draw(st.one_of(st.just(""), st.just(GOOD[start:end] * 2), st.text(max_size=8)))
    path = write(tmp_path, (GOOD[:start] + piece + GOOD[end:]).encode("utf-8", "surrogatepass"))
    message = f"{path}:1: "
    try:
        load_model(path)
    except ModelError as error:
        message = str(error)
    assert re.match(rf"{re.escape(str(path))}(:\d+)?: ", message)
