"""Rotation of new tokens on their way into a key/value cache, in one launch."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ... import ops
from ...ops.kv_append import check_append, check_append_sizes
from ...ops.kv_rows import row_width
from ..route import route
from . import blocks, kv_append, rope
from .kv_append import append, place_of, row_codes, row_scale, seen, store_scale
from .launch import launch, strides
from .rope import angles, check_positions, parts, position_strides, rotate, split_rows, store_head, table_strides

# mypy: disable-error-code="no-untyped-def"


@triton.jit(do_not_specialize=["position"])  # it grows with every token
def _rope_append(query, key, value, cos, sin, position_ids, query_weight, key_weight, rotated, key_cache, value_cache,
                 positions, counter, position, every, batch, tokens, heads, kv_heads, width, value_width, length, capacity,
                 q_b, q_s, q_h, q_d, k_b, k_s, k_h, k_d, v_b, v_s, v_h, v_d, qw_d, kw_d, c_b, c_s, c_i, d_b, d_s, d_i,
                 i_b, i_s, kc_r, kc_h, kc_t, vc_r, vc_h, vc_t, p_s, eps, offset, query_blocks, key_blocks,
                 HALF: tl.constexpr, INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, SEEN: tl.constexpr,
                 ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Programs for the heads of query, then for those of key, then for those of value; every: as in kv_append."""
    program = tl.program_id(0)
    i = tl.arange(0, PAIRS)[None, :]
    if program < query_blocks:
        row = program * ROWS + tl.arange(0, ROWS)[:, None]
        inside = row < batch * tokens * heads
        b, s, h = split_rows(row, heads, tokens)
        c = angles(cos, position_ids, b, s, i, inside & (i < HALF), length, c_b, c_s, c_i, i_b, i_s)
        d = angles(sin, position_ids, b, s, i, inside & (i < HALF), length, d_b, d_s, d_i, i_b, i_s)
        u, v, rest = rotate(query, query_weight, b, s, h, inside, q_b, q_s, q_h, q_d, qw_d, c, d, width, eps, offset, HALF,
                            INTERLEAVED, PAIRS, REST)  # fmt: skip
        store_head(rotated, row.to(tl.int64) * width, u, v, rest, inside, width, HALF, INTERLEAVED, PAIRS, REST)
    elif program < query_blocks + key_blocks:
        row = (program - query_blocks) * ROWS + tl.arange(0, ROWS)[:, None]
        rows = (batch + every - 1) // every * tokens * kv_heads
        b, s, h = split_rows(row, kv_heads, tokens)
        b = b * every
        place, inside = place_of(positions, counter, position, s, row < rows, tokens, capacity, p_s, SEEN)
        c = angles(cos, position_ids, b, s, i, inside & (i < HALF), length, c_b, c_s, c_i, i_b, i_s)
        d = angles(sin, position_ids, b, s, i, inside & (i < HALF), length, d_b, d_s, d_i, i_b, i_s)
        u, v, rest = rotate(key, key_weight, b, s, h, inside, k_b, k_s, k_h, k_d, kw_d, c, d, width, eps, offset, HALF,
                            INTERLEAVED, PAIRS, REST)  # fmt: skip
        dtype: tl.constexpr = key.dtype.element_ty
        u, v = u.to(dtype).to(tl.float32), v.to(dtype).to(tl.float32)
        target = b * kc_r + h * kc_h + place * kc_t
        if key_cache.dtype.element_ty == tl.int8:
            largest = tl.max(tl.maximum(tl.abs(u), tl.abs(v)), 1, keep_dims=True)
            if REST > 0:
                largest = tl.maximum(largest, tl.max(tl.abs(rest), 1, keep_dims=True))
            scale, inverse = row_scale(largest)
            u, v, rest = row_codes(u, inverse), row_codes(v, inverse), row_codes(rest, inverse)
            store_scale(key_cache, target, width, scale, inside)
        store_head(key_cache, target, u, v, rest, inside, width, HALF, INTERLEAVED, PAIRS, REST)
    else:
        rows = (batch + every - 1) // every * tokens * kv_heads
        append(value_cache, value, positions, counter, position, rows, kv_heads, tokens, value_width, capacity, every, vc_r,
               vc_h, vc_t, v_b, v_s, v_h, v_d, p_s, (program - query_blocks - key_blocks) * ROWS, SEEN, ROWS, BLOCK)  # fmt: skip


def _refuses(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> str | None:
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    return rope.refuses(query, key, *tensors) or kv_append.refuses(*tensors[2:4], key, value)


@route("triton", "rope_append", _refuses)
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
    """See `llmrt.ops.rope_append`; on a device tokens with a place outside the cache are not written."""
    rotated, _ = ops.rope.empty(
        query, key, cos, sin, position_ids, rotary_dim, interleaved, query_weight, key_weight, eps, offset
    )
    check_positions(position_ids, cos)
    check = check_append if key.device.type == "cpu" else check_append_sizes  # a device would have to be waited for
    check(key_cache, value_cache, key, value, position, every, positions, counter)
    batch, tokens, heads, width = query.shape
    kv_heads, value_width = key.shape[2], row_width(value_cache)
    query_rows, rows = batch * tokens * heads, -(-batch // every) * tokens * kv_heads

    def counts(b: blocks.Blocks) -> tuple[int, int]:
        return triton.cdiv(query_rows, b.sizes["ROWS"]), triton.cdiv(rows, b.sizes["ROWS"])

    choices = blocks.heads(max(width, value_width))[:1]
    query_blocks, key_blocks = counts(choices[0])
    launch(
        _rope_append,
        choices,
        lambda b: (query_blocks + 2 * key_blocks,),
        (),
        *(query, key, value, cos, sin, position_ids, query_weight, key_weight, rotated, key_cache, value_cache),
        *(positions, counter, position, every, batch, tokens, heads, kv_heads, width, value_width, len(cos)),
        *(key_cache.shape[2], *query.stride(), *key.stride(), *value.stride()),
        *(*strides(query_weight, 1), *strides(key_weight, 1)),
        *(*table_strides(cos, position_ids), *table_strides(sin, position_ids), *position_strides(position_ids)),
        *(*key_cache.stride()[:3], *value_cache.stride()[:3], 0 if positions is None else positions.stride(0)),
        *(eps, offset, query_blocks, key_blocks),
        INTERLEAVED=interleaved,
        SEEN=seen(positions),
        enable_fp_fusion=False,
        **parts(width, rotary_dim),
    )
    if counter is not None:
        counter.add_(tokens)
    return rotated
