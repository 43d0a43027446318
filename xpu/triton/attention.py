"""Attention over a key/value cache: flash attention of query tokens x heads of a group over tiles of cached tokens."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import ops
from ...ops.attention import check_attention, check_attention_sizes, check_mask
from ...ops.check import check, check_dtype, check_floating, check_shape
from ...ops.kv_rows import row_width
from ..route import route
from . import blocks
from .activations import tanh
from .launch import launch, refuses_double, strides

# mypy: disable-error-code="no-untyped-def"

#: Wider heads would need more local memory than there is, or a kernel that splits them.
WIDEST_HEAD = 256
#: Spans of cached tokens start at multiples of this many, which every block size divides.
MOST_AT_ONCE = 128


@triton.jit
def load_tile(cache, row, t, k, width, inside, c_r, c_h, c_t, head, DTYPE: tl.constexpr):
    """Elements k of the cache's rows for tokens t, by broadcasting row, t and k; int8 codes stay codes."""
    place = row * c_r + head * c_h + t.to(tl.int64) * c_t
    return tl.load(cache + place + k, inside & (k < width), other=0.0).to(DTYPE)


@triton.jit
def load_scale(cache, row, t, width, inside, c_r, c_h, c_t, head):
    """The scales of int8 rows, which stand behind their codes and need not be aligned."""
    place = row * c_r + head * c_h + t.to(tl.int64) * c_t + width
    bits = tl.load(cache + place, inside, other=0).to(tl.int32) & 255
    for i in tl.static_range(1, 4):
        bits |= (tl.load(cache + place + i, inside, other=0).to(tl.int32) & 255) << (8 * i)
    return bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["length", "span"])  # they grow with the text
def _attention(query, key, value, mask, slopes, sinks, rows, y, partial, tokens, length, span, cache_rows, width, value_width, heads, scale,
               window, softcap, q_b, q_s, q_h, q_d, k_r, k_h, k_t, v_r, v_h, v_t, m_b, m_h, m_s, m_t, r_b, r_t, sink_h,
               GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BOOLEAN: tl.constexpr,
               INT8: tl.constexpr, FACTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
               BLOCK_DV: tl.constexpr):  # fmt: skip
    """Row m of a program's block is query token m // GROUP and head m % GROUP of the group that shares a key/value head.

    query: [B, S, H, D]; key, value: [R, Hk, C, D or Dv]; mask: [B, H, S, >= length]; y: contiguous [B, S, H, Dv]. With partial
    [spans, B, S, H, Dv + 2] each program sees only its span of tokens and writes weighted values, highest score and sum of weights.
    """
    kv_heads = heads // GROUP
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    head = (tl.program_id(1) % kv_heads).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    s, h = (m // GROUP).to(tl.int64), head * GROUP + m % GROUP
    alive = m < tokens * GROUP
    position = length - tokens + s
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    start = query + b * q_b + s[:, None] * q_s + h[:, None] * q_h
    q = tl.load(start + d[None, :] * q_d, alive[:, None] & (d < width)[None, :], other=0.0).to(FACTOR)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if sinks is not None:  # as if a token with this score and no value had been seen
        highest = tl.load(sinks + h * sink_h, alive, other=0.0).to(tl.float32)
        if partial is not None:  # the first span alone counts it
            highest = tl.where(tl.program_id(2) == 0, highest, float("-inf"))
        total = tl.where(highest > float("-inf"), 1.0, 0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    first, last = 0, length
    if CAUSAL:
        newest = tl.minimum((tl.program_id(0) * BLOCK_M + BLOCK_M - 1) // GROUP, tokens - 1)
        last = length - tokens + newest + 1
    if WINDOW:
        oldest = length - tokens + tl.program_id(0) * BLOCK_M // GROUP - window + 1
        first = tl.maximum(oldest, 0) // BLOCK_T * BLOCK_T
    if partial is not None:
        first += tl.program_id(2) * span
        last = tl.minimum(last, first + span)
    for t0 in range(first, last, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        cached = t < length
        row = b
        if rows is not None:
            row = tl.load(rows + b * r_b + t * r_t, cached, other=0).to(tl.int64)
            outside = (row < 0) | (row >= cache_rows)
            row = tl.where(outside, 0, row)
        visible = alive[:, None] & cached[None, :]
        if CAUSAL:
            visible = visible & (t[None, :] <= position[:, None])
        if WINDOW:
            visible = visible & (t[None, :] > position[:, None] - window)
        if mask is not None:
            at = mask + b * m_b + h[:, None] * m_h + s[:, None] * m_s + t[None, :].to(tl.int64) * m_t
            if BOOLEAN:
                visible = visible & (tl.load(at, visible, other=0) != 0)
            else:
                added = tl.load(at, visible, other=0.0).to(tl.float32)
                visible = visible & (added > float("-inf"))
        used = cached
        some = True
        if WINDOW or mask is not None:
            used = tl.max(visible.to(tl.int32), 0) > 0
            some = tl.max(used.to(tl.int32), 0) > 0
        if some:  # a tile that no query sees costs no reading of keys and values
            k_row = row if rows is None else row[None, :]
            v_row = row if rows is None else row[:, None]
            k = load_tile(key, k_row, t[None, :], d[:, None], width, used[None, :], k_r, k_h, k_t, head, FACTOR)
            x = tl.dot(q, k, input_precision="ieee") * scale
            if INT8:
                x = x * load_scale(key, k_row, t[None, :], width, used[None, :], k_r, k_h, k_t, head)
            if SOFTCAP:
                x = softcap * tanh(x / softcap)
            if slopes is not None:
                slope = tl.load(slopes + h, alive, other=0.0)
                x += slope[:, None] * (t[None, :] - position[:, None]).to(tl.float32)
            if mask is not None and not BOOLEAN:
                x += added
            if rows is not None:
                x = tl.where(outside[None, :], float("nan"), x)
            x = tl.where(visible, x, float("-inf"))
            raised = tl.maximum(highest, tl.max(x, 1))
            base = tl.where(raised == float("-inf"), 0.0, raised)
            weight = tl.exp(x - base[:, None])
            fade = tl.exp(highest - base)
            total = total * fade + tl.sum(weight, 1)
            v = load_tile(
                value, v_row, t[:, None], dv[None, :], value_width, used[:, None], v_r, v_h, v_t, head, FACTOR
            )
            if INT8:
                v_scale = load_scale(value, v_row, t[:, None], value_width, used[:, None], v_r, v_h, v_t, head)
                v = (v.to(tl.float32) * v_scale).to(FACTOR)
            acc = acc * fade[:, None] + tl.dot(weight.to(FACTOR), v, input_precision="ieee")
            highest = raised
    out, stored = (b * tokens + s) * heads + h, alive[:, None] & (dv < value_width)[None, :]
    if partial is not None:
        batch = tl.num_programs(1) // kv_heads
        start = partial + (tl.program_id(2).to(tl.int64) * batch * tokens * heads + out) * (value_width + 2)
        tl.store(start[:, None] + dv[None, :], acc, stored)
        tl.store(start + value_width, highest, alive)
        tl.store(start + value_width + 1, total, alive)
    else:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(y + out[:, None] * value_width + dv[None, :], acc.to(y.dtype.element_ty), stored)


@triton.jit
def _merge(partial, y, heads, spans, value_width, SPANS: tl.constexpr, BLOCK_DV: tl.constexpr):
    """One query token and head: the mean of all spans' values, each by its weights beside the highest score of all."""
    row = tl.program_id(0).to(tl.int64)
    i, dv = tl.arange(0, SPANS), tl.arange(0, BLOCK_DV)
    start = partial + (i.to(tl.int64) * heads + row) * (value_width + 2)
    highest = tl.load(start + value_width, i < spans, other=float("-inf"))
    total = tl.load(start + value_width + 1, i < spans, other=0.0)
    base = tl.max(highest, 0)
    fade = tl.exp(highest - tl.where(base == float("-inf"), 0.0, base))
    inside = (i < spans)[:, None] & (dv < value_width)[None, :]
    acc = tl.load(start[:, None] + dv[None, :], inside, other=0.0) * fade[:, None]
    total = tl.sum(total * fade, 0)
    mean = tl.sum(acc, 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(y + row * value_width + dv, mean.to(y.dtype.element_ty), dv < value_width)


def _refuses(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> str | None:
    widest = max(query.shape[-1], row_width(value))
    if widest > WIDEST_HEAD:
        return f"heads have {widest} elements, more than the {WIDEST_HEAD} that local memory holds"
    return refuses_double(query, key, *(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)))


def _check_options(
    query: Tensor, mask: Tensor | None, slopes: Tensor | None, sinks: Tensor | None, length: int
) -> None:
    batch, tokens, heads, _ = query.shape
    if mask is not None:
        check_mask(mask, batch, heads, tokens, length)
    if slopes is not None:
        check_shape(slopes, (heads,), "slopes")
        check_dtype(slopes, torch.float32, "slopes")
        check(slopes.is_contiguous(), f"slopes has stride {slopes.stride(0)}; expected 1")
    if sinks is not None:
        check_shape(sinks, (heads,), "sinks")
        check_floating(sinks, "sinks")


def _expanded(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Return the mask as [B, H, S, >= length], a bool one as bytes."""
    if mask is None:
        return None
    mask = mask[:, None, None] if mask.dim() == 2 else mask
    batch, tokens, heads, _ = query.shape
    mask = mask.expand(batch, heads, tokens, -1)
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def _factor_dtype(query: Tensor, key: Tensor) -> Any:
    """Return what products are taken of: query's 16 bits where keys and values are the same or codes, else float32."""
    if query.dtype == torch.float32 or key.dtype not in (query.dtype, torch.int8):
        return tl.float32
    return tl.bfloat16 if query.dtype == torch.bfloat16 else tl.float16


@route("triton", "attention", _refuses)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    length: int,
    scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    mask: Tensor | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    rows: Tensor | None = None,
    beams: int = 1,
) -> Tensor:
    """See `llmrt.ops.attention`; on a device an entry of rows outside the cache gives NaN."""
    check = (
        check_attention if query.device.type == "cpu" else check_attention_sizes
    )  # a device would have to be waited for
    check(query, key, value, length, causal, window, softcap, rows, beams)
    _check_options(query, mask, slopes, sinks, length)
    y = ops.attention.empty(query, key, value, length, scale)
    if length == 0 or not y.numel():
        return y.zero_()
    batch, tokens, heads, width = query.shape
    kv_heads, value_width = key.shape[1], y.shape[-1]
    group = heads // kv_heads
    expanded, factor = _expanded(mask, query), _factor_dtype(query, key)
    plain = mask is None and slopes is None and key.dtype == query.dtype and window == softcap == 0
    choices = blocks.attention(tokens * group, width, value_width, factor != tl.float32, plain)
    spans, span = 1, length
    if all(tokens * group <= b.sizes["BLOCK_M"] for b in choices):
        seen = min(length, window + tokens + MOST_AT_ONCE) if window else length
        spans, span = blocks.shared(seen, blocks.spans(batch * kv_heads, seen), MOST_AT_ONCE)
    kept = (spans, batch, tokens, heads, value_width + 2)
    partial = torch.empty(kept, dtype=torch.float32, device=query.device) if spans > 1 else None
    launch(
        _attention,
        choices,
        lambda b: (triton.cdiv(tokens * group, b.sizes["BLOCK_M"]), batch * kv_heads, spans),
        (tokens, group, batch * kv_heads, width, value_width, query.dtype, key.dtype, plain, blocks.power(length)),
        *(
            query,
            key,
            value,
            expanded,
            slopes,
            sinks,
            rows,
            y,
            partial,
            tokens,
            length,
            span,
            key.shape[0],
            width,
            value_width,
            heads,
            scale,
        ),
        *(window, softcap, *query.stride(), *key.stride()[:3], *value.stride()[:3]),
        *(*strides(expanded, 4), *strides(rows, 2), *strides(sinks, 1)),
        GROUP=group,
        CAUSAL=causal,
        WINDOW=window > 0,
        SOFTCAP=softcap > 0,
        BOOLEAN=mask is not None and mask.dtype == torch.bool,
        INT8=key.dtype == torch.int8,
        FACTOR=factor,
    )
    if partial is not None:
        launch(
            _merge,
            blocks.merge(spans, value_width),
            lambda b: (batch * tokens * heads,),
            (),
            *(partial, y, batch * tokens * heads, spans, value_width),
        )
    return y
