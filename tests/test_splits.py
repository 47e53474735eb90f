"""Experts that are split over ranks: which splits are asked about, and what reports say of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from miniatures import AnswersNothing

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.failure import Rank
from pytest_moe_routing.flashinfer import FlashInfer, preparation
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.finding import Finding, Kind
from pytest_moe_routing.oracle.judge import judge
from pytest_moe_routing.oracle.laid_out import LaidOut
from pytest_moe_routing.oracle.shares import split_findings, with_sizes, wrong_splits
from pytest_moe_routing.oracle.verdict import Verdict
from pytest_moe_routing.suite.shares import of_split
from pytest_moe_routing.targets.builtin.target import BuiltinTarget

FLASHINFER = FlashInfer.of("0.7.2")
MODELS = load_models(packaged_directory())
RAISED = Finding(Kind.RAISED, "ValueError", None, "no such size", "own/code.py:7")
#: A call in which nothing is wrong.
RIGHT = {
    "function": "f",
    "orders": [],
    "is_torn": False,
    "rows": 256,
    "inner": 128,
    "told": 128,
}


class Splits(AnswersNothing):
    """Splits experts, each into parts of which `answer` says what comes of one."""

    name = "splits"

    def __init__(self, answer):
        super().__init__(FLASHINFER)
        self.answer, self.asked = answer, []

    def weight_path(self, model, scheme):
        return "one way"

    def split(self, model, scheme, count, whole):
        self.asked.append((model.id, count, whole))
        return (replace(LaidOut("f", "own/code.py Method", ()), **self.answer(whole // count)),)


def splits_of(answer, scheme, *models):
    target = Splits(answer)
    return target, wrong_splits(target, scheme, [MODELS[model] for model in models])


def test_one_split_of_each_remainder_is_asked():
    target, found = splits_of(lambda _: {}, "nvfp4", "gemma-4-26b-a4b", "deepseek-r1", "glm-5")
    # 704, 352, 176 and 88 rows, as 64, 96, 48 and 88; 1024, 512 and 256, of which nothing is left
    # over, as of 2048.
    assert target.asked == [
        ("gemma-4-26b-a4b", 1, 64),
        ("gemma-4-26b-a4b", 2, 2 * 96),
        ("gemma-4-26b-a4b", 4, 4 * (48 + 128)),
        ("gemma-4-26b-a4b", 8, 8 * 88),
        # Of two ranks there is no third; of more, the fewest are asked about.
        ("deepseek-r1", 4, 4 * 128),
    ]
    assert (found.wrong, found.answered) == ((), 10)


def test_a_rank_has_something_of_a_small_size_where_whole_tiles_are_split():
    target, _ = splits_of(lambda _: {}, "nvfp4", "deepseek-coder-v2-lite")
    # 704 rows are five tiles of 128 and 64 rows: of 2 * 64 rows, the first rank would have all.
    assert target.asked[0] == ("deepseek-coder-v2-lite", 2, 2 * 192)
    # Of 4 * 48 rows, the first two of four.
    target, _ = splits_of(lambda _: {}, "nvfp4", "gemma-4-26b-a4b")
    assert target.asked[2] == ("gemma-4-26b-a4b", 4, 4 * 176)


def test_a_mistake_is_told_with_the_sizes_of_the_model():
    def answer(inner):
        return {"findings": (Finding(Kind.ARGUMENT, "intermediate_size", inner, 7),)}

    target, found = splits_of(answer, "nvfp4", "deepseek-v3", "deepseek-r1")
    (wrong,) = found.wrong
    failure = of_split(target, "nvfp4", wrong)
    assert failure.lines == (
        "deepseek-r1 on nvfp4, splits 0: experts are split wrongly over 8 ranks",
        "  reach    a published checkpoint, by default",
        "  because  intermediate_size arrives as 7, the layer has 256",
        "  ranks    each has 256 of 2048 rows of the gate and up weights",
        "  at       own/code.py Method",
        "  models   deepseek-r1 over 2 or 4 or 8, deepseek-v3 over 2 or 4 or 8",
    )
    assert failure.cause == "split:argument-intermediate_size:Method"
    assert failure.rank is Rank.SILENT


def test_every_size_is_asked_before_a_mistake_of_the_small_one_is_none():
    """Of 256, 512 and 1024 rows, which leave nothing over, the largest alone go wrong."""

    def answer(inner):
        is_wrong = inner in (128, 1024)
        return {"findings": (RAISED,) if is_wrong else ()}

    target, found = splits_of(answer, "nvfp4", "deepseek-r1")
    (wrong,) = found.wrong
    assert list(map(str, wrong.splits)) == ["deepseek-r1 over 2"]
    _, found = splits_of(lambda inner: answer(inner if inner < 256 else 0), "nvfp4", "deepseek-r1")
    assert (found.wrong, found.answered) == ((), 3)
    assert [count for _, count, _ in target.asked] == [4, 8, 4, 2]


@pytest.mark.parametrize(("model", "is_wrong"), [("deepseek-r1", True), ("gemma-4-26b-a4b", False)])
def test_only_blocks_may_be_refused(model, is_wrong):
    """Of 1024 rows, blocks of 128 are whole; of 352, they are not."""
    target, found = splits_of(lambda _: {"refused": RAISED}, "fp8_block", model)
    assert [of_split(target, "fp8_block", wrong).rank for wrong in found.wrong] == (
        [Rank.LOUD] if is_wrong else []
    )


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ({}, Verdict.EXACT),
        ({"findings": (RAISED,)}, Verdict.CRASH),
        ({"refused": RAISED}, Verdict.FALLBACK),
    ],
)
def test_sizes_that_a_kernel_lacks(answer, verdict):
    """Of experts that are whole: a target pads 1408 rows to 1536, prepares them wrongly or not."""
    exact = judge(BuiltinTarget(FLASHINFER), MODELS["glm-4.5-air"], "nvfp4")
    target = Splits(lambda _: answer)
    found = with_sizes(target, replace(exact, scheme="mxint4"))
    assert found.verdict is verdict
    assert target.asked == [("glm-4.5-air", 1, 1408)]
    assert found.findings == answer.get("findings", ())
    rejected = [str(gate) for gate in found.gates if not gate.ok]
    assert rejected == ["shape: no, no such size (own/code.py:7)"] * ("refused" in answer)


def test_sizes_that_a_kernel_has_need_no_question():
    exact = judge(BuiltinTarget(FLASHINFER), MODELS["glm-4.5-air"], "nvfp4")
    assert with_sizes(BuiltinTarget(FLASHINFER), exact) is exact
    with pytest.raises(Unsupported, match="builtin does not split experts"):
        with_sizes(BuiltinTarget(FLASHINFER), replace(exact, scheme="mxint4"))


def test_a_mistake_in_whole_experts_is_told_with_their_rows():
    target, found = splits_of(lambda _: {"findings": (RAISED,)}, "mxint4", "glm-4.5-air")
    (wrong,) = found.wrong
    failure = of_split(target, "mxint4", wrong)
    assert failure.lines[0] == (
        "glm-4.5-air on mxint4, splits 0: experts with 1408 rows do not get to their kernel"
    )
    assert failure.lines[-1] == "  models   glm-4.5-air, also glm-4.5-air over 2 or 4 or 8"


def test_what_cannot_be_asked_is_counted():
    def answer(_):
        raise Unsupported("no ranks here")

    _, found = splits_of(answer, "nvfp4", "deepseek-r1", "gemma-4-26b-a4b")
    assert (found.answered, found.unanswered) == (0, {"no ranks here": 7})


@pytest.mark.parametrize(
    ("scheme", "wrong", "fields"),
    [
        ("nvfp4", {}, []),
        ("nvfp4", {"told": 64}, ["intermediate_size"]),
        ("nvfp4", {"rows": 192, "inner": 96, "told": 96}, ["number of rows"]),
        ("bf16", {"rows": 384, "inner": 192, "told": 192}, ["intermediate_size"]),
        ("nvfp4", {"is_torn": True}, ["block scales"]),
    ],
)
def test_a_kernel_is_given_sizes_that_it_takes(scheme, wrong, fields):
    found = split_findings(FLASHINFER, scheme, {**RIGHT, **wrong})
    assert [finding.field for finding in found] == fields


@pytest.mark.parametrize(
    ("name", "rows", "others"),
    [
        ("shuffle_matrix_sf_a", 192, (128,)),
        ("get_shuffle_matrix_sf_a_row_indices", 192, (128,)),
        ("shuffle_matrix_a", 208, (128,)),
        ("convert_to_block_layout", 128, (96,)),
    ],
)
def test_sizes_that_flashinfer_asserts(name, rows, others):
    """As `flashinfer/utils.py` and `fused_moe/core.py` do."""
    prepare, columns = preparation.FUNCTIONS[name], 64
    with pytest.raises(AssertionError, match="expected a multiple of"):
        prepare(torch.zeros(rows, columns, dtype=torch.uint8), *others)
