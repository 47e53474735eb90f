"""Which family a config is of. The architecture decides: it names the code that is run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NoReturn

from pytest_moe_routing.errors import ModelError
from pytest_moe_routing.escape import shorten
from pytest_moe_routing.models.huggingface.config_keys import about_routing
from pytest_moe_routing.models.huggingface.document import Section, show
from pytest_moe_routing.models.huggingface.families import Family, Table, base_of


@dataclass(frozen=True)
class Named:
    """A family, and how sure it is.

    Attributes:
        architecture: The name of the whole model's class, else its `model_type`.
        family: What the config is read as.
        unproven: Why its router may be another than this family's.
        unknown: Architectures that are not known; nothing proves that they run the family's code.
        read_as: Known architectures, whose code the unknown ones are taken to run.
        notes: Names that were passed over.
    """

    architecture: str
    family: Family
    unproven: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    read_as: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def levels_of(root: Section, families: Table) -> list[Section]:
    """Return the whole config, and the nested ones down to the text model's."""
    levels = [root]
    for key in families.nested:
        inner = levels[-1].section(key)
        levels += [inner] if inner else []
    levels[-1] = _with_blocks(levels[-1])
    return levels


def _with_blocks(text: Section) -> Section:
    """Turn `block_configs` (Nemotron's puzzle models) into lists with one item per layer.

    Keys that the config itself has are left as they are.
    """
    blocks = [block for block in text.items("block_configs") if isinstance(block, dict)]
    routed = [block for block in blocks if block.get("block_type") == "moe"]
    if not routed:
        return text
    keys = dict.fromkeys(key for block in routed for key in block)
    lists = {key: [block.get(key) for block in blocks] for key in keys if key != "block_type"}
    kinds = [block.get("block_type") for block in blocks]
    values = {"layers_block_type": kinds, **lists, **text.values}
    return Section(text.file, values, text.name)


def check_experts(text: Section) -> None:
    """Check that a config does not state that there are no experts.

    Raises:
        ModelError: The model has no experts.
    """
    stated = {key: value for key, value in text.values.items() if value}
    names = ("num_experts", "n_routed_experts", "num_local_experts")
    counts = [key for key in names if key in text.values]
    if counts and not any(key in stated for key in counts):
        text.fail(counts[0], show(text.get(counts[0])), "at least 1: the model has no experts")


def family_of(levels: list[Section], families: Table) -> Named:
    """Return the family of a config, by the names on each level.

    A level's first architecture counts, as in vLLM, which runs the first one that it knows; its
    `model_type` counts where there is none. The names of outer levels must be of the same family, a
    known wrapper of it, or another head of it.

    Raises:
        ModelError: No name is there or none is known; or the family cannot be described.
    """
    family: Family | None = None
    unproven: list[str] = []
    unknown: list[str] = []
    notes: list[str] = []
    inner = ""  # the text model's own name, when it is not known
    for level in reversed(levels):
        architectures = [*texts([*level.items("architectures")])]
        model_type = next(texts(level.get("model_type")), "")
        name = architectures[0] if architectures else model_type
        if not name:
            continue
        if name in families.refused:
            key = "architectures" if architectures else "model_type"
            level.fail(
                key,
                shorten(name),
                "a family that can be judged; this one cannot be, because "
                f"{families.refused[name]}",
            )
        known = _family_named(name, families)
        by_type = families.by_name.get(model_type)
        if family is None:
            family = known or by_type
            if family is None:
                inner = inner or name
                continue
            if known is None:
                unknown.append(name)
            elif inner and not _is_type(inner):
                unknown.append(inner)
            elif inner and not architectures:
                unproven.append(
                    f"{shorten(inner)} is not known; the config is read as that of the text model "
                    f"of {name}"
                )
        elif known is None and family.name not in families.wrappers.get(name, ()):
            if architectures and name not in families.wrappers:
                unknown.append(name)
            else:
                unproven.append(
                    f"{shorten(name)} is not known to run its text model as {family.name}"
                )
        elif known not in (None, family):
            unproven.append(f"{name} has another router than its text model, {family.name}")
        others = [other for other in dict.fromkeys(architectures) if other != name]
        if others:
            listed = f"architectures lists {_listed([name, *others])}"
            families_of = [_family_named(other, families) for other in others]
            if families.refused.keys() & {*others} or any(
                f not in (None, known) for f in families_of
            ):
                unproven.append(f"{listed}, which may have different routers")
            else:
                notes.append(f"{listed}; the config is read as that of the first")
        if known is not None and architectures and by_type not in (None, known):
            notes.append(
                f"model_type is {shorten(model_type)}, that of another family; the config is read "
                f"as that of its architecture, {name}"
            )
    if family is None:
        _fail(levels, families)
    read_as = list(family.architectures)
    if levels[1:]:
        wrappers = (name for name, of in families.wrappers.items() if family.name in of)
        read_as += [name for name in wrappers if not _is_type(name)]
    return Named(
        _names(levels)[0],
        family,
        tuple(unproven),
        tuple(unknown),
        tuple(read_as) if unknown else (),
        tuple(notes),
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if names[4:] else ""
    return f"{', '.join(map(shorten, names[:4]))}{more}"


def _is_type(name: str) -> bool:
    """Whether a name is a `model_type`, which names a config and not a class."""
    return name == name.lower()


def texts(value: object) -> Iterator[str]:
    """Return the names in a value: text, or a list with text."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str) and item:
            yield item


def _family_named(name: str, families: Table) -> Family | None:
    """Return the family that has this name, or another head of a class with this name."""
    base = base_of(name)
    other_head = families.by_base.get(base) if base != name else None
    return families.by_name.get(name) or other_head


def _names(levels: list[Section]) -> list[str]:
    keys = ("architectures", "model_type")
    found = [name for key in keys for level in levels for name in texts(level.get(key))]
    return list(dict.fromkeys(found))


def _fail(levels: list[Section], families: Table) -> NoReturn:
    root, names = levels[0], _names(levels)[:3]
    if not names:
        root.fail("architectures", "neither this key nor model_type", "a list of names")
    stated = {key: value for level in levels for key, value in level.values.items() if value}
    if not any(map(about_routing, stated)):
        raise ModelError(
            f"{root.file}: found no key about experts, and {shorten(names[0])} is not a known "
            "architecture; expected the config of a model with experts"
        )
    stems = {_stem(name): name for name in families.by_name}
    near = [stems[s] for name in names for s in get_close_matches(_stem(name), stems, 2, 0.8)]
    hint = f" (did you mean {' or '.join(dict.fromkeys(near))}?)" if near else ""
    root.fail(
        "architectures",
        " and ".join(map(shorten, names)),
        f"an architecture of the {len(families.families)} known families{hint}; to describe an "
        "unknown router, run `moe-routing init DIRECTORY` and edit the model.yaml that it writes",
    )


def _stem(name: str) -> str:
    """Return what tells an architecture from others: a class's name without its usual endings."""
    return re.sub(r"(For(CausalLM|ConditionalGeneration)|Model)$", "", name[:99])
