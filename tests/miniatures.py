"""Targets that decide badly, each in one known way; history among them. Used by name."""

from __future__ import annotations

from dataclasses import replace

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.oracle.choice import Expected, Rule
from pytest_moe_routing.oracle.exact import Gate
from pytest_moe_routing.oracle.model_code import LayerRequest, SplitExperts
from pytest_moe_routing.oracle.target import Captured, Classification, Target
from pytest_moe_routing.routing import recipe_of
from pytest_moe_routing.targets.builtin.target import BuiltinTarget


class Vllm022(BuiltinTarget):
    """The classifier of vLLM 0.21 and 0.22 (fused_moe/config.py:129): the scaling factor and
    renormalize are not looked at for sigmoid with a bias, and sigmoid with top_k 1 is Llama4."""

    name = "vllm-0.22-classifier"

    def classify(self, model):
        router = model.router
        if router.scoring_func == "sigmoid" and router.correction_bias is not None:
            method = "DeepSeekV3" if (router.n_group or 0) > 0 else "MiniMax2"
        elif router.scoring_func == "sigmoid" and router.top_k == 1:
            method = "Llama4"
        else:
            return super().classify(model)
        return Classification(method, ("as vLLM 0.22",))

    def gates(self, model, scheme, method):
        """No vLLM release asks whether the method takes the router's parameters into account."""
        gates = super().gates(model, scheme, method)
        return tuple(gate for gate in gates if gate.name != "router parameters")


class NoFloat32Logits(BuiltinTarget):
    """The gate of vLLM 0.15.1 to 0.20 and of PR 43859: no float32 router logits (DeepSeekV3 too)."""

    name = "no-float32-logits"

    def gates(self, model, scheme, method):
        refuses = model.router.logits_dtype == "float32"
        return tuple(
            Gate(g.name, not refuses, "float32 is not bfloat16")
            if g.name == "router logits dtype"
            else g
            for g in super().gates(model, scheme, method)
        )


class DriftedNumbers(BuiltinTarget):
    """The enum of vLLM 0.20 under its FlashInfer pin: Custom is 6, which is SigmoidRenorm there."""

    name = "drifted-numbers"

    def method_numbers(self):
        return {**super().method_numbers(), "Custom": 6, "DeepSeekV3": 7}

    def gates(self, model, scheme, method):
        return (Gate("anything goes", True),)


class AcceptsAll(BuiltinTarget):
    """Every gate open: what the kernel refuses becomes a crash."""

    name = "accepts-all"

    def gates(self, model, scheme, method):
        return (Gate("anything goes", True),)


class LosesScale(BuiltinTarget):
    """Passes no routed_scaling_factor (vLLM PR 43769, SGLang PR 8333)."""

    name = "loses-scale"

    def kernel_call(self, model, scheme, method):
        return replace(super().kernel_call(model, scheme, method), routed_scaling_factor=1.0)


class NamesItsCall(LosesScale):
    """Tells which line calls the kernel."""

    def capture(self, model, scheme, method):
        return Captured(self.kernel_call(model, scheme, method), source="own/experts.py:7")


class RoutesOutside(BuiltinTarget):
    """Has its own router serve DeepSeek's and Kimi's models on purpose, unlike its release 1.0."""

    name = "routes-outside"

    def expected(self, model, scheme):
        return Expected("1.0", by_default=True)

    def gates(self, model, scheme, method):
        outside = model.id.startswith(("deepseek", "kimi"))
        own = Gate("the kernel routes", not outside, "its own top-k routes", by_choice=True)
        return (*super().gates(model, scheme, method), own)

    def rule(self, model, scheme, method, gate):
        return Rule("can_bypass", "own/topk.py:7") if gate == "the kernel routes" else Rule()


class NamesNoRunner(RoutesOutside):
    """The same in each release; what its fused experts do when a user names them is not known."""

    name = "names-no-runner"

    def expected(self, model, scheme):
        return None

    def named_findings(self, model, scheme):
        raise Unsupported("no runner here")


class AnswersNothing(Target):
    name = "answers-nothing"

    def version(self):
        return "0"


class AsksForTwo(AnswersNothing):
    """Model code that asks for two experts a token, whatever the model."""

    name = "asks-for-two"

    def layer_request(self, model):
        return LayerRequest(
            block="a.Block",
            num_experts=model.router.num_experts,
            recipe=replace(recipe_of(model.router), top_k=2),
            passed={},
            told_dtype="float32",
            logits_dtype="float32",
            gate_dtype="float32",
        )


class SplitsSharedExperts(AnswersNothing):
    """Model code that splits shared experts over ranks that have other tokens, and does not run."""

    name = "splits-shared-experts"

    def split_shared_experts(self, model):
        return SplitExperts("a.Block", ("up", "down"), ("--ranks 2",))


class KnowsNoRanks(AsksForTwo):
    """Model code of which it is not known what it does with ranks."""

    name = "knows-no-ranks"

    def split_shared_experts(self, model):
        raise Unsupported("no ranks here")


class RunsTransformers(AsksForTwo):
    """A backend for transformers' models that asks for two experts a token."""

    name = "runs-transformers"

    @staticmethod
    def without_backend():
        return ""

    def backend_request(self, model):
        return replace(self.layer_request(model), switch="--model-impl transformers")


class OnlyClassifies(AnswersNothing):
    name = "only-classifies"

    def classify(self, model):
        raise Unsupported("the crystal ball is cloudy")


class FailsToStart(Target):
    name = "fails-to-start"

    def __init__(self, flashinfer):
        raise ImportError("libfoo.so.1: cannot open shared object file")


class NotATarget:
    pass
