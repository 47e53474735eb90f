"""Targets, verdicts and the registry, with miniatures that decide badly in known ways."""

from __future__ import annotations

import json
from dataclasses import replace

import miniatures
import pytest
from configs import R1

from pytest_moe_routing.errors import (
    TargetImportError,
    TargetNotInstalled,
    UnknownTarget,
    Unsupported,
)
from pytest_moe_routing.failure import Rank
from pytest_moe_routing.flashinfer import FlashInfer, known_releases
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import dump_model, load_model, load_models, read_config
from pytest_moe_routing.oracle.enum_numbers import enum_mismatches
from pytest_moe_routing.oracle.exact import Gate, kernel_call
from pytest_moe_routing.oracle.judge import judge
from pytest_moe_routing.oracle.modular import rejected_by_method
from pytest_moe_routing.oracle.record import Reach
from pytest_moe_routing.oracle.target import Target
from pytest_moe_routing.oracle.verdict import Verdict
from pytest_moe_routing.report.text import sentence, story
from pytest_moe_routing.schemes import SERVED_SCHEMES
from pytest_moe_routing.suite.causes import of_enum
from pytest_moe_routing.targets import TargetId, load_target, locate, target_names
from pytest_moe_routing.targets.builtin.gates import support_gates
from pytest_moe_routing.targets.builtin.target import BuiltinTarget

MODELS = load_models(packaged_directory())
#: The spine: models whose verdicts were worked out by hand.
SPINE = "deepseek-r1 llama-4-maverick llama-4-scout minimax-m2 nemotron-3-nano nemotron-3-super step-3.7-flash"
CASES = [(MODELS[m], b) for m in SPINE.split() for b in MODELS[m].checkpoints]


NEWEST = known_releases()[-1]


class Anonymous(Target):
    """A target with nothing of its own."""

    name = "anonymous"


def told(judgement):
    return "\n".join(story(judgement.record()))


def verdicts(target_class, release):
    target = target_class(FlashInfer.of(release))
    return {(m.id, b): judge(target, m, b) for m, b in CASES}


@pytest.mark.parametrize("release", known_releases())
def test_the_builtin_target_is_never_wrong_and_never_crashes(release):
    target = BuiltinTarget(FlashInfer.of(release))
    cases = [(m, b) for m in MODELS.values() for b in m.checkpoints if b in SERVED_SCHEMES]
    found = {judge(target, model, scheme).verdict for model, scheme in cases}
    assert found <= {"exact", "fallback", "missed"}


def test_the_builtin_target_misses_nothing_in_the_newest_release():
    found = verdicts(BuiltinTarget, known_releases()[-1])
    assert {k for k, j in found.items() if j.verdict != "exact"} == {
        ("llama-4-maverick", "nvfp4"),
        ("llama-4-scout", "nvfp4"),
        ("llama-4-scout", "fp8_per_channel"),
    }


@pytest.mark.parametrize("release", ["0.6.8", "0.6.11.post2", "0.6.12"])
def test_history_scaled_minimax2(release):
    """vLLM PR 44347: exactly Step-3.7-Flash goes wrong, by the factor that the kernel drops."""
    found = verdicts(miniatures.Vllm022, release)
    bad = {k: j for k, j in found.items() if j.verdict in ("wrong", "crash")}
    assert set(bad) == {("step-3.7-flash", "fp8_block"), ("step-3.7-flash", "nvfp4")}
    text = told(bad["step-3.7-flash", "nvfp4"])
    assert "MiniMax2" in text
    assert "routed_scaling_factor: the router has 3, the kernel 1" in text
    assert "MiniMax2 forces routed_scaling_factor to 1.0 before 0.6.13" in text
    assert "would be DeepSeekV3(n_group=1, topk_group=1, routed_scaling_factor=3)" in text


def test_history_ends_where_flashinfer_honours_the_factor():
    assert all(j.verdict.is_good for j in verdicts(miniatures.Vllm022, "0.6.13").values())


def test_history_float32_logits():
    """vLLM issue 33543, PR 43859: exactly the models with float32 logits lose the fast path."""
    found = verdicts(miniatures.NoFloat32Logits, "0.7.0")
    bad = {model for (model, _), j in found.items() if not j.verdict.is_good}
    assert bad == {m.id for m, _ in CASES if m.router.logits_dtype == "float32"}
    judgement = found["minimax-m2", "fp8_block"]
    assert judgement.verdict == "missed"
    assert "gate     router logits dtype: no, float32 is not bfloat16" in told(judgement)


def test_a_number_that_means_another_method():
    found = verdicts(miniatures.DriftedNumbers, "0.6.8")
    judgement = found["deepseek-r1", "nvfp4"]
    assert judgement.verdict == "wrong"
    assert sentence(judgement.findings[0]) == (
        "DeepSeekV3 is passed as 7, which FlashInfer reads as MiniMax2"
    )
    assert judgement.counterexample is not None


def test_a_misread_number_matters_where_no_gate_stops_its_method():
    deepseek, custom = enum_mismatches(miniatures.DriftedNumbers(FlashInfer.of("0.6.8")), CASES)
    assert (custom.finding.field, custom.finding.wanted, custom.finding.got) == (
        "Custom",
        6,
        "SigmoidRenorm",
    )
    assert custom.cases == tuple(f"{model}-{scheme}" for model, scheme in CASES)
    assert (deepseek.finding.wanted, deepseek.finding.got) == (7, "MiniMax2")
    assert custom.classified == ()
    assert "deepseek-r1-nvfp4" in deepseek.classified
    assert not any(case.startswith("minimax-m2") for case in deepseek.classified)
    drifted = miniatures.DriftedNumbers(FlashInfer.of("0.6.8"))
    reach = [of_enum(drifted, each).lines[1] for each in (deepseek, custom)]
    assert reach[0].startswith("  reach    so classified: deepseek-r1-")
    assert reach[1] == "  reach    so classified: no chosen model"

    class Unclassified(miniatures.DriftedNumbers):
        def classify(self, model):
            raise Unsupported("not judged")

    open_ones, _ = enum_mismatches(Unclassified(FlashInfer.of("0.6.8")), CASES)
    assert open_ones.classified == tuple(f"{case} (not known)" for case in open_ones.cases)

    class Closed(miniatures.DriftedNumbers):
        def gates(self, model, scheme, method):
            return (Gate("routing method", method != "Custom", "not a kernel's"),)

    [only] = enum_mismatches(Closed(FlashInfer.of("0.6.8")), CASES)
    assert only.finding.field == "DeepSeekV3"

    class Swapped(Closed):
        def method_numbers(self):
            return {**BuiltinTarget.method_numbers(self), "SigmoidRenorm": 7, "MiniMax2": 6}

        def gates(self, model, scheme, method):
            return (Gate("routing method", method == "DeepSeekV3", "not a kernel's"),)

    swapped = enum_mismatches(Swapped(FlashInfer.of("0.6.8")), CASES)
    assert {(m.finding.field, m.cases) for m in swapped} == {
        ("SigmoidRenorm", ()),
        ("MiniMax2", ()),
    }
    failure = of_enum(Swapped(FlashInfer.of("0.6.8")), swapped[0])
    assert (failure.rank, failure.cause) == (Rank.LATENT, "enum:" + swapped[0].finding.field)
    # Before 0.6.8, six is Unspecified, and seven is no method at all: as bad as another one.
    [none] = enum_mismatches(Closed(FlashInfer.of("0.6.7")), CASES)
    assert (none.finding.field, none.finding.got) == ("DeepSeekV3", None)


def test_a_model_without_an_answer_hides_no_misread_number():
    class Partly(miniatures.DriftedNumbers):
        known = "nvfp4"

        def gates(self, model, scheme, method):
            if scheme != self.known:
                raise Unsupported(f"no {scheme} here")
            return super().gates(model, scheme, method)

    assert len(enum_mismatches(Partly(FlashInfer.of("0.6.8")), CASES)) == 2
    Partly.known = "nothing"
    with pytest.raises(Unsupported, match=r"no gate answers for DeepSeekV3 \(7\): no nvfp4 here"):
        enum_mismatches(Partly(FlashInfer.of("0.6.8")), CASES)
    with pytest.raises(Unsupported, match="answers-nothing has no routing method numbers"):
        enum_mismatches(miniatures.AnswersNothing(FlashInfer.of("0.6.8")), CASES)


class Modular(BuiltinTarget):
    """The gate for float32 logits stands on a base class, as in vLLM 0.18.1; no MXFP4."""

    name = "modular"

    def modular_gates(self, model, scheme, method):
        if scheme == "mxfp4":
            return super().modular_gates(model, scheme, method)
        refuses = model.router.logits_dtype == "float32" and method != "DeepSeekV3"
        return (
            Gate("router logits dtype", not refuses, "float32"),
            Gate("shape", model.id != "nemotron-3-nano", "odd"),
        )


def test_modular_experts_that_refuse_a_method():
    target = Modular(FlashInfer.of("0.6.7"))
    models = [MODELS[m] for m in ("minimax-m2", "llama-4-scout", "nemotron-3-nano", "deepseek-r1")]
    [rejection] = rejected_by_method(target, "nvfp4", models)
    assert rejection.methods[:3] == ("Default", "Renormalize", "Llama4")
    assert rejection.gates == ("router logits dtype",)
    assert rejection.accepted == ("DeepSeekV3",)
    assert rejection.models == ("minimax-m2", "deepseek-r1")
    # What is refused whatever the method has another reason.
    assert rejected_by_method(target, "nvfp4", [MODELS["nemotron-3-nano"]]) == []


def test_modular_experts_that_are_not_there():
    with pytest.raises(Unsupported, match="modular has no modular experts for mxfp4"):
        rejected_by_method(Modular(FlashInfer.of("0.6.7")), "mxfp4", [MODELS["gpt-oss-20b"]])


def test_what_the_launcher_refuses_is_a_crash():
    found = verdicts(miniatures.AcceptsAll, "0.6.0")
    judgement = found["minimax-m2", "fp8_block"]
    assert judgement.verdict == "crash"
    assert "no routing method" in told(judgement)


def test_a_lost_scale_is_wrong_for_exactly_the_models_that_scale():
    found = verdicts(miniatures.LosesScale, known_releases()[-1])
    wrong = {model for (model, _), j in found.items() if j.verdict == "wrong"}
    assert wrong == {m.id for m, _ in CASES if m.router.routed_scaling_factor != 1.0}


def test_a_weight_on_the_wrong_side_is_wrong():
    judgement = verdicts(miniatures.AcceptsAll, known_releases()[-1])["llama-4-scout", "nvfp4"]
    assert judgement.verdict == "wrong"
    assert "on the expert input" in told(judgement)


def test_questions_without_an_answer_are_no_verdicts():
    model = MODELS["deepseek-r1"]
    with pytest.raises(Unsupported, match="does not classify"):
        judge(miniatures.AnswersNothing(FlashInfer.of("0.7.0")), model, "nvfp4")
    with pytest.raises(Unsupported, match="cloudy"):
        judge(miniatures.OnlyClassifies(FlashInfer.of("0.7.0")), model, "nvfp4")


@pytest.mark.parametrize(
    ("scheme", "reach"), [("fp8_block", Reach.PUBLISHED), ("mxint4", Reach.PRODUCIBLE)]
)
def test_who_can_run_a_model_is_told_by_its_published_checkpoints(scheme, reach):
    judgement = judge(BuiltinTarget(FlashInfer.of()), MODELS["deepseek-r1"], scheme)
    assert judgement.record().reach is reach


def test_a_config_does_not_state_that_its_checkpoint_is_published(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.json").write_text(json.dumps({**R1, "_name_or_path": "some/base"}))
    model, target = read_config(tmp_path / "mine"), BuiltinTarget(FlashInfer.of())
    record = judge(target, model, "fp8_block").record()
    assert record.reach == "the checkpoint of this config"
    assert replace(record, verdict=Verdict.WRONG).fails
    assert judge(target, model, "mxint4").record().reach is Reach.PRODUCIBLE
    # Nor does a model.yaml that is made of it.
    (tmp_path / "mine/config.json").write_text(json.dumps(R1))
    made = dump_model(read_config(tmp_path / "mine"))
    (tmp_path / "mine/model.yaml").write_text(made)
    assert judge(target, load_model(tmp_path / "mine"), "fp8_block").record().reach is Reach.OWN


def test_a_target_that_does_not_state_its_version_says_so():
    with pytest.raises(Unsupported, match=r"^anonymous does not state its version$"):
        Anonymous(FlashInfer.of()).version()


@pytest.mark.parametrize(
    ("release", "scheme", "method"),
    [("0.5.2", "nvfp4", "Renormalize"), (NEWEST, "fp8_block", "Renormalize")],
)
def test_a_method_without_groups_is_given_none(release, scheme, method):
    """Launchers reject them, as rules of releases.yaml state; DeepSeekV3 alone has groups."""
    flashinfer = FlashInfer.of(release)
    call = kernel_call(MODELS["qwen3-30b-a3b"].router, scheme, method, flashinfer)
    assert not flashinfer.violations(call)


def test_registered_targets():
    assert {"builtin", "vllm"} <= set(target_names())
    assert load_target("builtin", FlashInfer.of("0.7.0")).name == "builtin"
    assert load_target("miniatures:LosesScale", FlashInfer.of("0.7.0")).name == "loses-scale"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("vlm", UnknownTarget, "unknown target 'vlm'; targets: builtin"),
        ("miniatures:NotATarget", UnknownTarget, "not a class derived from Target"),
        ("miniatures:Nowhere", UnknownTarget, "miniatures has no Nowhere"),
        ("no_such_module:Target", UnknownTarget, "No module named 'no_such_module'"),
        ("miniatures:FailsToStart", TargetImportError, "ImportError: libfoo.so.1"),
        ("os:system", UnknownTarget, "not a class derived from Target"),
        (":", UnknownTarget, "unknown target ':': expected module:Class"),
        ("builtin@somewhere", UnknownTarget, "builtin does not accept @PATH"),
    ],
)
def test_targets_that_cannot_be_used(name, error, message):
    with pytest.raises(error) as caught:
        load_target(name, FlashInfer.of("0.7.0"))
    assert message in str(caught.value)


def test_a_target_whose_package_is_missing():
    try:
        import vllm  # noqa: F401
    except ImportError:
        with pytest.raises(TargetNotInstalled, match=r"or name a wheel.*: vllm@PATH$"):
            load_target("vllm", FlashInfer.of("0.7.0"))
        with pytest.raises(TargetNotInstalled, match=r"or name a wheel.*: vllm@PATH$"):
            locate(TargetId.parse("vllm"))
    else:
        pytest.skip("vllm is installed here")


def test_names_are_checked_without_importing_what_is_tested():
    assert locate(TargetId.parse("builtin")).pinned_flashinfer is None
    with pytest.raises(UnknownTarget):
        locate(TargetId.parse("nothing"))


@pytest.mark.parametrize("text", ["builtin", "a.module:Class", "vllm@some/wheel.whl"])
def test_an_id_is_written_as_it_was_read(text):
    assert str(TargetId.parse(text)) == text


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"n_group": 4, "topk_group": 2, "group_score": "max"}, "n_group"),
        ({"routed_scaling_factor": 16.0}, "scale"),
        ({"correction_bias": "float32"}, "bias"),
    ],
)
def test_a_method_that_ignores_what_the_router_has_is_refused(changes, lost):
    """vLLM PR 30623: softmax with groups must not become plain top-k; Ernie's softmax has a bias."""
    base = replace(
        MODELS["minimax-m2"].router, scoring_func="softmax", correction_bias=None, renormalize=False
    )
    model = replace(MODELS["minimax-m2"], router=replace(base, **changes))
    gates = support_gates(model, "nvfp4", "Default", FlashInfer.of("0.7.0"))
    assert [str(g) for g in gates if not g.ok] == [f"router parameters: no, Default ignores {lost}"]
    plain = replace(MODELS["minimax-m2"], router=base)
    assert all(g.ok for g in support_gates(plain, "nvfp4", "Default", FlashInfer.of("0.7.0")))
    assert judge(BuiltinTarget(FlashInfer.of("0.7.0")), model, "nvfp4").verdict == "fallback"
