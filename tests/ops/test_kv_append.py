"""kv_append: what it leaves alone, strides, bad arguments."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmrt import ops


def test_other_memory_is_untouched(isa: str) -> None:
    memory = torch.full((2, 4, 12, 3, 10), math.nan)
    key_cache, value_cache = memory[0].transpose(1, 2)[:, :2, :, :8], memory[1].transpose(1, 2)[:, 1:, :, 1:7]
    fused = torch.randn(4, 5, 6, 8)
    key, value = fused[:, :, :2], fused[:, :, 3:5, :6]
    ops.kv_append(key_cache, value_cache, key, value, 4, 2)
    assert torch.equal(key_cache[::2, :, 4:9], key[::2].transpose(1, 2))
    assert torch.equal(value_cache[::2, :, 4:9], value[::2].transpose(1, 2))
    written = 2 * 2 * 5 * (8 + 6)
    assert memory.isfinite().sum() == written


def test_every_dtype_is_copied_bit_by_bit(isa: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        key_cache, value_cache = torch.zeros(2, 1, 3, 2, 9, 16, dtype=dtype).unbind(0)
        key = torch.tensor([math.nan, math.inf, -0.0, 1e-7] * 4).to(dtype).expand(1, 5, 2, 16)
        ops.kv_append(key_cache[0, :, :, :], value_cache[0], key, -key, 2)
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        for cache, new in ((key_cache, key), (value_cache, -key)):
            assert torch.equal(cache[0, 0, :, 2:7].view(bits), new[0].transpose(0, 1).contiguous().view(bits))
            assert not cache[0, 0, :, :2].any() and not cache[0, :, :, 7:].any() and not cache[0, 1:].any()


CACHE, NEW = torch.zeros(2, 3, 6, 8), torch.zeros(2, 4, 3, 8)
BAD: list[tuple[str, Callable[[], Any], str]] = [
    (
        "position",
        lambda: ops.kv_append(CACHE, CACHE, NEW, NEW, 3),
        "position 3 and 4 tokens do not fit .* capacity of 6",
    ),
    ("negative position", lambda: ops.kv_append(CACHE, CACHE, NEW, NEW, -1), "position -1 and 4 tokens do not fit"),
    ("every", lambda: ops.kv_append(CACHE, CACHE, NEW, NEW, 0, 0), "every is 0; expected at least 1"),
    ("rows", lambda: ops.kv_append(CACHE[:1], CACHE[:1], NEW, NEW, 0), "key has 2 rows; key_cache holds 1"),
    ("cache dtype", lambda: ops.kv_append(CACHE.int(), CACHE, NEW, NEW, 0), "key_cache has dtype int32"),
    (
        "value cache dtype",
        lambda: ops.kv_append(CACHE, CACHE.half(), NEW, NEW, 0),
        "value_cache has dtype float16; expected f",
    ),
    (
        "cache dtype",
        lambda: ops.kv_append(CACHE.bfloat16(), CACHE.bfloat16(), NEW, NEW, 0),
        "key_cache has dtype bfloat16; valid with float32 tokens: float32, float16, int8",
    ),
    (
        "int8 cache width",
        lambda: ops.kv_append(CACHE.char(), CACHE.char(), NEW, NEW, 0),
        r"key has shape .*; expected \[any, any, ",
    ),
    (
        "value dtype",
        lambda: ops.kv_append(CACHE, CACHE, NEW, NEW.half(), 0),
        "value has dtype float16; expected float32",
    ),
    (
        "key heads",
        lambda: ops.kv_append(CACHE, CACHE, NEW[:, :, :2], NEW, 0),
        r"key has shape .* expected \[any, any, 3, 8",
    ),
    (
        "value tokens",
        lambda: ops.kv_append(CACHE, CACHE, NEW, NEW[:, :3], 0),
        r"value has shape .* expected \[2, 4, 3, 8",
    ),
    (
        "capacity",
        lambda: ops.kv_append(CACHE, CACHE[:, :, :5], NEW, NEW, 0),
        r"value_cache has shape .* \[2, 3, 6, any",
    ),
    (
        "stride",
        lambda: ops.kv_append(CACHE.mT.contiguous().mT, CACHE, NEW, NEW, 0),
        "key_cache has stride 6 in its last",
    ),
]


def at(*positions: int, position: int = 0, every: int = 1, key: torch.Tensor = NEW) -> None:
    ops.kv_append(CACHE, CACHE.clone(), key, NEW, position, every, torch.tensor(positions))


BAD += [
    ("large entry", lambda: at(0, 6, 1, 2), "positions has value 6; valid: 0 to 5"),
    ("negative entry", lambda: at(0, 1, 2, -1), "positions has value -1; valid: 0 to 5"),
    ("wild entry", lambda: at(0, 1, 2**62, 3), "positions has value 4611686018427387904; valid: 0 to 5"),
    ("short positions", lambda: at(0, 1, 2), r"positions has shape \[3\]; expected \[4\]"),
    ("both positions", lambda: at(0, 1, 2, 3, position=1), "position is 1; expected 0, as positions says"),
    ("positions, every", lambda: at(0, 1, 2, 3, every=0), "every is 0"),
    (
        "positions dtype",
        lambda: ops.kv_append(CACHE, CACHE, NEW, NEW, 0, 1, torch.arange(4).int()),
        "positions has dtype int32; expected int64",
    ),
]


def counted(count: torch.Tensor, position: int = 0, positions: torch.Tensor | None = None) -> None:
    ops.kv_append(CACHE, CACHE.clone(), NEW, NEW, position, 1, positions, count)


BAD += [
    ("large counter", lambda: counted(torch.tensor(3)), "counter 3 and 4 tokens do not fit .* capacity of 6"),
    ("negative counter", lambda: counted(torch.tensor([-1])), "counter -1 and 4 tokens do not fit"),
    ("wild counter", lambda: counted(torch.tensor(2**63 - 1)), "counter 9223372036854775807 and 4 tokens do not fit"),
    ("counter, position", lambda: counted(torch.tensor(0), 2), "position is 2; expected 0, as counter says"),
    ("both", lambda: counted(torch.tensor(0), 0, torch.arange(4)), "positions and counter are given; valid: one"),
    ("counter dtype", lambda: counted(torch.tensor(0).int()), "counter has dtype int32; expected int64"),
    ("counter shape", lambda: counted(torch.tensor([0, 0])), r"counter has shape \[2\]; expected one element"),
]


@pytest.mark.parametrize("which", ["kernel", "reference"])
def test_nothing_is_written_when_a_position_is_bad(which: str, isa: str) -> None:
    cache, new = torch.zeros(2, 3, 6, 8), torch.ones(2, 4, 3, 8)
    append = ops.kv_append if which == "kernel" else ops.kv_append.reference
    with pytest.raises(RuntimeError, match="positions has value 6"):
        append(cache, cache, new, new, 0, 1, torch.tensor([0, 1, 2, 6]))
    assert not cache.any()


@pytest.mark.parametrize("which", ["kernel", "reference"])
def test_a_counter_that_does_not_fit_stays(which: str, isa: str) -> None:
    cache, new, counter = torch.zeros(2, 3, 6, 8), torch.ones(2, 4, 3, 8), torch.tensor(2)
    append = ops.kv_append if which == "kernel" else ops.kv_append.reference
    append(cache, cache, new, new, 0, counter=counter)
    assert counter == 6 and cache[:, :, 2:].all() and not cache[:, :, :2].any()
    with pytest.raises(RuntimeError, match="counter 6 and 1 tokens do not fit"):
        append(cache, cache, -new[:, :1], -new[:, :1], 0, counter=counter)
    assert counter == 6 and cache.min() == 0


def test_new_tokens_have_any_strides(isa: str) -> None:
    key_cache, value_cache = torch.zeros(2, 2, 3, 9, 8).unbind(0)
    key, value = torch.randn(2, 2, 8, 5, 3).permute(0, 1, 3, 4, 2).unbind(0)
    ops.kv_append(key_cache, value_cache, key, value, 1)
    assert torch.equal(key_cache[:, :, 1:6], key.transpose(1, 2))
    assert torch.equal(value_cache[:, :, 1:6], value.transpose(1, 2))


@pytest.mark.parametrize("tokens", [1, 7, 900])
@pytest.mark.parametrize("places", [5, 1000])
def test_positions_equal_index_copy(tokens: int, places: int, isa: str) -> None:
    caches = list(torch.zeros(4, 2, 3, places, 40).unbind(0))
    key, value = torch.randn(2, 2, tokens, 3, 40).unbind(0)
    positions = torch.randint(0, places, (tokens,))
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        ops.kv_append(caches[0], caches[1], key, value, 0, 1, positions)
    finally:
        torch.set_num_threads(before)
    last = {int(p): s for s, p in enumerate(positions)}  # of a repeated position the last token
    for cache, new in ((caches[2], key), (caches[3], value)):
        cache[:, :, list(last)] = new[:, list(last.values())].transpose(1, 2)
    assert torch.equal(caches[0], caches[2]) and torch.equal(caches[1], caches[3])


@pytest.mark.parametrize(("call", "message"), [pytest.param(c, m, id=name) for name, c, m in BAD])
def test_bad_arguments_are_named(isa: str, call: Callable[[], Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
