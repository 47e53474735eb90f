"""What a model says about itself: its router, its experts, its layers, and its checkpoints.

Each dataclass field *is* the YAML schema: its name is the key, its metadata the valid values, its
default (if any) makes the key optional. `loader.py` reads it; there is no second list of keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pytest_moe_routing.models.kinds import Problem, key, mapping
from pytest_moe_routing.models.layer_groups import MAX_LAYERS, LayerGroup, overlaps
from pytest_moe_routing.schemes import CHECKPOINT_SCHEMES

DTYPES = ("float32", "bfloat16")
#: dtypes that a checkpoint's activations can have. No fused backend takes float16.
MODEL_DTYPES = (*DTYPES, "float16")
SCORING_FUNCS = ("softmax", "sigmoid", "sqrtsoftplus")
GROUP_SCORES = ("top2_sum", "max")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2", "swigluoai", "swiglustep", "situ")
#: Activations that differ by at most `MOST_APART`: gelu, which has the error function, and its
#: approximation with tanh.
NEARLY: Mapping[str, str] = {"gelu": "gelu_tanh", "gelu_tanh": "gelu"}
#: The largest difference of the two functions is 4.73e-4, at 2.7 and at -2.7.
MOST_APART = 5e-4

#: The owner in `hf_repo` of a model that no repository is known to hold.
UNPUBLISHED = "local"
#: The widest layer of a published model has 53,248 columns.
_WIDTH = {"minimum": 1, "maximum": 2**20}
# Routing is run on this many columns: a slip in a config must not become an allocation of 100 GB.
_EXPERTS = {"minimum": 1, "maximum": 2**16}
#: The factors and limits of published models lie between 1 and 25. A number that float32 holds only
#: as a subnormal may count as zero in a kernel.
_POSITIVE = {"minimum": 1e-6, "maximum": 1e6}


@dataclass(frozen=True)
class RouterConfig:
    """How a model chooses and weighs experts. Keys carry the names of vLLM and the HF configs."""

    num_experts: int = key(int, **_EXPERTS)
    top_k: int = key(int, **_EXPERTS)
    scoring_func: str = key(str, choices=SCORING_FUNCS)
    #: dtype of `e_score_correction_bias` in the checkpoint, null when the router has none.
    correction_bias: str | None = key(str, choices=DTYPES, nullable=True)
    renormalize: bool = key(bool)
    #: dtype of the router logits, for bfloat16 hidden states: float32 where transformers or vLLM
    #: takes the gate's product in float32. A target whose code hands others to its experts is
    #: judged with those (`Target.logits_dtype`).
    logits_dtype: str = key(str, choices=MODEL_DTYPES)
    #: dtype of the router's weight in checkpoints, if it is not the model's own and the weight must
    #: be loaded in it; null if it is the model's own, or if sources do not tell it or disagree.
    router_weight_dtype: str | None = key(str, default=None, choices=DTYPES, nullable=True)
    #: Llama4, gpt-oss: choose on the raw logits, score only what was chosen.
    topk_before_score: bool = key(bool, default=False)
    n_group: int | None = key(int, default=None, nullable=True, **_EXPERTS)
    topk_group: int | None = key(int, default=None, nullable=True, **_EXPERTS)
    group_score: str | None = key(str, default=None, choices=GROUP_SCORES, nullable=True)
    #: Intern-S1-Pro: each of so many groups contributes its best `top_k / router_n_groups` experts.
    router_n_groups: int | None = key(int, default=None, nullable=True, **_EXPERTS)
    renormalize_epsilon: float = key(float, default=0.0, minimum=0, maximum=1)
    routed_scaling_factor: float = key(float, default=1.0, **_POSITIVE)
    weight_on: str = key(str, default="output", choices=("output", "input"))
    #: Why no recipe computes what this router does. The other keys are then the nearest recipe's,
    #: and no kernel can mean the same.
    not_expressible: str | None = key(str, default=None, nullable=True)

    def problems(self) -> Iterator[Problem]:
        """Yield combinations of valid values that no router can have."""
        groups, kept = self.n_group or 1, self.topk_group or 1
        if self.top_k > self.num_experts:
            yield "top_k", str(self.top_k), f"at most num_experts ({self.num_experts})"
        if (self.n_group is None) != (self.topk_group is None):
            missing = "topk_group" if self.topk_group is None else "n_group"
            yield missing, "nothing", "a value: n_group and topk_group come together"
        if self.group_score is not None and self.n_group is None:
            yield "group_score", self.group_score, "no group_score without n_group"
        if groups > 1:
            if self.num_experts % groups:
                yield "n_group", str(groups), f"a divisor of num_experts ({self.num_experts})"
            elif self.top_k > kept * self.num_experts // groups:
                in_kept = kept * self.num_experts // groups
                yield "top_k", str(self.top_k), f"at most the {in_kept} experts of the kept groups"
            if self.group_score is None:
                yield "group_score", "null", f"one of {', '.join(GROUP_SCORES)} with n_group > 1"
            if self.group_score == "top2_sum" and self.num_experts < 2 * groups:
                yield "n_group", str(groups), "groups of two or more experts for top2_sum"
        if self.router_n_groups is not None:
            parts = {"num_experts": self.num_experts, "top_k": self.top_k}
            for name, whole in parts.items():
                if whole % self.router_n_groups:
                    yield (
                        "router_n_groups",
                        str(self.router_n_groups),
                        f"a divisor of {name} ({whole})",
                    )
            if self.n_group is not None:
                yield "n_group", str(self.n_group), "null with router_n_groups"
        if kept > groups:
            yield "topk_group", str(kept), f"at most n_group ({groups})"
        if self.renormalize_epsilon and not self.renormalize:
            yield "renormalize_epsilon", f"{self.renormalize_epsilon:g}", "0 without renormalize"
        if self.topk_before_score:
            if self.correction_bias is not None:
                yield "correction_bias", self.correction_bias, "null with topk_before_score"
            if groups > 1 or self.router_n_groups is not None:
                found = str(self.router_n_groups or groups)
                yield "n_group", found, "no groups with topk_before_score"
            if self.scoring_func == "softmax" and not self.renormalize:
                yield "renormalize", "false", "true: a softmax over the chosen always sums to 1"


#: The parameters that each activation takes; an activation that is not here takes none but a limit.
PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "swigluoai": ("activation_alpha", "activation_beta"),
    "swiglustep": ("activation_limit",),
    "situ": ("activation_alpha",),
}


@dataclass(frozen=True)
class ExpertsConfig:
    """The routed experts: their shapes, and what they compute.

    With `gate, up = x @ W13 (+ bias)`, an expert computes `act(gate, up) @ W2 (+ bias)`:

    | activation | act(gate, up), with a = activation_alpha, b = activation_beta |
    |---|---|
    | silu       | silu(gate) * up |
    | gelu       | 0.5 * gate * (1 + erf(gate / sqrt(2))) * up |
    | gelu_tanh  | 0.5 * gate * (1 + tanh(sqrt(2 / pi) * (gate + 0.044715 * gate**3))) * up |
    | swigluoai  | gate * sigmoid(a * gate) * (up + b) |
    | swiglustep | min(silu(gate), limit) * up |
    | situ       | a * tanh(gate / a) * sigmoid(gate) * (b * tanh(up / b) with b, else up) |
    | relu2      | relu(x) ** 2, not gated |

    With `activation_limit`, `gate` is first replaced by `min(gate, limit)` (for swiglustep after
    the function), and `up` by `clamp(up, -limit, limit)`.

    Sources: transformers 5.19.0 (gpt_oss, minimax_m3_vl, glm5_next, deepseek_v4, step3p7), vllm
    0.33.0 model_executor/layers/activation.py (SituAndMul).
    """

    hidden_size: int = key(int, **_WIDTH)
    intermediate_size: int = key(int, **_WIDTH)
    activation: str = key(str, choices=ACTIVATIONS)
    gated: bool = key(bool)
    shared_experts: int = key(int, default=0, minimum=0, maximum=1024)
    #: Width that the routed experts see when it is not hidden_size (latent MoE).
    latent_size: int | None = key(int, default=None, nullable=True, **_WIDTH)
    #: Clamp of the two halves, `swiglu_limit` in configs; null for none.
    activation_limit: float | None = key(float, default=None, nullable=True, **_POSITIVE)
    #: `swiglu_alpha` or `activation_situ_beta` in configs; null where the activation takes none.
    activation_alpha: float | None = key(float, default=None, nullable=True, **_POSITIVE)
    #: `swiglu_beta` or `activation_situ_linear_beta` in configs; null where there is none.
    activation_beta: float | None = key(float, default=None, nullable=True, minimum=0, maximum=1e6)
    #: Whether both projections of every expert have a bias (gpt-oss).
    bias: bool = key(bool, default=False)

    def problems(self) -> Iterator[Problem]:
        """Yield combinations of valid values that no experts can have."""
        if self.activation.startswith("swiglu") and not self.gated:
            yield "gated", "false", f"true for {self.activation}"
        needed = PARAMETERS.get(self.activation, ())
        for name in needed:
            if getattr(self, name) is None:
                yield name, "nothing", f"a number for {self.activation}"
        if self.activation_alpha is not None and "activation_alpha" not in needed:
            yield "activation_alpha", f"{self.activation_alpha:g}", f"none for {self.activation}"
        takes_beta = self.activation in ("swigluoai", "situ")
        if self.activation_beta is not None and not takes_beta:
            yield "activation_beta", f"{self.activation_beta:g}", f"none for {self.activation}"
        if self.activation_limit is not None and not self.gated:
            yield "activation_limit", f"{self.activation_limit:g}", "none without a gate"


#: Names appear in tables, reports and links, unquoted.
_NAMES: Mapping[str, tuple[str, str]] = {
    "model": (
        r"\w[\w .,:+()/-]{0,99}",
        "a name of at most 100 letters, digits, spaces and .,:+()/-",
    ),
    "hf_repo": (r"[\w.-]{1,96}/[\w.-]{1,96}", "owner/name"),
    "architecture": (r"\w{1,100}", "the name of a class"),
}


@dataclass(frozen=True, kw_only=True)
class _Described:
    """What every `golden/<id>/model.yaml` says."""

    model: str = key(str)
    hf_repo: str | None
    architecture: str = key(str)
    checkpoints: tuple[str, ...]
    #: Where each number comes from.
    sources: tuple[str, ...] = key(str, many=True)
    #: What a reader should know and no other key says, such as layers that differ.
    notes: tuple[str, ...] = key(str, many=True, default=())
    #: The id of a model in the same directory: keys of `router` and `experts` that are not here are
    #: those of that model.
    like: str | None = key(str, default=None, nullable=True)
    #: The folder that holds model.yaml and the goldens; its name is the model's id.
    folder: Path = field(default=Path(), compare=False)

    @property
    def id(self) -> str:
        return self.folder.name

    def problems(self) -> Iterator[Problem]:
        for name, (pattern, expected) in _NAMES.items():
            value = getattr(self, name)
            if value is not None and not re.fullmatch(pattern, value):
                yield name, repr(value[:60]), expected


@dataclass(frozen=True, kw_only=True)
class ModelSpec(_Described):
    """One model, as far as it must be known to be judged.

    Attributes:
        router, experts: Of the layers that are in none of the groups of `layers`.
        checkpoints: The schemes of the experts in published checkpoints, or in the config's own.
        unknown_scheme: Why the scheme of an imported checkpoint is not known; None if it is.
        num_layers: Decoder layers, `num_hidden_layers` in configs; None where it is not known.
        dtype: dtype of the activations and of unquantized weights, `torch_dtype` in configs.
        layers: The layers that differ, in groups. `variants` resolves them.
        architectures: Every architecture name that the config states, outer config first.
        model_types: Every `model_type` that the config states, outer config first.
        raw_config: The config's own keys about experts and routing with their values, verbatim.
            Frameworks read some of them differently; what `router` and `experts` state is what
            transformers computes, and a target resolves the rest from here.
        defaulted: Keys of `router` and `experts` whose values the config does not state: they are
            the defaults of the config class.
        contradicted: The config's values for keys of `router` and `experts` that transformers
            ignores in favor of its own. Some frameworks honor them.
        disputed: Values of `router` as computed by code that ignores the config's keys for them.
            Some frameworks honor these keys; others, transformers among them, do not.
        unknown_architectures: Those of `architectures` that are not known.
        read_as: Known architectures, whose code the unknown ones are taken to run.
        unproven: Why the model may compute something else than what stands here, in sentences. A
            model that has any is not judged.
    """

    router: RouterConfig
    experts: ExpertsConfig
    hf_repo: str = key(str)
    checkpoints: tuple[str, ...] = key(str, choices=CHECKPOINT_SCHEMES, many=True, empty=True)
    unknown_scheme: str | None = key(str, default=None, nullable=True)
    num_layers: int | None = key(int, default=None, nullable=True, minimum=1, maximum=MAX_LAYERS)
    dtype: str = key(str, default="bfloat16", choices=MODEL_DTYPES)
    layers: tuple[LayerGroup, ...] = ()
    architectures: tuple[str, ...] = key(str, many=True, default=())
    model_types: tuple[str, ...] = key(str, many=True, default=())
    raw_config: Mapping[str, Any] = mapping()
    defaulted: tuple[str, ...] = key(str, many=True, default=())
    contradicted: Mapping[str, Any] = mapping()
    disputed: Mapping[str, Any] = mapping()
    unknown_architectures: tuple[str, ...] = key(str, many=True, default=())
    read_as: tuple[str, ...] = key(str, many=True, default=())
    unproven: tuple[str, ...] = key(str, many=True, default=())
    #: The layers that this is about, if it is one of another model's `variants`.
    variant: str = ""

    def __hash__(self) -> int:
        """Hash what tells most models apart, once: each is looked up hundreds of times."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.router, self.experts, self.model, self.dtype, self.variant))

    @property
    def is_published(self) -> bool:
        """Whether its `checkpoints` are known to be published, which no config.json states."""
        return self.folder.is_absolute() and not self.hf_repo.startswith(f"{UNPUBLISHED}/")

    def variants(self) -> dict[str, ModelSpec]:
        """Return the model once for each kind of routed layer, by the layers as `0-2, 43`.

        Each is the whole model with that group's router and experts and no groups. The layers that
        no group names come first, under the empty text. Dense layers and those routed by a table
        are left out.
        """
        found = {"": replace(self, layers=())}
        for group in self.layers:
            if group.kind == "moe":
                found[group.layers] = replace(
                    self,
                    router=replace(self.router, **group.router),
                    experts=replace(self.experts, **group.experts),
                    checkpoints=(group.scheme,) if group.scheme else self.checkpoints,
                    layers=(),
                    variant=group.layers,
                )
        return found

    def problems(self) -> Iterator[Problem]:
        """Yield combinations of valid values that no model can have."""
        yield from super().problems()
        if not self.checkpoints and self.unknown_scheme is None:
            yield "checkpoints", "an empty list", "a scheme, or unknown_scheme with the reason"
        router, experts = schema(RouterConfig), schema(ExpertsConfig)
        for name, kinds in (("contradicted", {**router, **experts}), ("disputed", router)):
            for value, stated in getattr(self, name).items():
                if value not in kinds:
                    yield name, repr(value)[:60], f"keys of {', '.join(kinds)}"
                elif expected := kinds[value].metadata["kind"].problem(stated):
                    yield name, f"{value} {stated!r}"[:60], expected
        yield from overlaps(self.layers, self.num_layers)
        for layers, variant in self.variants().items():
            if layers:
                for section in (variant.router, variant.experts):
                    for name, found, expected in section.problems():
                        yield "layers", f"{name} {found} in layers {layers}", expected

    def as_dict(self) -> dict[str, Any]:
        """Return what the model says, as plain data: everything but where it was read and sourced.

        `router` and `experts` have all their keys. What only an imported config has, from
        `architectures` on, is there if it is not empty.
        """
        data = {**vars(self), **{name: _section(getattr(self, name)) for name in SECTIONS}}
        names = ("model", "hf_repo", "architecture", "router", "experts")
        for name in ("not_expressible", "router_n_groups"):
            if data["router"][name] is None:
                del data["router"][name]
        imported = (
            *("unknown_scheme", "architectures", "model_types", "raw_config"),
            *("defaulted", "contradicted", "disputed"),
            *("unknown_architectures", "read_as", "unproven"),
        )
        return {
            **{name: data[name] for name in names},
            "checkpoints": list(self.checkpoints),
            "num_layers": self.num_layers,
            "dtype": self.dtype,
            "layers": [group.as_dict() for group in self.layers],
            **{name: _plain(data[name]) for name in imported if data[name]},
        }

    def __str__(self) -> str:
        """Return the id, with the layers if it is a variant: `step-3.7-flash@43-44`."""
        return f"{self.id}@{self.variant.replace(' ', '')}" if self.variant else self.id


def _section(section: Any) -> dict[str, Any]:
    """Return the keys of a section, as `dataclasses.asdict` does; its values need no copies."""
    return dict(vars(section))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True, kw_only=True)
class IncompleteModel(_Described):
    """A model of which some keys have no source. What is known is checked; nothing is judged."""

    #: What is missing, in words.
    incomplete: str = key(str)
    hf_repo: str | None = key(str, default=None)
    #: The keys of a `RouterConfig` and an `ExpertsConfig` that are known.
    router: Mapping[str, Any] = field(default_factory=dict)
    experts: Mapping[str, Any] = field(default_factory=dict)
    checkpoints: tuple[str, ...] = key(str, choices=CHECKPOINT_SCHEMES, many=True, default=())
    num_layers: int | None = key(int, default=None, nullable=True, minimum=1, maximum=MAX_LAYERS)
    dtype: str = key(str, default="bfloat16", choices=MODEL_DTYPES)
    layers: tuple[LayerGroup, ...] = ()


SECTIONS: Mapping[str, type] = {"router": RouterConfig, "experts": ExpertsConfig}
#: Keys whose value is a list of mappings.
LISTS: Mapping[str, type] = {"layers": LayerGroup}


def schema(cls: type) -> dict[str, Field[Any]]:
    """Return the YAML keys of a section, by name."""
    return {f.name: f for f in fields(cls) if "kind" in f.metadata or f.name in (*SECTIONS, *LISTS)}
