"""A case that a release is known to run in the fused kernel, and that no longer does, fails."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import pytest
import yaml
from miniatures import RoutesOutside
from packaging.version import Version

from pytest_moe_routing import targets
from pytest_moe_routing.failure import Rank
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.choice import Choice, Expected, Rule
from pytest_moe_routing.oracle.exact import Gate
from pytest_moe_routing.oracle.judge import judge
from pytest_moe_routing.report import text
from pytest_moe_routing.schemes import SERVED_SCHEMES
from pytest_moe_routing.session import variants_of
from pytest_moe_routing.suite.causes import of_verdict
from pytest_moe_routing.targets.expected import expected_kernel, is_open
from pytest_moe_routing.targets.sglang.runner_rule import deciding

MODELS = load_models(packaged_directory())
R1 = MODELS["deepseek-r1"]
FLAG = "--moe-backend flashinfer_trtllm"
FOLDER = Path(targets.__file__).parent
RECORDED = {
    package: yaml.safe_load((FOLDER / package / "fused.yaml").read_text("utf-8"))["releases"]
    for package in ("vllm", "sglang")
}


def judged(model=R1, **attributes):
    target = type("Lost", (RoutesOutside,), attributes)(FlashInfer.of("0.7.0"))
    return judge(target, model, "nvfp4").record()


def test_a_kernel_that_is_missed_on_purpose_is_lost():
    record = judged()
    assert (record.verdict, record.by_choice, record.fails) == ("missed", True, True)
    assert record.cause == "lost:the-kernel-routes:can_bypass"
    assert text.story(record)[0].endswith(": missed, no longer fused")
    assert "  expected the fused kernel, as known of routes-outside 1.0" in text.story(record)
    assert "  rule     can_bypass turns it away (own/topk.py:7)" in text.story(record)
    assert of_verdict(record).rank is Rank.LOST


@pytest.mark.parametrize("expected", [None, Expected("1.0", by_default=False)])
def test_a_choice_of_another_runner_is_lost_only_where_the_kernel_is_the_default(expected):
    options = {
        "gates": lambda *_: (Gate("all", True),),
        "choice": lambda *_, **__: Choice("select", (FLAG,)),
        "rule": lambda *_: Rule("select", "own/oracle.py:9", "Triton by default"),
    }
    record = judged(**options)
    assert (record.verdict, record.fails) == ("exact", True)
    assert record.cause == "lost:by-default:select"
    assert text.story(record)[0].endswith(": exact, no longer fused by default")
    assert "  now      Triton by default" in text.story(record)
    record = judged(**options, expected=lambda *_: expected)
    assert (record.fails, record.cause, record.lost_since) == (False, "", "")


def test_what_is_right_or_fails_by_itself_is_not_lost():
    # Nothing is expected of a release that is older than all known ones.
    assert not judged(expected=lambda *_: None).fails
    # No kernel multiplies the input for Llama 4 on NVFP4: a release is right to reject it.
    llama = judged(MODELS["llama-4-scout"])
    assert (llama.verdict, llama.lost_since, llama.fails) == ("fallback", "", False)
    # It still runs.
    assert not judged(MODELS["minimax-m2"]).lost_since


def test_a_release_without_a_row_is_held_to_the_row_before_it():
    def of(package, release):
        found = expected_kernel(package, release, "kimi-k2", "nvfp4")
        return found and (found.release, found.by_default)

    assert of("vllm", "0.22.1") == of("vllm", "0.29.3") == ("0.22.1", True)
    assert of("vllm", "0.33.0") == of("vllm", "99.0") == of("vllm", "main") == ("0.33.0", True)
    assert of("vllm", "0.21.0") is None
    assert of("flashinfer", "0.7.2") is None
    assert expected_kernel("vllm", "0.33.0", "kimi-k2", "mxint4") == Expected("0.33.0", False)
    assert expected_kernel("vllm", "0.33.0", "llama-4-scout", "nvfp4") is None


@pytest.mark.parametrize("package", RECORDED)
def test_rows_name_packaged_models_that_are_judged(package):
    known = {str(model) for each in MODELS.values() for model in variants_of(each)}
    for release, sections in RECORDED[package].items():
        Version(str(release))
        assert set(sections) <= {"by_default", "with_switch"}
        named: dict[str, set[str]] = {}
        for schemes in sections.values():
            assert set(schemes) <= set(SERVED_SCHEMES)
            for scheme, patterns in schemes.items():
                for pattern in patterns:
                    models = set(fnmatch.filter(known, pattern))
                    assert models, (release, scheme, pattern)
                    assert not models & named.setdefault(scheme, set()), (release, scheme, pattern)
                    named[scheme] |= models
        opened = [
            f"{model}-{scheme}"
            for scheme, models in named.items()
            for model in models
            if is_open(package, str(release), "test_verdict", f"{model}-{scheme}")
        ]
        assert not opened


def run(host, *args):
    chosen = ("--moe-models", "deepseek-r1,kimi-k2,minimax-m2", "--moe-schemes", "nvfp4,fp8_block")
    target = ("--moe-target", "miniatures:RoutesOutside", "--moe-flashinfer", "0.7.0")
    options = ("-p", "no:cacheprovider", "-p", "no:xdist", "-k", "test_verdict[")
    return host.runpytest_subprocess("--moe-golden", *target, *chosen, *options, *args)


def test_lost_cases_are_one_block_that_names_them_all(host):
    result = run(host)
    assert result.parseoutcomes()["failed"] == 1
    assert result.parseoutcomes()["repeated"] == 3
    result.stdout.fnmatch_lines(
        [
            "*deepseek-r1 on nvfp4, decided by routes-outside *: missed, no longer fused*",
            "  rule     can_bypass turns it away (own/topk.py:7)",
            "  in       4 cases: nvfp4, fp8_block: deepseek-r1, kimi-k2",
            "  cause    lost:the-kernel-routes:can_bypass",
        ]
    )
    assert result.stdout.str().count("rule     can_bypass") == 1


def test_an_entry_of_the_ledger_accepts_a_deliberate_change(host):
    (host.path / "known.yaml").write_text(
        "- cause: lost:the-kernel-routes:can_bypass\n"
        "  target: miniatures:RoutesOutside\n"
        "  reason: the kernel is slower\n"
    )
    result = run(host, "--moe-known-failures", "known.yaml")
    assert (result.ret, result.parseoutcomes()["xfailed"]) == (0, 4)


def answer(name, instead=""):
    return {"name": name, "source": f"{name}.py:7", "instead": instead}


@pytest.mark.parametrize(
    ("asked", "elsewhere", "rule"),
    [
        ([], [answer("a", "trtllm")], Rule()),
        ([answer("a")], [], Rule("a", "a.py:7")),
        ([answer("a", "triton"), answer("b")], [], Rule("a", "a.py:7", "triton")),
        # One that names a runner in another scheme could have named one here.
        ([answer("a"), answer("b")], [answer("a"), answer("b", "trtllm")], Rule("b", "b.py:7")),
        ([answer("a"), answer("b")], [answer("c", "trtllm")], Rule("a or b", "a.py:7")),
    ],
)
def test_the_function_of_sglang_that_decides(asked, elsewhere, rule):
    assert deciding(asked, elsewhere) == rule
