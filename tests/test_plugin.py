"""The plugin as users run it: pytest in a subprocess, in a repository of their own."""

from __future__ import annotations

import json
import re
import sys

import pytest

from pytest_moe_routing import goldens
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.record import VerdictRecord
from pytest_moe_routing.report import records
from pytest_moe_routing.schemes import SERVED_SCHEMES
from pytest_moe_routing.session import variants_of

MODEL = "minimax-m2"
MODELS = load_models(goldens.packaged_directory()).values()
NO_MODEL = f"none of the {len(MODELS)} models matches 'nope-*'; `moe-routing models` lists them"


def run(host, *args):
    return host.runpytest_subprocess("--moe-models", MODEL, "-p", "no:cacheprovider", *args)


CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "_name_or_path": "somebody/Tiny-V3",
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "n_routed_experts": 64,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


def test_golden_runs_only_the_suite_and_ends_with_the_table(cold, host, monkeypatch):
    """And it fits a screen: no GPU test runs unless it is asked for."""
    cases = [(m, c) for m in MODELS for c in m.checkpoints if c in SERVED_SCHEMES]
    monkeypatch.setenv("COLUMNS", "80")
    result = host.runpytest_subprocess("--moe-golden")
    judged = sum(len(variants_of(model)) for model in MODELS)
    inexpressible = sum(m.router.not_expressible is not None for m in MODELS)
    result.assert_outcomes(
        # Recipe, routing and stray goldens of a model; a golden of each published case; a verdict
        # of every case; a sweep of every scheme; the numbers of the methods.
        passed=len(MODELS) * 3
        + len(cases)
        + (judged + 1) * len(SERVED_SCHEMES)
        + 1
        - inexpressible,
        skipped=inexpressible,
    )
    result.stdout.fnmatch_lines(
        [
            f"moe-routing: target builtin, FlashInfer *, {len(MODELS)} models*, goldens in *",
            "*MoE routing verdicts*",
            "scheme * exact * fallback *",
            "fp8_block *",
            "* exact, * fallback, * missed; builtin *",
            "config sweep: * configs are not judged*",
            "left out: * GPU tests (-m gpu), *",
        ]
    )
    assert sum(max(1, -(-len(line) // 80)) for line in result.outlines) <= 60
    assert "test_of_the_host" not in result.stdout.str()


def test_paths_on_the_command_line_run_as_well(host):
    result = run(host, "--moe-golden", "-m", "not gpu", "test_host.py")
    (model,) = (model for model in MODELS if model.id == MODEL)
    published = len(set(model.checkpoints) & set(SERVED_SCHEMES))
    # Its three goldens, those of its published cases, every verdict, the numbers, the host's test.
    result.assert_outcomes(passed=3 + published + len(SERVED_SCHEMES) + 1 + 1)


def test_without_the_option_the_host_is_left_alone(cold, host):
    result = host.runpytest_subprocess("-v")
    result.assert_outcomes(passed=1)
    assert "moe-routing" not in result.stdout.str().replace("plugins: ", "").split("collected")[1]


@pytest.mark.parametrize(
    "args", [("-n", "2"), ("-n0",), ("-p", "no:xdist"), ("-p", "no:syrupy")], ids=str
)
def test_runs_every_way(cold, host, args):
    result = run(host, "--moe-golden", "-m", "not gpu", *args)
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        ["nvfp4 * 1*", f"{len(SERVED_SCHEMES)} exact; *", "left out: * (--moe-target), *"]
    )


def test_ini_twins(host):
    host.makeini(
        f"[pytest]\nmoe_golden = true\nmoe_models = {MODEL} deepseek-r1\nmoe_schemes = nvfp4\nmoe_flashinfer = 0.6.12\n"
    )
    result = host.runpytest_subprocess("-m", "not gpu")
    result.stdout.fnmatch_lines(
        ["moe-routing: *FlashInfer 0.6.12 (as requested), 2 models*", "2 exact; *"]
    )


def test_an_unknown_flashinfer_release_is_a_stated_assumption(host):
    result = run(host, "--moe-golden", "--moe-flashinfer", "99.0")
    result.stdout.fnmatch_lines(
        ["assumption: the kernels of FlashInfer 99.0, which has no table of its own, are"]
    )
    known = run(host, "--moe-golden", "--moe-flashinfer", "0.6.12+cu130")
    known.stdout.no_fnmatch_line("assumption: *")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--moe-models", "nope-*"), NO_MODEL),
        (("--moe-models", ","), "--moe-models: found ',', expected at least one name"),
        (("--moe-schemes", ""), "--moe-schemes: found '', expected at least one name"),
        (("--moe-target", ""), "--moe-target: found '', expected a value"),
        (("--moe-flashinfer", ""), "--moe-flashinfer: found '', expected a value"),
        (("--moe-schemes", "nvfp5"), "unknown scheme 'nvfp5'; schemes: fp8_block"),
        (("--moe-schemes", "all,nvfp5"), "unknown scheme 'nvfp5'; schemes: fp8_block"),
        (
            ("--moe-target", "vlm"),
            "unknown target 'vlm'; targets: builtin, flashinfer, sglang, transformers, vllm, or "
            "module:Class",
        ),
        (("--moe-flashinfer", "0.1"), "FlashInfer 0.1 is older than the oldest known, 0.2.9"),
        (
            ("-o", "moe_require_gpu=maybe"),
            "ini option moe_require_gpu: invalid truth value 'maybe'",
        ),
        (
            ("--moe-kernels", "my kernels"),
            "--moe-kernels: found 'my kernels', expected flashinfer, simulator, simulator:FAULT, "
            "sglang[@PATH] or vllm[@PATH]",
        ),
        (("--moe-kernels", "vllm@x"), "--moe-kernels vllm@x: no such file or directory"),
        (("--moe-golden-dir", "nowhere"), "nowhere: found no */model.yaml"),
        (
            ("--moe-target", "miniatures:LosesScale", "--snapshot-update"),
            "only the builtin target has goldens",
        ),
        (
            ("--snapshot-update", "-p", "no:syrupy"),
            "needs syrupy: pip install 'pytest-moe-routing[update]'",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_misuse_is_one_line_and_exit_4(host, args, message):
    check_misuse(host, args, message)


def test_misuse_is_one_line_and_exit_4_under_xdist(host):
    check_misuse(host, ("--moe-models", "nope-*", "-n", "2"), NO_MODEL)


def check_misuse(host, args, message):
    result = host.runpytest_subprocess("--moe-golden", *args)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: {message}" in result.stderr.str().replace("--snapshot-update: ", "").replace(
        "--snapshot-update ", ""
    )
    assert "Traceback" not in result.stderr.str() + result.stdout.str()


def test_update_in_an_installed_package_is_refused(host, monkeypatch):
    """The packaged goldens of a wheel are not the user's to rewrite."""
    plugin = "import pytest_moe_routing.goldens as g\ng.is_checkout = lambda directory: False\n"
    host.makeconftest(plugin)
    result = run(host, "--moe-golden", "--snapshot-update")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: *belongs to an installed package*--moe-golden-dir*"])


def test_another_target_is_judged_not_compared(host):
    result = run(host, "--moe-golden", "-m", "not gpu", "--moe-target", "miniatures:LosesScale")
    # Goldens are left out; what this target does not have (model code, recorded calls, modular
    # experts) is not asked. MiniMax-M2 has no scale to lose.
    result.assert_outcomes(
        passed=len(SERVED_SCHEMES) + 1, skipped=result.parseoutcomes()["skipped"]
    )
    result.stdout.fnmatch_lines([f"{len(SERVED_SCHEMES)} exact; loses-scale *"])


def test_history_is_told_by_the_suite(host):
    result = host.runpytest_subprocess(
        "--moe-golden",
        "-m",
        "not gpu",
        "--moe-target",
        "miniatures:Vllm022",
        "--moe-flashinfer",
        "0.6.12",
        "--moe-report=r.jsonl",
    )
    assert result.ret == 1
    text = result.stdout.str()
    found = [r for r in records.load(host.path / "r.jsonl") if isinstance(r, VerdictRecord)]
    failed = {f"test_verdict[{r.model}-{r.scheme}]" for r in found if r.outcome == "failed"}
    scaled_without_groups = {
        f"test_verdict[{m}-{scheme}]"
        for m in MODELS
        for scheme in m.checkpoints
        if scheme in SERVED_SCHEMES and m.router.scoring_func == "sigmoid" and not m.router.n_group
        if m.router.correction_bias and m.router.routed_scaling_factor != 1.0
    }
    assert "test_verdict[step-3.7-flash-nvfp4]" in scaled_without_groups
    # The experts need a clamp, or swigluoai, from 0.6.13 on: another reason goes first.
    no_kernel = {name for name in scaled_without_groups if "-bf16]" in name}
    assert scaled_without_groups - no_kernel <= failed
    assert "test_verdict[deepseek-v2-bf16]" in failed  # grouped softmax is taken for Default
    assert "test_verdict[minimax-m2-fp8_block]" not in failed
    # One block for the cause, however many models it has; the others are counted.
    assert text.count("  cause    wrong:recipe-scale\n") == 1
    result.stdout.fnmatch_lines(
        [
            "_* on *, decided by vllm-0.22-classifier *: wrong _*",
            "*because  routed_scaling_factor: the router has *, the kernel 1; MiniMax2 forces *",
            "  also     * more: *",
            "  cause    wrong:recipe-scale",
        ]
    )


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("AnswersNothing", "SKIPPED * does not classify routers"),
    ],
)
def test_a_target_that_cannot_answer(host, target, message):
    result = run(
        host, "--moe-golden", "-m", "not gpu", "--moe-target", f"miniatures:{target}", "-rs"
    )
    result.stdout.fnmatch_lines([f"*{message}*"])
    result.stdout.fnmatch_lines(["moe-routing: no verdict was given, *"])
    assert "Traceback" not in result.stdout.str()
    assert result.ret == 1


def test_fixtures_and_marker_for_tests_of_the_host(host):
    host.makepyfile(
        test_host="""
        import pytest

        @pytest.mark.moe_models("llama-4-*", "minimax-m2")
        def test_models(moe_model): assert moe_model.router.num_experts >= 16

        def test_schemes(moe_scheme): assert moe_scheme

        @pytest.mark.moe_models("minimax-m2", "llama-4-scout")
        def test_cases(moe_model, moe_scheme, moe_target, moe_flashinfer):
            assert moe_scheme
            assert moe_target.classify(moe_model).method in moe_flashinfer.methods
        """
    )
    result = host.runpytest_subprocess("-v")
    result.assert_outcomes(passed=3 + 3 * len(SERVED_SCHEMES))
    result.stdout.fnmatch_lines(
        ["*test_models[[]llama-4-maverick[]]*", "*test_cases[[]minimax-m2-fp8_block[]]*"]
    )


def test_a_config_adds_a_model_for_this_run(host):
    (host.path / "config.json").write_text(json.dumps(CONFIG))
    result = host.runpytest_subprocess(
        *(
            "--moe-golden",
            "-m",
            "not gpu",
            "--moe-config",
            "config.json",
            "--moe-models",
            "tiny-*,minimax-m2",
        )
    )
    # Verdicts, and no goldens: those of the other model.
    golden = 3 + 2
    result.assert_outcomes(passed=golden + 2 * len(SERVED_SCHEMES) + 1)
    result.stdout.fnmatch_lines(["fp8_block * 2*"])


@pytest.mark.parametrize("name", ["tiny", MODEL])
def test_a_config_that_is_not_chosen_is_no_pass(host, name):
    """Nor where a packaged model has the name of its folder, which is then judged instead."""
    (host.path / name).mkdir()
    config = {key: value for key, value in CONFIG.items() if key != "_name_or_path"}
    (host.path / name / "config.json").write_text(json.dumps(config))
    check_misuse(
        host,
        ("--moe-config", name, "--moe-models", MODEL),
        f"--moe-config {name}: its model has the id {'tiny' if name == 'tiny' else MODEL + '.config'}, "
        f"which does not match --moe-models {MODEL}",
    )


def test_a_run_that_stops_early_writes_no_ledger(host):
    target = ("--moe-target", "miniatures:LosesScale", "--moe-models", "deepseek-r1")
    wrong = ("--moe-golden", *target, "--moe-write-known-failures", "known.yaml")
    result = host.runpytest_subprocess(*wrong, "-x")
    result.stdout.fnmatch_lines(["moe-routing: *known.yaml not written, because the run*"])
    assert not (host.path / "known.yaml").exists()
    chosen = ("--moe-schemes", "nvfp4,fp8_block", "-k", "test_verdict[")
    host.runpytest_subprocess(*wrong, *chosen)
    # The entry lists its cases: the cause in another one fails.
    text = (host.path / "known.yaml").read_text()
    assert "\n- test: test_verdict\n  cause: " in text
    assert "cases: [deepseek-r1-fp8_block, deepseek-r1-nvfp4]" in text
    # The reason is that of the first, and names the other scheme.
    (reason,) = re.findall("^  reason: '?(.*?)'?$", text, re.M)
    assert re.search(r"^deepseek-r1 on (nvfp4|fp8_block), .*; also (nvfp4|fp8_block)$", reason)
    known = ("--moe-golden", *target, *chosen, "--moe-known-failures", "known.yaml")
    known += ("--moe-write-known-failures", "new.yaml")
    (host.path / "known.yaml").write_text(text.replace("deepseek-r1-fp8_block, ", ""))
    result = host.runpytest_subprocess(*known)
    assert result.parseoutcomes()["failed"] == result.parseoutcomes()["xfailed"] == 1
    # A case that is known already is in no further ledger.
    assert "cases: [deepseek-r1-fp8_block]\n" in (host.path / "new.yaml").read_text()


def test_a_ledger_that_cannot_be_written_fails_the_run(host):
    (host.path / "file").touch()
    chosen = ("--moe-models", "minimax-m2", "--moe-schemes", "nvfp4", "-k", "test_verdict[")
    result = run(host, "--moe-golden", *chosen, "--moe-write-known-failures", "file/known.yaml")
    assert result.parseoutcomes() == {
        "passed": 1,
        "deselected": result.parseoutcomes()["deselected"],
    }
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        ["moe-routing: */file/known.yaml not written, because it cannot be *"]
    )


def test_collecting_gives_no_verdicts_and_misses_none(host):
    result = run(host, "--moe-golden", "--co", "-q", "--moe-min-verdicts", "9999")
    assert result.ret == 0


def test_a_config_that_is_wrong(host):
    (host.path / "config.json").write_text(json.dumps({**CONFIG, "n_group": 5}))
    result = host.runpytest_subprocess("--moe-golden", "--moe-config", "config.json")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["ERROR: *config.json*n_group: found 5, expected a divisor of *64*"]
    )


def test_warnings_as_errors_without_numpy_and_with_junitxml(host):
    """torch warns without numpy, and pytest's `record_property` beside the default XML."""
    host.makeconftest("import sys\nsys.modules['numpy'] = None")
    result = run(host, "-W", "error", "--moe-golden", "-m", "not gpu", "--junitxml", "out.xml")
    assert result.ret == 0
    text = (host.path / "out.xml").read_text()
    assert text.count('property name="moe_verdict"') == len(SERVED_SCHEMES)


# -- cost -------------------------------------------------------------------------------------

LOADED = "import sys; heavy = {'torch', 'yaml', 'numpy', 'syrupy.extensions'} & set(sys.modules)"


def test_an_unrelated_run_loads_nothing_heavy(cold, host):
    host.makeconftest(
        f"""
        def pytest_unconfigure(config):
            {LOADED}
            assert not heavy - {{'syrupy.extensions'}}, heavy
        """
    )
    result = host.runpytest_subprocess(
        "-p", "no:syrupy", "-p", "no:benchmark", "-p", "no:hypothesispytest"
    )
    result.assert_outcomes(passed=1)
    assert result.ret == 0


def test_version_loads_nothing_heavy(host):
    code = (
        "import sys, pytest; pytest.main(['--version']); "
        "loaded = {'torch', 'yaml', 'numpy'} & set(sys.modules); sys.exit(repr(loaded) if loaded else 0)"
    )
    assert host.run(sys.executable, "-c", code).ret == 0


def test_collecting_the_suite_loads_no_torch(cold, host):
    host.makeconftest(
        """
        import sys
        def pytest_collection_finish(session):
            assert len(session.items) > 5 and "torch" not in sys.modules
        """
    )
    assert run(host, "--moe-golden", "--collect-only", "-q").ret == 0


def test_one_test_that_is_left_out_is_no_plural(host):
    chosen = "--moe-models", MODEL, "--moe-schemes", "nvfp4", "-k", "test_method_numbers"
    result = run(host, "--moe-golden", *chosen)
    text = " ".join(result.outlines)
    assert re.search(r"\b1 full-scale +test \(--moe-scale full\)", text)
    assert not re.search(r"\b1 [a-z-]+ tests", text)
