"""Rotary position embedding of queries and keys."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .check import check, check_dtype, check_floating, check_shape
from .norm import wide
from .operator import Sample, operator


def _check_shapes(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, rotary_dim: int
) -> int:
    """Check all that can be checked without reading values; return the number of rotated elements R."""
    check_floating(query, "query")
    check_dtype(key, query.dtype, "key")
    check_floating(cos, "cos")
    check_dtype(sin, cos.dtype, "sin")
    check_shape(query, (-1, -1, -1, -1), "query")
    B, S, _, D = query.shape
    check_shape(key, (B, S, -1, D), "key")
    R = D if rotary_dim == 0 else rotary_dim
    check(0 < R <= D and R % 2 == 0, f"rotary_dim is {R}; valid: even, 2 to {D} (0 means all {D})")
    if position_ids is None:
        check_shape(cos, (-1, S, -1), "cos")
        check(cos.shape[0] in (1, B), f"cos has {cos.shape[0]} rows; valid: 1 or {B}, as query")
    else:
        check_dtype(position_ids, torch.int64, "position_ids")
        check_shape(position_ids, (-1, S), "position_ids")
        check(
            position_ids.shape[0] in (1, B), f"position_ids has {position_ids.shape[0]} rows; valid: 1 or {B}, as query"
        )
        check_shape(cos, (-1, -1), "cos")
    check(cos.shape[-1] in (R, R // 2), f"cos has {cos.shape[-1]} columns; valid: {R // 2} or {R}")
    check_shape(sin, cos.shape, "sin")
    return R


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first 2 * cos.shape[-1] elements of each head; x: [B, S, H, D], cos, sin: [B|1, S, R/2]."""
    half = cos.shape[-1]
    cos, sin, v = wide(cos)[:, :, None], wide(sin)[:, :, None], wide(x)
    if interleaved:
        first, second = v[..., 0 : 2 * half : 2], v[..., 1 : 2 * half : 2]
    else:
        first, second = v[..., :half], v[..., half : 2 * half]
    parts = (first * cos - second * sin, second * cos + first * sin)
    rotated = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat((rotated.to(x.dtype), x[..., 2 * half :]), -1)


@operator()
def rope(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    rotary_dim: int = 0,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of the first R elements of each head: with (a, b) a pair and t its angle,
    ``a' = a * cos(t) - b * sin(t)``, ``b' = b * cos(t) + a * sin(t)``, rounded once at the end; the others are copied.

    Pair i of R / 2 is (i, i + R / 2), or with interleaved (2 * i, 2 * i + 1). Source: Su et al. 2021, "RoFormer",
    equation 34 (interleaved); the halves are GPT-NeoX's order.

    Args:
        query: [B, S, H, D] float32, bfloat16 or float16, any strides.
        key: [B, S, Hk, D] in the dtype of query, any strides.
        cos: a floating dtype of its own. Without position_ids [B|1, S, R or R / 2], with them a table [P, R or R / 2];
            only the first R / 2 columns are read, column i belongs to pair i.
        sin: the shape and dtype of cos.
        position_ids: int64 [B|1, S], rows of the table.
        rotary_dim: R, even; 0 means D.
        interleaved: which elements make a pair.

    Returns:
        (query, key) rotated, contiguous [B, S, H, D] and [B, S, Hk, D] in the dtype of query.

    Raises:
        RuntimeError: a shape or dtype does not fit, or a position is negative or not below P.
    """
    R = _check_shapes(query, key, cos, sin, position_ids, rotary_dim)
    if position_ids is not None:
        if position_ids.numel():
            for value in (int(position_ids.min()), int(position_ids.max())):
                check(0 <= value < len(cos), f"position_ids has value {value}; valid: 0 to {len(cos) - 1}")
        cos, sin = cos[position_ids], sin[position_ids]
    cos, sin = cos[..., : R // 2], sin[..., : R // 2]
    return _rotate(query, cos, sin, interleaved), _rotate(key, cos, sin, interleaved)


@rope.fake
def _(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    rotary_dim: int = 0,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    _check_shapes(query, key, cos, sin, position_ids, rotary_dim)
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _tables(rows: tuple[int, ...], columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the cosine and sine of random angles."""
    angle = 10 * torch.randn(*rows, columns)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _same_halves(table: Tensor) -> Tensor:
    """Return the table as Hugging Face passes it: the frequencies twice."""
    return torch.cat((table, table), -1)


# (B, S, H, Hk, D, rotary_dim): decode, grouped heads, odd tails, pairs below and above one vector, empty.
SHAPES = (
    (1, 1, 4, 2, 64, 0),
    (2, 3, 3, 1, 67, 48),
    (1, 5, 2, 2, 80, 80),
    (2, 4, 4, 4, 96, 24),
    (1, 2, 3, 1, 128, 20),
    (3, 1, 2, 1, 6, 2),
    (1, 2, 1, 1, 33, 10),
    (1, 40, 4, 4, 128, 0),
    (2, 0, 4, 2, 16, 0),
    (0, 3, 4, 2, 16, 8),
)


@rope.samples
def _(dtype: torch.dtype) -> Iterator[Sample]:
    for B, S, H, Hk, D, rotary_dim in SHAPES:
        half = (rotary_dim or D) // 2
        query, key = torch.randn(B, S, H, D, dtype=dtype), torch.randn(B, S, Hk, D, dtype=dtype)
        position_ids = torch.randint(0, 50, (B, S))
        for interleaved in (False, True):
            name = f"{[B, S, H, Hk, D]} rotary {rotary_dim}{' interleaved' if interleaved else ''}"
            cos, sin = _tables((B, S), half, dtype)
            yield Sample(f"{name}", (query, key, cos, sin, None, rotary_dim, interleaved))
            cos, sin = _tables((50,), half, torch.float32)
            yield Sample(f"{name} table", (query, key, cos, sin, position_ids, rotary_dim, interleaved))
            cos, sin = (_same_halves(t) for t in _tables((1, S), half, torch.float32))
            yield Sample(f"{name} R columns, one row", (query, key, cos, sin, None, rotary_dim, interleaved))
            cos, sin = (_same_halves(t) for t in _tables((50,), half, dtype))
            yield Sample(f"{name} table, one row", (query, key, cos, sin, position_ids[:1], rotary_dim, interleaved))
    yield from _strided(dtype)


def _strided(dtype: torch.dtype) -> Iterator[Sample]:
    """Yield calls whose arguments are views."""
    B, S, H, Hk, D = 2, 3, 4, 2, 40
    fused = torch.randn(B, S, H + 2 * Hk, D, dtype=dtype)
    query, key = fused[:, :, :H], fused[:, :, H : H + Hk]
    cos, sin = _tables((B, S), D // 2, dtype)
    yield Sample("slices of one tensor", (query, key, cos, sin))
    yield Sample("slices of one tensor interleaved", (query, key, cos[..., :12], sin[..., :12], None, 24, True))
    heads_first = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key))
    yield Sample("heads before tokens", (*heads_first, cos, sin))
    every_second = torch.randn(B, S, H, 2 * D, dtype=dtype)[..., ::2]
    yield Sample("element stride", (every_second, key, cos, sin))
    cos, sin = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (cos, sin))
    yield Sample("tokens before rows in cos", (query, key, cos, sin.contiguous()))
    angle = torch.randn(D // 2, 9).T
    positions = torch.tensor([[0], [8], [4]]).T.expand(B, S)
    yield Sample("transposed table, expanded positions", (query, key, angle.cos(), angle.sin(), positions))
