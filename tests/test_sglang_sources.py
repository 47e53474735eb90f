"""What the sources of an SGLang say of its server's arguments."""

from __future__ import annotations

import pytest

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.contract import Contract, Names
from pytest_moe_routing.targets.definitions import Definitions
from pytest_moe_routing.targets.sglang.probe.replaced import Told
from pytest_moe_routing.targets.sglang.probe.sources import Sources

ARGUMENTS = """
import os
RUNNERS = ["auto", "triton"]
PORT = 30000
retries: int = 3
class ServerArgs:
    runner: str = "auto"
    host: str = os.name
    port: int
    kinds = ["a"]
    def check(self):
        checked: bool = True
def main():
    status: int = 7
    names = ["b"]
"""
GROUP = """
class MoE:
    experts: int = 1
"""


def sources(folder, modules, version="0.5.6"):
    """Those of an SGLang with these modules."""
    for name, text in modules.items():
        file = folder / "sglang/srt" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    definitions = stubs.definitions("sglang", str(folder))
    return Sources(Names(Contract.of("sglang"), version, definitions), str(folder))


@pytest.mark.parametrize(
    ("modules", "more"),
    [
        ({"server_args.py": ARGUMENTS}, {}),
        ({"server_args.py": ARGUMENTS, "arg_groups/moe.py": GROUP}, {"experts": 1}),
    ],
    ids=["one module", "groups"],
)
def test_constants_of_fields_and_lists_of_choices(tmp_path, modules, more):
    """What functions have in them is none of it."""
    assert sources(tmp_path, modules).server_defaults() == {
        "RUNNERS": ["auto", "triton"],
        "retries": 3,
        "runner": "auto",
        "kinds": ["a"],
        **more,
    }


ASSERTION = """
class ServerArgs:
    moe_runner_backend: str = "auto"
    def check(self):
        if self.moe_runner_backend == "flashinfer_trtllm":
            assert {test}, "quantization is required for Flashinfer TRTLLM MoE"
"""


@pytest.mark.parametrize(
    ("test", "allowed"),
    [
        ('self.quantization == "fp8"', ["fp8"]),
        (
            'self.quantization == "fp8" or self.quantization == "modelopt_fp4"',
            ["fp8", "modelopt_fp4"],
        ),
        ('self.quantization in ["fp8"] or self.quantization is None', ["fp8", None]),
        # No checkpoint here has such experts.
        (
            'self.quantization in ["fp8"] or config(self).nvfp4_moe_meta is not None',
            ["fp8"],
        ),
    ],
)
def test_quantizations_that_are_allowed_one_by_one(tmp_path, test, allowed):
    modules = {"server_args.py": ASSERTION.format(test=test)}
    assert sources(tmp_path, modules).accepted_quantizations() == allowed


@pytest.mark.parametrize(
    "test",
    ['self.quantization == "fp8" or self.ep_size == 1', 'self.quantization not in ["mxfp8"]'],
)
def test_an_assertion_on_something_else_allows_nothing(tmp_path, test):
    with pytest.raises(Unsupported, match="assert nothing about the quantizations"):
        sources(tmp_path, {"server_args.py": ASSERTION.format(test=test)}).accepted_quantizations()


REPLACED = """
class ServerArgs:
    moe_runner_backend: str = "auto"
    def adjust(self, model_arch):
        if is_remote(self.path):
            self.path = ""
        elif model_arch in ["A", "B"]:
            if self.quantization in ["fp8", None] and not self.quantization is None:
                self.moe_runner_backend = "cutlass"
            elif self.moe_runner_backend == "auto":
                self.moe_runner_backend = "triton"
        elif "C" in model_arch and self.device != "cpu":
            self.moe_runner_backend = "triton"
        elif model_arch == "D":
            if is_sm100():
                self.moe_runner_backend = "marlin"
    def finish(self):
        if self.quantization == "mxfp8":
            if self.moe_runner_backend not in ["auto", "trtllm"]:
                logger.warning("overriding")
                self.moe_runner_backend = "deep_gemm"
        if environment("CUTLASS"):
            self.moe_runner_backend = "cutlass"
"""


@pytest.mark.parametrize(
    ("told", "replaced"),
    [
        (Told("A", "fp8", "trtllm"), "cutlass (server_args.py:9)"),
        (Told("A", "fp8", "cutlass"), ""),
        (Told("B", None, "trtllm"), ""),
        (Told("B", None, "auto"), "triton (server_args.py:11)"),
        (Told("E", "fp8", "trtllm"), ""),
        (Told("E", "mxfp8", "trtllm"), ""),
        (Told("E", "mxfp8", "triton"), "deep_gemm (server_args.py:21)"),
    ],
)
def test_a_runner_that_a_server_replaces(tmp_path, told, replaced):
    """Whatever it was told, for some models or quantizations; a switch is not given."""
    assert sources(tmp_path, {"server_args.py": REPLACED}).replaced_runner(told) == replaced


@pytest.mark.parametrize(("architecture", "line"), [("OfC", 13), ("D", 16)])
def test_a_runner_that_may_be_replaced_is_not_judged(tmp_path, architecture, line):
    server, told = sources(tmp_path, {"server_args.py": REPLACED}), Told(architecture, "fp8", "a")
    with pytest.raises(Unsupported, match=f"not judged: line {line} of the server's arguments"):
        server.replaced_runner(told)


LITERALS = """
Backend = Literal["naive", "allgather"]

class Fields:
    backend: A[Literal["none", "deepep"], Arg(choices=["none", "deepep"])] = "none"
    kind: A[Optional[typing.Literal["bf16"]], "The dtype of tokens."] = None
    read: A[Literal[tuple(names())], "Names that are found when it runs."] = None
"""


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("Backend", ("naive", "allgather")),
        ("Fields.backend", ("none", "deepep")),
        ("Fields.kind", ("bf16",)),
    ],
)
def test_the_literals_of_a_definition(path, values):
    definitions = Definitions("sglang", lambda _: LITERALS, lambda _: True)
    assert definitions.literals("sglang.srt.fields", path) == values


@pytest.mark.parametrize("path", ["Fields.read", "Fields.other"])
def test_a_definition_without_literals(path):
    definitions = Definitions("sglang", lambda _: LITERALS, lambda _: True)
    with pytest.raises(Unsupported, match=rf"sglang.srt.fields:{path} is no list of literals"):
        definitions.literals("sglang.srt.fields", path)
