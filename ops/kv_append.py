"""Writing new tokens into a key/value cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .attention import check_last_dense
from .check import check, check_dtype, check_floating, check_shape, differ
from .kv_rows import check_stored, row_width, store_rows, stored_width
from .operator import Sample, operator


def check_append(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    position: int,
    every: int,
    positions: Tensor | None,
    counter: Tensor | None,
) -> int:
    """Raise RuntimeError unless the arguments of kv_append fit together; return the place of the first token."""
    check_append_sizes(key_cache, value_cache, key, value, position, every, positions, counter)
    capacity = key_cache.shape[2]
    if counter is not None:
        position = int(counter)
    if positions is None:
        _check_place(position, key, capacity, "position" if counter is None else "counter")
    elif positions.numel():
        for entry in (int(positions.min()), int(positions.max())):
            check(0 <= entry < capacity, f"positions has value {entry}; valid: 0 to {capacity - 1}")
    return position


def _check_place(position: int, key: Tensor, capacity: int, name: str) -> None:
    check(
        position >= 0 and position + key.shape[1] <= capacity,
        f"{name} {position} and {key.shape[1]} tokens do not fit into the cache's capacity of {capacity} tokens",
    )


def check_append_sizes(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    position: int,
    every: int,
    positions: Tensor | None,
    counter: Tensor | None,
) -> None:
    """Raise RuntimeError where `check_append` does, but for the values of tensors, for which a device would have to be awaited."""
    check_floating(key, "key")
    check_stored(key_cache, key.dtype, "key_cache")
    check_dtype(value_cache, key_cache.dtype, "value_cache")
    check_dtype(value, key.dtype, "value")
    check_shape(key_cache, (-1, -1, -1, -1), "key_cache")
    rows, heads, capacity, _ = key_cache.shape
    check_shape(value_cache, (rows, heads, capacity, -1), "value_cache")
    check_stored(value_cache, key.dtype, "value_cache")
    check_shape(key, (-1, -1, heads, row_width(key_cache)), "key")
    check_shape(value, (key.shape[0], key.shape[1], heads, row_width(value_cache)), "value")
    for x, name in ((key_cache, "key_cache"), (value_cache, "value_cache")):
        check_last_dense(x, name)
    check(key.shape[0] <= rows, f"key has {key.shape[0]} rows; key_cache holds {rows}")
    check(every >= 1, f"every is {every}; expected at least 1")
    name = "position"
    if positions is not None or counter is not None:
        name = "counter" if positions is None else "positions"
        check(position == 0, f"position is {position}; expected 0, as {name} says where the tokens go")
    if counter is not None:
        check(positions is None, "positions and counter are given; valid: one of them")
        check_counter(counter)
    elif positions is None:
        _check_place(position, key, capacity, name)
    if positions is not None:
        check_dtype(positions, torch.int64, "positions")
        check_shape(positions, (key.shape[1],), "positions")


def check_counter(counter: Tensor) -> None:
    """Raise RuntimeError unless a counter has the dtype and the size of one."""
    check_dtype(counter, torch.int64, "counter")
    check(not differ(counter.numel(), 1), f"counter has shape {list(counter.shape)}; expected one element")


def check_append_kinds(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor | None,
    counter: Tensor | None,
) -> None:
    """Raise RuntimeError where dtypes or numbers of dimensions cannot fit: what a fake kernel can say of any sizes."""
    check_floating(key, "key")
    for x, name in ((key_cache, "key_cache"), (value_cache, "value_cache"), (key, "key"), (value, "value")):
        check_shape(x, (-1, -1, -1, -1), name)
    check_stored(key_cache, key.dtype, "key_cache")
    check_dtype(value_cache, key_cache.dtype, "value_cache")
    check_dtype(value, key.dtype, "value")
    if positions is not None:
        check_dtype(positions, torch.int64, "positions")
        check_shape(positions, (-1,), "positions")
    if counter is not None:
        check_counter(counter)


@operator(mutates=("key_cache", "value_cache", "counter"))
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
    """Write S tokens per row to a cache: ``cache[b, :, position + s] = new[b, s]`` for every row b with b % every == 0.

    With `positions` token s goes to positions[s] instead, as by ``cache.index_copy_(2, positions, new.transpose(1, 2))``:
    a graph that is captured once then writes where its input says. Of tokens with the same position the last one stays.

    With `counter`, the number of tokens that the cache holds, token s goes to counter + s, and counter grows by S.

    With `every` = number of beams the prompt of a beam search is stored once per sample, in the sample's first row.

    An int8 cache holds D codes and the float32 scale of each token and head: scale = largest magnitude / 127, code =
    element / scale, rounded to the nearest (ties to even). Rows that are zero, or smaller than 1e-30, are stored as zeros.

    Args:
        key_cache: [R, Hk, C, D] of key's dtype, float16 or float32, or [R, Hk, C, D + 4] int8; R at least B; the last
            dimension contiguous. Written to.
        value_cache: [R, Hk, C, Dv] or, int8, [R, Hk, C, Dv + 4], the dtype of key_cache, likewise. Written to.
        key: [B, S, Hk, D] float32, bfloat16 or float16, any strides.
        value: [B, S, Hk, Dv], the dtype of key, any strides.
        position: index of the first token written, 0 to C - S; 0 where positions or counter is given.
        every: distance between the rows that are written, 1 = all.
        positions: int64 [S], the index of each token, 0 to C - 1; None: position + s.
        counter: int64, one element, 0 to C - S; instead of positions. Written to.

    Raises:
        RuntimeError: shapes or dtypes do not fit together, the tokens do not fit into the cache, or every is below 1;
            nothing is written then.
    """
    position = check_append(key_cache, value_cache, key, value, position, every, positions, counter)
    token = torch.arange(key.shape[1], device=key.device)
    if positions is None:
        positions = position + token
    # each token brings the last one of its position: the order in which index_copy_ writes is not defined
    last = torch.zeros(key_cache.shape[2], dtype=torch.int64, device=key.device)
    last = last.scatter_reduce(0, positions, token, "amax")[positions]
    for cache, new in ((key_cache, key), (value_cache, value)):
        stored = store_rows(new[::every, last], cache.dtype)
        cache[: key.shape[0] : every].index_copy_(2, positions, stored.transpose(1, 2))
    if counter is not None:
        counter.add_(key.shape[1])


@kv_append.fake
def _(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    position: int,
    every: int = 1,
    positions: Tensor | None = None,
    counter: Tensor | None = None,
) -> None:
    check_append_kinds(key_cache, value_cache, key, value, positions, counter)


def empty_caches(*shape: int, width: int, value_width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a key and a value cache [R, Hk, C, width or value_width] full of NaN, int8 ones of 99."""
    if dtype == torch.int8:
        key_cache, value_cache = (torch.full((*shape, stored_width(w, dtype)), 99).char() for w in (width, value_width))
        return key_cache, value_cache
    nan = float("nan")
    return torch.full((*shape, width), nan, dtype=dtype), torch.full((*shape, value_width), nan, dtype=dtype)


@kv_append.samples
def _(dtype: torch.dtype) -> Iterator[Sample]:
    def caches(rows: int, heads: int, capacity: int, width: int, value_width: int) -> tuple[Tensor, Tensor]:
        return empty_caches(rows, heads, capacity, width=width, value_width=value_width, dtype=dtype)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype)

    yield Sample("prompt", (*caches(2, 3, 9, 16, 16), new(2, 5, 3, 16), new(2, 5, 3, 16), 0))
    yield Sample("one token", (*caches(3, 2, 7, 5, 9), new(3, 1, 2, 5), new(3, 1, 2, 9), 6))
    yield Sample("every 3", (*caches(6, 2, 8, 8, 8), new(6, 4, 2, 8), new(6, 4, 2, 8), 2, 3))
    yield Sample("more cache rows", (*caches(5, 1, 4, 8, 8), new(2, 2, 1, 8), new(2, 2, 1, 8), 1))
    yield Sample("no token", (*caches(1, 2, 3, 4, 4), new(1, 0, 2, 4), new(1, 0, 2, 4), 3))
    yield Sample("no row", (*caches(2, 2, 3, 4, 4), new(0, 2, 2, 4), new(0, 2, 2, 4), 0))
    heads_first = (new(2, 3, 6, 8).transpose(1, 2), new(2, 3, 6, 10)[..., :8].transpose(1, 2))
    yield Sample("strided new tokens", (*caches(2, 3, 12, 8, 8), *heads_first, 4))
    fused = new(2, 4, 6, 8)
    yield Sample("parts of one projection", (*caches(2, 2, 6, 8, 8), fused[:, :, 2:4], fused[:, :, 4:], 1))
    wide_caches = tuple(c.transpose(1, 2)[:, 1:, :, :6] for c in caches(2, 8, 3, 7, 9))
    yield Sample("strided caches", (*wide_caches, new(2, 3, 2, 6), new(2, 3, 2, 6), 0))
    yield Sample("long prompt", (*caches(1, 4, 300, 64, 64), new(1, 290, 4, 64), new(1, 290, 4, 64), 7))
    for name, positions, every in (
        ("in order", torch.tensor([0, 1, 4, 6]), 1),
        ("out of order", torch.tensor([5, 0, 6, 2]), 1),
        ("repeated", torch.tensor([3, 1, 3, 3]), 1),
        ("strided", torch.arange(7)[::2], 1),
        ("every 2", torch.tensor([2, 3, 4, 5]), 2),
    ):
        new_tokens = (new(3, 4, 2, 6), new(3, 4, 2, 9)[..., :5])
        yield Sample(f"positions {name}", (*caches(4, 2, 7, 6, 5), *new_tokens, 0, every, positions))
    yield Sample(
        "one position", (*caches(1, 2, 70, 64, 64), new(1, 1, 2, 64), new(1, 1, 2, 64), 0, 1, torch.tensor([69]))
    )
    repeated = torch.arange(300) // 3
    yield Sample("many repeated", (*caches(1, 4, 100, 64, 64), new(1, 300, 4, 64), new(1, 300, 4, 64), 0, 1, repeated))
    for stored in (torch.tensor(3), torch.tensor([0]), torch.tensor([[9, 2]])[:, 1:]):
        caches_and_new = (*caches(3, 2, 7, 6, 5), new(3, 4, 2, 6), new(3, 4, 2, 5))
        yield Sample(f"counter of {stored.tolist()}", (*caches_and_new, 0), {"counter": stored})
    counted = {"every": 2, "counter": torch.tensor(60)}
    yield Sample("counter, every 2", (*caches(5, 4, 100, 64, 64), new(4, 40, 4, 64), new(4, 40, 4, 64), 0), counted)
    for rows, tokens in ((2, 0), (0, 2)):
        shape = (rows, tokens, 2, 4)
        yield Sample(
            f"counter, {shape}", (*caches(2, 2, 3, 4, 4), new(*shape), new(*shape), 0), {"counter": torch.tensor(1)}
        )
    no_token = torch.empty(0, dtype=torch.int64)
    yield Sample("no positions", (*caches(1, 2, 3, 4, 4), new(1, 0, 2, 4), new(1, 0, 2, 4), 0, 1, no_token))
    for cache_dtype in (torch.int8, torch.float16, torch.float32):
        yield from _stored_samples(dtype, cache_dtype)


def _stored_samples(dtype: torch.dtype, stored: torch.dtype) -> Iterator[Sample]:
    """Yield calls that convert the tokens."""

    def sample(name: str, rows: int, tokens: int, width: int, value_width: int, *args: Any, **options: Any) -> Sample:
        caches = empty_caches(rows + 1, 2, 70, width=width, value_width=value_width, dtype=stored)
        key = (
            torch.randn(rows, tokens, 2, width, dtype=dtype)
            * torch.tensor([1e-3, 0, 8, 1])[torch.arange(tokens) % 4, None, None]
        )
        value = torch.randn(rows, tokens, 2, value_width + 3, dtype=dtype)[..., :value_width]
        return Sample(f"{str(stored)[6:]} cache, {name}", (*caches, key.to(dtype), value, *args), options)

    yield sample("one token", 2, 1, 64, 64, 5)
    yield sample("a prompt", 1, 60, 128, 96, 3)
    yield sample("odd sizes, every 2", 4, 5, 33, 7, 1, 2)
    yield sample("repeated positions", 1, 4, 16, 1, 0, 1, torch.tensor([3, 1, 3, 3]))
    yield sample("counter", 3, 4, 24, 40, 0, counter=torch.tensor(9))
