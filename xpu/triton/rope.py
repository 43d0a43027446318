"""Rotary position embedding of heads, with the norms of the heads before it where there are any."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ... import ops
from ..route import route
from . import blocks
from .launch import launch, refuses_double, strides

# mypy: disable-error-code="no-untyped-def"


@triton.jit
def split_rows(row, heads, tokens):
    """The batch row, the token and the head of rows [batch, tokens, heads]."""
    token = row // heads
    return (token // tokens).to(tl.int64), (token % tokens).to(tl.int64), (row % heads).to(tl.int64)


@triton.jit
def angles(table, position_ids, b, s, i, inside, length, t_b, t_s, t_i, p_b, p_s):
    """Elements of cos or sin [B, S, R / 2], or of a table [length, R / 2] by position; NaN for positions that it lacks."""
    if position_ids is not None:
        position = tl.load(position_ids + b * p_b + s * p_s, inside, other=0)
        there = inside & (position >= 0) & (position < length)
        angle = tl.load(table + position * t_s + i * t_i, there, other=float("nan"))
    else:
        angle = tl.load(table + b * t_b + s * t_s + i * t_i, inside, other=0.0)
    return angle.to(tl.float32)


@triton.jit
def rotate(x, weight, b, s, h, inside, x_b, x_s, x_h, x_d, w_d, c, d, width, eps, offset, HALF: tl.constexpr,
           INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr):  # fmt: skip
    """Both elements of the rotated pairs, [rows, PAIRS] each, and the elements that are copied, [rows, REST]; float32, rounded to x.

    c, d: [rows, PAIRS] cosine and sine. Pair i is (i, i + HALF), or interleaved (2 * i, 2 * i + 1).
    """
    i = tl.arange(0, PAIRS)[None, :]
    paired = inside & (i < HALF)
    start = x + b * x_b + s * x_s + h * x_h
    if INTERLEAVED:
        first, second = 2 * i, 2 * i + 1
    else:
        first, second = i, i + HALF
    u = tl.load(start + first * x_d, paired, other=0.0).to(tl.float32)
    v = tl.load(start + second * x_d, paired, other=0.0).to(tl.float32)
    squares = tl.sum(u * u + v * v, 1, keep_dims=True)
    rest = u
    if REST > 0:
        j = 2 * HALF + tl.arange(0, REST)[None, :]
        rest = tl.load(start + j * x_d, inside & (j < width), other=0.0).to(tl.float32)
        squares += tl.sum(rest * rest, 1, keep_dims=True)
    if weight is not None:
        dtype: tl.constexpr = x.dtype.element_ty
        factor = tl.rsqrt(squares / width + eps)
        u = u * factor * (tl.load(weight + first * w_d, i < HALF, other=0.0).to(tl.float32) + offset)
        v = v * factor * (tl.load(weight + second * w_d, i < HALF, other=0.0).to(tl.float32) + offset)
        u, v = u.to(dtype).to(tl.float32), v.to(dtype).to(tl.float32)
        if REST > 0:
            j = 2 * HALF + tl.arange(0, REST)[None, :]
            rest = rest * factor * (tl.load(weight + j * w_d, j < width, other=0.0).to(tl.float32) + offset)
            rest = rest.to(dtype).to(tl.float32)
    return u * c - v * d, v * c + u * d, rest


@triton.jit
def store_head(y, row, u, v, rest, inside, width, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr,
               REST: tl.constexpr):  # fmt: skip
    """Write the three parts of a head to y + row, whose elements are adjacent."""
    i = tl.arange(0, PAIRS)[None, :]
    if INTERLEAVED:
        first, second = 2 * i, 2 * i + 1
    else:
        first, second = i, i + HALF
    tl.store(y + row + first, u.to(y.dtype.element_ty), inside & (i < HALF))
    tl.store(y + row + second, v.to(y.dtype.element_ty), inside & (i < HALF))
    if REST > 0:
        j = 2 * HALF + tl.arange(0, REST)[None, :]
        tl.store(y + row + j, rest.to(y.dtype.element_ty), inside & (j < width))


@triton.jit
def _rope(x, weight, y, cos, sin, position_ids, rows, heads, tokens, width, length, x_b, x_s, x_h, x_d, w_d, c_b, c_s, c_i,
          d_b, d_s, d_i, p_b, p_s, eps, offset, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr,
          REST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """x: [B, S, H, D] with strides; y: contiguous."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = row < rows
    b, s, h = split_rows(row, heads, tokens)
    i = tl.arange(0, PAIRS)[None, :]
    c = angles(cos, position_ids, b, s, i, inside & (i < HALF), length, c_b, c_s, c_i, p_b, p_s)
    d = angles(sin, position_ids, b, s, i, inside & (i < HALF), length, d_b, d_s, d_i, p_b, p_s)
    u, v, rest = rotate(x, weight, b, s, h, inside, x_b, x_s, x_h, x_d, w_d, c, d, width, eps, offset, HALF, INTERLEAVED,
                        PAIRS, REST)  # fmt: skip
    store_head(y, row.to(tl.int64) * width, u, v, rest, inside, width, HALF, INTERLEAVED, PAIRS, REST)


def check_positions(position_ids: Tensor | None, cos: Tensor) -> None:
    """Raise RuntimeError for a position that the table lacks, on the CPU; a device would have to be waited for and gives NaN."""
    if position_ids is not None and position_ids.device.type == "cpu" and position_ids.numel():
        for value in (int(position_ids.min()), int(position_ids.max())):
            if not 0 <= value < len(cos):
                raise RuntimeError(f"position_ids has value {value}; valid: 0 to {len(cos) - 1}")


def table_strides(table: Tensor, position_ids: Tensor | None) -> tuple[int, int, int]:
    """Return the strides of cos or sin along batch (0 where one row serves all), tokens and pairs."""
    if position_ids is not None:
        return (0, *table.stride())  # type: ignore[return-value]
    return (table.stride(0) if table.shape[0] > 1 else 0, table.stride(1), table.stride(2))


def position_strides(position_ids: Tensor | None) -> tuple[int, int]:
    """Return the strides of position_ids, 0 along the batch where one row serves all."""
    if position_ids is None:
        return 0, 0
    return (position_ids.stride(0) if position_ids.shape[0] > 1 else 0, position_ids.stride(1))


def parts(width: int, rotary_dim: int) -> dict[str, int]:
    """Return the compile-time sizes of a head's parts."""
    rotary_dim = rotary_dim or width
    rest = width - rotary_dim
    return {"HALF": rotary_dim // 2, "PAIRS": blocks.power(rotary_dim // 2), "REST": blocks.power(rest) if rest else 0}


def rotate_to(
    y: Tensor,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    rotary_dim: int,
    interleaved: bool,
    weight: Tensor | None,
    eps: float,
    offset: float,
) -> None:
    """Write the rotated x to y, contiguous."""
    if not y.numel():
        return
    _, tokens, heads, width = x.shape
    rows = y.numel() // width
    launch(
        _rope,
        blocks.heads(width),
        lambda b: (triton.cdiv(rows, b.sizes["ROWS"]),),
        (rows, width, x.dtype),
        *(x, weight, y, cos, sin, position_ids, rows, heads, tokens, width, len(cos), *x.stride(), *strides(weight, 1)),
        *(*table_strides(cos, position_ids), *table_strides(sin, position_ids), *position_strides(position_ids)),
        *(eps, offset),
        INTERLEAVED=interleaved,
        **parts(width, rotary_dim),
    )


def refuses(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> str | None:
    """Say why the kernels cannot rotate these heads."""
    if query.dim() == 4 and query.numel() // max(1, query.shape[-1]) >= 1 << 31:
        return f"query has {query.numel() // query.shape[-1]} heads of tokens, more than 31 bits number"
    return refuses_double(query, *(a for a in args if isinstance(a, Tensor)))


@route("triton", "rope", refuses)
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
    """See `llmrt.ops.rope`."""
    both = ops.rope.empty(
        query, key, cos, sin, position_ids, rotary_dim, interleaved, query_weight, key_weight, eps, offset
    )
    check_positions(position_ids, cos)
    for y, x, weight in ((both[0], query, query_weight), (both[1], key, key_weight)):
        rotate_to(y, x, cos, sin, position_ids, rotary_dim, interleaved, weight, eps, offset)
    return both
