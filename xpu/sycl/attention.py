"""Attention over a key/value cache in SYCL: see xpu/sycl/attention.cpp."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...ops.attention import check_attention_sizes, check_score_terms
from ...ops.kv_rows import row_width
from ..route import route
from .bundle import KINDS, TYPES, Bundle, launch
from .pointwise import HEADS_LOCAL, head_groups, last_dense

#: Head dimensions that have a program of their own, for caches whose rows begin at multiples of 4 bytes; one other serves all the rest.
EXACT = (64, 80, 96, 112, 128, 192, 256)
WIDEST = 256
#: Numbers of query rows of a work-group for which there are programs, that of the program for all the rest; keys it takes at once.
ROWS, ANY_ROWS, TILE = (1, 4, 8), 4, 128
#: The keys are split over work-groups until there are this many, but each gets this many tiles or more.
ENOUGH_GROUPS, FEWEST_TILES = 256, 2


def _refuses(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> str | None:
    if query.dim() != 4 or value.dim() != 4:
        return None  # the operator's own error says it better
    for width, name in ((query.shape[-1], "query"), (row_width(value), "value")):
        if width > WIDEST:
            return f"{name} has heads of {width} elements; it takes up to {WIDEST}"
    return None


@lru_cache(maxsize=32)
def bundle(element: torch.dtype, rows: int, cache: torch.dtype | None = None, width: int = 0) -> Bundle:
    """Return the program for a dtype of activations and a number of query rows: for a cache's dtype and a head dimension, or for any."""
    names = (("T", element), ("KV", cache or torch.float32))
    types = tuple((name, TYPES[dtype]) for name, dtype in names)
    return Bundle(("attention",), (*types, ("D", width), ("DV", width), ("ROWS", rows)))


def has_program(element: torch.dtype, cache: torch.dtype, width: int) -> bool:
    """Return whether there is a program for these dtypes of activations and cache and this head dimension alone."""
    return width in EXACT


def _exact(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether the program for this head dimension serves: it reads whole words."""
    width = query.shape[-1]
    if row_width(value) != width or not has_program(query.dtype, key.dtype, width):
        return False
    words = 4 // key.element_size()
    strides = (*key.stride()[:3], *value.stride()[:3])
    return not any(stride % words for stride in strides) and not (key.data_ptr() | value.data_ptr()) % 4


def rows_of_program(rows: int, cache: torch.dtype) -> int:
    """Return the number of query rows of a work-group: the smallest that holds all, or else the largest.

    With an int8 cache 8 rows would not fit into the registers of Arc.
    """
    numbers = [n for n in ROWS if n <= 4 or cache != torch.int8]
    return next((n for n in numbers if n >= rows), numbers[-1])


def splits_of(groups: int, length: int) -> int:
    """Return the number of parts of the keys that work-groups of their own take: 1 where there are enough work-groups."""
    tiles = -(-length // (TILE * FEWEST_TILES))
    return max(1, min(ENOUGH_GROUPS // max(groups, 1), tiles))


@route("sycl", "attention", _refuses)
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
    """Run `ops.attention` without waiting for the device: an entry of rows outside the cache gives NaN."""
    check_attention_sizes(query, key, value, length, causal, window, softcap, rows, beams)
    out = ops.attention.empty(query, key, value, length, scale)
    if length == 0:
        return out.zero_()
    check_score_terms(query, length, mask, slopes, sinks)
    query = last_dense(query)
    (B, S, H, D), Hk, Dv = query.shape, key.shape[1], row_width(value)
    exact = _exact(query, key, value)
    count = rows_of_program(S * (H // Hk), key.dtype) if exact else ANY_ROWS
    program = bundle(query.dtype, count, key.dtype, D) if exact else bundle(query.dtype, count)
    blocks = -(-S * (H // Hk) // count)
    splits = splits_of(B * Hk * blocks, min(length, window + S) if window else length)
    partial = query.new_empty((splits, B * S * H, Dv + 2), dtype=torch.float32) if splits > 1 else None
    if mask is not None and mask.dim() == 2:
        mask = mask[:, None, None]
    if rows is not None:
        rows = last_dense(rows)
    slopes, sinks = (None if t is None else t.contiguous() for t in (slopes, sinks))
    sizes = (KINDS[key.dtype], D, Dv, S, H, Hk, length, key.shape[0], causal, window)
    kinds = (0 if t is None else KINDS[t.dtype] for t in (mask, sinks))
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *_mask_strides(mask))
    launch(
        query.device, program, "attention_rows", (splits, blocks, B * Hk), (1, 1, TILE),
        query, key, value, out, partial, mask, slopes, sinks, rows,
        *sizes, *kinds, *strides, 0 if rows is None else rows.stride(0), float(scale), float(softcap),
    )  # fmt: skip
    if partial is not None:
        launch(
            query.device, program, "attention_join", head_groups(B * S * H), HEADS_LOCAL,
            partial, out, sinks, 0 if sinks is None else KINDS[sinks.dtype], splits, B * Hk, Hk, H // Hk, S, Dv,
        )  # fmt: skip
    return out


def _mask_strides(mask: Tensor | None) -> tuple[int, ...]:
    """Return the strides of a mask's rows, heads, tokens and columns, 0 for a dimension that has one element for all."""
    if mask is None:
        return 0, 0, 0, 0
    return *(
        stride if size > 1 else 0 for size, stride in zip(mask.shape[:3], mask.stride()[:3], strict=True)
    ), mask.stride(3)
