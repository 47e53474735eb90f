"""Whether FlashInfer's functions and launchers take a call: `checks.yaml`, evaluated."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.data import read_data
from pytest_moe_routing.errors import NotSimulated
from pytest_moe_routing.flashinfer import FlashInfer, signatures

GATED = ("Swiglu", "Geglu", "SwigluBias", "SwigluStep", "GegluTanh", "Situ")
_RAISES: Mapping[str, type[Exception]] = {
    error.__name__: error
    for error in (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError)
}


@dataclass(frozen=True)
class Check:
    """One row of `checks.yaml`; its header explains the fields.

    Attributes:
        at: Name in `files` and line, `launcher:1846`; empty for what is not simulated.
        path: The file, within the release's wheel.
    """

    at: str
    path: str
    entries: tuple[str, ...]
    when: str
    must: str
    raises: type[Exception]
    text: str

    @cached_property
    def _code(self) -> tuple[CodeType, CodeType]:
        where = f"checks.yaml, {self.at or self.text}"
        return compile(self.when, where, "eval"), compile(self.must, where, "eval")

    def holds(self, names: Names) -> bool:
        """Return whether a call passes this check, or is not concerned by it."""
        when, must = self._code
        return not eval(when, _NO_BUILTINS, names) or bool(eval(must, _NO_BUILTINS, names))

    @property
    def used(self) -> tuple[str, ...]:
        """The names in `must`, in order."""
        nodes = ast.walk(ast.parse(self.must))
        return tuple(dict.fromkeys(node.id for node in nodes if isinstance(node, ast.Name)))

    def error(self, names: Names) -> Exception:
        """Return the exception for a call that does not pass."""
        known = {name: names[name] for name in self.used}
        found = ", ".join(f"{name} = {_shown(v)}" for name, v in known.items() if not _constant(v))
        where = f"{self.path}:{self.at.partition(':')[2]}" if self.at else "not simulated"
        return self.raises(f"{self.text.strip()} ({where}): found {found}; expected {self.must}")


@cache
def _data() -> dict[str, Any]:
    data: dict[str, Any] = read_data(__package__, "checks.yaml")
    return data


@cache
def checks() -> tuple[Check, ...]:
    """Return FlashInfer's checks, in the order in which it makes them, then the simulator's own."""
    data = _data()
    own = [{**row, "raises": "", "at": ""} for row in data["not_simulated"]]
    return tuple(check for row in [*data["checks"], *own] for check in _rows(row, data["files"]))


def files() -> Mapping[str, str]:
    """Return the paths within the release's wheel, by the names that checks use."""
    found: Mapping[str, str] = _data()["files"]
    return found


def release() -> str:
    """Return the release whose checks these are."""
    found: str = _data()["release"]
    return found


def _rows(row: dict[str, Any], files: Mapping[str, str]) -> Iterator[Check]:
    """Yield a row once for each name that it holds for."""
    file, _, line = row["at"].partition(" ")
    each = row.get("each", ("",))
    for x in each:
        at = f"{file}:{each[x] if isinstance(each, dict) else line}" if file else ""
        when, must, text = (
            row.get(key, default).replace("{x}", x)
            for key, default in (("when", "True"), ("must", ""), ("text", ""))
        )
        raises = _RAISES[row.get("raises", "RuntimeError")] if file else NotSimulated
        yield Check(at, files.get(file, ""), tuple(row["entries"]), when, must, raises, text)


class Names(dict[str, Any]):
    """What expressions of `checks.yaml` may name: a call's arguments, and what follows from them.

    An argument that the release does not have, or that was not given, is None.
    """

    def __missing__(self, name: str) -> None:
        if name not in _arguments():
            raise NameError(f"checks.yaml: found {name!r}, expected an argument or a derived name")

    def __init__(self, function: str, given: Mapping[str, Any], flashinfer: FlashInfer) -> None:
        super().__init__(given)
        self.update(_DTYPES, shape=_shape, rows=_rows_of, columns=_columns_of)
        entry = next((e for part, e in _data()["entries"].items() if part in function), "")
        if not entry:
            raise NotSimulated(f"the simulator does not model {function}")
        number = given["routing_method" if entry == "routing" else "routing_method_type"]
        topk = given.get("topk_ids")
        self.update(
            entry=entry,
            method=flashinfer.method(int(number)) or "",
            shared=given.get("num_fused_shared_experts") or 0,
            routed=topk is not None,
            unpacked=isinstance(topk, tuple),
            ids=topk[0] if isinstance(topk, tuple) else topk,
            weights=topk[1] if isinstance(topk, tuple) else None,
        )
        if entry == "routing":
            self._add_routing(given["routing_logits"])
        else:
            self._add_fused(flashinfer.release)

    def _add_routing(self, logits: Tensor) -> None:
        self["tokens"] = logits.shape[0]
        self["num_experts"] = logits.shape[-1]
        if self["local_num_experts"] is None:
            self["local_num_experts"] = logits.shape[-1]

    def _add_fused(self, release: str) -> None:
        kinds = {n: kind for kind, n in signatures.enum("ActivationType", release).items()}
        formats = {n: kind for kind, n in signatures.enum("Fp8QuantizationType", release).items()}
        hidden_states = self["hidden_states"]
        number = self["activation_type"]
        activation = "Swiglu" if number is None else kinds.get(int(number), "")
        quantization = self["fp8_quantization_type"]
        self.update(
            activation=activation,
            quantization="DeepSeekFp8" if quantization is None else formats.get(int(quantization)),
            halves=2 if activation in GATED else 1,
            tokens=hidden_states.shape[0],
            hidden=hidden_states.shape[1] * (2 if hidden_states.dtype == torch.uint8 else 1),
            total=self["local_num_experts"] + self["shared"],
            has_constants=any(
                self[f"gemm1_{name}"] is not None for name in ("alpha", "beta", "clamp_limit")
            ),
        )
        if self["entry"] == "fp4":
            self._add_fp4()

    def _add_fp4(self) -> None:
        """Tell formats from the numbers of scales, as the launcher does (lines 6023 to 6104)."""
        count = self["total"] * self["intermediate_size"] * self["halves"] * self["hidden"]
        scales, inputs = self["gemm1_weights_scale"], self["hidden_states_scale"]
        # Tiles are padded, so a block of 32 may look smaller.
        block = 32 if count // max(scales.numel(), 1) > 16 else 16
        input_block = 0 if inputs is None else self["tokens"] * self["hidden"] // inputs.numel()
        act = {torch.uint8: "E2m1", torch.float8_e4m3fn: "E4m3"}.get(
            self["hidden_states"].dtype, "Bfloat16"
        )
        if input_block == 32:
            act = {"E2m1": "MxE2m1", "E4m3": "MxE4m3"}.get(act, act)
        self.update(
            scale_count=count,
            scale_block=block,
            input_block=input_block,
            element="E2m1" if block == 16 else "MxE2m1",
            act=act,
        )


def check_call(names: Names) -> None:
    """Raise what FlashInfer raises for a call, or say that the call is not simulated.

    Raises:
        NotSimulated: FlashInfer takes the call, and the simulator does not model it.
        RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError: FlashInfer rejects
            the call; the message names the file and the line.
    """
    check = broken(names)
    if check is not None:
        raise check.error(names)


def broken(names: Names) -> Check | None:
    """Return the first check that a call does not pass, None if it passes all."""
    own = (check for check in checks() if names["entry"] in check.entries)
    return next((check for check in own if not check.holds(names)), None)


@cache
def _arguments() -> frozenset[str]:
    """Every parameter of an entry point in the release of the checks."""
    return frozenset(
        name
        for function in signatures.functions(release())
        if (signature := signatures.signature(function, release())) is not None
        for name in signature.parameters
    )


_NO_BUILTINS: dict[str, Any] = {"__builtins__": {}}
_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8": torch.float8_e4m3fn,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "int32": torch.int32,
}


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _rows_of(weights: Tensor) -> int:
    """Rows of `[experts, M, K]` or of `[experts, K / block, M, block]`."""
    return weights.shape[-2]


def _columns_of(weights: Tensor) -> int:
    return weights.shape[-1] * (weights.shape[1] if weights.ndim == 4 else 1)


def _constant(value: Any) -> bool:
    return callable(value) or isinstance(value, torch.dtype)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return repr(value)
