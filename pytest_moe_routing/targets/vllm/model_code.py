"""vLLM's model code and what it asks of its MoE layer: the parent's side of `vllm_blocks`."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from typing import Any, TypedDict

from pytest_moe_routing.data import read_data
from pytest_moe_routing.errors import RecipeError, Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.models.huggingface.published import (
    in_config,
    intermediate_key,
    left_out,
    nesting,
    published_keys,
    stated_keys,
)
from pytest_moe_routing.models.layer_groups import LayerGroup
from pytest_moe_routing.oracle.model_code import LayerRequest, SplitExperts
from pytest_moe_routing.routing import Recipe, recipe_of
from pytest_moe_routing.targets.dtype_names import narrowest
from pytest_moe_routing.targets.hf_configs import config_of
from pytest_moe_routing.targets.probe import Probe, Questions
from pytest_moe_routing.targets.source import Source
from pytest_moe_routing.targets.vllm.registry import MODELS

_CHILD = "pytest_moe_routing.targets.vllm.probe.model_code"
_BACKEND = "pytest_moe_routing.targets.vllm.probe.backend"
#: Activations that vLLM names otherwise.
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "swigluoai_uninterleave": "swigluoai"}
#: The arguments of vLLM's layer for the parameters of an activation, by key of `ExpertsConfig`.
_SWIGLU = {
    "activation_limit": "swiglu_limit",
    "activation_alpha": "swiglu_alpha",
    "activation_beta": "swiglu_beta",
}
_SITU = {
    "activation_alpha": "activation_situ_beta",
    "activation_beta": "activation_situ_linear_beta",
}


class _Asked(TypedDict):
    """The arguments with which vLLM's model code makes its MoE layer, and what goes around it."""

    block: str
    config_class: str
    num_experts: int
    top_k: int
    scoring_func: str
    renormalize: bool
    use_grouped_topk: bool | None
    num_expert_group: int | None
    topk_group: int | None
    routed_scaling_factor: float | None
    apply_routed_scale_to_output: bool | None
    apply_router_weight_on_input: bool | None
    bias_dtype: str | None
    bias_is_loaded: bool
    router_logits_dtype: str | None
    logits_dtype: str
    gate_dtypes: list[str]
    router_weight_dtypes: list[str]
    output_factor: float
    shared_experts: bool
    custom_routing: str | None
    routing_problem: str | None
    activation: str
    parameters: dict[str, float | None]
    has_bias: bool
    sizes: dict[str, tuple[int, int]]


class _Split(TypedDict):
    """The layers of shared experts that are split under sequence parallelism."""

    block: str
    layers: list[str]


#: With these, a server of vLLM gives each rank other tokens.
_SWITCHES = ("--enable-expert-parallel", "--data-parallel-size 2", "--tensor-parallel-size 2")


@cache
def blocks() -> Mapping[str, Mapping[str, Any]]:
    """Return the MoE block of each architecture; the columns are explained in `blocks.yaml`.

    `keys` and `nested` are those of `models/huggingface/published.yaml`, and `intermediate` is the
    key of the experts' intermediate size.
    """
    rows: Mapping[str, Mapping[str, Any]] = read_data(__package__, "blocks.yaml")["blocks"]
    return {
        name: {
            **row,
            "keys": published_keys(name),
            "nested": nesting(name),
            "intermediate": row.get("intermediate", intermediate_key(name)),
        }
        for name, row in rows.items()
    }


def modules_of_blocks(architectures: Collection[str]) -> set[str]:
    """Return the modules of architectures' blocks."""
    modules = (row["module"] for name, row in blocks().items() if name in architectures)
    return {module if "." in module else f"{MODELS}.{module}" for module in modules}


class ModelCode:
    """The models of one vLLM, in a process of their own: all of an installed one is imported."""

    def __init__(self, source: Source, flashinfer: FlashInfer) -> None:
        #: Whether vLLM's dependencies are not imported: answers then depend on vLLM alone.
        self.is_apart = str(source.root) not in sys.path
        place = "apart" if self.is_apart else "installed"
        arguments = str(source.root), flashinfer.release, source.version, place
        answers = {"layer_request": list[_Asked], "split_shared_experts": _Split}
        self.probe = Probe("vllm", _CHILD, *arguments, answers=answers)

        asked: Any = _Asked | None
        self.backend = Probe("vllm", _BACKEND, *arguments[:3], answers={"backend_request": asked})

    def layer_request(self, model: ModelSpec, without: str = "") -> LayerRequest:
        """Return what a model's MoE block requests from its MoE layer.

        Args:
            without: A key that its config leaves out.

        Raises:
            Unsupported: The block is not in the table, or not in this release, or cannot be built
                on a CPU.
        """
        first, *further = (
            request_of(answer, question["row"], model)
            for question in _layer_questions(model, without)
            for answer in self.probe.ask("layer_request", **question)
        )
        return replace(first, further=tuple(further))

    def split_shared_experts(self, model: ModelSpec) -> SplitExperts | None:
        """Return what of a model's shared experts is split over ranks that have other tokens.

        Raises:
            Unsupported: The block is not in the table, or not in this release, or cannot be built.
        """
        answer = self.probe.ask("split_shared_experts", **_published(model))
        if not answer["layers"]:
            return None
        return SplitExperts(answer["block"], tuple(answer["layers"]), _SWITCHES)

    def backend_request(self, model: ModelSpec) -> LayerRequest | None:
        """Return what the transformers backend requests from vLLM's MoE layer for a model.

        None if it leaves routing to transformers.

        Raises:
            Unsupported: Neither vLLM nor transformers can be asked about it.
        """
        answer = self.backend.ask("backend_request", **_backend_question(model))
        if answer is None:
            return None
        request = request_of(answer, {}, model)
        missing = model.router.not_expressible
        if missing is not None:
            # The backend makes no layer with a routing function of a model's own, or zero experts.
            otherwise = f"the layer routes by itself, but {missing}"
            request = replace(request, judges_step=True, otherwise=otherwise)
        return replace(request, switch="--model-impl transformers")

    def questions(self, models: Iterable[ModelSpec]) -> Iterator[Questions]:
        """Yield what a model's block is asked with all of its config's keys."""
        for model in models:
            with suppress(Unsupported):
                yield Questions(self.probe, "split_shared_experts", [_published(model)])
                for each in (model, *(v for layers, v in model.variants().items() if layers)):
                    yield Questions(self.probe, "layer_request", _layer_questions(each))

    def backend_questions(self, models: Iterable[ModelSpec]) -> Iterator[Questions]:
        """Yield what the transformers backend is asked."""
        for model in models:
            with suppress(Unsupported):
                yield Questions(self.backend, "backend_request", [_backend_question(model)])

    def left_out(self, model: ModelSpec) -> Iterator[tuple[str, ModelSpec]]:
        """Yield each key about the router that a config may leave out, and what it then means."""
        return left_out(model, blocks()[model.architecture].get("published") or ())

    def close(self) -> None:
        self.probe.close()
        self.backend.close()


def _layer_questions(model: ModelSpec, without: str = "") -> Iterator[dict[str, Any]]:
    """Yield what is asked about a model's layers, or about those of a variant.

    Of a variant, its first and its last layer; of a model with variants, those next to these too.

    Raises:
        Unsupported: The block is not in the table, or the keys that tell its layers apart are not.
    """
    question = _layer_question(model, without)
    row = question["row"]
    keys: Mapping[str, str] = row.get("per_layer") or {}
    variants = {model.variant: model} if model.variant else model.variants()
    groups = [(LayerGroup(layers).indices, each) for layers, each in variants.items() if layers]
    if not (keys and groups):
        if model.variant:
            raise Unsupported(f"vllm: not judged: code of {model.architecture} for some layers")
        yield question
        return
    apart = {layer: each for indices, each in groups for layer in indices}
    count = model.num_layers or max(apart) + 1
    lists = {
        key: [getattr(apart[n].experts, name) or 0.0 if n in apart else 0.0 for n in range(count)]
        for name, key in keys.items()
    }
    ends = {layer for indices, _ in groups for layer in (indices[0], indices[-1])}
    neighbors = {near for layer in ends for near in (layer - 1, layer + 1)} - {*apart}
    row = {**row, "published": {**(row.get("published") or {}), **lists}}
    if not model.variant:
        yield {**question, "row": row}
    for layer in sorted(ends if model.variant else neighbors):
        if 0 <= layer < count:
            yield {**question, "row": {**row, "layer": layer}}


def _layer_question(model: ModelSpec, without: str = "") -> dict[str, Any]:
    asked = _published(model)
    if without:
        row = asked["row"]
        published = {**(row.get("published") or {})}
        for keys in (asked["values"], row["stated"], published):
            keys.pop(without, None)
        asked["row"] = {**row, "published": published}
    return {**asked, "router": asdict(model.router)}


def _backend_question(model: ModelSpec) -> dict[str, Any]:
    router = asdict(model.router)
    return {"architecture": model.architecture, **config_of(model), "router": router}


def _published(model: ModelSpec) -> dict[str, dict[str, Any]]:
    """Return the row of a model's block, and the values of its config's keys.

    Raises:
        Unsupported: The block is not in the table.
    """
    row = blocks().get(model.architecture)
    if row is None:
        raise Unsupported(
            f"vllm: the MoE block of {model.architecture} is not known to this adapter"
        )
    said = {**asdict(model.router), **asdict(model.experts)}
    values = {key: said[name] for name, key in row["keys"].items() if said[name] is not None}
    stated = in_config(model.architecture, stated_keys(model))
    return {"row": {**row, "stated": stated}, "values": in_config(model.architecture, values)}


def request_of(answer: Mapping[str, Any], row: Mapping[str, Any], model: ModelSpec) -> LayerRequest:
    """Return a request, from the arguments that vLLM's layer is made with.

    As its routers read them: groups count with `use_grouped_topk`, and are scored by the best two
    of them when there is a bias; a routing function takes the place of all but the weights' side.
    """

    def said(*names: str) -> str:
        return ", ".join(f"{name}={answer[name]!r}" for name in names)

    groups = ("use_grouped_topk", "num_expert_group", "topk_group")
    scale = ("routed_scaling_factor", "apply_routed_scale_to_output")
    passed = {
        "score": said("scoring_func"),
        "bias": f"e_score_correction_bias={'None' if answer['bias_dtype'] is None else '...'}",
        "n_group": said(*groups),
        "topk_group": said(*groups),
        "top_k": said("top_k"),
        "normalize": said("renormalize"),
        "scale": f"{said(*scale)}, and x {answer['output_factor']:.4g} on what the layer returns",
        "weight_on": said("apply_router_weight_on_input"),
        "logits_dtype": said("router_logits_dtype"),
    }
    parameters = _parameters(answer["parameters"], row, model)
    arguments = _arguments_of(model)
    passed |= {name: f"{arguments[name]}={value!r}" for name, value in parameters.items()}
    passed |= {"activation": said("activation"), "biases of the experts": said("has_bias")}
    kind, no_gate, _ = answer["activation"].partition("_no_mul")
    groups_count = bool(answer["use_grouped_topk"] and answer["num_expert_group"])
    factor = answer["routed_scaling_factor"]
    recipe, otherwise = recipe_of(model.router), answer["routing_problem"]
    routes, step = answer["custom_routing"], row.get("step")
    try:
        if routes is not None:
            recipe = replace(recipe, top_k=answer["top_k"], scale=1.0)
            if otherwise is not None:
                otherwise = f"{routes} routes otherwise: {otherwise}"
        else:
            recipe = Recipe(
                top_k=answer["top_k"],
                score=answer["scoring_func"],
                bias=answer["bias_dtype"] is not None,
                n_group=answer["num_expert_group"] if groups_count else 1,
                topk_group=(answer["topk_group"] or 1) if groups_count else 1,
                group_score="max" if answer["bias_dtype"] is None else "top2_sum",
                normalize="sum" if answer["renormalize"] else "none",
                scale=1.0 if factor is None else factor,
                bias_dtype=answer["bias_dtype"] or "float32",
            )
    except RecipeError as error:
        otherwise = f"the model code requests a routing that no router computes: {error}"
    # The layer takes the dtype of the hidden states when it is told nothing.
    told = answer["router_logits_dtype"] or "bfloat16"
    if step is not None and routes is not None:
        # No kernel is handed the logits then: only the function is.
        told = answer["logits_dtype"]
    side = "input" if answer["apply_router_weight_on_input"] else "output"
    has_shared = model.experts.shared_experts > 0
    return LayerRequest(
        block=answer["block"],
        config_class=answer["config_class"],
        num_experts=answer["num_experts"],
        recipe=replace(recipe, weight_on=side),
        passed=passed,
        told_dtype=told,
        logits_dtype=answer["logits_dtype"],
        gate_dtype=narrowest(answer["gate_dtypes"], default="float32"),
        router_weight_dtype=narrowest(answer["router_weight_dtypes"], default=""),
        output_factor=answer["output_factor"],
        bias_is_loaded=answer["bias_is_loaded"],
        shared_experts=answer["shared_experts"],
        own_factor=row.get("own_factor", 1.0) if has_shared else 1.0,
        otherwise=otherwise,
        judges_step=step is not None,
        rounds_logits=row.get("rounds_logits"),
        experts={
            "activation": _ACTIVATIONS.get(kind, kind),
            "gated": not no_gate,
            "bias": answer["has_bias"],
            **parameters,
        },
        sizes={name: (ours, theirs) for name, (ours, theirs) in answer["sizes"].items()},
    )


def _arguments_of(model: ModelSpec) -> Mapping[str, str]:
    return _SITU if model.experts.activation == "situ" else _SWIGLU


def _parameters(
    stated: Mapping[str, float | None], row: Mapping[str, Any], model: ModelSpec
) -> dict[str, float | None]:
    """Return the parameters of the activation that model code states, by key of `ExpertsConfig`.

    A parameter is left out if the model has none although its config has a key for it: the config
    is then built without this key, and the value is a default of its class.
    """
    defaults = {name for name in row.get("keys", ()) if getattr(model.experts, name, 0) is None}
    return {
        name: stated[argument]
        for name, argument in _arguments_of(model).items()
        if argument in stated and name not in defaults
    }
