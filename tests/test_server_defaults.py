"""What a server of vLLM does by default is read from its options and configs, or not judged."""

from __future__ import annotations

import pytest

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.contract import Contract, Names
from pytest_moe_routing.targets.definitions import Definitions
from pytest_moe_routing.targets.vllm.probe import server_defaults

SOURCES = {
    "vllm.config.kernel": """
MoEBackend = Literal["auto", "triton", "flashinfer_cutedsl"]

class KernelConfig:
    moe_backend: MoEBackend = "auto"

    def normalize(self):
        self.moe_backend = self.moe_backend.lower()
""",
    "vllm.config.parallel": """
class ParallelConfig:
    tensor_parallel_size: int = Field(default=1, ge=1)
    data_parallel_size: int = Field(1, ge=1)
    enable_expert_parallel: bool = False
    enable_eplb: bool = False
    enable_dbo: bool = False
    expert_placement_strategy: Strategy = "linear"
    all2all_backend: All2AllBackend = "allgather_reducescatter"
""",
    "vllm.engine.arg_utils": """
class EngineArgs:
    tensor_parallel_size: int = ParallelConfig.tensor_parallel_size
    data_parallel_size: int = ParallelConfig.data_parallel_size
    enable_expert_parallel: bool = ParallelConfig.enable_expert_parallel
    enable_eplb: bool = ParallelConfig.enable_eplb
    enable_dbo: bool = ParallelConfig.enable_dbo
    expert_placement_strategy: Strategy = (
        ParallelConfig.expert_placement_strategy
    )
    all2all_backend: All2AllBackend = ParallelConfig.all2all_backend
    moe_backend: MoEBackend = KernelConfig.moe_backend
""",
}
KERNEL, PARALLEL, OPTIONS = SOURCES


@pytest.fixture
def reads(monkeypatch):
    """Ask a release in whose sources one text of a module is another."""

    def ask(question, module=KERNEL, old="", new="", about=()):
        texts = {**SOURCES, module: SOURCES[module].replace(old, new)}
        assert not old or texts[module] != SOURCES[module]
        definitions = Definitions("vllm", lambda name: texts.get(name, ""), texts.__contains__)
        names = Names(Contract.of("vllm"), "0.33.0", definitions)
        monkeypatch.setattr(server_defaults, "names", lambda: names)
        server_defaults.parallel.cache_clear()
        return question.__wrapped__(*about)

    return ask


def test_the_defaults_of_releases(reads):
    assert reads(server_defaults.moe_backend) == "auto"
    assert reads(server_defaults.check_parallel) is None


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        (KERNEL, '"auto"', '"triton"'),
        (KERNEL, '"auto"', 'Field(default="triton")'),
        (OPTIONS, "KernelConfig.moe_backend", '"triton"'),
    ],
)
def test_another_backend(reads, module, old, new):
    assert reads(server_defaults.moe_backend, module, old, new) == "triton"


def test_an_option_that_keeps_what_the_config_has(reads):
    assert reads(server_defaults.moe_backend, OPTIONS, "KernelConfig.moe_backend", '"auto"') == (
        "auto"
    )


def test_another_placement_or_way_to_gather(reads):
    parallel, about = server_defaults.parallel, {"about": [server_defaults.PLACEMENT]}
    assert reads(parallel, **about) == "linear"
    changed = PARALLEL, '"linear"', '"round_robin"'
    assert reads(parallel, *changed, **about) == "round_robin"
    about = {"about": [server_defaults.ALL2ALL]}
    assert reads(parallel, **about) == "allgather_reducescatter"
    changed = OPTIONS, "ParallelConfig.all2all_backend", '"nixl_ep"'
    assert reads(parallel, *changed, **about) == "nixl_ep"


@pytest.mark.parametrize(
    ("module", "old", "new", "found"),
    [
        (KERNEL, '"auto"', "chosen()", "KernelConfig.moe_backend in vLLM 0.33.0 is chosen(), so"),
        (KERNEL, ' = "auto"', "", "KernelConfig.moe_backend in vLLM 0.33.0 is nothing, so"),
        (OPTIONS, "KernelConfig.moe_backend", "Other.backend", "is Other.backend, so"),
        (KERNEL, "moe_backend: ", "experts: ", "KernelConfig.moe_backend in vLLM 0.33.0 is noth"),
        (OPTIONS, "moe_backend: ", "experts: ", "(contract row 'server-options.moe_backend'"),
    ],
)
def test_a_backend_that_cannot_be_read(reads, module, old, new, found):
    with pytest.raises(Unsupported, match="not judged: ") as error:
        reads(server_defaults.moe_backend, module, old, new)
    assert found in str(error.value)


def test_a_name_of_experts_that_no_user_can_ask_for(reads):
    ask, about = server_defaults.require_backend, {"about": ["flashinfer_cutedsl", "own"]}
    assert reads(ask, **about) is None
    with pytest.raises(Unsupported, match="does not take flashinfer_cutedsl or own"):
        reads(ask, KERNEL, "flashinfer_cutedsl", "cutedsl", **about)
    with pytest.raises(Unsupported, match="is no list of literals"):
        reads(ask, KERNEL, "Literal[", "backends[", **about)
    with pytest.raises(Unsupported, match="contract row 'moe-backends'"):
        reads(ask, KERNEL, "MoEBackend =", "Backends =", **about)


@pytest.mark.parametrize(
    ("module", "old", "new", "found"),
    [
        (PARALLEL, "enable_eplb: bool = False", "enable_eplb: bool = True", "enable_eplb in"),
        (PARALLEL, "default=1", "default=2", "EngineArgs.tensor_parallel_size in vLLM 0.33.0 is 2"),
        (PARALLEL, "Field(1", "Field(2", "data_parallel_size in vLLM 0.33.0 is 2 by default; the"),
        (OPTIONS, "ParallelConfig.enable_eplb", "True", "is True by default; the probe asks as"),
        (OPTIONS, "ParallelConfig.enable_dbo", "not no", "EngineArgs.enable_dbo in vLLM 0.33.0 is"),
    ],
)
def test_a_server_that_is_parallel_by_default(reads, module, old, new, found):
    with pytest.raises(Unsupported, match="not judged: ") as error:
        reads(server_defaults.check_parallel, module, old, new)
    assert found in str(error.value)
