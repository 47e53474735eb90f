"""Which class of experts a target ends with for a model, and how monolithic ones route."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from pytest_moe_routing.routing import Recipe

#: A model, the compute capability of a GPU, and how a server is run: a placement, or a backend.
Key = tuple[str, str, str]
#: The name of no class: the target rejects the model.
NONE = "none"
#: Ways to run a server: by default, and so that it serves adapters.
DEFAULT, LORA = "tp", "lora"
#: The same, where the experts that FlashInfer's TRT-LLM kernels run are asked for by name.
NAMED = f"{LORA}+trtllm"
#: Ways in which each expert is split over ranks, without and with adapters, and over how many.
SPLITS: Mapping[str, int] = {
    f"{adapters}tp{count}": count for adapters in ("", f"{LORA}+") for count in (2, 4, 8)
}


@dataclass(frozen=True)
class Routed:
    """What a class of monolithic experts makes of a routing method.

    Attributes:
        accepted: Whether its gate accepts the method.
        recipes: What its calls compute, each once.
        rounded: The dtype to which a call rounds scores before it chooses, if any does.
        unknown: Why nothing is known of its calls, if so.
    """

    accepted: bool
    recipes: tuple[Recipe, ...] = ()
    rounded: str = ""
    unknown: str = ""


@dataclass(frozen=True)
class Router:
    """A class of monolithic experts that calls no kernel of FlashInfer's.

    Attributes:
        gate: The function that accepts or rejects routing methods.
        source: Its file and line.
        num_experts, top_k: Those of the layer whose calls were recorded.
        methods: By name.
    """

    name: str
    gate: str
    source: str
    num_experts: int
    top_k: int
    methods: Mapping[str, Routed]


@dataclass(frozen=True)
class KnownSplits:
    """Where a target is known to end with another class if experts are split over ranks.

    Attributes:
        rules: By compute capability and way (`DEFAULT` or `LORA`): the other class, and two
            numbers. Intermediate sizes of a rank end with it that are multiples of the first and
            none of the second.
        unpadded: A pattern of classes whose kernels of FlashInfer's get a rank's rows as they are.
    """

    rules: Mapping[tuple[str, str], tuple[str, int, int]]
    unpadded: str = ""

    def known(self, key: Key, size: int, whole: str) -> str:
        """Return the class for a rank's size, if `whole` is the class for whole experts."""
        _, device, way = key
        base = LORA if way.startswith(LORA) else DEFAULT
        other, of, none_of = self.rules.get((device, base), (whole, 1, 1))
        return other if size % of == 0 and size % none_of and whole != NONE else whole


@dataclass(frozen=True)
class KnownTaken:
    """The classes that a target is known to end with in one scheme.

    Attributes:
        release: The target's own release, or the newest one before it of which that is known.
        is_own: Whether it is the target's own.
        classes: Absent for models that run in experts of FlashInfer's.
        splits: None if nothing is known of experts that are split.
    """

    release: str
    is_own: bool
    classes: Mapping[Key, str]
    splits: KnownSplits | None = None


@dataclass(frozen=True)
class Kept:
    """What keeps a class of experts from a model.

    Attributes:
        exists: Whether the release has the class.
        is_gate: Whether one of its gates rejects the model; if not, the target prefers another.
        name: The function that decides.
        source: Its file and line.
    """

    exists: bool
    is_gate: bool
    name: str
    source: str


@dataclass(frozen=True)
class TakenExperts:
    """The classes of experts that a target ends with in one scheme.

    Attributes:
        classes: The class in each case, or `NONE`.
        kept_out: The monolithic class that would be taken, but for its gate of routing methods.
        preceded: The class of FlashInfer's that would be taken, but for a class of another library.
        methods: The routing method of each model.
        routers: The monolithic classes among them.
        elsewhere: The classes of FlashInfer's, which other questions are asked about.
        switches: What a user switches on, by the way to run a server.
        kept_by: Says what keeps a class, by its name, from a case.
        unanswered: Why how many models could not be asked about.
    """

    known: KnownTaken
    classes: Mapping[Key, str]
    kept_out: Mapping[Key, str]
    preceded: Mapping[Key, str]
    methods: Mapping[str, str]
    routers: Sequence[Router]
    elsewhere: Collection[str]
    switches: Mapping[str, tuple[str, ...]]
    kept_by: Callable[[Key, str], Kept]
    unanswered: Counter[str]
