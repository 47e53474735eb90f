"""The failures of `test_flashinfer_names`: names of FlashInfer that its release does not have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_moe_routing.failure import Failure, Rank, cause_id

if TYPE_CHECKING:
    from pytest_moe_routing.oracle.lacking import Lacking
    from pytest_moe_routing.oracle.target import Target


def of_lacking(target: Target, lacking: Lacking) -> Failure:
    """Describe a name of FlashInfer that the framework's code needs and the release lacks."""
    what = f"{target} needs {lacking.name}, which {target.flashinfer} does not have"
    if lacking.why:
        what = f"{target} calls {lacking.name}, which {target.flashinfer} does not take so"
    because = (f"  because  {lacking.why}",) if lacking.why else ()
    lines = (what, *because, *(f"  at       {place}" for place in lacking.places))
    return Failure(cause_id("flashinfer-name", lacking.name), Rank.LOUD, lacking.name, lines)
