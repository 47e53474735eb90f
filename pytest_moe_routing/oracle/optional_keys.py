"""What model code asks of its MoE layer when a config leaves out a key that it may leave out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.oracle.finding import Finding
from pytest_moe_routing.oracle.model_code import CodeJudgement, compare_request
from pytest_moe_routing.oracle.target import Target


def without_keys(
    target: Target, judged: CodeJudgement
) -> Iterator[tuple[str, CodeJudgement, tuple[Finding, ...]]]:
    """Yield keys that a config may leave out, and what model code then asks for that is wrong.

    Only where the target reads the model's config by a class of its own: transformers' classes have
    the defaults that the model is described with. Code that fails without a key is passed over, as
    it fails before anything is computed.

    Args:
        judged: The model with all of its keys; what is wrong with these is not repeated.
    """
    if not judged.request.config_class:
        return
    for key, described in target.left_out(judged.model):
        with suppress(Unsupported):
            found = compare_request(described, target.layer_request(described, key))
            findings = tuple(f for f in found.findings if f not in judged.findings)
            if findings:
                yield key, found, findings
