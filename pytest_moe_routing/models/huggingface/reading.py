"""One config read as one family: values, where each came from, and what stays open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Any, NoReturn

from pytest_moe_routing.errors import ModelError
from pytest_moe_routing.escape import shorten
from pytest_moe_routing.models.huggingface.config_keys import (
    about_experts,
    about_routing,
    row_of,
    stated,
    unread,
)
from pytest_moe_routing.models.huggingface.document import ABSENT, Section, show
from pytest_moe_routing.models.huggingface.families import DISPUTED, REFUSE, UNPROVEN, Family, Table
from pytest_moe_routing.models.huggingface.layers import Layers
from pytest_moe_routing.models.kinds import Kind, is_required
from pytest_moe_routing.models.spec import PARAMETERS, ExpertsConfig, RouterConfig, schema

#: Values of which a contradicting key may make another router or other experts.
_MEANING = (
    *("scoring_func", "renormalize", "routed_scaling_factor", "n_group", "topk_group"),
    *("num_experts", "top_k", "activation"),
)


class Reading:
    """One config, read as one family.

    Attributes:
        defaulted: The values that the config does not state, by name.
        contradicted: What the config states where the family's code has a value of its own.
        disputed: What code computes that ignores the key which a case is about.
        unproven: Why the model may compute something else than what was read.
        notes: What a reader should know.
    """

    def __init__(self, text: Section, family: Family, families: Table, layers: Layers) -> None:
        self.text, self.family, self.table, self.layers = text, family, families, layers
        self.fixed = dict(family.fixed)
        self.defaulted: dict[str, Any] = {}
        self.contradicted: dict[str, Any] = {}
        self.disputed: dict[str, Any] = {}
        self.unproven: list[str] = []
        self.read: set[str] = {*family.limits, *family.reads}
        self.notes: list[str] = []
        self.origin: dict[str, str] = {}
        for case in family.cases:
            value = text.get(case.key, case.default)
            fixed = case.fixed(value)
            if fixed is None:
                text.fail(case.key, show(value), str(case))
            if REFUSE in fixed:
                text.fail(case.key, show(value), f"another value: {fixed[REFUSE]}")
            self.read.add(case.key)
            fixed = dict(fixed)
            if fixed.pop(DISPUTED, False):
                self.disputed.update({name: self.fixed[name] for name in fixed})
            if UNPROVEN in fixed:
                is_there = text.get(case.key, ABSENT) is not ABSENT
                stated = f"is {show(value)}" if is_there else "is not in the config"
                self.unproven.append(f"{case.key} {stated}: {fixed.pop(UNPROVEN)}")
            self.fixed.update(fixed)
            self.origin.update(dict.fromkeys(fixed, case.key))

    def build(self, cls: type) -> Any:
        """Return a section of the spec, each value checked as in `model.yaml`.

        Raises:
            ModelError: A value that cannot be; it is named by the key of the config. Or the model
                has no experts.
        """
        if not any(self._states(name) for name in ("num_experts", "top_k")):
            raise ModelError(f"{self.text.file}: the model has no experts: no key states how many")
        values = {f.name: v for f in fields(cls) if (v := self._value(f.name, cls)) is not ABSENT}
        if cls is RouterConfig:
            # What has no meaning without its condition is not said at all.
            if values.get("n_group") is None:
                values.pop("group_score", None)
            if not values["renormalize"]:
                values.pop("renormalize_epsilon", None)
        else:
            values.setdefault("gated", True)
            self._clamp_layers(values)
            if values["activation"] not in PARAMETERS:
                # Kimi-Linear's config class has the parameters of situ, whatever hidden_act says.
                values.pop("activation_alpha", None)
                values.pop("activation_beta", None)
        built = cls(**values)
        for name, found, expected in built.problems():
            self._fail(name, found, expected)
        return built

    def _value(self, name: str, cls: type) -> Any:
        item = schema(cls)[name]
        keys = self._keys(name)
        self.read.update(keys)
        if name in self.fixed:
            self._contradict(name, keys, item.metadata["kind"])
            return self.fixed[name]
        if not keys:
            return ABSENT
        key, value = self.text.pick(keys)
        self.origin[name] = key
        if value is ABSENT:
            value = self.family.defaults.get(name, "silu" if name == "activation" else ABSENT)
            if value is not ABSENT:
                self.defaulted[name] = value
        if value is ABSENT and not is_required(item):
            return ABSENT
        value = self._one(name, key, value, item.metadata["kind"])
        if value is None and name in self.table.nulls:
            value = self.table.nulls[name]
        if name == "activation":
            value = self._activation(key, value)
        expected = item.metadata["kind"].problem(value)
        if expected is not None:
            self.text.fail(key, show(value), expected)
        return value

    def _one(self, name: str, key: str, value: Any, kind: Kind) -> Any:
        """One value for the model, of what may be a list with one for each layer."""
        if not isinstance(value, list) or not value:
            return value
        if name in self.family.first:
            if any(v != value[0] for v in value):
                self.notes.append(
                    f"{key} is {shorten(str(value))}; the first value, the text model's, is used"
                )
            return value[0]
        return self._per_layer(name, key, value, kind)

    def _per_layer(self, name: str, key: str, values: list[Any], kind: Kind) -> Any:
        """Take in a list with one value for each layer, and return the model's value."""
        if all(v == values[0] for v in values):
            return values[0]
        count = self.layers.count
        if count is None or len(values) < count:
            layers = "num_hidden_layers is missing" if count is None else f"there are {count}"
            expected = f"one value, or one for each layer: {layers}"
            self.text.fail(key, f"{len(values)} values that differ", expected)
        for i in set(range(count)) - set(self.layers.kinds):
            problem = kind.problem(values[i])
            if problem is not None:
                self.text.fail(f"{key}.{i}", show(values[i]), problem)
        return self.layers.vary(name, values[:count])

    def _clamp_layers(self, values: dict[str, Any]) -> None:
        """Take in a list of clamp limits, one for each layer."""
        kind = schema(ExpertsConfig)["activation_limit"].metadata["kind"]
        for key, activation in self.family.limits.items():
            limits = [limit or None for limit in self.text.items(key)]
            if not any(limits):
                continue
            self.origin["activation_limit"] = key
            values["activation_limit"] = self._per_layer("activation_limit", key, limits, kind)
            problem = kind.problem(values["activation_limit"])
            if problem is not None:
                self.text.fail(key, show(values["activation_limit"]), problem)
            usual = values["activation"]
            values["activation"] = self.layers.vary(
                "activation", [activation if limit else usual for limit in limits]
            )

    def _activation(self, key: str, value: Any) -> str:
        if not isinstance(value, str) or value not in self.table.activations:
            self.text.fail(key, show(value), f"one of {', '.join(self.table.activations)}")
        return self.table.activations[value]

    def _contradict(self, name: str, keys: tuple[str, ...], kind: Kind) -> None:
        """Take in a key that states something else than the family's code computes."""
        if name in self.origin or not keys:
            return
        key, value = self.text.pick(keys)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
        does = self.fixed[name]
        if value is ABSENT or value is None or value == does:
            return
        if not kind.is_typed(value):
            self.text.fail(key, show(value), str(kind))
        if name == "activation" and str(does).startswith("swiglu") and value in ("silu", does):
            # gpt-oss states silu, and means the one it has.
            return
        if name in ("n_group", "topk_group") and value in (0, 1):
            return
        if name in _MEANING and kind.problem(value) is None:
            self.contradicted[name] = value
        does = {None: "none", True: "true", False: "false"}.get(does, does)
        self.notes.append(
            f"{key} is {show(value)}; transformers ignores this and computes {does}, and another "
            "framework may read it"
        )

    def with_unread(
        self, router: RouterConfig, experts: ExpertsConfig, outer: list[Section]
    ) -> RouterConfig:
        """Return the router, changed by the keys that nothing read.

        Keys that may change the routing or the experts in an unknown way are an open question;
        notes name other unknown keys.

        Args:
            router, experts: What was read.
            outer: The sections around the text model's.
        """
        known = self.read | self._restated({**vars(experts), **vars(router)})
        found = unread(self.text, known)
        objects = {part.partition(".")[0] for part in known}
        doubted = self._suggest([key for key in self.text.values if key not in objects])
        routing = [key for key in found.routing if key not in doubted]
        strays = [
            (section.path(path), key, value)
            for section in outer
            for path, key, value in stated(section, self.table.nested)
            if about_routing(key)
        ]
        defaulted = {key for name in self.defaulted for key in self._keys(name)}
        contrary = [
            path
            for path, key, value in strays
            if key in defaulted or self.text.get(key, ABSENT) not in (value, ABSENT)
        ]
        same = [path for path, _, _ in strays if path not in contrary]
        for keys, words, told in (
            (routing, "about experts or routing, and not read", self.unproven),
            (contrary, "stated otherwise outside the text model's config", self.unproven),
            (found.unknown, "not known, and not read", self.notes),
            (same, "outside the text model's config, and not read", self.notes),
        ):
            if keys:
                names = ", ".join(map(shorten, keys[:12]))
                more = f" and {len(keys) - 12} more" if keys[12:] else ""
                told.append(f"{words}: {names}{more}")
        reasons = (router.not_expressible, *found.changes)
        reason = "; ".join(dict.fromkeys(filter(None, reasons)))
        return replace(router, not_expressible=reason or None)

    def _restated(self, values: Mapping[str, Any]) -> set[str]:
        """Return the keys that state once more, in a common spelling, what another key stated."""
        return {
            key
            for name, keys in self.table.spellings.items()
            for key in keys
            if values.get(name) is not None
            and all(value == values[name] for value in self._as_list(key))
        }

    def _as_list(self, key: str) -> list[Any]:
        value = self.text.get(key, ABSENT)
        return value if isinstance(value, list) and value else [value]

    def _suggest(self, keys: list[str]) -> set[str]:
        """Doubt a default whose key may stand there misspelt; return such keys."""
        doubted: set[str] = set()
        absent = {key: name for name in self.defaulted for key in self._keys(name)}
        for key in keys:
            # A name that is nothing else but near may be far; a known one must be very near.
            cutoff = 0.85 if about_routing(key) or row_of(key) is None else 0.9
            near = get_close_matches(key, absent, n=1, cutoff=cutoff)
            if near:
                name = absent[near[0]]
                doubted.add(key)
                self.unproven.append(
                    f"{shorten(key)} is not read (did you mean {near[0]}?), and {name} is the "
                    f"default of the class, {self.defaulted[name]}"
                )
        return doubted

    def _states(self, name: str) -> bool:
        """Whether the config, or the class for a key that is absent, has a value."""
        if name == "num_experts" and name in self.family.defaults:
            return True
        return name in self.fixed or self.text.pick(self._keys(name))[1] is not ABSENT

    def _keys(self, name: str) -> tuple[str, ...]:
        return self.family.keys.get(name) or self.table.spellings.get(name, ())

    def all_notes(self) -> list[str]:
        """Return the notes, and the defaults of the class."""
        if not self.defaulted:
            return self.notes
        values = {name: show(value) for name, value in self.defaulted.items()}
        listed = ", ".join(f"{name} {value}" for name, value in values.items())
        return [*self.notes, f"not in the config, and defaults of the class: {listed}"]

    def raw_config(self) -> dict[str, Any]:
        """Return the keys that are about experts or routing or were read, as they stand."""
        read = {key.partition(".")[0] for key in self.read}
        return {k: v for k, v in self.text.values.items() if k in read or about_experts(k)}

    def _fail(self, name: str, found: str, expected: str) -> NoReturn:
        self.text.fail(self.origin.get(name, name), found, expected)
