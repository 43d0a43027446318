"""The rewrites, in the order in which they are applied."""

from __future__ import annotations

from collections.abc import Sequence

from .attention import ATTENTION
from .dense import GATED_LINEARS, LINEARS, PARALLEL_LINEARS
from .folding import FOLDING
from .gated import ACTIVATIONS, GATED
from .kv_append import APPENDS
from .linear import QUANTIZED
from .norm import ADDED_NORMS, NORMS
from .rewrite import GraphRewrite, Rewrite
from .rope import NORMED_ROPES, ROPES
from .rope_append import ROPE_APPENDS

REWRITES: tuple[Rewrite | GraphRewrite, ...] = (
    *NORMS,
    *ACTIVATIONS,
    *ROPES,
    *NORMED_ROPES,
    *ATTENTION,
    *APPENDS,
    *ROPE_APPENDS,
    *ADDED_NORMS,
    *GATED,
    *QUANTIZED,
    *GATED_LINEARS,
    *PARALLEL_LINEARS,
    *LINEARS,
    *FOLDING,
)


def chosen(names: Sequence[str]) -> tuple[Rewrite | GraphRewrite, ...]:
    """Return the rewrites of these names, in their order.

    Raises:
        ValueError: a name is unknown.
    """
    if isinstance(names, str):
        raise ValueError(f"options['passes']={names!r}; expected a list of names")
    known = [one.name for one in REWRITES]
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"options['passes']={unknown}: unknown rewrites (known: {'; '.join(known)})")
    return tuple(one for one in REWRITES if one.name in names)
