"""Rotary position embedding of queries and keys."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .check import check, check_broadcast, check_dtype, check_floating, check_shape, differ
from .norm import rms_norm, wide
from .operator import Sample, operator


def check_rope(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    rotary_dim: int,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
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
        check_broadcast(cos, B, "cos")
    else:
        check_dtype(position_ids, torch.int64, "position_ids")
        check_shape(position_ids, (-1, S), "position_ids")
        check_broadcast(position_ids, B, "position_ids")
        check_shape(cos, (-1, -1), "cos")
    columns = cos.shape[-1]
    check(not (differ(columns, R // 2) and differ(columns, R)), f"cos has {columns} columns; valid: {R // 2} or {R}")
    check_shape(sin, cos.shape, "sin")
    both = (query_weight is None) == (key_weight is None)
    missing = "query_weight" if query_weight is None else "key_weight"
    check(both, f"{missing} is missing; valid: query_weight and key_weight, or none of them")
    for weight, name in ((query_weight, "query_weight"), (key_weight, "key_weight")):
        if weight is not None:
            check_floating(weight, name)
            check_shape(weight, (D,), name)
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
    return torch.cat((rotated.to(x.dtype), x[..., 2 * half :]), -1).contiguous()


@operator()
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
    """Rotary position embedding of the first R elements of each head: with (a, b) a pair and t its angle,
    ``a' = a * cos(t) - b * sin(t)``, ``b' = b * cos(t) + a * sin(t)``, rounded once at the end; the others are copied.

    Pair i of R / 2 is (i, i + R / 2), or with interleaved (2 * i, 2 * i + 1). Source: Su et al. 2021, "RoFormer",
    equation 34 (interleaved); the halves are GPT-NeoX's order.

    With weights each head of query and key is first normalized over its D elements by `rms_norm`. The norm is rounded to
    the dtype of query before the rotation: the result equals that of the two steps apart. Source: Qwen3 technical
    report, section 2; Henry et al. 2020, "Query-Key Normalization for Transformers".

    Args:
        query: [B, S, H, D] float32, bfloat16 or float16, any strides.
        key: [B, S, Hk, D] in the dtype of query, any strides.
        cos: a floating dtype of its own. Without position_ids [B|1, S, R or R / 2], with them a table [P, R or R / 2];
            only the first R / 2 columns are read, column i belongs to pair i.
        sin: the shape and dtype of cos.
        position_ids: int64 [B|1, S], rows of the table.
        rotary_dim: R, even; 0 means D.
        interleaved: which elements make a pair.
        query_weight: [D], a floating dtype of its own: the weight of the norm of query; None for no norms.
        key_weight: [D], likewise of key; both weights or none.
        eps: of the norms, added to the mean square.
        offset: of the norms, added to the weights; 1.0 for the (1 + w) form.

    Returns:
        (query, key) rotated, contiguous [B, S, H, D] and [B, S, Hk, D] in the dtype of query.

    Raises:
        RuntimeError: a shape or dtype does not fit, one weight is missing, or a position is negative or not below P.
    """
    R = check_rope(query, key, cos, sin, position_ids, rotary_dim, query_weight, key_weight)
    if position_ids is not None:
        if position_ids.numel():
            for value in (int(position_ids.min()), int(position_ids.max())):
                check(0 <= value < len(cos), f"position_ids has value {value}; valid: 0 to {len(cos) - 1}")
        cos, sin = cos[position_ids], sin[position_ids]
    if query_weight is not None and key_weight is not None:
        query = rms_norm.reference(query, query_weight, eps, offset)
        key = rms_norm.reference(key, key_weight, eps, offset)
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
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    check_rope(query, key, cos, sin, position_ids, rotary_dim, query_weight, key_weight)
    return query.new_empty(query.shape), key.new_empty(key.shape)


def tables(rows: tuple[int, ...], columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the cosine and sine of random angles."""
    angle = 10 * torch.randn(*rows, columns)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _same_halves(table: Tensor) -> Tensor:
    """Return the table as Hugging Face passes it: the frequencies twice."""
    return torch.cat((table, table), -1)


def exact_heads(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return random heads of mean square 4: with eps 0 or 12 their norm is exact in every dtype, rounding included."""
    D = shape[-1]
    block = torch.tensor([3.0, 3.0, 3.0, 2.0, 1.0, 0.0, 0.0, 0.0])  # squares sum to 32
    blocks = block[torch.rand(*shape[:-1], D // 8, 8).argsort(-1)].flatten(-2)
    x = torch.cat((blocks, torch.full((*shape[:-1], D % 8), 2.0)), -1)
    return (x * torch.randint(0, 2, shape).mul(2).sub(1)).to(dtype)


def head_weight(D: int) -> Tensor:
    """Return a random weight of a norm whose products with `exact_heads` are exact in every dtype."""
    return torch.randint(-15, 16, (D,)) / 8


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
            cos, sin = tables((B, S), half, dtype)
            yield Sample(f"{name}", (query, key, cos, sin, None, rotary_dim, interleaved))
            cos, sin = tables((50,), half, torch.float32)
            yield Sample(f"{name} table", (query, key, cos, sin, position_ids, rotary_dim, interleaved))
            cos, sin = (_same_halves(t) for t in tables((1, S), half, torch.float32))
            yield Sample(f"{name} R columns, one row", (query, key, cos, sin, None, rotary_dim, interleaved))
            cos, sin = (_same_halves(t) for t in tables((50,), half, dtype))
            yield Sample(f"{name} table, one row", (query, key, cos, sin, position_ids[:1], rotary_dim, interleaved))
    yield from _strided(dtype)
    yield from _normalized(dtype)


def _normalized(dtype: torch.dtype) -> Iterator[Sample]:
    """Yield calls with norms."""
    for B, S, H, Hk, D, rotary_dim in SHAPES:
        fused = exact_heads(B, S, H + Hk, D, dtype=dtype)
        query, key = fused[:, :, :H], fused[:, :, H:]
        for interleaved in (False, True):
            name = f"norms {[B, S, H, Hk, D]} rotary {rotary_dim}{' interleaved' if interleaved else ''}"
            args = (query, key, *tables((B, S), (rotary_dim or D) // 2, torch.float32), None, rotary_dim, interleaved)
            yield Sample(name, (*args, head_weight(D), head_weight(D).to(dtype), 12.0))
            yield Sample(f"{name} offset", (*args, head_weight(D).half(), head_weight(D), 0.0, 1.0))


def _strided(dtype: torch.dtype) -> Iterator[Sample]:
    """Yield calls whose arguments are views."""
    B, S, H, Hk, D = 2, 3, 4, 2, 40
    fused = torch.randn(B, S, H + 2 * Hk, D, dtype=dtype)
    query, key = fused[:, :, :H], fused[:, :, H : H + Hk]
    cos, sin = tables((B, S), D // 2, dtype)
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
