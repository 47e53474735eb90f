"""A page of 100 models in 8 schemes, as large as a report gets."""

from __future__ import annotations

from verdict_records import verdict

from pytest_moe_routing.oracle.finding import Finding, Kind
from pytest_moe_routing.oracle.record import Known, TestRecord
from pytest_moe_routing.oracle.verdict import Verdict
from pytest_moe_routing.report import html

SCHEMES = (
    *("bf16", "fp8_block", "fp8_per_channel", "fp8_per_tensor"),
    *("mxfp4", "mxfp8", "mxint4", "nvfp4"),
)
#: Most of a release is fine; every tenth model has something.
_VERDICTS = (*("exact",) * 11, "wrong", *("fallback",) * 5, "missed", "not judged", "crash")
_SCALE = Finding(Kind.RECIPE, "scale", 2.5, 1.0, fact="MiniMax2 forces it to 1.0 before 0.6.13")
_TOKEN = {
    "logits": [0.0] * 8,
    "bias": [0.0] * 8,
    "wanted": [[e, 0.375] for e in range(8)],
    "got": [[e, 0.125] for e in range(8)],
    "sides": ["output", "output"],
}
_CALL = {
    "function": "trtllm_fp4_block_scale_moe",
    "method": "DeepSeekV3",
    "arguments": {
        "routing_method_type": 2,
        "routing_logits": {"dtype": "float32", "shape": ["num_tokens", 256]},
        "routing_bias": {"dtype": "float32", "shape": [256]},
        "num_experts": 256,
        "top_k": 8,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
    },
}
_PATHS = {
    "Default": ("scoring_func is softmax", "not e_score_correction_bias", "not renormalize"),
    "RenormalizeNaive": ("scoring_func is softmax", "not e_score_correction_bias", "renormalize"),
    "DeepSeekV3": ("scoring_func is sigmoid", "e_score_correction_bias", "num_expert_group > 0"),
    "MiniMax2": ("scoring_func is sigmoid", "e_score_correction_bias", "not num_expert_group > 0"),
}


def records(models=100, releases=("0.33.0",)):
    """Verdicts of every kind, a known failure, and a failed test."""
    found = []
    for age, release in enumerate(releases):
        for n in range(models):
            method = list(_PATHS)[n % len(_PATHS)]
            for place, scheme in enumerate(SCHEMES):
                v = Verdict(
                    _VERDICTS[(n * 7 + place * (n % 10 == 0) + age * (n % 5 == 0) + 1) % 20]
                )
                bad = v in ("wrong", "crash", "missed")
                record = verdict(
                    f"model-{n:03}-with-a-long-name",
                    scheme,
                    v,
                    release=release,
                    router="sigmoid -> + bias to choose -> best 4 of 8 groups by top2_sum -> top 8",
                    method="" if v == "not judged" else method,
                    path=() if v == "not judged" else _PATHS[method],
                    findings=(_SCALE,) if v in ("wrong", "crash") else (),
                    counterexample=_TOKEN if v == "wrong" else None,
                    rejected_by={"shape": "96 not a multiple of 128"} if v in ("fallback", "missed") else {},
                    obstacles=("shape: 96 not a multiple of 128",) if v == "fallback" else (),
                    exact=("DeepSeekV3(n_group=8)",) if bad else (),
                    call=_CALL if bad or v == "exact" else None,
                    kernel="sigmoid -> top 8" if v in ("exact", "wrong") else None,
                    reason="the crystal ball is cloudy" if v == "not judged" else "",
                    known=Known("tracked", "https://example.com/1") if n == 17 and bad else None,
                    source="vllm/model_executor/layers/fused_moe/layer.py:123" if bad else "",
                )  # fmt: skip
                found.append(record)
    found.append(TestRecord("FlashInfer 0.7.0", "B200", "test_x::test_y[a]", "failed", "assert 0"))
    return found


def page(**options):
    return html.page(records(**options))
