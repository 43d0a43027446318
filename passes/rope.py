"""Rotary position embedding written out in slices and products, and the norms per head before it.

Models differ in three ways, which are crossed here: heads before tokens or after; pairs (i, i + R / 2) or (2 i, 2 i + 1); the
whole head or its first R elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .. import ops
from .canonical import form
from .nodes import aten, insert_call, is_call
from .rewrite import Examples, Rewrite

_rope = ops.rope.overload
_rms_norm = ops.rms_norm.overload

#: R: rotated elements, F = R / 2 pairs; D: elements of a head of which only R are rotated, P = D - R.
SIZES = {"B": 61, "S": 67, "H": 71, "Hk": 73, "R": 46, "F": 23, "D": 105, "P": 59}
EPS = 0.0123

Inputs = Callable[[Examples], dict[str, Any]]
Turn = Callable[[Tensor, Tensor, Tensor], Tensor]


def _swap(x: Any) -> Any:
    """[B, H, S, D] <-> [B, S, H, D]."""
    return aten.permute.default(x, [0, 2, 1, 3])


def _half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def _alternating(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def _inputs(heads_first: bool, partial: bool, columns: str, float_tables: bool) -> Inputs:
    def make(e: Examples) -> dict[str, Any]:
        width = "D" if partial else "R"
        query, key = (("B", h, "S", width) if heads_first else ("B", "S", h, width) for h in ("H", "Hk"))
        table = {"dtype": torch.float32} if float_tables else {}
        tables = {name: e.like("B", "S", columns, **table) for name in ("cos", "sin")}
        return {"query": e.like(*query), "key": e.like(*key), **tables}

    return make


def _pattern(
    heads_first: bool, partial: bool, interleaved: bool, tables: Callable[[Tensor], Tensor]
) -> Callable[..., tuple[Tensor, Tensor]]:
    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        part = x[..., : SIZES["R"]] if partial else x
        rotated = part * cos + (_alternating(part) if interleaved else _half(part)) * sin
        return torch.cat((rotated, x[..., SIZES["R"] :]), -1) if partial else rotated

    def pattern(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = (tables(t.unsqueeze(1 if heads_first else 2)) for t in (cos, sin))
        return turn(query, cos, sin), turn(key, cos, sin)

    return pattern


def _replacement(heads_first: bool, interleaved: bool, float_tables: bool) -> Callable[..., tuple[Any, Any]]:
    def replacement(query: Any, key: Any, cos: Any, sin: Any, dims: dict[str, Any]) -> tuple[Any, Any]:
        rotary_dim = dims["R"] if "D" in dims else 0
        if float_tables:
            query, key = (aten.to.dtype(x, torch.float32) for x in (query, key))
        if not heads_first:
            rotated = _rope(query, key, cos, sin, None, rotary_dim, interleaved)
            return rotated[0], rotated[1]
        rotated = _rope(_swap(query), _swap(key), cos, sin, None, rotary_dim, interleaved)
        return _swap(rotated[0]), _swap(rotated[1])

    return replacement


#: What a table column becomes: (name, columns of the table, function), as [.., R] for the products.
_TABLES: dict[str, tuple[bool, str, Callable[[Tensor], Tensor]]] = {
    "": (False, "R", lambda t: t),
    "interleaved": (True, "F", lambda t: t.repeat_interleave(2, -1)),
    "interleaved, doubled table": (True, "R", lambda t: t[..., : t.shape[-1] // 2].repeat_interleave(2, -1)),
}


def _rope_rewrite(kind: str, heads_first: bool, partial: bool, float_tables: bool) -> Rewrite:
    interleaved, columns, tables = _TABLES[kind]
    details = [kind, "" if heads_first else "tokens first", "partial" if partial else "", "float32" * float_tables]
    return Rewrite(
        ", ".join(("rope", *(d for d in details if d))),
        _pattern(heads_first, partial, interleaved, tables),
        _replacement(heads_first, interleaved, float_tables),
        _inputs(heads_first, partial, columns, float_tables),
        SIZES,
        loose=("B",),
        needs=(aten.stack.default,) if interleaved else (aten.neg.default, aten.cat.default),
        dtypes=(torch.bfloat16,) if float_tables else (torch.bfloat16, torch.float32),
    )


#: Where 16-bit queries meet float32 tables, torch computes and returns float32; so does the operator on converted inputs.
ROPES = tuple(
    _rope_rewrite(kind, heads_first, partial, float_tables)
    for float_tables in (False, True)
    for partial in (True, False)
    for kind in _TABLES
    for heads_first in (True, False)
)


@form(_rms_norm)
def _rows_may_be_permuted(node: Node) -> Any:
    """Move a permutation that keeps the last dimension behind the norm, where it meets others."""
    x: Any = node.args[0]
    if not is_call(x, aten.permute.default) or x.args[1][-1] != len(x.args[1]) - 1:
        return None
    normed = insert_call(node, _rms_norm, x.args[0], *node.args[1:], **node.kwargs)
    return insert_call(node, aten.permute.default, normed, x.args[1])


def _normed_inputs(columns: str) -> Inputs:
    def make(e: Examples) -> dict[str, Any]:
        query, key = (e.like("B", "S", h, "R") for h in ("H", "Hk"))
        weights = {name: e.like("R") for name in ("query_weight", "key_weight")}
        tables = {name: e.like("B", "S", columns) for name in ("cos", "sin")}
        return {"query": query, "key": key, **tables, **weights, "eps": EPS}

    return make


def _normed(offset: float) -> Rewrite:
    def pattern(
        query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, query_weight: Tensor, key_weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        normed = _rms_norm(query, query_weight, eps, offset), _rms_norm(key, key_weight, eps, offset)
        rotated = _rope(*normed, cos, sin, None, 0, False)
        return rotated[0], rotated[1]

    def replacement(
        query: Any, key: Any, cos: Any, sin: Any, query_weight: Any, key_weight: Any, eps: float
    ) -> tuple[Any, Any]:
        rotated = _rope(query, key, cos, sin, None, 0, False, query_weight, key_weight, eps, offset)
        return rotated[0], rotated[1]

    return Rewrite(
        "norms per head + rope" + (" of 1 + weight" if offset else ""),
        pattern,
        replacement,
        [_normed_inputs("R"), _normed_inputs("F")],
        SIZES,
        loose=("B",),
        any_dtype=("query_weight", "key_weight", "cos", "sin"),
        needs=(_rms_norm, _rope),
    )


NORMED_ROPES = (_normed(0.0), _normed(1.0))
