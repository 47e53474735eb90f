"""The config sweep: what it holds, how it is judged, and that the builtin target passes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import miniatures
import pytest

from pytest_moe_routing import __version__
from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.failure import Rank
from pytest_moe_routing.flashinfer import FlashInfer, known_releases
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import ModelSpec, load_models
from pytest_moe_routing.models.spec import ACTIVATIONS
from pytest_moe_routing.oracle.config_sweep import CachedTarget, sweep, sweep_behind_gates
from pytest_moe_routing.oracle.exact import Gate, kernel_call
from pytest_moe_routing.oracle.swept_configs import swept_models, swept_routers
from pytest_moe_routing.oracle.target import Captured
from pytest_moe_routing.report.text import story
from pytest_moe_routing.schemes import SERVED_SCHEMES
from pytest_moe_routing.suite.causes import of_sweep
from pytest_moe_routing.targets.builtin.target import BuiltinTarget

MODELS = load_models(packaged_directory())
NEWEST = known_releases()[-1]


def serving(scheme):
    return [model for model in MODELS.values() if scheme in model.checkpoints]


def test_the_sweep_is_bounded_valid_and_in_order():
    routers = swept_routers()
    assert 2000 < len(routers) < 6000
    assert len(set(routers)) == len(routers)
    undivided = [router for router in routers if any(router.problems())]
    assert {(n, e) for r in undivided for n, _, e in r.problems()} == {
        ("n_group", f"a divisor of num_experts ({count})") for count in (60, 257)
    }
    sizes = [(router.num_experts, router.top_k) for router in routers]
    assert sizes == sorted(sizes)
    assert set(swept_routers(1)) <= set(routers)


def test_the_sweep_has_experts_of_every_activation():
    """Gated but for relu2, which is what no fused kernel gates."""
    there = {(model.experts.activation, model.experts.gated) for model in swept_models()}
    assert there == {(activation, activation != "relu2") for activation in ACTIVATIONS}
    # With the parameters of models.
    fields = ("activation", "activation_alpha", "activation_beta")
    swept, known = (
        {tuple(getattr(m.experts, name) for name in fields) for m in models}
        for models in (swept_models(), MODELS.values())
    )
    assert {row for row in swept if row[1] is not None} == {row for row in known if row[1]}


def test_the_sweep_surrounds_every_expressible_model():
    """But for sizes, every model's router is in it, or one step away from one that is."""

    def words(router):
        grouped = (router.topk_group or 1) < (router.n_group or 1)
        return (
            router.scoring_func,
            router.renormalize,
            router.correction_bias is not None,
            router.routed_scaling_factor != 1.0,
            router.group_score if grouped else None,
            router.topk_before_score,
            router.weight_on,
        )

    there = {words(router) for router in swept_routers()}
    for model in MODELS.values():
        if model.router.not_expressible is None:
            mine = words(model.router)
            assert min(sum(a != b for a, b in zip(mine, w, strict=True)) for w in there) <= 1, model


@pytest.mark.parametrize("release", known_releases())
def test_the_builtin_target_passes(release):
    """In the release in force the suite sweeps the whole config sweep; here its heart, in each."""
    routers = swept_routers() if release in ("0.6.8", "0.6.12") else swept_routers(1)
    target = CachedTarget(BuiltinTarget(FlashInfer.of(release)))
    for scheme in SERVED_SCHEMES:
        found = sweep(target, scheme, (), routers)
        assert not found.causes, [str(cause) for cause in found.causes]
        # No kernel and no reference divides experts into unequal groups.
        undivided = [router for router in routers if any(router.problems())]
        assert found.unanswered.total() == len(undivided)
        assert found.verdicts.total() == len(routers) - len(undivided)


def test_history_of_scaled_minimax2():
    """vLLM 0.22's classifier: a handful of causes, and the one that a model reaches."""
    target = CachedTarget(miniatures.Vllm022(FlashInfer.of("0.6.12")))
    found = sweep(target, "nvfp4", serving("nvfp4"))
    assert len(found.causes) < 40
    [scaled] = [
        cause
        for cause in found.causes
        if cause.methods == ("MiniMax2",) and "scale" in fields_of(cause)
    ]
    assert scaled.models == ("minimax-m3", "step-3.7-flash")
    assert scaled.count > 20
    assert scaled.example.model.router.num_experts == 8
    [(_, _, fact)] = scaled.why
    assert "MiniMax2 forces routed_scaling_factor to 1.0 before 0.6.13" in fact
    assert scaled.settings["routed_scaling_factor"] == 1.5
    # What concerns models is told as their verdicts are, and no second time.
    [failure] = of_sweep(scaled)
    assert (failure.rank, failure.case) == (Rank.SILENT, "minimax-m3 nvfp4")
    assert failure.cause == scaled.concerned[0].record().cause == "wrong:recipe-scale"
    [behind] = of_sweep(scaled, behind_gates=True)
    assert behind.rank is Rank.LATENT
    latent = [cause for cause in found.causes if not cause.models]
    assert all(f.rank is Rank.LATENT for cause in latent for f in of_sweep(cause))
    crashes = {
        fact for cause in found.causes if cause.verdict == "crash" for _, _, fact in cause.why
    }
    assert "the Llama4 kernel accepts only top_k 1 and at most 128 experts" in crashes


def test_causes_that_are_others_together_are_left_out():
    target = CachedTarget(miniatures.Vllm022(FlashInfer.of("0.6.12")))
    softmax = [fields_of(c) for c in sweep(target, "nvfp4", ()).causes if "Default" in c.methods]
    assert {"scale"} in softmax
    assert {"groups"} in softmax
    assert not any({"scale", "groups"} <= found for found in softmax)


def fields_of(cause):
    return {field for _, field, _ in cause.why}


class Gated(BuiltinTarget):
    """Records its calls, which know no factor; takes `methods` only, and no router of 8 experts."""

    name = "gated"
    methods = ("Renormalize", "RenormalizeNaive")

    def gates(self, model, scheme, method):
        return (
            Gate("routing method", method in self.methods, f"{method} is not taken"),
            Gate("shape", model.router.num_experts != 8, "8 experts"),
        )

    def capture(self, model, scheme, method):
        call = kernel_call(model.router, scheme, method, self.flashinfer)
        return Captured(replace(call, routed_scaling_factor=1.0))


def test_what_only_a_routing_gate_stops_is_judged():
    """vLLM PR 44007: the gate of MXFP4 hid that four arguments were None."""
    target = CachedTarget(Gated(FlashInfer.of(NEWEST)))
    # The gate loses every router of the method, and hides what is wrong behind it.
    [closed] = [c for c in sweep(target, "fp8_block", ()).causes if "DeepSeekV3" in c.methods]
    assert (closed.verdict, closed.why) == ("missed", (("gate", "routing method", ""),))
    # Models that have such routers miss the same kernel: the method is not lost for nobody.
    known = sweep(target, "fp8_block", serving("fp8_block")).causes
    [closed] = [cause for cause in known if cause.methods == ("DeepSeekV3",)]
    assert "deepseek-r1" in closed.models
    assert {failure.cause for failure in of_sweep(closed)} == {"missed:routing-method:DeepSeekV3"}
    found = sweep_behind_gates(target, "fp8_block", serving("fp8_block"))
    [lost] = [cause for cause in found.causes if "DeepSeekV3" in cause.methods]
    assert (lost.verdict, fields_of(lost)) == ("wrong", {"scale"})
    assert {"deepseek-r1", "step-3.7-flash"} <= set(lost.models)
    text = "\n".join(story(lost.example.record()))
    assert "decided  if no gate stopped it -> DeepSeekV3" in text
    assert "gate     routing method: no, DeepSeekV3 is not taken" in text
    # Other gates had their reasons, and no framework makes up a bias.
    assert all(c.example.model.router.num_experts != 8 for c in found.causes)
    assert all(c.example.model.router.correction_bias for c in found.causes)


def test_behind_open_gates_there_is_nothing(monkeypatch):
    monkeypatch.setattr(Gated, "methods", FlashInfer.of(NEWEST).methods)
    found = sweep_behind_gates(CachedTarget(Gated(FlashInfer.of(NEWEST))), "mxfp4", ())
    assert (found.verdicts.total(), found.causes) == (0, ())


def test_calls_that_are_not_recorded_cannot_be_judged_behind_gates():
    found = sweep_behind_gates(CachedTarget(BuiltinTarget(FlashInfer.of(NEWEST))), "nvfp4", ())
    [reason] = {reason for reason in found.unanswered if "its own router" not in reason}
    assert reason == f"builtin {__version__}: its calls are not recorded"
    assert not found.verdicts


class Counting(BuiltinTarget):
    """Counts the questions that it is asked."""

    name = "counting"

    def __init__(self, flashinfer):
        super().__init__(flashinfer)
        self.asked = Counter()

    def version(self):
        self.asked["version"] += 1
        return super().version()

    def method_numbers(self):
        self.asked["method_numbers"] += 1
        return super().method_numbers()

    def classify(self, model: ModelSpec):
        self.asked["classify"] += 1
        return super().classify(model)

    def gates(self, model, scheme, method):
        self.asked["gates", scheme] += 1
        return super().gates(model, scheme, method)

    def kernel_call(self, model, scheme, method):
        self.asked["kernel_call", scheme] += 1
        return super().kernel_call(model, scheme, method)


def test_questions_are_few():
    """Every router is asked about, once for each thing that can differ."""
    target = Counting(FlashInfer.of(NEWEST))
    routers = [router for router in swept_routers(1) if not any(router.problems())]
    once = CachedTarget(target)
    exact = {b: sweep(once, b, (), routers).verdicts["exact"] for b in ("nvfp4", "fp8_block")}
    assert target.asked == {
        "version": 1,  # for the records
        "method_numbers": 1,
        "classify": len(routers),
        **{("gates", b): len(routers) for b in exact},
        **{("kernel_call", b): passed for b, passed in exact.items()},
    }


class AnswersSoftmax(BuiltinTarget):
    name = "answers-softmax"

    def classify(self, model):
        if model.router.scoring_func != "softmax":
            raise Unsupported("too hard")
        return super().classify(model)


def test_what_cannot_be_answered_is_counted():
    routers = [router for router in swept_routers(1) if not any(router.problems())]
    found = sweep(AnswersSoftmax(FlashInfer.of(NEWEST)), "nvfp4", (), routers)
    assert found.unanswered["too hard"] + found.verdicts.total() == len(routers)
    assert found.unanswered["too hard"] > 50


def test_models_without_an_answer_are_counted_where_a_cause_may_concern_them():
    class Forgetful(BuiltinTarget):
        """Passes no groups, and cannot be asked about one model."""

        def classify(self, model):
            if model.id == "glm-5":
                raise Unsupported("too hard")
            return super().classify(model)

        def kernel_call(self, model, scheme, method):
            call = super().kernel_call(model, scheme, method)
            return replace(call, n_group=1, topk_group=1) if call.n_group == 8 else call

    models = [MODELS["glm-5"], MODELS["deepseek-r1"]]
    grouped = [r for r in swept_routers(1) if r.n_group == 8 and r.num_experts == 256]
    found = sweep(Forgetful(FlashInfer.of(NEWEST)), "fp8_block", models, grouped)
    assert any(cause.models == ("deepseek-r1",) for cause in found.causes)
    assert found.unanswered_models == {"too hard": 1}
