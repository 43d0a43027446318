"""The rewrites, in the order in which they are applied, and applying them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence

from torch.fx import GraphModule

from .attention import ATTENTION
from .canonical import canonicalize
from .dense import GATED_LINEARS, LINEARS, PARALLEL_LINEARS
from .folding import FOLDING
from .gated import ACTIVATIONS, GATED
from .kv_append import APPENDS
from .linear import QUANTIZED
from .norm import ADDED_NORMS, NORMS
from .rewrite import GraphRewrite, Rewrite, RewriteReport
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


class RewriteError(RuntimeError):
    """A rewrite failed and strict was asked for."""


def rewrite(
    gm: GraphModule, rewrites: Iterable[Rewrite | GraphRewrite] | None = None, strict: bool = False
) -> RewriteReport:
    """Canonicalize a graph of ATen operators and apply the rewrites in their order, in place.

    A rewrite that fails with an error is left out, with a warning that names it; the graph is then as if it did not exist.

    Args:
        gm: graph in ATen operators before dispatch (`retrace`, or torch.export's), every node with ``meta["val"]``.
        rewrites: None: all of `REWRITES`.
        strict: a rewrite that fails raises.

    Raises:
        RewriteError: a rewrite failed, and strict.
    """
    wanted = list(REWRITES if rewrites is None else rewrites)
    original = copy.deepcopy(gm.graph) if wanted else None
    canonicalize(gm)
    report = RewriteReport(before=_calls(gm))
    for one in wanted:
        try:
            before = report.fired[one.name]
            one.apply(gm, report)
            if report.fired[one.name] > before:
                canonicalize(gm)
        except Exception as error:
            message = f"rewrite {one.name} failed: {type(error).__name__}: {error}"
            if strict:
                raise RewriteError(message) from error
            warnings.warn(f"llmrt: {message}; it is left out", stacklevel=2)
            assert original is not None
            gm.graph = original
            report = rewrite(gm, [other for other in wanted if other is not one], strict)
            report.skipped[one.name] = f"{type(error).__name__}: {error}"
            return report
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    report.after = _calls(gm)
    report.settle()
    return report


def _calls(gm: GraphModule) -> int:
    return sum(1 for node in gm.graph.nodes if node.op == "call_function")
