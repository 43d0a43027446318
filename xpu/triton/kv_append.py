"""Writing new tokens into a key/value cache, as floating point or as int8 rows with their scales."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...ops.kv_append import check_append, check_append_sizes
from ...ops.kv_rows import row_width
from ..route import route
from . import blocks
from .activations import round_even
from .launch import launch, refuses_double
from .rope import split_rows

# mypy: disable-error-code="no-untyped-def"


@triton.jit
def place_of(positions, counter, position, s, inside, tokens, capacity, p_s, SEEN: tl.constexpr):
    """Where in the cache token s goes, and whether: not outside of it, and not if a later token has the same place."""
    if positions is None:
        place = position + s
        if counter is not None:
            place += tl.load(counter)
        last = inside & (place >= 0) & (place < capacity)
    else:
        place = tl.load(positions + s * p_s, inside, other=-1)
        last = inside & (place >= 0) & (place < capacity)
        for start in range(0, tokens, SEEN):
            t = start + tl.arange(0, SEEN)[None, :]
            others = tl.load(positions + t * p_s, t < tokens, other=-1)
            later = (others == place) & (t > s)
            last = last & (tl.max(later.to(tl.int32), 1, keep_dims=True) == 0)
    return place, last


@triton.jit
def row_scale(largest):
    """The scale of a row of int8 and its inverse, both 0 for rows that are stored as zeros."""
    some = largest > 1e-30
    safe = tl.where(some, largest, 1.0)
    return tl.where(some, tl.div_rn(safe, 127.0), 0.0), tl.where(some, tl.div_rn(127.0, safe), 0.0)


@triton.jit
def row_codes(x, inverse):
    """The codes of a row's elements."""
    return tl.minimum(tl.maximum(round_even(x * inverse), -127.0), 127.0).to(tl.int8)


@triton.jit
def store_scale(cache, row, width, scale, inside):
    """Write a row's scale behind its codes, byte by byte: the place need not be aligned."""
    bits = scale.to(tl.int32, bitcast=True)
    for i in tl.static_range(4):
        tl.store(cache + row + width + i, (bits >> (8 * i)).to(tl.int8), inside)


@triton.jit
def append(cache, new, positions, counter, position, rows, heads, tokens, width, capacity, every, c_r, c_h, c_t, n_b, n_s,
           n_h, n_d, p_s, first, SEEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Write rows first, first + 1, ... of new [B, S, Hk, D], of which only batch rows 0, every, ... count, to cache [R, Hk, C, D]."""
    row = first + tl.arange(0, ROWS)[:, None]
    b, s, h = split_rows(row, heads, tokens)
    b = b * every
    place, written = place_of(positions, counter, position, s, row < rows, tokens, capacity, p_s, SEEN)
    k = tl.arange(0, BLOCK)[None, :]
    inside = written & (k < width)
    x = tl.load(new + b * n_b + s * n_s + h * n_h + k * n_d, inside, other=0.0).to(tl.float32)
    target = b * c_r + h * c_h + place * c_t
    if cache.dtype.element_ty == tl.int8:
        scale, inverse = row_scale(tl.max(tl.abs(x), 1, keep_dims=True))
        tl.store(cache + target + k, row_codes(x, inverse), inside)
        store_scale(cache, target, width, scale, written)
    else:
        tl.store(cache + target + k, x.to(cache.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["position"])  # it grows with every token
def _kv_append(key_cache, value_cache, key, value, positions, counter, position, rows, heads, tokens, width, value_width,
               capacity, every, kc_r, kc_h, kc_t, vc_r, vc_h, vc_t, k_b, k_s, k_h, k_d, v_b, v_s, v_h, v_d, p_s,
               SEEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    first = tl.program_id(0) * ROWS
    if tl.program_id(1) == 0:
        append(key_cache, key, positions, counter, position, rows, heads, tokens, width, capacity, every, kc_r, kc_h, kc_t,
               k_b, k_s, k_h, k_d, p_s, first, SEEN, ROWS, BLOCK)  # fmt: skip
    else:
        append(value_cache, value, positions, counter, position, rows, heads, tokens, value_width, capacity, every, vc_r,
               vc_h, vc_t, v_b, v_s, v_h, v_d, p_s, first, SEEN, ROWS, BLOCK)  # fmt: skip


def refuses(*args: Any, **kwargs: Any) -> str | None:
    """Say why the kernels cannot write these tokens."""
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    if any(t.dim() == 4 and t.numel() // max(1, t.shape[-1]) >= 1 << 31 for t in tensors[2:]):
        return "key or value has more heads of tokens than 31 bits number"
    return refuses_double(*tensors)


def seen(positions: Tensor | None) -> int:
    """Return how many positions `place_of` compares at a time."""
    return 16 if positions is None else min(64, blocks.power(positions.numel()))


@route("triton", "kv_append", refuses)
def kv_append(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    position: int,
    every: int = 1,
    positions: Tensor | None = None,
    counter: Tensor | None = None,
) -> None:
    """See `llmrt.ops.kv_append`; on a device tokens with a place outside the cache are not written."""
    check = check_append if key.device.type == "cpu" else check_append_sizes  # a device would have to be waited for
    check(key_cache, value_cache, key, value, position, every, positions, counter)
    batch, tokens, heads, _ = key.shape
    rows = -(-batch // every) * tokens * heads
    width, value_width = row_width(key_cache), row_width(value_cache)
    launch(
        _kv_append,
        blocks.heads(max(width, value_width)),
        lambda b: (triton.cdiv(rows, b.sizes["ROWS"]), 2),
        (rows, width, key.dtype),
        *(key_cache, value_cache, key, value, positions, counter, position, rows, heads, tokens, width, value_width),
        *(key_cache.shape[2], every, *key_cache.stride()[:3], *value_cache.stride()[:3], *key.stride()),
        *(*value.stride(), 0 if positions is None else positions.stride(0)),
        SEEN=seen(positions),
        enable_fp_fusion=False,
    )
    if counter is not None:
        counter.add_(tokens)
