"""Writing new tokens into a key/value cache in SYCL: see xpu/sycl/kv_append.cpp."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ...ops.kv_append import check_append_sizes
from ...ops.kv_rows import row_width
from ..route import route
from .bundle import KINDS, launch, queue_of
from .pointwise import HEADS_LOCAL, head_groups, last_dense, pointwise


@lru_cache(maxsize=64)
def _ticket(device: torch.device, queue: int) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


def ticket(counter: Tensor | None) -> Tensor | None:
    """Return where the work-groups of one launch count themselves, a zero: the last one advances the counter."""
    return None if counter is None else _ticket(counter.device, queue_of(counter.device))


def append_groups(heads: int, counter: Tensor | None) -> tuple[int, int, int]:
    """Return the numbers of work-groups for a number of heads: with a counter at least one, which advances it."""
    return head_groups(max(heads, int(counter is not None)))


def cache_strides(key_cache: Tensor, value_cache: Tensor) -> tuple[int, ...]:
    """Return the strides of rows, heads and tokens of both caches."""
    return (*key_cache.stride()[:3], *value_cache.stride()[:3])


@route("sycl", "kv_append")
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
    """Run `ops.kv_append` without waiting for the device: tokens whose position is outside the cache are not written.

    A counter after which the tokens do not fit stays, and nothing is written.
    """
    check_append_sizes(key_cache, value_cache, key, value, position, every, positions, counter)
    key, value = last_dense(key), last_dense(value)
    B, S, Hk, D = key.shape
    rows = -(-B // every)
    sizes = (rows, S, Hk, D, row_width(value_cache), key_cache.shape[2], every, position)
    strides = (*cache_strides(key_cache, value_cache), *key.stride()[:3], *value.stride()[:3])
    groups = append_groups(2 * rows * S * Hk, counter)
    launch(
        key.device, pointwise(key.dtype), "kv_append", groups, HEADS_LOCAL,
        key_cache, value_cache, key, value, positions, counter, ticket(counter),
        *sizes, 0 if positions is None else positions.stride(0), KINDS[key_cache.dtype], *strides,
    )  # fmt: skip
