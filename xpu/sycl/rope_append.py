"""Rotary position embedding on the way into a key/value cache in SYCL: see xpu/sycl/rope_append.cpp."""

from __future__ import annotations

from torch import Tensor

from ... import ops
from ...ops.kv_append import check_append_sizes
from ..route import route
from .bundle import KINDS, launch
from .kv_append import append_groups, cache_strides, ticket
from .pointwise import HEADS_LOCAL, last_dense, pointwise
from .rope import angles, norm_weights


@route("sycl", "rope_append")
def rope_append(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    position: int,
    every: int = 1,
    positions: Tensor | None = None,
    position_ids: Tensor | None = None,
    rotary_dim: int = 0,
    interleaved: bool = False,
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    counter: Tensor | None = None,
) -> Tensor:
    """Run `ops.rope_append` without waiting for the device; see `rope` and `kv_append` here for values out of range."""
    out = ops.rope_append.empty(
        query, key, value, cos, sin, key_cache, value_cache, position, every, positions, position_ids, rotary_dim,
        interleaved, query_weight, key_weight, eps, offset, counter,
    )  # fmt: skip
    check_append_sizes(key_cache, value_cache, key, value, position, every, positions, counter)
    query, key, value = last_dense(query), last_dense(key), last_dense(value)
    (B, S, H, D), (Hk, Dv) = query.shape, value.shape[2:]
    tables, numbers = angles(cos, sin, position_ids)
    weights, weight_kinds = norm_weights(query_weight, key_weight)
    sizes = (B, S, H, Hk, D, Dv, (rotary_dim or D) // 2, interleaved)
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
    places = (key_cache.shape[2], every, position, 0 if positions is None else positions.stride(0))
    groups = append_groups(B * S * (H + 2 * Hk), counter)
    launch(
        query.device, pointwise(query.dtype), "rope_append", groups, HEADS_LOCAL,
        query, key, value, *tables, position_ids, *weights, out, key_cache, value_cache, positions, counter,
        ticket(counter), *sizes, *strides, *numbers, *weight_kinds, *places, KINDS[key_cache.dtype],
        *cache_strides(key_cache, value_cache), float(eps), float(offset),
    )  # fmt: skip
    return out
