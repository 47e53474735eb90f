"""What a model says of itself: its router, its experts, and the checkpoints that people serve.

Each dataclass field *is* the YAML schema: its name is the key, its metadata the valid values, its
default (if any) makes the key optional. `loader.py` reads it; there is no second list of keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pytest_moe_routing.schemes import SCHEMES

#: (offending key, what was found, what is expected instead)
Problem = tuple[str, str, str]


@dataclass(frozen=True)
class Kind:
    """The valid values of one key: a type, and optionally a range or a closed list."""

    type: type
    choices: tuple[Any, ...] = ()
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    nullable: bool = False
    many: bool = False

    def problem(self, value: object) -> str | None:
        """What is expected, if `value` is not valid; otherwise None."""
        if self.many:
            one = Kind(self.type, choices=self.choices)
            if not isinstance(value, list) or not value or any(map(one.problem, value)):
                return f"a non-empty list, each item {one}"
            return None if len(set(value)) == len(value) else "a list without repetition"
        if value is None:
            return None if self.nullable else str(self)
        # bool is an int in Python, and 8 is a fine float in YAML; only the latter is meant.
        fits = type(value) is self.type or (self.type is float and type(value) is int)
        if not fits or (self.choices and value not in self.choices):
            return str(self)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            low_enough = self.maximum is None or value <= self.maximum
            high_enough = (self.minimum is None or value >= self.minimum) and (
                self.above is None or value > self.above
            )
            if not (low_enough and high_enough):
                return str(self)
        return None

    def __str__(self) -> str:
        if self.choices:
            text = "one of " + ", ".join(map(str, self.choices))
        else:
            names = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
            text = names[self.type]
        if self.minimum is not None:
            text += f" >= {self.minimum:g}"
        if self.above is not None:
            text += f" > {self.above:g}"
        if self.maximum is not None:
            text += f" <= {self.maximum:g}"
        return text + (" or null" if self.nullable else "")


def key(type_: type, *, default: Any = MISSING, **limits: Any) -> Any:
    """Declare one YAML key; without `default` it is required."""
    kind = {"kind": Kind(type_, **limits)}
    return field(metadata=kind) if default is MISSING else field(default=default, metadata=kind)


def is_required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


DTYPES = ("float32", "bfloat16")
SCORING_FUNCS = ("softmax", "sigmoid", "sqrtsoftplus")
GROUP_SCORES = ("top2_sum", "max")
ACTIVATIONS = ("silu", "gelu", "relu2", "swigluoai", "swiglustep", "situ")

_COUNT = {"minimum": 1, "maximum": 2**31 - 1}
# Routing is run on this many columns: a slip in a config must not become an allocation of 100 GB.
_EXPERTS = {"minimum": 1, "maximum": 2**16}


@dataclass(frozen=True)
class RouterConfig:
    """How a model chooses and weighs experts. Keys carry the names of vLLM and the HF configs."""

    num_experts: int = key(int, **_EXPERTS)
    top_k: int = key(int, **_EXPERTS)
    scoring_func: str = key(str, choices=SCORING_FUNCS)
    #: dtype of `e_score_correction_bias` in the checkpoint, null when the router has none.
    correction_bias: str | None = key(str, choices=DTYPES, nullable=True)
    renormalize: bool = key(bool)
    #: dtype of the router logits that reach the experts.
    logits_dtype: str = key(str, choices=DTYPES)
    #: Llama4, gpt-oss: choose on the raw logits, score only what was chosen.
    topk_before_score: bool = key(bool, default=False)
    n_group: int | None = key(int, default=None, nullable=True, **_EXPERTS)
    topk_group: int | None = key(int, default=None, nullable=True, **_EXPERTS)
    group_score: str | None = key(str, default=None, choices=GROUP_SCORES, nullable=True)
    renormalize_epsilon: float = key(float, default=0.0, minimum=0, maximum=1)
    routed_scaling_factor: float = key(float, default=1.0, above=0, maximum=1e6)
    weight_on: str = key(str, default="output", choices=("output", "input"))
    #: Why no recipe computes what this router does. The other keys are then the nearest recipe's,
    #: and no kernel can mean the same.
    not_expressible: str | None = key(str, default=None, nullable=True)

    def problems(self) -> Iterator[Problem]:
        """Combinations of valid values that no router can have."""
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
        if kept > groups:
            yield "topk_group", str(kept), f"at most n_group ({groups})"
        if self.renormalize_epsilon and not self.renormalize:
            yield "renormalize_epsilon", f"{self.renormalize_epsilon:g}", "0 without renormalize"
        if self.topk_before_score:
            if self.correction_bias is not None:
                yield "correction_bias", self.correction_bias, "null with topk_before_score"
            if groups > 1:
                yield "n_group", str(groups), "no groups with topk_before_score"
            if self.scoring_func == "softmax" and not self.renormalize:
                yield "renormalize", "false", "true: a softmax over the chosen always sums to 1"


@dataclass(frozen=True)
class ExpertsConfig:
    """The routed experts, as far as kernels care."""

    hidden_size: int = key(int, **_COUNT)
    intermediate_size: int = key(int, **_COUNT)
    activation: str = key(str, choices=ACTIVATIONS)
    gated: bool = key(bool)
    shared_experts: int = key(int, default=0, minimum=0, maximum=1024)
    #: Width that the routed experts see when it is not hidden_size (latent MoE).
    latent_size: int | None = key(int, default=None, nullable=True, **_COUNT)

    def problems(self) -> Iterator[Problem]:
        if self.activation.startswith("swiglu") and not self.gated:
            yield "gated", "false", f"true for {self.activation}"


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
        if self.hf_repo is not None:
            owner, _, name = self.hf_repo.partition("/")
            if not owner or not name or "/" in name:
                yield "hf_repo", self.hf_repo, "owner/name"


@dataclass(frozen=True, kw_only=True)
class ModelSpec(_Described):
    """One model, as far as it must be known to be judged."""

    router: RouterConfig
    experts: ExpertsConfig
    hf_repo: str = key(str)
    checkpoints: tuple[str, ...] = key(str, choices=SCHEMES, many=True)

    def as_dict(self) -> dict[str, Any]:
        """What the model says, as plain data: everything but where it was read and sourced."""
        data = asdict(self)
        names = ("model", "hf_repo", "architecture", "router", "experts")
        if self.router.not_expressible is None:
            del data["router"]["not_expressible"]
        return {**{name: data[name] for name in names}, "checkpoints": list(self.checkpoints)}

    def __str__(self) -> str:
        return self.id


@dataclass(frozen=True, kw_only=True)
class IncompleteModel(_Described):
    """A model of which some keys have no source. What is known is checked; nothing is judged."""

    #: What is missing, in words.
    incomplete: str = key(str)
    hf_repo: str | None = key(str, default=None)
    #: The keys of a `RouterConfig` and an `ExpertsConfig` that are known.
    router: Mapping[str, Any] = field(default_factory=dict)
    experts: Mapping[str, Any] = field(default_factory=dict)
    checkpoints: tuple[str, ...] = key(str, choices=SCHEMES, many=True, default=())


SECTIONS: Mapping[str, type] = {"router": RouterConfig, "experts": ExpertsConfig}


def schema(cls: type) -> dict[str, Field[Any]]:
    """The YAML keys of a section, by name."""
    return {f.name: f for f in fields(cls) if "kind" in f.metadata or f.name in SECTIONS}
