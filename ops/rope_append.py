"""Rotary position embedding of new tokens on their way into a key/value cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .kv_append import check_append_kinds, empty_caches, kv_append
from .operator import Sample, operator
from .rope import check_rope, exact_heads, head_weight, rope, tables


@operator(mutates=("key_cache", "value_cache", "counter"))
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
    """`rope` of query and key, then `kv_append` of the rotated key and the value: the bits of the two steps apart.

    Args:
        query: [B, S, H, D] float32, bfloat16 or float16, any strides.
        key: [B, S, Hk, D] in the dtype of query, any strides.
        value: [B, S, Hk, Dv] in the dtype of query, any strides.
        cos: [B|1, S, R or R / 2], or with position_ids a table [P, R or R / 2], as in `rope`.
        sin: the shape and dtype of cos.
        key_cache: [R, Hk, C, D] or, int8, [R, Hk, C, D + 4], R at least B, of a dtype that `kv_append` takes; the last
            dimension contiguous. Written to.
        value_cache: [R, Hk, C, Dv] or, int8, [R, Hk, C, Dv + 4], likewise. Written to.
        position: index in the cache of the first token written, 0 to C - S; 0 where positions or counter is given.
        every: distance between the rows that are written to the cache, 1 = all.
        positions: int64 [S], the index in the cache of each token; None: position + s.
        position_ids: int64 [B|1, S], rows of the table that cos and sin are.
        rotary_dim: number of rotated elements of a head, even; 0 means D.
        interleaved: which elements make a pair.
        query_weight: [D], the weight of an RMS norm of each head of query before the rotation; None for no norms.
        key_weight: [D], likewise of key; both weights or none.
        eps: of the norms, added to the mean square.
        offset: of the norms, added to the weights.
        counter: int64, one element: the number of tokens that the cache holds, instead of positions; token s goes to
            counter + s, and counter grows by S. Written to.

    Returns:
        The rotated query, contiguous [B, S, H, D] in the dtype of query.

    Raises:
        RuntimeError: what `rope` or `kv_append` refuse; nothing is written then.
    """
    rotated, rotated_key = rope.reference(
        query, key, cos, sin, position_ids, rotary_dim, interleaved, query_weight, key_weight, eps, offset
    )
    kv_append.reference(key_cache, value_cache, rotated_key, value, position, every, positions, counter)
    return rotated


@rope_append.fake
def _(
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
    check_rope(query, key, cos, sin, position_ids, rotary_dim, query_weight, key_weight)
    check_append_kinds(key_cache, value_cache, key, value, positions, counter)
    return query.new_empty(query.shape)


# (B, S, H, Hk, D, Dv, rotary_dim, interleaved): decode, a prompt, odd tails, partial rotation.
SHAPES = (
    (1, 1, 4, 2, 64, 64, 0, False),
    (3, 1, 4, 2, 128, 96, 0, False),
    (2, 5, 3, 1, 67, 33, 48, False),
    (2, 3, 2, 2, 80, 80, 24, True),
    (1, 40, 4, 4, 128, 128, 64, True),
    (2, 4, 2, 1, 6, 5, 2, False),
    (2, 0, 2, 1, 8, 8, 0, False),
    (0, 2, 2, 1, 8, 8, 0, True),
)


@rope_append.samples
def _(dtype: torch.dtype) -> Iterator[Sample]:
    for B, S, H, Hk, D, Dv, rotary_dim, interleaved in SHAPES:
        capacity = S + 6

        def operands() -> tuple[Tensor, ...]:
            fused = exact_heads(B, S, H + Hk, D, dtype=dtype)  # noqa: B023
            value = torch.randn(B, S, Hk, Dv + 3, dtype=dtype)[..., :Dv]  # noqa: B023
            return fused[:, :, :H], fused[:, :, H:], value  # noqa: B023

        def caches() -> tuple[Tensor, Tensor]:
            return empty_caches(B + 1, Hk, capacity, width=D, value_width=Dv, dtype=dtype)  # noqa: B023

        name = f"{[B, S, H, Hk, D, Dv]} rotary {rotary_dim}{' interleaved' if interleaved else ''}"
        half = (rotary_dim or D) // 2
        rope_options: dict[str, Any] = {"rotary_dim": rotary_dim, "interleaved": interleaved}
        norms: dict[str, Any] = {
            "query_weight": head_weight(D),
            "key_weight": head_weight(D).to(dtype),
            "eps": 12.0,
            "offset": 1.0,
        }
        cos_sin = tables((B, S), half, dtype)
        yield Sample(name, (*operands(), *cos_sin, *caches(), 3), rope_options)
        options = rope_options | {"positions": torch.randperm(capacity)[:S], "position_ids": torch.arange(S)[None] + 2}
        yield Sample(f"{name} positions", (*operands(), *tables((S + 2,), half, torch.float32), *caches(), 0), options)
        yield Sample(f"{name} norms", (*operands(), *cos_sin, *caches(), 6, 2), rope_options | norms)
        options = rope_options | norms | {"positions": torch.arange(S) // 2}
        yield Sample(f"{name} norms, repeated positions", (*operands(), *cos_sin, *caches(), 0), options)
        counted: dict[str, Any] = {"counter": torch.tensor([5])}
        yield Sample(f"{name} counter", (*operands(), *cos_sin, *caches(), 0), rope_options | counted)
    yield _strided(dtype)


def _strided(dtype: torch.dtype) -> Sample:
    """Return a call on views: parts of one projection, caches whose tokens come before their heads."""
    B, S, Hk, D = 2, 3, 2, 24
    fused = torch.randn(B, S, 4 * Hk, D, dtype=dtype)
    memory = torch.full((2, B, 9, Hk, D + 8), float("nan"), dtype=dtype)[..., :D].transpose(2, 3)
    parts = (fused[:, :, : 2 * Hk], fused[:, :, 2 * Hk : 3 * Hk], fused[:, :, 3 * Hk :])
    return Sample("strided", (*parts, *tables((1, S), D // 2, dtype), memory[0], memory[1], 4))
