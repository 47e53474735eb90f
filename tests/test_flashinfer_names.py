"""Names of FlashInfer by release, and code that needs others."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import wheels
from test_probes import run, write

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.failure import Rank
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.flashinfer.listing import Reader, timeline
from pytest_moe_routing.flashinfer.names import Names, is_in_any_release, listed_releases
from pytest_moe_routing.flashinfer.package import Package
from pytest_moe_routing.oracle.lacking import Lacking
from pytest_moe_routing.suite.flashinfer_names import of_lacking
from pytest_moe_routing.targets.builtin.target import BuiltinTarget
from pytest_moe_routing.targets.uses import lacking

#: The release that the code below is judged with.
RELEASE = "0.7.2.post1"


@pytest.mark.parametrize(
    ("release", "name", "missing"),
    [
        ("0.7.2", "flashinfer.shuffle_matrix_a", ""),
        ("0.7.2", "flashinfer.shuffle_matrix_z", "flashinfer.shuffle_matrix_z"),
        ("0.5.3", "flashinfer.tllm_enums", "flashinfer.tllm_enums"),
        ("0.7.2", "flashinfer.tllm_enums.ActivationType.Situ.value", ""),
        ("0.6.15", "flashinfer.ActivationType.Situ", "flashinfer.ActivationType.Situ"),
        ("0.6.3", "flashinfer.fused_moe.QuantFormat", "flashinfer.fused_moe.QuantFormat"),
        ("0.7.0", "flashinfer.fused_moe.QuantFormat.NVFP4", ""),
        ("0.7.2", "flashinfer.moe_ep.MoEEpLayer", ""),
        ("0.6.12", "flashinfer.moe_ep.MoEEpLayer", "flashinfer.moe_ep.MoEEpLayer"),
        ("0.6.11", "flashinfer.moe_ep.MoEEpLayer", "flashinfer.moe_ep"),
        # Neither listed nor denied.
        ("0.7.2", "flashinfer.jit.core.anything", ""),
        ("0.7.2", "flashinfer.__version__", ""),
    ],
)
def test_names_by_release(release, name, missing):
    assert Names.of(release).missing(name) == missing


def test_parameters_move():
    found = {r: Names.of(r).signature("fp4_quantize").parameters for r in ("0.6.7", "0.6.8")}
    assert "backend" not in found["0.6.7"]
    assert found["0.6.8"]["backend"].default is None
    quantize = {r: Names.of(r).signature("nvfp4_quantize").parameters for r in ("0.6.11", "0.6.13")}
    kinds = [q["per_token_activation"].kind for q in quantize.values()]
    assert kinds == [inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert Names.of(RELEASE).signature("no_such_function") is None


def test_an_unlisted_release_is_not_judged():
    assert Names.of("0.4.0") is None
    assert Names.of("99.0") is None


def test_names_of_any_release():
    assert is_in_any_release("flashinfer.fused_moe.QuantFormat")
    assert not is_in_any_release("flashinfer.silu_and_scaled_nvfp4_experts_quantize")


WHEELS = [
    wheel
    for release in listed_releases()
    if (wheel := wheels.find_wheel(f"flashinfer_python {release}"))
]


@pytest.mark.parametrize("wheel", WHEELS[:2], ids=lambda wheel: wheel.name)
def test_the_list_is_that_of_the_wheel(wheel):
    package = Package.of(wheel)
    known = Names(package.release).listing()
    found = Reader(package).listing({section: list(rows) for section, rows in known.items()})
    for section, rows in known.items():
        for key, words in rows.items():
            assert set(found[section][key]) == words, (section, key)


PACKAGE = {
    "flashinfer/__init__.py": """
        from . import gpu
        from .fused_moe import moe as moe, Kind
        from ._core import *
        import torch
        try:
            from .gpu import on_gpu
        except ImportError:
            pass
        old_moe = moe
        _LAZY = frozenset({"late"})
        def __getattr__(name):
            if name in _LAZY or name == "later": ...
        """,
    "flashinfer/_core.py": "def core(): ...\ndef _hidden(): ...",
    "flashinfer/gpu.py": "if True:\n    def on_gpu(): ...",
    "flashinfer/fused_moe/__init__.py": "from ..fused_moe.core import run as moe, Kind\n",
    "flashinfer/fused_moe/core.py": """
        from enum import Enum
        def run(x, y=1, *, z=None, **rest): ...
        class Kind(Enum):
            a, b = "a", "b"
            @property
            def is_a(self): ...
        """,
}
KEYS = {
    "modules": ["flashinfer", "flashinfer.fused_moe"],
    "names": ["flashinfer", "flashinfer.gone"],
    "enums": ["Kind"],
    "functions": ["moe", "old_moe", "late"],
}


def test_what_is_read_of_a_package(tmp_path):
    write(tmp_path, PACKAGE)
    found = Reader(Package.of(tmp_path)).listing(KEYS)
    assert found["modules"] == {
        "flashinfer": ("_core", "fused_moe", "gpu"),
        "flashinfer.fused_moe": ("core",),
    }
    names = set(found["names"]["flashinfer"])
    # A module is none, but where it has a function of its name.
    assert "gpu" not in names
    assert "_core" not in names
    assert {"moe", "Kind", "core", "on_gpu", "old_moe", "late", "later"} <= names
    assert names.isdisjoint({"torch", "_hidden", "ImportError"})
    assert found["names"]["flashinfer.gone"] == ()
    assert found["enums"] == {"Kind": ("a", "b", "is_a")}
    parameters = ("(x,y=0,*,z=0,**rest)",)
    assert found["functions"] == {"moe": parameters, "old_moe": parameters, "late": ()}


def test_ranges_of_releases():
    listings = {
        release: {"names": {"m": words}}
        for release, words in {
            "1.9": ("old", "always"),
            "1.10": ("always", "once"),
            "2.0": ("always", "again", "old"),
        }.items()
    }
    assert timeline(listings) == {
        "names": {
            "m": {"..1.9": ["old"], "..": ["always"], "1.10..1.10": ["once"], "2.0..": ["again", "old"]}
        }
    }  # fmt: skip


def test_stand_ins_have_what_the_release_has(tmp_path):
    write(tmp_path, {"frame/__init__.py": "", "frame/moe.py": "from flashinfer import nothing"})
    said = run(
        tmp_path,
        """
        from pytest_moe_routing.flashinfer import FlashInfer
        stubs.install(contract("frame.moe", third_party=("flashinfer",)), root)
        recorder.install(FlashInfer.of("0.6.7"))
        from importlib.util import find_spec
        import flashinfer
        import flashinfer.fused_moe.core
        from flashinfer import SfLayout, fp4_quantize, mxfp8_quantize
        from flashinfer.comm import mnnvl
        print(find_spec("flashinfer.moe_ep"), find_spec("flashinfer.comm").name)
        print(hasattr(flashinfer, "QuantFormat"), hasattr(SfLayout, "layout_8x4"), bool(fp4_quantize))
        def attempt(code):
            try:
                exec(code, globals())
            except Exception as error:
                print(type(error).__mro__[1].__name__, str(error).replace(" ", "_"))
            else:
                print("fine")
        attempt("from flashinfer import shuffle_matrix_z")
        attempt("import flashinfer.fused_moe.trtllm")
        attempt("from flashinfer.fp4_quantization import nothing")
        attempt("stubs.real_module('frame.moe')")
        attempt("SfLayout.layout_9x9")
        attempt("flashinfer.nothing()")
        attempt("fp4_quantize(1, sf_vec_size=16)")
        attempt("fp4_quantize(1, backend='cuda')")
        attempt("mxfp8_quantize(1, aligned=32)")
        attempt("flashinfer.jit.core.anything")
        """,
    )
    assert said[:5] == ["None", "flashinfer.comm", "False", "True", "True"]
    assert said[5:] == [
        *(
            "Exception",
            "cannot_import_name_'shuffle_matrix_z'_from_'flashinfer'_(unknown_location)",
        ),
        *("ImportError", "No_module_named_'flashinfer.fused_moe.trtllm'"),
        *(
            "Exception",
            "cannot_import_name_'nothing'_from_'flashinfer.fp4_quantization'_(unknown_location)",
        ),
        *("Exception", "cannot_import_name_'nothing'_from_'flashinfer'_(unknown_location)"),
        *("AttributeError", "flashinfer.SfLayout_has_no_member_'layout_9x9'"),
        *("AttributeError", "module_'flashinfer'_of_FlashInfer_0.6.7_has_no_attribute_'nothing'"),
        "fine",
        *(
            "TypeError",
            "fp4_quantize_of_FlashInfer_0.6.7:_got_an_unexpected_keyword_argument_'backend'",
        ),
        *(
            "TypeError",
            "mxfp8_quantize_of_FlashInfer_0.6.7:_got_an_unexpected_keyword_argument_'aligned'",
        ),
        *(
            "MoERoutingError",
            "not_judged:_whether_FlashInfer_0.6.7_has_flashinfer.jit.core_is_not_listed",
        ),
    ]


def uses(tmp_path, code, **files):
    """What a layer's code needs and the release lacks: name, reason and lines."""
    write(tmp_path, {"frame/moe/experts.py": code, **files})
    flashinfer = FlashInfer.of(RELEASE)
    found = lacking(
        Path(tmp_path), ["frame.moe", "frame.flashinfer"], flashinfer, Names.of(RELEASE)
    )
    return [(each.name, each.why, *(p.rpartition(":")[2] for p in each.places)) for each in found]


@pytest.mark.parametrize(
    ("code", "name", "why"),
    [
        ("from flashinfer import shuffle_matrix_z", "flashinfer.shuffle_matrix_z", ""),
        ("import flashinfer.moe", "flashinfer.moe", ""),
        ("def f():\n    import flashinfer as fi\n    fi.moe()", "flashinfer.moe", ""),
        (
            "from flashinfer import SfLayout as S\ndef f(): S.layout_9x9",
            "flashinfer.SfLayout.layout_9x9",
            "",
        ),
        (
            "from flashinfer import fp4_quantize as q\ndef f(x): q(x, sf_layout=1)",
            "flashinfer.fp4_quantize()",
            "got an unexpected keyword argument 'sf_layout'",
        ),
        (
            "import flashinfer\ndef f(x, **more): flashinfer.fp4_quantize(x, sf_layout=1, **more)",
            "flashinfer.fp4_quantize()",
            "got an unexpected keyword argument 'sf_layout'",
        ),
        (
            "from flashinfer.fused_moe import trtllm_bf16_moe as moe\ndef f(): moe(top_k=1)",
            "flashinfer.fused_moe.trtllm_bf16_moe()",
            "missing a required argument: 'routing_logits'",
        ),
        ("f = lazy_import('flashinfer', 'fp4_quantise')", "flashinfer.fp4_quantise", ""),
        ("NEEDED = [('flashinfer.fused', 'fp4_quantize')]", "flashinfer.fused", ""),
        (
            "try:\n    from flashinfer import fp4_quantise\nexcept ImportError: pass",
            "flashinfer.fp4_quantise",
            "",
        ),
    ],
)
def test_what_code_needs_in_vain(tmp_path, code, name, why):
    ((found, because, *_),) = uses(tmp_path, code)
    assert (found, because) == (name, why)


def test_what_code_imports_lazily_elsewhere(tmp_path):
    wrapper = "quantize = _lazy_import_wrapper('flashinfer', 'fp4_quantize')"
    code = "from frame.flashinfer import quantize\ndef f(x): quantize(x, sf_layout=1)"
    (found,) = uses(tmp_path, code, **{"frame/flashinfer.py": wrapper})
    assert found[0] == "flashinfer.fp4_quantize()"


@pytest.mark.parametrize(
    "code",
    [
        "from flashinfer import fp4_quantize\ndef f(x): fp4_quantize(x, sf_vec_size=16)",
        # In another release.
        "try:\n    from flashinfer import env\nexcept ImportError: pass",
        "import flashinfer\nif hasattr(flashinfer, 'env'): flashinfer.env()",
        "NEEDED = [('flashinfer', 'env')]",
        # Another function of this name.
        "from flashinfer import fp4_quantize\ndef f(fp4_quantize): fp4_quantize(sf_layout=1)",
        "from flashinfer import fp4_quantize\ndef fp4_quantize(sf_layout): fp4_quantize(sf_layout=1)",
        "register('flashinfer', 'flashinfer_cutlass')",
        "from flashinfer.jit import anything",
        "from .flashinfer import anything",
    ],
)
def test_what_code_may_need(tmp_path, code):
    assert uses(tmp_path, code) == []


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import torch", "files do not mention FlashInfer, or moved"),
        ("import flashinfer\ndef f(:", r"frame/moe/experts\.py cannot be parsed \(SyntaxError\)"),
    ],
)
def test_code_that_says_nothing_is_not_judged(tmp_path, code, reason):
    with pytest.raises(Unsupported, match=f"not judged: .*{reason}"):
        uses(tmp_path, code)


def test_a_missing_name_is_told_once_with_all_its_lines(tmp_path):
    code = "def f():\n    import flashinfer.moe\ndef g():\n    import flashinfer.moe"
    assert uses(tmp_path, code) == [("flashinfer.moe", "", "2", "4")]
    target = BuiltinTarget(FlashInfer.of(RELEASE))
    failure = of_lacking(target, Lacking("flashinfer.moe", "", ("a.py:2", "a.py:4")))
    assert (failure.rank, failure.cause) == (Rank.LOUD, "flashinfer-name:flashinfer.moe")
    assert list(failure.lines) == [
        f"{target} needs flashinfer.moe, which FlashInfer {RELEASE} does not have",
        "  at       a.py:2",
        "  at       a.py:4",
    ]
