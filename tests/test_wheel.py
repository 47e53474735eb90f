"""Packages of FlashInfer, read without importing them: miniatures, and the installed one."""

from __future__ import annotations

import importlib.util
import sys
import time
import zipfile

import pytest

from pytest_moe_routing.cli import main
from pytest_moe_routing.errors import ReleaseError, Unsupported
from pytest_moe_routing.flashinfer import FlashInfer, signatures, sources
from pytest_moe_routing.flashinfer.drift import drift, examine
from pytest_moe_routing.flashinfer.package import Package
from pytest_moe_routing.targets import load_target

INCLUDE = "data/include/flashinfer/trtllm/fused_moe/"
KERNELS = "data/csrc/fused_moe/trtllm_backend/trtllm_fused_moe_routing_"
LAUNCHER = "data/csrc/trtllm_fused_moe_kernel_launcher.cu"

SMALL, WIDE, BIASED = ((128, 8), (256, 8)), ((512, 8), (2048, 32)), ((384, 8), (1024, 32))
POLICIES = {
    ("Softmax", "NoOp"): SMALL,
    ("NoOp", "Softmax"): WIDE,
    ("Sigmoid", "SumNormalize"): SMALL,
    ("SigmoidBias", "ScaledSumNormalize"): BIASED,
    ("NoOp", "Sigmoid"): SMALL,
    ("NoOp", "NoOp"): SMALL,
}
BLOCK_SCALE = """
class Fp8BlockScaleLauncher : public FusedMoeLauncher {
  void check_routing() {
    if (method == RoutingMethodType::DeepSeekV3) {
      constexpr int32_t kNumKimiK2Experts = 384;  // kept in step with the kernel
      int32_t most = args->num_experts <= kNumKimiK2Experts ? 8 : 22;
    } else if (method == RoutingMethodType::Renormalize || method == RoutingMethodType::Sigmoid) {
      ICHECK(args->top_k <= 32 && args->top_k > 0) << "too many";
    }
  }
};
"""


def python_enum(name, members):
    return f"class {name}(IntEnum):\n" + "".join(f"    {m} = {n}\n" for m, n in members.items())


def files(release="0.7.0"):
    """A package that says what the bundled facts say, in as few lines as possible."""
    numbers = {m: n for n, m in enumerate(FlashInfer.of(release).methods)}
    # Both ways of writing a member are in use: `Default = (0,)` and `Unspecified = 6`.
    enums = [python_enum("RoutingMethodType", {m: f"({n},)" for m, n in numbers.items()})]
    enums += [python_enum(name, signatures.enum(name, release)) for name in signatures.enums()]
    functions, methods = {}, []
    for name in signatures.functions(release):
        parameters = ", ".join(signatures.parameters(name, release))
        if f"{name}.run" in signatures.functions(release) or name.endswith(".run"):
            method = "run" if name.endswith(".run") else "__init__"
            methods.append(f"    @decorated\n    def {method}(self, {parameters}):\n        pass\n")
        else:
            functions[name] = f"@decorated\ndef {name}({parameters}):\n    pass\n"
    routing = functions.pop("trtllm_gen_routing", "")
    tiers = "".join(
        f"template <>\nstruct PolicyTraits<{pre}Preprocess, {post}Postprocess> {{\n"
        f"  using Pairs = TierList<{', '.join(f'Tier<{e}, {k}>' for e, k in pairs)} // all\n  >;\n}};\n"
        for (pre, post), pairs in POLICIES.items()
    )
    cpp = ", ".join(f"{m} = {n}" for m, n in numbers.items())
    return {
        "_build_meta.py": f'__version__ = "{release}"\n',
        "tllm_enums.py": "from enum import IntEnum\n" + "\n".join(enums),
        "fused_moe/core.py": "import torch_that_is_not_there\n" + "\n".join(functions.values()),
        "fused_moe/trtllm_gen_routing.py": routing,
        "fused_moe/cute_dsl/fused_moe.py": "\n".join(["class CuteDslMoEWrapper:", *methods])
        if methods
        else "",
        f"{INCLUDE}runner.h": f"enum class RoutingMethodType : int64_t {{ // in step\n{cpp},\n}};",
        f"{INCLUDE}RoutingCustomPolicy.cuh": tiers,
        f"{KERNELS}llama4.cu": "static constexpr int MaxNumTopExperts = 1;\n"
        "static constexpr int MaxSupportedExperts = 128;",
        f"{KERNELS}deepseek.cu": "static constexpr int MaxNumTopGroups = 4;\n"
        "static constexpr int MaxNumGroups = 8;",
        LAUNCHER: BLOCK_SCALE,
    }


def unpacked(path, contents):
    for name, text in contents.items():
        file = path / "flashinfer" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return path


def wheel(path, contents):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in contents.items():
            archive.writestr(f"flashinfer/{name}", text)
    return path


@pytest.mark.parametrize("release", ["0.6.8", "0.6.12", "0.6.18", "0.7.0", "0.7.2.post1"])
def test_a_package_that_says_what_we_say(release, tmp_path):
    path = wheel(tmp_path / "a.whl", files(release))
    found = examine(Package.of(path))
    assert (found.differences, found.unread) == ((), ())
    assert found.methods["Unspecified"] == len(found.methods) - 1


def test_a_launcher_with_one_bound_for_groups(tmp_path):
    """As 0.6.3 to 0.6.6 have it, whose other checks of top_k are about other methods."""
    launcher = """
class Fp8BlockScaleLauncher : public FusedMoeLauncher {
  void check_routing() {
    if (n_group <= 1) {
      TVM_FFI_ICHECK(args->top_k <= 10) << "Current routing kernel (no groups) only supports top_k<=10";
    } else {
      TVM_FFI_ICHECK(args->top_k <= 7) << "Current routing kernel (with groups) only supports top_k<=7";
    }
  }
};
"""
    package = Package.of(wheel(tmp_path / "a.whl", {**files(), LAUNCHER: launcher}))
    assert sources.block_scale_top_k(package) == {"DeepSeekV3": ((256, 7),)}


def test_every_form_of_a_package_is_read(tmp_path):
    contents = files()
    root = unpacked(tmp_path / "x", contents)
    for path in (wheel(tmp_path / "a.whl", contents), root, root / "flashinfer"):
        assert drift(path) == []
    # A checkout: sources beside the package, and the release in a file.
    checkout = unpacked(
        tmp_path / "c", {n: t for n, t in contents.items() if n.endswith(".py") and n[0] != "_"}
    )
    for name in (n for n in contents if n.startswith("data/")):
        file = checkout / name.removeprefix("data/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(contents[name])
    (checkout / "version.txt").write_text("0.7.0\n")
    found = examine(Package.of(checkout))
    assert (found.differences, found.unread) == ((), ())


@pytest.mark.parametrize(
    ("file", "old", "new", "difference"),
    [
        ("tllm_enums.py", "MiniMax2 = (7,)", "MiniMax3 = (7,)", "RoutingMethodType.MiniMax3: package 7, bundled facts None"),
        ("tllm_enums.py", "Situ = 10", "Situ = 12", "ActivationType.Situ: package 12, bundled facts 10"),
        ("fused_moe/core.py", "def trtllm_bf16_moe", "def trtllm_bf32_moe", "trtllm_bf16_moe: only the bundled facts have it"),
        ("fused_moe/core.py", "def trtllm_bf16_moe", "def trtllm_bf32_moe", "trtllm_bf32_moe: only the package has it"),
        ("fused_moe/core.py", "norm_topk_prob=True", "norm_topk_prob=False", "trtllm_bf16_moe: + norm_topk_prob=False, - norm_topk_prob=True"),
        ("fused_moe/core.py", "top_k, n_group", "n_group, top_k", "trtllm_bf16_moe: another order"),
        (f"{INCLUDE}runner.h", "TopK = 5", "TopK = 15", "runner.h RoutingMethodType.TopK: package 15, bundled facts 5"),
        (f"{INCLUDE}RoutingCustomPolicy.cuh", "Tier<256, 8>", "Tier<320, 8>", "Default: the kernel accepts 320 experts with top_k 8, the bundled facts do not"),
        (f"{INCLUDE}RoutingCustomPolicy.cuh", "Tier<1024, 32>", "Tier<512, 32>", "MiniMax2: the bundled facts accept 513 experts with top_k 1, the kernel does not"),
        (f"{INCLUDE}RoutingCustomPolicy.cuh", "Tier<2048, 32>", "Tier<2048, 22>", "Renormalize: the bundled facts accept 2048 experts with top_k 23, the kernel does not"),
        (f"{KERNELS}llama4.cu", "128", "256", "Llama4: the kernel accepts 256 experts with top_k 1, the bundled facts do not"),
        (f"{KERNELS}deepseek.cu", "Groups = 8", "Groups = 16", "DeepSeekV3: 16 groups of which 4 are kept"),
        (f"{KERNELS}deepseek.cu", "Groups = 4", "Groups = 3", "DeepSeekV3: 8 groups of which 4 are kept"),
        (LAUNCHER, "top_k <= 32", "top_k <= 16", "Renormalize: the bundled facts accept 512 experts with top_k 17, the block-scale launcher does not"),
        (LAUNCHER, "8 : 22", "8 : 24", "DeepSeekV3: the block-scale launcher accepts 512 experts with top_k 24, the bundled facts do not"),
    ],
)  # fmt: skip
def test_drift_is_named(file, old, new, difference, tmp_path):
    contents = files()
    assert old in contents[file]
    contents[file] = contents[file].replace(old, new)
    found = drift(wheel(tmp_path / "a.whl", contents))
    assert any(line.startswith(difference) for line in found), found


@pytest.mark.parametrize(
    ("file", "unread"),
    [
        (f"{INCLUDE}runner.h", "RoutingMethodType in runner.h"),
        (f"{INCLUDE}RoutingCustomPolicy.cuh", "limits of the kernel of Default"),
        (f"{KERNELS}llama4.cu", "limits of the kernel of Llama4"),
        (f"{KERNELS}deepseek.cu", "groups of the DeepSeek kernel"),
        (LAUNCHER, "top_k that the block-scale launcher accepts for DeepSeekV3"),
    ],
)
def test_what_cannot_be_read_is_said(file, unread, tmp_path, capsys):
    path = wheel(tmp_path / "a.whl", {n: t for n, t in files().items() if n != file})
    assert main(["drift", "flashinfer", str(path)]) == 0
    text = capsys.readouterr().out
    assert f"not read  {unread}\n" in text
    assert text.endswith(
        f"  no drift in what was read; not read: {text.count('not read  ')} (above)\n"
    )


@pytest.mark.parametrize(
    ("file", "line", "unread"),
    [
        (f"{KERNELS}llama4.cu", "MaxNumTopExperts = 1;", "limits of the kernel of Llama4"),
        (f"{KERNELS}llama4.cu", "MaxSupportedExperts = 128;", "limits of the kernel of Llama4"),
        (f"{KERNELS}deepseek.cu", "MaxNumTopGroups = 4;", "groups of the DeepSeek kernel"),
        (f"{KERNELS}deepseek.cu", "MaxNumGroups = 8;", "groups of the DeepSeek kernel"),
    ],
)
def test_half_a_limit_is_none(file, line, unread, tmp_path):
    contents = files()
    assert line in contents[file]
    contents[file] = contents[file].replace(line, "Moved = 1;")
    assert examine(Package.of(wheel(tmp_path / "a.whl", contents))).unread == (unread,)


#: Sources in which a search begins at thousands of places, and ends at none.
ENDLESS = {
    "classes": (LAUNCHER, "class Fp8BlockScaleLauncher "),
    "methods": (LAUNCHER, "class Fp8BlockScaleLauncher\n};RoutingMethodType::Renormalize "),
    "comments": (LAUNCHER, "/* "),
    "literals": (LAUNCHER, 'R"('),
    "exports": (LAUNCHER, "TVM_FFI_DLL_EXPORT_TYPED_FUNC(f, g\n"),
    "lambdas": (LAUNCHER, 'name == "run") { return Function::FromTyped([a](int b'),
    "policies": (
        f"{INCLUDE}RoutingCustomPolicy.cuh",
        "struct PolicyTraits<SoftmaxPreprocess, NoOpPostprocess> { using Pairs = TierList<",
    ),
    "enums": (f"{INCLUDE}runner.h", "enum class RoutingMethodType "),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_hostile_sources_are_read_in_seconds(name, tmp_path):
    file, text = ENDLESS[name]
    contents = {**files(), file: text * (400_000 // len(text))}
    started = time.process_time()
    assert examine(Package.of(wheel(tmp_path / "a.whl", contents))).unread
    assert time.process_time() - started < 5


@pytest.mark.parametrize("digits", ["9" * 30, "0x" + "f" * 5_000])
def test_a_number_that_no_enum_has_is_none(digits, tmp_path):
    contents = files()
    contents["tllm_enums.py"] = contents["tllm_enums.py"].replace(
        "TopK = (5,)", f"TopK = ({digits},)"
    )
    found = drift(wheel(tmp_path / "a.whl", contents))
    assert "RoutingMethodType.TopK: package None, bundled facts 5" in found


def test_a_difference_of_megabytes_is_shown_in_part(tmp_path):
    contents = files()
    many = ", ".join(f"a{n}" for n in range(20_000))
    contents["fused_moe/core.py"] = f"def trtllm_bf16_moe({many}): pass\n"
    found = examine(Package.of(wheel(tmp_path / "a.whl", contents)))
    assert max(map(len, found.differences)) > 100_000
    assert max(map(len, found.lines())) < 2_100


def test_parameters_as_python_writes_them(tmp_path):
    core = (
        "def trtllm_x_moe(a: Tensor, /, b: Optional[int] = None, *, c: str = 'x,y', **more): pass\n"
        "def _trtllm_y_moe(a): pass\ndef trtllm_moe_z(a): pass\n"
        "class Launcher:\n    def trtllm_inner_moe(self): pass\n"
    )
    package = Package.of(wheel(tmp_path / "a.whl", {"fused_moe/core.py": core}))
    assert package.signatures == {"trtllm_x_moe": ("a", "b=None", "*", "c='x,y'", "**more")}


def test_the_command_says_what_it_found(tmp_path, capsys):
    good = wheel(tmp_path / "good.whl", files())
    assert main(["drift", "flashinfer", str(good)]) == 0
    text = capsys.readouterr().out
    assert f"flashinfer-python 0.7.0 ({good})\n" in text
    assert "methods   Default 0, Renormalize 1, " in text
    assert "compared  17 entry points, 0 calls of operators\n  no drift\n" in text
    contents = files()
    contents["tllm_enums.py"] = contents["tllm_enums.py"].replace(
        "TopKSigmoid = (9,)", "Other = (9,)"
    )
    bad = wheel(tmp_path / "bad.whl", contents)
    assert main(["drift", "flashinfer", str(good), str(bad)]) == 1
    text = capsys.readouterr().out
    assert text.count("no drift") == 1
    assert "  drift     RoutingMethodType.TopKSigmoid: package None, bundled facts 9\n" in text


@pytest.mark.parametrize(
    ("release", "head"),
    [
        ("99.0", "99.0, newer than known, judged as "),
        ("0.7.0.post9", "0.7.0.post9, judged as 0.7.0 "),
    ],
)
def test_a_release_without_data_of_its_own(release, head, tmp_path, capsys):
    contents = {
        **files("99.0" if release == "99.0" else "0.7.0"),
        "_build_meta.py": f'__version__ = "{release}"',
    }
    path = wheel(tmp_path / "a.whl", contents)
    assert main(["drift", "flashinfer", str(path)]) == 0
    assert f"flashinfer-python {head}" in capsys.readouterr().out


def broken(path):
    """A wheel whose one compressed file is damaged."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("flashinfer/fused_moe/core.py", "x = 1\n" * 999)
    path.write_bytes(path.read_bytes()[:60] + b"\xff" * 8 + path.read_bytes()[68:])
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "nothing", "no such file"),
        (lambda d: unpacked(d / "x", {"a.py": ""}), "found no flashinfer/fused_moe/core.py, expected a flashinfer-python package"),
        (lambda d: wheel(d / "a.whl", {"__init__.py": ""}), "found no flashinfer/fused_moe/core.py, expected a flashinfer-python package"),
        (lambda d: wheel(d / "a.whl", {"fused_moe/core.py": ""}), "does not state its release"),
        (lambda d: wheel(d / "a.whl", {**files(), "_build_meta.py": '__version__ = "new"'}), "'new' is not a release"),
        (lambda d: wheel(d / "a.whl", {**files(), "_build_meta.py": '__version__ = "0.1"'}), "older than the oldest"),
        (lambda d: wheel(d / "a.whl", {**files(), "fused_moe/core.py": "def ("}), "flashinfer/fused_moe/core.py: "),
        (lambda d: (d / "a.whl").write_text("text") and d / "a.whl", "found no wheel file (File is not a zip file)"),
        (lambda d: broken(d / "a.whl"), "cannot be read"),
    ],
)  # fmt: skip
def test_what_is_no_flashinfer_is_one_line(make, message, tmp_path, capsys):
    assert main(["drift", "flashinfer", str(make(tmp_path))]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_installed_package_says_what_we_say():
    if importlib.util.find_spec("flashinfer") is None:
        with pytest.raises(ReleaseError, match="is not installed; install it, or name a wheel"):
            Package.installed()
        pytest.skip("flashinfer-python is not installed")
    found = examine(Package.installed())
    assert found.differences == ()


def test_the_installed_package_is_found_and_not_imported(tmp_path, monkeypatch, capsys):
    # Where it is really installed, other tests have imported it.
    monkeypatch.delitem(sys.modules, "flashinfer", raising=False)
    monkeypatch.syspath_prepend(unpacked(tmp_path, {**files(), "__init__.py": "1 / 0"}))
    assert Package.installed().release == "0.7.0"
    assert main(["drift", "flashinfer"]) == 0
    assert "flashinfer-python 0.7.0 " in capsys.readouterr().out


def test_the_target_answers_for_a_wheel(tmp_path):
    contents = {**files(), "__init__.py": ""}
    contents["fused_moe/core.py"] = contents["fused_moe/core.py"].replace("top_k", "k")
    target = load_target(
        f"flashinfer@{wheel(tmp_path / 'a.whl', contents)}", FlashInfer.of("0.7.0")
    )
    assert target.method_numbers()["MiniMax2"] == 7
    assert any("+ k" in line for line in target.drift())
    with pytest.raises(Unsupported, match="does not classify"):
        target.classify(None)
    with pytest.raises(Unsupported, match="has no gates"):
        target.gates(None, "nvfp4", "Default")


@pytest.mark.parametrize("drifts", [False, True])
def test_a_run_asks_the_target_what_it_answers(pytester, tmp_path, drifts):
    contents = {**files(), "__init__.py": ""}
    if drifts:
        contents["fused_moe/core.py"] = contents["fused_moe/core.py"].replace("top_k", "k")
    path = wheel(tmp_path / "a.whl", contents)
    chosen = "--moe-target", f"flashinfer@{path}", "--moe-flashinfer", "0.7.0"
    result = pytester.runpytest_subprocess("--moe-golden", *chosen)
    outcomes = result.parseoutcomes()
    assert {key: outcomes.get(key, 0) for key in ("passed", "failed", "skipped")} == {
        "passed": int(not drifts),
        "failed": int(drifts),
        "skipped": 0,
    }
    assert result.ret == int(drifts)
    result.stdout.fnmatch_lines("*the target does not call*")
