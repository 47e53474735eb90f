"""SGLang, any release: the routing method that a model's code declares, and the call it ends in.

There is no classifier in SGLang: each model's code names a method when it makes its MoE layer, or
names none. So the model's own MoE block is built and run, by SGLang's code in a process of its own,
with the scheme's TRT-LLM runner on a Blackwell GPU, up to FlashInfer's entry point.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.models import ModelSpec, RouterConfig
from pytest_moe_routing.models.huggingface.published import left_out, nesting
from pytest_moe_routing.oracle.around import Request, Response
from pytest_moe_routing.oracle.around import read as read_responses
from pytest_moe_routing.oracle.choice import Choice, Rule
from pytest_moe_routing.oracle.exact import Gate
from pytest_moe_routing.oracle.finding import Finding
from pytest_moe_routing.oracle.laid_out import LaidOut
from pytest_moe_routing.oracle.model_code import LayerRequest
from pytest_moe_routing.oracle.routers import RouterRun
from pytest_moe_routing.oracle.target import Captured, Classification, OtherCall
from pytest_moe_routing.targets.answers import RuleAnswer
from pytest_moe_routing.targets.contract import Names, release_of
from pytest_moe_routing.targets.layouts import laid_out
from pytest_moe_routing.targets.model_classes import Place
from pytest_moe_routing.targets.probe import Probe, Questions
from pytest_moe_routing.targets.routers import ANSWERS, OTHER, RouterProbes
from pytest_moe_routing.targets.sglang.handed_over import HandedOver, findings_of, raised
from pytest_moe_routing.targets.sglang.model_code import Asked, requests_of
from pytest_moe_routing.targets.sglang.model_configs import (
    configs,
    other_ways,
    published_of,
    told_of,
    ways_of_flashinfer,
)
from pytest_moe_routing.targets.sglang.questions import AUTO, SglangQuestions
from pytest_moe_routing.targets.sglang.recorded import TOKENS, captured_of, with_tokens
from pytest_moe_routing.targets.sglang.registry import registered
from pytest_moe_routing.targets.sglang.runner_rule import deciding, placed_by
from pytest_moe_routing.targets.source import Source
from pytest_moe_routing.targets.stubs import source_of

#: The method of a model whose code names none: what its layer gets depends on the scheme.
UNDECLARED = "undeclared"
#: The runner of most schemes.
TRTLLM = "flashinfer_trtllm"
#: The gate that rejects a model where SGLang's own router chooses the experts.
_ROUTES = "the kernel routes"


class SglangTarget(SglangQuestions):
    """The SGLang of this environment, or at `sglang@PATH`.

    Raises:
        TargetNotInstalled: `sglang` is not installed.
    """

    name = "sglang"
    package = "sglang"
    distributions = ("sglang",)
    model_packages = ("sglang.srt.models.",)
    routers = (
        "HashTopK.forward",
        "biased_grouped_topk_gpu",
        "biased_grouped_topk_impl",
        "biased_topk_impl",
        "biased_topk_jit_kernel_impl",
        "fused_topk",
        "fused_topk_softmax_torch_raw_logits",
        "fused_topk_torch_native",
        "grouped_topk_gpu",
        "kimi_k2_biased_topk_impl",
        OTHER,
    )

    def __init__(self, flashinfer: FlashInfer, source: Source) -> None:
        super().__init__(flashinfer, source)
        answers = {**ANSWERS, "layer_request": list[Asked]}
        self._torch = self.child("routers", answers=answers)
        self._routers = RouterProbes(
            [self._torch],
            self.routers,
            lambda m: {"config": self._config(m)},
            lambda m: {"servers": self.servers(m)},
        )

    def probes(self) -> Iterable[Probe]:
        return (*super().probes(), self._probe, *self._routers.probes)

    def questions_ahead(self, method: str, models: Sequence[ModelSpec]) -> Iterable[Questions]:
        if method == "router_runs":
            return self._routers.questions(models)
        return super().questions_ahead(method, models)

    def start(self) -> None:
        self._probe.start()
        self._routers.probes[0].start()

    def close(self) -> None:
        super().close()
        self._probe.close()
        self._routers.close()

    def registered(self, names: Names, root: str) -> Mapping[str, Place]:
        return registered(root, names.spelling("models").module, partial(source_of, root))

    def method_numbers(self) -> Mapping[str, int]:
        return self._numbers

    def classify(self, model: ModelSpec) -> Classification:
        """Return the method that the model's code declares, whatever the checkpoint."""
        known = [name for name in configs()["schemes"] if name not in self.elsewhere]
        schemes = [name for name in model.checkpoints if name in known] or ["fp8_block"]
        found = self._run(model, schemes[0])
        for scheme in known:
            # The model's code may make no layer for the runner in some schemes.
            if found["place"]:
                break
            with suppress(Unsupported):
                found = self._run(model, scheme)
        method = found["declared"]
        if not found["place"]:
            return Classification(UNDECLARED, (found["refused"],))
        verb = "declares no routing method" if method is None else "declares"
        return Classification(method or UNDECLARED, (f"{found['place']} {verb}",))

    def router_runs(self, models: Iterable[ModelSpec]) -> list[RouterRun]:
        """Return what the functions of `topk.py` compute, on CUDA and as plain torch."""
        return self._routers.runs(models)

    def refused_models(self) -> Mapping[str, str]:
        """Return why no router was run for models, by id."""
        return self._routers.refusals()

    def around(self, model: ModelSpec, scheme: str, method: str) -> Mapping[Request, Response]:
        """Return what becomes of padding rows, placed experts and captured ids.

        Raises:
            Unsupported: No kernel routes for the model, or a request cannot be made here.
        """
        answer = self._run(model, scheme)
        if answer["refused"] or answer["failed"]:
            raise Unsupported(f"no kernel routes: {answer['refused'] or answer['failed']}")
        question = {**self._question(model, scheme), "server": self._server(model, scheme)}
        return read_responses(self._remembered("around", question))

    def rule(self, model: ModelSpec, scheme: str, method: str, gate: str) -> Rule:
        """Return the code that routes outside the kernel, or that does not name the runner."""
        if gate == _ROUTES:
            answer = self._remembered("rule", self._question(model, scheme))
            return Rule() if answer is None else Rule(**answer)
        if gate:
            return Rule()
        runner = self.chosen_runner(model, scheme)
        told = f"{runner} by default"
        if runner == self._row(model, scheme)["runner"]:
            # A layer that takes the runner by itself gives it experts that SGLang's router chose.
            told = f"SGLang's own top-k routes by default, and the layer takes {runner} by itself"
        schemes = (other for other in configs()["schemes"] if other != scheme)
        elsewhere = (answer for other in schemes for answer in self._runner_rules(model, other))
        return replace(deciding(self._runner_rules(model, scheme), elsewhere), instead=told)

    def _runner_rules(self, model: ModelSpec, scheme: str) -> list[RuleAnswer]:
        """Return the functions that may name a runner; none if the scheme cannot be asked for."""
        with suppress(Unsupported):
            found: list[RuleAnswer] = self._remembered("runner_rules", self._server(model, scheme))
            return found
        return []

    def read_routers(self, models: Sequence[ModelSpec]) -> Sequence[RouterConfig | Unsupported]:
        """Return what SGLang's TopK computes on CUDA where no kernel routes."""
        return self._routers.read(models)

    def layer_request(self, model: ModelSpec, without: str = "") -> LayerRequest:
        """Return what a model's MoE block asks of its TopK, when SGLang's own code builds it."""
        question = {
            "architecture": model.architecture,
            "router": vars(model.router),
            "config": self._config(model),
            "nested": nesting(model.architecture),
            "published": published_of(model, without),
        }
        reason = configs()["rounds_logits"].get(model.architecture)
        return requests_of(self._torch.ask("layer_request", **question), model, reason)

    def left_out(self, model: ModelSpec) -> Iterable[tuple[str, ModelSpec]]:
        return left_out(model, configs()["published"].get(model.architecture, ()))

    def gates(self, model: ModelSpec, scheme: str, method: str) -> tuple[Gate, ...]:
        """Return the gates that let the kernel route, given that the TRT-LLM runner is chosen."""
        row = self._row(model, scheme)
        quantization, runner = row["quantization"], row["runner"]
        # Only this one is asserted on.
        allowed = self._probe.ask("accepted_quantizations") if runner == TRTLLM else None
        switch, reason = f"--moe-runner-backend {runner}", ""
        told = {"architecture": model.architecture, "quantization": quantization, "runner": runner}
        if allowed is not None and quantization not in allowed:
            reason = f"{switch} does not support {quantization or 'models that are not quantized'}"
        elif instead := self._remembered("replaced_runner", told):
            reason = f"the server replaces {switch} with {instead}"
        accepted = Gate("server arguments", not reason, reason)
        if not accepted.ok:
            return (accepted,)
        answer, declared = self._run(model, scheme), self.classify(model).method
        refused = answer["refused"]
        return (
            accepted,
            Gate("declared method", method == declared, f"the model's code has {declared}"),
            Gate(_ROUTES, refused is None, refused or "", by_choice=answer["by_choice"]),
        )

    def opt_in(self, model: ModelSpec, scheme: str) -> tuple[str, ...]:
        """Return the runner's switch, where SGLang does not choose the TRT-LLM runner.

        The server's arguments choose it, or leave it to the layer. A layer that takes the runner
        by itself may still have its experts chosen outside the kernel, so its block is run as well.
        """
        runner = self._row(model, scheme)["runner"]
        switch = (f"--moe-runner-backend {runner}",)
        if self.chosen_runner(model, scheme) != runner:
            return switch
        if self._server_runner(model, scheme) == runner:
            return ()
        runs = (self._run(model, scheme, runner) for runner in (AUTO, None))
        first, second = ({**run, "at": ""} for run in runs)
        return () if first == second else switch

    def chosen_runner(self, model: ModelSpec, scheme: str) -> str:
        """Return the runner that SGLang's own code takes on Blackwell when none is named.

        Raises:
            Unsupported: The code cannot be asked here.
        """
        runner = self._server_runner(model, scheme)
        if runner != AUTO:
            return runner
        question = self._block(model, scheme) | {"scheme": scheme}
        return str(self._remembered("layer_runner", question))

    def capture(self, model: ModelSpec, scheme: str, method: str) -> Captured:
        """Return the call that the model's block ends in, on the second of two ranks.

        A call with another number of tokens that differs is a finding.
        """
        declared = self.classify(model).method
        if method != declared:
            raise Unsupported(f"{self}: the model's code has {declared}, not {method}")
        question = self._question(model, scheme)
        answers = {n: self._remembered("with_tokens", {**question, "tokens": n}) for n in TOKENS}
        about = model, scheme, self.flashinfer, self._numbers
        refused = {n: a["refused"] for n, a in answers.items() if a["refused"]}
        others = {n: captured_of(a, *about) for n, a in answers.items() if n not in refused}
        return with_tokens(captured_of(self._run(model, scheme), *about), others, refused)

    def modular_gates(self, model: ModelSpec, scheme: str, method: str) -> tuple[Gate, ...]:
        """Return whether a kernel is given experts and weights by default.

        A runner that has to be named for that is not run: it would double the questions. The one
        whose kernels route is run as well if it is the default, where SGLang's own router serves a
        model: it has to compute what it is given then.
        """
        # No layer takes such a runner by itself when a server leaves the choice to it.
        default, row = self._server_runner(model, scheme), self._row(model, scheme)
        if default not in (row["runner"], row.get("routed")):
            return (Gate("default runner", False, f"the server's default is {default}"),)
        refused = self._handed_over(model, scheme).get("refused")
        return (Gate("experts and weights are handed over", refused is None, refused or ""),)

    def modular_findings(self, model: ModelSpec, scheme: str) -> tuple[Finding, ...]:
        """Return what is wrong with the call that is given experts and weights."""
        return findings_of(self._handed_over(model, scheme), model, scheme, self.flashinfer)

    def named_findings(self, model: ModelSpec, scheme: str) -> tuple[Finding, ...]:
        """Return what is wrong where the TRT-LLM runner is named and SGLang's router chooses."""
        answer = self._handed_over(model, scheme, self._row(model, scheme)["runner"])
        if "failed" in answer:
            return (raised(answer),)
        return () if "refused" in answer else findings_of(answer, model, scheme, self.flashinfer)

    def other_experts(self, model: ModelSpec, scheme: str) -> tuple[OtherCall, ...]:
        """Return the calls of other runners; see `FrameworkTarget.other_experts`.

        For the usual checkpoint, that is also TRT-LLM's runner that is given experts and weights,
        where it is not the default one.
        """
        if not (self.elsewhere or scheme in configs()["schemes"]):
            return ()  # See `served_elsewhere`.
        calls = super().other_experts(model, scheme)
        if self._served or self.elsewhere:
            return calls
        return (*calls, *self._named_to_be_given(model, scheme))

    def _named_to_be_given(self, model: ModelSpec, scheme: str) -> Iterator[OtherCall]:
        """Yield the call of TRT-LLM's kernel that is given experts because its runner is named."""
        row, default = self._row(model, scheme), None
        with suppress(Unsupported):  # Before 0.5.18, nobody can ask which runner is the default.
            default = self._server_runner(model, scheme)
        runner = row.get("routed", row["runner"])
        if runner in (row["runner"], default):
            return
        answer = self._handed_over(model, scheme, runner)
        if "refused" not in answer:
            findings = findings_of(answer, model, scheme, self.flashinfer)
            switches = (f"--moe-runner-backend {runner}",)
            yield OtherCall(f"{runner} runner", "Blackwell", switches, True, findings)

    def asked_of_others(self, model: ModelSpec, scheme: str) -> dict[str, Any] | None:
        if scheme in self.elsewhere:
            ways = ways_of_flashinfer(scheme, self._server_runner(model, scheme))
        else:
            ways = other_ways(scheme, release_of(self.version()), self._served.get(scheme, {}))
        if not ways:
            return None
        scale = model.router.routed_scaling_factor
        return {**self._asked_of_ways(model, scheme, ways), "scale": scale}

    def _asked_of_ways(
        self, model: ModelSpec, scheme: str, ways: Iterable[Mapping[str, Any]]
    ) -> dict[str, Any]:
        about = self._server(model, scheme), self._row(model, scheme), ways
        told = told_of(*about, elsewhere=scheme in self.elsewhere)
        # On two ranks: there, models keep their shared experts apart.
        return {**self._block(model, scheme), "scheme": scheme, "told": told}

    def asked_of_placements(self, model: ModelSpec, scheme: str) -> dict[str, Any]:
        placed = placed_by(self._row(model, scheme))
        return {"server": self._server(model, scheme), "scheme": scheme, **placed}

    def weight_path(self, model: ModelSpec, scheme: str) -> str | None:
        runner = self._runner_given(model, scheme)
        return runner and json.dumps([self._row(model, scheme), runner], sort_keys=True)

    def served_elsewhere(self, scheme: str) -> Mapping[str, SglangTarget]:
        rows = {} if self._served or self.elsewhere else configs()["elsewhere"].get(scheme, {})
        found = {}
        for name, row in rows.items():
            other = found["" if name == "usual" else name] = copy(self)
            other.elsewhere = {scheme: row}
        return found

    def choice_of_others(self, model: ModelSpec, scheme: str) -> object:
        """Return whose code may apply a scaling factor, or what a checkpoint is served with."""
        if not self.elsewhere:
            return None if model.router.routed_scaling_factor == 1.0 else model.architecture
        with suppress(Unsupported):  # It is asked about as well then, and the reason is counted.
            return self._server_runner(model, scheme), self.classify(model).method == UNDECLARED
        return None

    def laid_out(self, model: ModelSpec, scheme: str) -> tuple[LaidOut, ...]:
        answer = self._remembered("layouts", self.asked_of_split(model, scheme))
        return (laid_out(answer, model, scheme, self.split_switches(model, scheme)),)

    def asked_of_split(self, model: ModelSpec, scheme: str) -> dict[str, Any]:
        runner = self._runner_given(model, scheme) or self._row(model, scheme)["runner"]
        return self._asked(model, scheme, runner)

    def split_switches(self, model: ModelSpec, scheme: str) -> tuple[str, ...] | None:
        with suppress(Unsupported):  # Before 0.5.18, nobody can ask which runner is the default.
            return self.opt_in(model, scheme)
        return None

    def laid_out_elsewhere(self, model: ModelSpec, scheme: str) -> tuple[LaidOut, ...]:
        # Other checkpoints are asked of TRT-LLM's kernels alone.
        ways = [] if self._served else other_ways(scheme, release_of(self.version()), {})
        calls = self._remembered("other_layouts", self._asked_of_ways(model, scheme, ways))
        return tuple(laid_out(c, model, scheme, c["switches"], c["device"]) for c in calls)

    def _runner_given(self, model: ModelSpec, scheme: str) -> str | None:
        """Return the runner whose kernel routes for a model, or is given experts by default."""
        method = self.classify(model).method
        if all(gate.ok for gate in self.gates(model, scheme, method)):
            return str(self._row(model, scheme)["runner"])
        is_given = all(gate.ok for gate in self.modular_gates(model, scheme, method))
        return self._server_runner(model, scheme) if is_given else None

    def choice(
        self, model: ModelSpec, scheme: str, method: str, *, modular: bool = False
    ) -> Choice | None:
        """Return that the runner that is given experts and weights is the default; see above."""
        return Choice("the default runner", ()) if modular else None

    def _handed_over(self, model: ModelSpec, scheme: str, runner: str | None = None) -> HandedOver:
        runner = runner or self._server_runner(model, scheme)
        scale, question = model.router.routed_scaling_factor, self._question(model, scheme, runner)
        answer: HandedOver = self._remembered("handed_over", {**question, "scale": scale})
        return answer

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return dict(self._probe.ask("method_numbers"))
