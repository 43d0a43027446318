"""Rotary position embedding in SYCL: see xpu/sycl/rope.cpp."""

from __future__ import annotations

from torch import Tensor

from ... import ops
from ..route import route
from .bundle import KINDS, launch
from .pointwise import HEADS_LOCAL, head_groups, last_dense, pointwise


def angles(cos: Tensor, sin: Tensor, position_ids: Tensor | None) -> tuple[tuple[Tensor, Tensor], tuple[int, ...]]:
    """Return the tables and the numbers that rope.hpp's Angles take: kind, strides of cos and of position_ids, rows of the table."""
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    column = cos.stride(-1)
    if position_ids is None:
        strides = (cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1), column, 0, 0, 0)
    else:
        row = position_ids.stride(0) if position_ids.shape[0] > 1 else 0
        strides = (0, cos.stride(0), column, row, position_ids.stride(1), cos.shape[0])
    return (cos, sin), (KINDS[cos.dtype], *strides)


def norm_weights(query_weight: Tensor | None, key_weight: Tensor | None) -> tuple[list[Tensor | None], list[int]]:
    """Return the weights of the norms of query and key, contiguous, and their kinds."""
    weights = [None if w is None else w.contiguous() for w in (query_weight, key_weight)]
    return weights, [0 if w is None else KINDS[w.dtype] for w in weights]


@route("sycl", "rope")
def rope(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    rotary_dim: int = 0,
    interleaved: bool = False,
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Run `ops.rope`; a position outside the table, which it refuses, gives NaN."""
    out = ops.rope.empty(
        query, key, cos, sin, position_ids, rotary_dim, interleaved, query_weight, key_weight, eps, offset
    )
    query, key = last_dense(query), last_dense(key)
    (B, S, H, D), Hk = query.shape, key.shape[2]
    tables, numbers = angles(cos, sin, position_ids)
    weights, weight_kinds = norm_weights(query_weight, key_weight)
    sizes = (B, S, H, Hk, D, (rotary_dim or D) // 2, interleaved, *query.stride()[:3], *key.stride()[:3])
    launch(
        query.device, pointwise(query.dtype), "rope_heads", head_groups(B * S * (H + Hk)), HEADS_LOCAL,
        query, key, *tables, position_ids, *weights, *out, *sizes, *numbers, *weight_kinds, float(eps), float(offset),
    )  # fmt: skip
    return out
