"""A decision path as a drawing: the answers that were taken, and those that others took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pytest_moe_routing.escape import for_html, shorten

_ROW, _STEP = 24, 20
#: Pixels of a character in the drawing's font.
_CHARACTER = 8
_LONGEST = 48


@dataclass
class Tree:
    """Every decision path of one decider, merged: each answer with those that follow it."""

    branches: dict[str, Tree] = field(default_factory=dict)

    @classmethod
    def of(cls, paths: Iterable[Sequence[str]]) -> Tree:
        """Merge paths; each ends in the routing method."""
        root = cls()
        for path in paths:
            node = root
            for answer in path:
                node = node.branches.setdefault(answer, cls())
        return root

    def rows(self, path: Sequence[str]) -> list[tuple[int, str, bool]]:
        """Return depth, answer, and whether it was taken, for each answer beside a path.

        Answers that were not taken stand after the taken one, without what follows them.
        """
        if not path:
            return []
        return self._rows(path, 0)

    def _rows(self, path: Sequence[str], depth: int) -> list[tuple[int, str, bool]]:
        taken, *more = path
        inner = self.branches.get(taken, Tree())
        below = inner._rows(more, depth + 1) if more else []
        others = [(depth, answer, False) for answer in self.branches if answer != taken]
        return [(depth, taken, True), *below, *others]


def svg(tree: Tree, path: Sequence[str], title: str, id_: str) -> str:
    """Draw a path in its tree, the taken branch marked; `id_` is unique on the page."""
    rows = tree.rows(path)
    texts = [shorten(answer, _LONGEST) for _, answer, _ in rows]
    width = max(
        depth * _STEP + 24 + len(t) * _CHARACTER for (depth, *_), t in zip(rows, texts, strict=True)
    )
    height = len(rows) * _ROW + 6
    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-labelledby="{id_}"><title id="{id_}">{for_html(title)}</title>'
    ]
    above: dict[int, int] = {-1: 0}
    drawn: Mapping[bool, list[str]] = {False: [], True: []}
    for place, ((depth, _, taken), text) in enumerate(zip(rows, texts, strict=True)):
        x, y = depth * _STEP + 6, place * _ROW + 15
        start = above.get(depth - 1, 0)
        drawn[taken].append(
            f'<path d="M{x} {start + 5}V{y}h12"/>'
            f'<text x="{x + 18}" y="{y + 4}">{for_html(text)}</text>'
        )
        if taken:
            above[depth] = y
    parts += [
        f"<g>{''.join(drawn[False])}</g>",
        f'<g class="taken">{"".join(drawn[True])}</g></svg>',
    ]
    return "".join(parts)
