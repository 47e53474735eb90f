"""What SGLang's child process is asked about a model's block, each question once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from copy import copy
from typing import Any

from packaging.version import Version

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.methods_run import MethodsRun
from pytest_moe_routing.targets.contract import release_of
from pytest_moe_routing.targets.framework import FrameworkTarget
from pytest_moe_routing.targets.sglang.answers import ANSWERS
from pytest_moe_routing.targets.sglang.hand_overs import methods_run
from pytest_moe_routing.targets.sglang.model_configs import (
    config_of,
    configs,
    deciding_of,
    other_ways,
    rewriting_of,
    rewritten_config,
    server_of,
    told_of,
)
from pytest_moe_routing.targets.source import Source

#: The runner of a server that leaves the choice to each layer.
AUTO = "auto"


class SglangQuestions(FrameworkTarget):
    """The part of SGLang's target that runs blocks of models."""

    layer_package = "sglang.srt.layers"

    def __init__(self, flashinfer: FlashInfer, source: Source) -> None:
        super().__init__(flashinfer, source)
        self._probe = self._aside = self.child("main", answers=ANSWERS)
        self._answers: dict[str, Any] = {}
        #: By scheme, a row of `formats` in `configs.yaml`.
        self._served: dict[str, Any] = {}
        #: By scheme, a row of `elsewhere`.
        self.elsewhere = dict[str, Any]()

    def _server_runner(self, model: ModelSpec, scheme: str) -> str:
        """Return the runner of a server to which none was named."""
        return str(self._remembered("default_runner", self._server(model, scheme)))

    def _server(self, model: ModelSpec, scheme: str) -> dict[str, Any]:
        return server_of(model, self._row(model, scheme), self._config(model))

    def servers(self, model: ModelSpec) -> dict[str, Any]:
        """Return the `server` and the `quantization` of a model's usual checkpoint, by scheme.

        A scheme without one is left out; other tests count it as not judged.
        """
        found = {}
        for scheme in configs()["schemes"]:
            with suppress(Unsupported):
                quantization = self._block(model, scheme)["quantization"]
                server = self._server(model, scheme)
                found[scheme] = {"server": server, "quantization": quantization}
        return found

    def _config(self, model: ModelSpec) -> dict[str, Any]:
        """Return attributes of the config object from which SGLang builds a model's MoE block.

        Raises:
            Unsupported: SGLang's own code that makes it is not run here.
        """
        question = rewriting_of(model)
        if question is None:
            return config_of(model)
        return rewritten_config(model, self._remembered("rewritten", question))

    def _row(self, model: ModelSpec, scheme: str) -> dict[str, Any]:
        """Return SGLang's view of a model's checkpoint in a scheme."""
        rows: dict[str, dict[str, Any]] = configs()["schemes"] | self.elsewhere
        if scheme not in rows:
            raise self.not_served(scheme)
        row = rows[scheme]
        own: dict[str, Any] = row.get("architectures", {}).get(model.architecture, row)
        release, since = release_of(self.version()), own.get("since")
        if since and release is not None and release < Version(since):
            raise Unsupported(
                f"{self}: checkpoints of {model.architecture} in {scheme} are known to SGLang from "
                f"{since} on"
            )
        return {**own, **self._served.get(scheme, {})}

    def _run(self, model: ModelSpec, scheme: str, runner: str | None = None) -> dict[str, Any]:
        """One run of the model's block, with the scheme's TRT-LLM runner unless one is given."""
        answer: dict[str, Any] = self._remembered("capture", self._question(model, scheme, runner))
        return answer

    def _question(self, model: ModelSpec, scheme: str, runner: str | None = None) -> dict[str, Any]:
        """Return what a child runs a model's block with, the runner, and what the server says."""
        runner = runner or self._row(model, scheme)["runner"]
        server = {**self._server(model, scheme), "scheme": scheme, "runner": runner}
        asked = self._asked(model, scheme, runner)
        if self._remembered("keeps_shared_apart", server):
            return asked
        return {**asked, "deciding": deciding_of(model.architecture)}

    def _asked(self, model: ModelSpec, scheme: str, runner: str) -> dict[str, Any]:
        return {**self._block(model, scheme), "scheme": scheme, "runner": runner}

    def _block(self, model: ModelSpec, scheme: str) -> dict[str, Any]:
        """Return what a child makes a model's block from."""
        row = self._row(model, scheme)
        config = row["config"]
        if config is not None and "arguments" not in config:
            config = {**config, "in_checkpoint": row["in_checkpoint"]}
        return {
            "architecture": model.architecture,
            "config": self._config(model),
            "quantization": config,
        }

    def formats(self, scheme: str) -> Mapping[str, SglangQuestions]:
        rows = configs()["schemes"].get(scheme, {}).get("formats", {})
        found = {name: copy(self) for name in rows}
        for name, other in found.items():
            other._served = {scheme: rows[name]}
        return found

    def asked_of_hand_overs(self, model: ModelSpec, scheme: str) -> dict[str, Any]:
        """Return the arguments of the question about what calls kernels, on every way."""
        row, served = self._row(model, scheme), self._served.get(scheme, {})
        ways = other_ways(scheme, release_of(self.version()), served)
        told = told_of(self._server(model, scheme), row, ways, elsewhere=False)
        runners = dict.fromkeys((row["runner"], row.get("routed", row["runner"])))
        asked = {**self._block(model, scheme), "scheme": scheme, "told": told}
        return {**asked, "runners": [*runners]}

    def taken_elsewhere(self, model: ModelSpec, scheme: str) -> object:
        """Return on which GPUs a server takes kernels that are not TRT-LLM's by default."""
        if scheme in self.elsewhere:
            return None
        ways = other_ways(scheme, release_of(self.version()), self._served.get(scheme, {}))
        with suppress(Unsupported):  # Then, no block is asked about either.
            asked = {"server": self._server(model, scheme), "ways": ways}
            return str(self._remembered("defaults_elsewhere", asked))
        return None

    def ask(self, kind: str, question: Mapping[str, Any]) -> Any:
        """Return an answer of the child that runs blocks."""
        return self._probe.ask(kind, **question)

    def methods_run(self) -> MethodsRun:
        return methods_run(self)

    def _remembered(self, kind: str, question: Mapping[str, Any]) -> Any:
        """Ask the child, each question once."""
        key = json.dumps([kind, question], sort_keys=True)
        if key not in self._answers:
            try:
                self._answers[key] = self._probe.ask(kind, **question)
            except Unsupported as reason:
                self._answers[key] = reason
        found = self._answers[key]
        if isinstance(found, Unsupported):
            raise found
        return found
