"""Attention over a key/value cache, for prefill, decode and anything between."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .check import check, check_dtype, check_floating, check_shape
from .kv_rows import check_stored, load_rows, row_width, store_rows, stored_width
from .norm import wide
from .operator import Sample, operator


def check_last_dense(x: Tensor, name: str) -> None:
    """Raise unless the last dimension of `x` is contiguous."""
    dense = x.shape[-1] <= 1 or x.stride(-1) == 1
    check(dense, f"{name} has stride {x.stride(-1)} in its last dimension; expected 1")


def check_mask(mask: Tensor, batch: int, heads: int, tokens: int, length: int) -> None:
    """Raise RuntimeError unless `mask` is [B, >= length] bool or [B|1, 1|H, 1|S, >= length] bool or floating."""
    boolean = mask.dtype == torch.bool
    fits = mask.shape[-1] >= length if mask.dim() else False
    if mask.dim() == 2:
        fits = fits and boolean and mask.shape[0] == batch
    else:
        fits = fits and mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads)
        fits = fits and mask.shape[2] in (1, tokens)
        if not boolean:
            check_floating(mask, "mask")
    check(
        fits,
        f"mask has shape {list(mask.shape)} and dtype {str(mask.dtype)[6:]}; expected bool [{batch}, >= {length}], or "
        f"bool or floating [{batch} or 1, {heads} or 1, {tokens} or 1, >= {length}]",
    )


def check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    length: int,
    causal: bool,
    window: int,
    softcap: float,
    rows: Tensor | None,
    beams: int,
) -> None:
    """Raise RuntimeError unless these arguments of attention fit together."""
    check_attention_sizes(query, key, value, length, causal, window, softcap, rows, beams)
    used = None if rows is None else rows[:, :length]
    if used is not None and used.numel():
        low, high, cache_rows = int(used.min()), int(used.max()), key.shape[0]
        check(
            low >= 0 and high < cache_rows,
            f"rows has the entry {low if low < 0 else high}; expected 0 to {cache_rows - 1}",
        )


def check_attention_sizes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    length: int,
    causal: bool,
    window: int,
    softcap: float,
    rows: Tensor | None,
    beams: int,
) -> None:
    """Raise RuntimeError where `check_attention` does, but for the values of rows, for which a device would have to be awaited."""
    check_floating(query, "query")
    check_stored(key, query.dtype, "key")
    check_dtype(value, key.dtype, "value")
    check_shape(query, (-1, -1, -1, -1), "query")
    batch, tokens, heads, width = query.shape
    check_shape(key, (-1, -1, -1, stored_width(width, key.dtype)), "key")
    cache_rows, kv_heads, capacity, _ = key.shape
    check_shape(value, (cache_rows, kv_heads, capacity, -1), "value")
    check_stored(value, query.dtype, "value")
    check_last_dense(key, "key")
    check_last_dense(value, "value")
    check(
        kv_heads > 0 and heads % kv_heads == 0,
        f"query has {heads} heads; expected a multiple of the {kv_heads} key heads",
    )
    check(0 <= length <= capacity, f"length is {length}; expected 0 to {capacity}, the tokens that key holds")
    check(
        not causal or tokens <= length,
        f"query has {tokens} tokens and length is {length}; causal attention counts the query's tokens in length",
    )
    check(window >= 0, f"window is {window}; expected 0 (none) or more")
    check(softcap >= 0, f"softcap is {softcap}; expected 0 (none) or more")
    check(beams >= 1 and batch % beams == 0, f"beams is {beams}; expected a divisor of the {batch} rows of query")
    if rows is None:
        check(cache_rows >= batch, f"key has {cache_rows} rows; expected at least {batch}, or rows")
        return
    check_dtype(rows, torch.int32, "rows")
    check(
        rows.dim() == 2 and rows.shape[0] == batch and rows.shape[1] >= length,
        f"rows has shape {list(rows.shape)}; expected [{batch}, >= {length}]",
    )


def check_score_terms(
    query: Tensor, length: int, mask: Tensor | None, slopes: Tensor | None, sinks: Tensor | None
) -> None:
    """Raise RuntimeError unless what attention adds to its scores fits."""
    batch, tokens, heads, _ = query.shape
    if slopes is not None:
        check_shape(slopes, (heads,), "slopes")
        check(
            slopes.dtype in (torch.float32, torch.float64),
            f"slopes has dtype {str(slopes.dtype)[6:]}; expected float32",
        )
    if mask is not None:
        check_mask(mask, batch, heads, tokens, length)
    if sinks is not None:
        check_shape(sinks, (heads,), "sinks")
        check_floating(sinks, "sinks")


def logical_rows(x: Tensor, batch: int, length: int, rows: Tensor | None) -> Tensor:
    """Return tokens 0..length-1 of each logical row, [B, Hk, length, D] in the dtype that references compute in."""
    if rows is None:
        return _wide_rows(x[:batch, :, :length])
    token = torch.arange(length, device=x.device)
    return _wide_rows(x.transpose(1, 2)[rows[:, :length].long(), token].transpose(1, 2))


def _wide_rows(x: Tensor) -> Tensor:
    return load_rows(x, torch.float32) if x.dtype == torch.int8 else wide(x)


@operator()
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
    """Scaled dot-product attention ``softmax(scale q k^T + ...) v`` of S new tokens over a cache of `length` tokens.

    Query token s sits at position length - S + s, so one call serves prefill (S = length), decode (S = 1) and several
    new tokens with a past. Query head h reads key/value head h // (H / Hk). In this order, with p the position of the
    query and t the cached token: ``x = scale q k``; ``x = softcap tanh(x / softcap)``; ``x += slopes[h] (t - p)``;
    ``x += mask`` (floating); tokens that causality, window or a bool mask hide count as -inf; softmax over the tokens
    and the head's sink; weighted sum of the values. A query that sees no token gives zeros. Tokens that no query of a
    row sees do not reach the result whatever the cache holds there, NaN included.

    Sources: Vaswani et al. 2017, equation 1; sliding window: Beltagy et al. 2020 (Longformer); slopes: Press et al.
    2022 (ALiBi); softcap: Gemma 2 report, section 2; sinks: Xiao et al. 2024 (StreamingLLM) in the form of gpt-oss.

    Args:
        query: [B, S, H, D] float32, bfloat16 or float16, any strides.
        key: [R, Hk, C, D] in query's dtype: a cache, or any strided tensor whose last dimension is contiguous. Also
            float16 or float32 [R, Hk, C, D], or int8 [R, Hk, C, D + 4], rows of D codes and a scale (see `kv_append`).
        value: [R, Hk, C, Dv] in key's dtype, int8 [R, Hk, C, Dv + 4], likewise.
        length: tokens 0..length-1 of the cache are valid; at most C. The new tokens are already in it.
        scale: factor of the dot products, usually D ** -0.5.
        causal: hide tokens t > p. Needs S <= length.
        window: if above 0, hide tokens t <= p - window.
        softcap: if above 0, the bound of the scores.
        mask: None; bool [B, >= length], True = attend (padding); or [B or 1, H or 1, S or 1, >= length], bool (True =
            attend) or floating (added to the scores, any floating dtype), any strides, best with the last dimension
            contiguous. What a mask hides from all queries at either end of the cache costs next to nothing.
        slopes: [H] float32, the ALiBi slope of each head.
        sinks: [H] floating, the logit of each head's sink: it takes part in the softmax and has no value.
        rows: int32 [B, >= length], indirect access: the row of key and value that holds token t of logical row b.
            None: row b itself.
        beams: logical rows g * beams .. (g + 1) * beams - 1 belong to one sample and may share rows of the cache; what
            they share is read once. The result does not depend on it.

    Returns:
        [B, S, H, Dv] in query's dtype, contiguous.

    Raises:
        RuntimeError: shapes or dtypes do not fit together, or a number or an entry of rows is out of its range.
    """
    check_attention(query, key, value, length, causal, window, softcap, rows, beams)
    batch, tokens, heads, _ = query.shape
    kv_heads, device = key.shape[1], query.device
    if length == 0:
        return query.new_zeros(batch, tokens, heads, row_width(value))
    check_score_terms(query, length, mask, slopes, sinks)
    q = wide(query).transpose(1, 2).unflatten(1, (kv_heads, -1))
    k, v = (logical_rows(x, batch, length, rows).to(q.dtype) for x in (key, value))
    scores = (q @ k.unsqueeze(2).transpose(-1, -2)).flatten(1, 2) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    token = torch.arange(length, device=device)
    position = torch.arange(length - tokens, length, device=device).unsqueeze(1)
    if slopes is not None:
        scores = scores + slopes[:, None, None] * (token - position)
    visible = torch.ones(1, 1, tokens, length, dtype=torch.bool, device=device)
    if causal:
        visible = visible & (token <= position)
    if window > 0:
        visible = visible & (token > position - window)
    if mask is not None:
        seen = mask[:, None, None, :length] if mask.dim() == 2 else mask[..., :length]
        if mask.dtype != torch.bool:
            scores = scores + wide(seen)
            seen = seen > -math.inf
        visible = visible & seen
    scores = scores.masked_fill(~visible, -math.inf)
    highest = scores.amax(-1, keepdim=True)
    if sinks is not None:
        highest = torch.maximum(highest, wide(sinks)[:, None, None].to(highest.dtype))
    highest = highest.masked_fill(highest == -math.inf, 0)
    weights = torch.exp(scores - highest)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(wide(sinks)[:, None, None] - highest)
    weights = weights / total.masked_fill(total == 0, 1)
    v = v.masked_fill(~visible.flatten(1, 2).any(1)[:, None, :, None], 0)
    out = weights.unflatten(1, (kv_heads, -1)) @ v.unsqueeze(2)
    return out.flatten(1, 2).transpose(1, 2).contiguous().to(query.dtype)


@attention.fake
def _(
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
    check_floating(query, "query")
    for x, name in ((query, "query"), (key, "key"), (value, "value")):
        check_shape(x, (-1, -1, -1, -1), name)
    check_stored(key, query.dtype, "key")
    check_dtype(value, key.dtype, "value")
    batch, tokens, heads, _width = query.shape
    return query.new_empty(batch, tokens, heads, row_width(value))


def _operands(
    dtype: torch.dtype, batch: int, tokens: int, heads: int, kv_heads: int, width: int, length: int, **more: int
) -> tuple[Tensor, Tensor, Tensor, int, float]:
    """Return query, key, value, length and scale; the cache holds NaN beyond length."""
    capacity, cache_rows = more.get("capacity", length + 3), more.get("cache_rows", batch)
    value_width = more.get("value_width", width)
    query = torch.randn(batch, tokens, heads, width, dtype=dtype)
    key = torch.randn(cache_rows, kv_heads, capacity, width, dtype=dtype)
    value = torch.randn(cache_rows, kv_heads, capacity, value_width, dtype=dtype)
    key[:, :, length:], value[:, :, length:] = math.nan, math.nan
    return query, key, value, length, width**-0.5


def _left_padding(batch: int, length: int) -> Tensor:
    mask = torch.ones(batch, length + 2, dtype=torch.bool)
    for b in range(batch):
        mask[b, : (3 * b) % length] = False
    return mask


@attention.samples
def _(dtype: torch.dtype) -> Iterator[Sample]:
    def sample(name: str, *sizes: int, **options: Any) -> Sample:
        shape = {k: options.pop(k) for k in ("capacity", "cache_rows", "value_width") if k in options}
        return Sample(name, _operands(dtype, *sizes, **shape), options)

    # batch, tokens, heads, kv_heads, width, length
    yield sample("prefill", 2, 9, 4, 2, 16, 9)
    yield sample("decode", 2, 1, 8, 2, 64, 70)
    yield sample("several tokens with a past", 2, 5, 6, 2, 80, 45, softcap=2.5, sinks=torch.randn(6).to(dtype))
    rows = torch.randint(0, 3, (4, 20), dtype=torch.int32)
    yield sample("indirect", 4, 1, 4, 2, 8, 19, mask=_left_padding(4, 19), rows=rows, beams=2, cache_rows=3)
    yield sample("slopes and window", 1, 6, 4, 1, 24, 30, slopes=torch.rand(4), window=11)
    yield sample("bias", 1, 4, 2, 2, 16, 4, mask=torch.randn(1, 2, 4, 4, dtype=dtype), causal=False)
    yield sample("not causal", 1, 7, 3, 3, 40, 4, causal=False)
    yield sample("no query token", 2, 0, 4, 2, 16, 5)
    yield sample("no cached token", 2, 3, 4, 2, 16, 0, causal=False)
    for width, value_width in ((96, 96), (120, 64), (33, 17), (7, 131), (256, 256), (1, 1), (2, 40), (192, 128)):
        yield sample(f"decode D {width} Dv {value_width}", 1, 1, 4, 2, width, 67, value_width=value_width)
        yield sample(f"prefill D {width} Dv {value_width}", 1, 37, 4, 2, width, 41, value_width=value_width)
    for heads, kv_heads in ((1, 1), (3, 1), (5, 1), (7, 1), (10, 2), (18, 1)):
        yield sample(f"decode {heads} heads of {kv_heads}", 2, 1, heads, kv_heads, 24, 40)
        yield sample(f"prefill {heads} heads of {kv_heads}", 1, 21, heads, kv_heads, 24, 40)
    yield sample("long decode", 1, 1, 2, 1, 32, 1200)
    yield sample("long prefill", 1, 150, 3, 1, 32, 420)
    yield sample("long chunk", 1, 12, 4, 1, 16, 900)
    yield sample("window shorter than the chunk", 1, 100, 2, 1, 16, 200, window=50)
    for tokens in (1, 3, 40):
        sizes = (2, tokens, 4, 2, 24, 150)
        yield sample(f"window, {tokens} tokens", *sizes, window=35)
        yield sample(f"window not causal, {tokens} tokens", *sizes, window=35, causal=False)
        yield sample(f"softcap, {tokens} tokens", *sizes, softcap=2.5)
        yield sample(f"slopes, {tokens} tokens", *sizes, slopes=torch.tensor([0.5, 0.25, 0.1, 0.0]))
        yield sample(f"sinks, {tokens} tokens", *sizes, sinks=torch.tensor([2.0, -3.0, 5.0, 0.0]).to(dtype))
        yield sample(f"padding, {tokens} tokens", *sizes, mask=_left_padding(2, 150))
        yield sample(f"bool mask, {tokens} tokens", *sizes, mask=torch.rand(2, 1, tokens, 150) < 0.5)
        yield sample(f"bool mask per head, {tokens} tokens", *sizes, mask=torch.rand(1, 4, tokens, 160) < 0.1)
        bias = torch.randn(1, 4, tokens, 150, dtype=dtype).masked_fill(torch.rand(tokens, 150) < 0.3, -math.inf)
        yield sample(f"float mask, {tokens} tokens", *sizes, mask=bias)
        smallest = torch.zeros(2, 1, tokens, 150).masked_fill(torch.rand(tokens, 150) < 0.4, torch.finfo().min)
        smallest[:, :, -1] = torch.finfo().min  # a row that weighs all tokens alike
        yield sample(f"smallest numbers as a mask, {tokens} tokens", *sizes, mask=smallest)
        rows = torch.randint(0, 5, (2, 152), dtype=torch.int32)
        yield sample(f"scattered rows, {tokens} tokens", *sizes, cache_rows=5, rows=rows)
        everything: dict[str, Any] = {"window": 60, "softcap": 3.0, "slopes": torch.rand(4), "sinks": torch.randn(4)}
        yield sample(f"everything, {tokens} tokens", *sizes, mask=_left_padding(2, 150), rows=rows % 2, **everything)
        sizes = (2, tokens, 4, 2, 24, 420)
        static = torch.zeros(2, 1, tokens, 430, dtype=torch.bool)
        for b, newest in enumerate((133, 250)):  # of a buffer of which a part is filled, the second row padded
            static[b, :, :, 60 * b : newest - tokens] = True
            static[b, :, :, newest - tokens : newest] = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        yield sample(f"part of a buffer, {tokens} tokens", *sizes, mask=static, causal=False)
        holes = static & (torch.rand(tokens, 430) < 0.8)
        yield sample(f"part of a buffer with holes, {tokens} tokens", *sizes, mask=holes, causal=False)
        minus_infinity = torch.zeros(static.shape).masked_fill(~static, -math.inf)
        yield sample(f"float32 part of a buffer, {tokens} tokens", *sizes, mask=minus_infinity, causal=False)
        heads_differ = static & (torch.arange(430) > torch.tensor([0, 100, 120, 255])[:, None, None])
        yield sample(f"parts that differ by head, {tokens} tokens", *sizes, mask=heads_differ, causal=False)
        sizes = (2, tokens, 4, 2, 24, 150)
        yield sample(f"bias for all queries, {tokens} tokens", *sizes, mask=torch.randn(1, 4, 1, 151))
        yield sample(f"bool mask for all queries, {tokens} tokens", *sizes, mask=torch.rand(2, 4, 1, 150) < 0.5)
        expanded = (torch.rand(2, 1, 1, 150) < 0.5).expand(2, 4, tokens, 150)
        yield sample(f"expanded mask, {tokens} tokens", *sizes, mask=expanded)
        bias = torch.randn(2, 1, 1, 1, dtype=torch.float16).expand(2, 4, tokens, 150)
        yield sample(f"expanded float16 bias, {tokens} tokens", *sizes, mask=bias)
    for beams in (2, 3, 5):
        rows = (torch.arange(2 * beams) // beams * beams).int()[:, None].repeat(1, 200)
        rows[:, 130:] += torch.randint(0, beams, (2 * beams, 70), dtype=torch.int32)
        yield sample(f"{beams} beams", 2 * beams, 1, 6, 2, 16, 190, rows=rows, beams=beams)
    hidden = torch.ones(2, 66, dtype=torch.bool)
    hidden[0] = False
    for tokens in (1, 33):
        nothing = _operands(dtype, 2, tokens, 2, 1, 16, 66)
        nothing[1][0], nothing[2][0] = math.nan, math.nan
        yield Sample(f"a row that sees nothing, {tokens} tokens", nothing, {"mask": hidden})
    heads_first = torch.randn(2, 4, 11, 24, dtype=dtype).transpose(1, 2)
    fused = torch.randn(2, 11, 6, 24, dtype=dtype)
    key, value = fused[:, :, 2:4].transpose(1, 2), fused[:, :, 4:].transpose(1, 2)
    yield Sample("strided operands", (heads_first, key, value, 11, 0.3))
    yield Sample("strided operands, one token", (heads_first[:, -1:], key, value, 11, 0.3))
    query, key, value, length, _ = _operands(dtype, 1, 1, 2, 1, 16, 20)
    yield Sample("large scores", (query * 30, key * 30, value, length, 0.25))
    yield Sample("negative scale", (query, key, value, length, -0.25))
    for stored in (torch.int8, torch.float16, torch.float32):
        yield from _stored_samples(dtype, stored)


def _stored_samples(dtype: torch.dtype, stored: torch.dtype) -> Iterator[Sample]:
    """Yield calls over caches of another dtype than the query's."""

    def sample(name: str, *sizes: int, cache_rows: int = 0, value_width: int = 0, **options: Any) -> Sample:
        shape = {"cache_rows": cache_rows or sizes[0], "value_width": value_width or sizes[4]}
        query, key, value, length, scale = _operands(dtype, *sizes, **shape)
        key, value = (store_rows(x.nan_to_num(), stored) for x in (key * 2, value))
        return Sample(f"{str(stored)[6:]} cache, {name}", (query, key, value, length, scale), options)

    rows = torch.randint(0, 3, (4, 152), dtype=torch.int32)
    for tokens in (1, 3, 40):
        yield sample(f"{tokens} tokens", 1, tokens, 8, 2, 64, 150)
        yield sample(f"{tokens} tokens, odd sizes", 2, tokens, 5, 1, 33, 70, value_width=17)
        more: dict[str, Any] = {"mask": _left_padding(4, 150), "rows": rows, "beams": 2, "cache_rows": 3}
        yield sample(f"{tokens} tokens, indirect, padding", 4, tokens, 4, 2, 24, 150, **more)
        more = {"window": 60, "softcap": 3.0, "slopes": torch.rand(3), "sinks": torch.randn(3)}
        yield sample(f"{tokens} tokens, everything", 2, tokens, 3, 3, 128, 200, **more)
    yield sample("long decode", 1, 1, 8, 2, 128, 1200)
    yield sample("tiny heads", 1, 2, 2, 2, 1, 20)
