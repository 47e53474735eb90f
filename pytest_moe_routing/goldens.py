"""Golden files: where they are, how they read, and how two of them differ. Needs no syrupy.

A golden is JSON with one line per short value, made to be reviewed in diffs. Numbers are stored to
eight significant digits and compare equal when they round to what is stored.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_moe_routing.data import packaged_directory as packaged_directory
from pytest_moe_routing.errors import MoERoutingError
from pytest_moe_routing.escape import shorten
from pytest_moe_routing.inputs import parse_json, read_text
from pytest_moe_routing.schemes import SERVED_SCHEMES

if TYPE_CHECKING:
    from pytest_moe_routing.models import ModelSpec

FORMAT = 1
SUFFIX = ".golden.json"
ROUTER = "router"
ROUTING = "routing"
#: How the name of a half-written file ends. One stays only if its process was killed.
PARTIAL = ".partial"
#: The largest golden has 12 kB.
MAX_BYTES = 4_000_000
DIGITS = 8
_WIDTH = 100
#: So many numbers that are scaled by one factor are told in one line.
_FEW = 3
#: What stands for a key that one side does not have.
ABSENT = object()


def is_checkout(directory: Path) -> bool:
    """Whether goldens may be written there: not inside an installed package."""
    return "site-packages" not in directory.parts and directory.name != "_golden"


def golden_path(folder: Path, name: str) -> Path:
    return folder / f"{name}{SUFFIX}"


def names_of(model: ModelSpec) -> set[str]:
    """Return the name of every golden that a model has."""
    routing = set() if model.router.not_expressible else {ROUTING}
    return {ROUTER, *routing, *(name for name in model.checkpoints if name in SERVED_SCHEMES)}


def serialize(data: dict[str, Any]) -> str:
    """Return the text of a golden file."""
    return _text({"format": FORMAT, **data}, 0) + "\n"


def _text(value: Any, depth: int) -> str:
    flat = json.dumps(_storable(value), allow_nan=False)
    simple = not isinstance(value, (dict, list)) or not value
    short = isinstance(value, list) and not any(isinstance(v, (dict, list)) for v in value)
    if simple or (short and len(flat) + depth <= _WIDTH):
        return flat
    pad, close = " " * (depth + 1), " " * depth
    if isinstance(value, dict):
        items = [f"{json.dumps(k)}: {_text(v, depth + 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(pad + item for item in items) + f"\n{close}}}"
    items = [_text(v, depth + 1) for v in value]
    if not short:
        return "[\n" + ",\n".join(pad + item for item in items) + f"\n{close}]"
    lines, line = [], ""
    for item in items:
        if line and len(pad) + len(line) + len(item) > _WIDTH:
            lines.append(line.rstrip())
            line = ""
        line += f"{item}, "
    lines.append(line.rstrip(", "))
    return "[\n" + "\n".join(pad + text for text in lines) + f"\n{close}]"


def _storable(value: Any) -> Any:
    """Plain JSON: numbers rounded, and NaN and the infinities as text."""
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"golden keys must be text: {list(value)}")
        return {key: _storable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_storable(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise TypeError(f"a golden holds plain data, not {type(value).__name__}")


def read(path: Path) -> dict[str, Any]:
    """Read a golden file, without its format line.

    Raises:
        MoERoutingError: Missing, unreadable, or of another format.
    """
    if not path.exists() and not path.is_symlink():
        raise MoERoutingError(f"{path}: there is no such golden file")
    data = parse_json(read_text(path, MAX_BYTES), str(path))
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        raise MoERoutingError(f"{path}: format: found {found!r}, expected {FORMAT}")
    del data["format"]
    return data


def write_in_one_step(path: Path, text: str) -> None:
    """Write a file that is there in full or not at all; what was there before is replaced."""
    # Through links, so that what they lead to is written and they stay.
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
    try:
        with partial.open("x", encoding="utf-8") as file:
            file.write(text)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def left_by_killed_updates(folder: Path) -> list[Path]:
    """Return half-written files that nobody is writing any more: those older than a minute."""
    return [
        path
        for path in sorted(folder.glob(f".*{SUFFIX}.*{PARTIAL}"))
        if time.time() - path.lstat().st_mtime > 60
    ]


@dataclass(frozen=True)
class Difference:
    """A leaf in which a golden and the present disagree; `ABSENT` stands for none."""

    where: str
    golden: Any
    now: Any

    def __str__(self) -> str:
        golden = "has none" if self.golden is ABSENT else _brief(self.golden)
        now = "absent" if self.now is ABSENT else _brief(self.now)
        return f"{self.where}: golden {golden}, now {now}"

    @property
    def ratio(self) -> float | None:
        """How many times the golden the present is; None unless both are such numbers."""
        both = (self.golden, self.now)
        if not all(
            type(value) in (int, float) and value and math.isfinite(value) for value in both
        ):
            return None
        return float(self.now / self.golden)

    @property
    def name(self) -> str:
        """The last key on the way to the leaf: `weights` of `patterns.x[0].weights[5]`."""
        return re.sub(r"\[\d+\]", "", self.where).rpartition(".")[2]


def differences(golden: Any, now: Any, where: str = "") -> Iterator[Difference]:
    """Yield every leaf in which a golden and the present disagree."""
    if isinstance(golden, dict) and isinstance(now, dict):
        for key in [*golden, *(k for k in now if k not in golden)]:
            place = f"{where}.{key}" if where else key
            if key in golden and key in now:
                yield from differences(golden[key], now[key], place)
            else:
                yield Difference(place, golden.get(key, ABSENT), now.get(key, ABSENT))
    elif isinstance(golden, list) and isinstance(now, (list, tuple)) and len(golden) == len(now):
        for place, (old, new) in enumerate(zip(golden, now, strict=True)):
            yield from differences(old, new, f"{where}[{place}]")
    elif not _same(golden, now):
        yield Difference(where, golden, now)


def _scaled(found: Sequence[Difference]) -> Iterator[tuple[str, set[int]]]:
    """Yield each kind of numbers that are all scaled by one factor, in a sentence, and places."""
    for name in dict.fromkeys(difference.name for difference in found):
        places = {n for n, difference in enumerate(found) if difference.name == name}
        ratios = [found[n].ratio for n in sorted(places)]
        first = ratios[0]
        if first is None or len(places) < _FEW:
            continue
        if all(r is not None and math.isclose(r, first, rel_tol=1e-5) for r in ratios):
            example = found[min(places)]
            yield f"{name} x {first:.6g} in all {len(places)} places, such as {example}", places


def disagreement(path: Path, found: Sequence[Difference], command: str) -> str:
    """Return the message of a golden test that fails: where, and how to accept the change.

    Args:
        command: What rewrites the golden, with the options of the run.
    """
    places = "1 place" if len(found) == 1 else f"{len(found)} places"
    scaled = list(_scaled(found))
    told = set().union(*(those for _, those in scaled))
    lines = [text for text, _ in scaled]
    lines += [str(difference) for n, difference in enumerate(found) if n not in told]
    more = [f"  ... and {len(lines) - 20} more"] if len(lines) > 20 else []
    return "\n".join(
        [
            f"{path} disagrees in {places}:",
            *(f"  {line}" for line in lines[:20]),
            *more,
            _accept(command),
        ]
    )


def _accept(command: str) -> str:
    return f"If the change is meant, review it and accept it with:\n  {command}"


def unreadable(path: Path, error: Exception, command: str) -> str:
    """Return the message of a golden test whose golden is missing or cannot be read."""
    return f"{error}\n" + (_accept(command) if path.exists() else f"Write it with:\n  {command}")


def _same(golden: Any, now: Any) -> bool:
    if isinstance(now, float) and math.isfinite(now):
        if isinstance(golden, bool) or not isinstance(golden, (int, float)):
            return False
        if now == 0:
            return golden == 0
        # Half a unit of the last stored digit, and a hair: machines differ in the last bit of exp.
        unit = 10.0 ** (math.floor(math.log10(abs(now))) + 1 - DIGITS)
        return abs(golden - now) <= 0.5001 * unit
    return type(golden) is type(_storable(now)) and bool(golden == _storable(now))


def _brief(value: Any) -> str:
    return shorten(json.dumps(_storable(value)), 160)
