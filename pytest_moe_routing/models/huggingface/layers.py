"""What a config says of layers that differ from the others. Notes for a reader, no values."""

from __future__ import annotations

from collections.abc import Iterator

from pytest_moe_routing.models.huggingface.document import Section

_KINDS = {
    "dense": "dense",
    "hash_moe": "routed by a table of token ids instead of logits, and not judged here",
}


def layer_notes(text: Section) -> Iterator[str]:
    """One note for each way in which layers differ."""
    kinds = text.get("mlp_layer_types")
    if isinstance(kinds, list):
        for kind, words in _KINDS.items():
            yield from _note([i for i, k in enumerate(kinds) if k == kind], words)
    else:
        yield from _note(_first(text, "first_k_dense_replace", "num_dense_layers"), "dense")
        yield from _note(_first(text, "num_hash_layers"), _KINDS["hash_moe"])
        frequency = text.get("moe_layer_freq")
        if isinstance(frequency, list):
            yield from _note([i for i, f in enumerate(frequency) if not f], "dense")
    for key in ("interleave_moe_layer_step", "decoder_sparse_step", "expert_layer_period"):
        step = text.get(key)
        if isinstance(step, int) and step > 1:
            yield f"one layer in {step} is a mixture of experts ({key})"
    limits = text.get("swiglu_limits")
    if isinstance(limits, list):
        clamped = [i for i, limit in enumerate(limits) if limit]
        yield from _note(clamped, "swiglustep: clamped after the activation (swiglu_limits)")


def _first(text: Section, *keys: str) -> range:
    counts = [text.get(key) for key in keys]
    return range(max((n for n in counts if isinstance(n, int) and 0 < n < 10_000), default=0))


def _note(layers: list[int] | range, words: str) -> Iterator[str]:
    """`layers 0-2, 43 are ...`; nothing without layers."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], layer]
        else:
            runs.append([layer])
    if runs:
        names = ", ".join("-".join(map(str, run)) for run in runs[:8])
        more = ", ..." if len(runs) > 8 else ""
        one = len(runs) == 1 and len(runs[0]) == 1
        yield f"layer{'' if one else 's'} {names}{more} {'is' if one else 'are'} {words}"
