"""Keys in objects that no family reads: they are seen at any depth, where the object is not known."""

from __future__ import annotations

import pytest
from configs import read
from test_config_keys import GLM


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"foo": {"num_experts": 4}}, "foo.num_experts"),
        ({"foo": {"bar": {"num_experts": 4}}}, "foo.bar.num_experts"),
        ({"foo": [{"a": [[{"num_experts": 4}]]}]}, "foo.0.a.0.0.num_experts"),
        ({"foo_config": {"text_config": {"router_kind": 1}}}, "foo_config.text_config.router_kind"),
        ({"foo": {"bar": {"clamp_limit": 7}}}, "foo.bar.clamp_limit"),
    ],
)
def test_keys_deep_in_an_unknown_object_are_seen(tmp_path, change, path):
    spec = read(tmp_path, {**GLM, **change})
    assert spec.unproven == (f"about experts or routing, and not read: {path}",)
    [name] = change
    assert f"not known, and not read: {name}" in spec.notes


@pytest.mark.parametrize(
    ("value", "doubt"),
    [(4, ""), (9, "stated otherwise outside the text model's config: foo.bar.num_experts_per_tok")],
)
def test_deep_keys_beside_the_text_config_may_not_contradict_it(tmp_path, value, doubt):
    assert GLM["num_experts_per_tok"] == 4
    outer = {"foo": {"bar": {"num_experts_per_tok": value}}}
    spec = read(tmp_path, {"text_config": GLM, **outer})
    assert spec.unproven == tuple(filter(None, [doubt]))
    same = "outside the text model's config, and not read: foo.bar.num_experts_per_tok"
    assert (same in spec.notes) is not bool(doubt)


def test_a_deep_key_that_changes_the_meaning(tmp_path):
    assert read(
        tmp_path, {**GLM, "foo": {"bar": [{"router_temperature": 0.5}]}}
    ).router.not_expressible == (
        "the router's logits are divided by a temperature (foo.bar.0.router_temperature)"
    )
    assert (
        read(tmp_path, {**GLM, "foo": [{"router_temperature": 1}]}).router.not_expressible is None
    )


def test_an_object_of_which_keys_were_read_has_others(tmp_path):
    dbrx = {"architectures": ["DbrxForCausalLM"], "ffn_config": {"moe_odd": 1, "frobnicate": 2}}
    spec = read(tmp_path, dbrx)
    assert "about experts or routing, and not read: ffn_config.moe_odd" in spec.unproven
    assert "not known, and not read: ffn_config.frobnicate" in spec.notes


@pytest.mark.parametrize("key", ["vision_config", "rope_scaling", "quantization_config"])
def test_objects_about_something_else_are_not_searched(tmp_path, key):
    config = {**GLM, key: {"x": {"num_experts": 4}}}
    if key == "quantization_config":
        config[key]["quant_method"] = "fp8"
    assert not read(tmp_path, config).unproven
