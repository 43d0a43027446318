"""rope_append: the bits of rope and kv_append apart; what it leaves alone; bad arguments."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llmrt import ops

B, S, H, Hk, D, Dv, C = 4, 6, 4, 2, 48, 40, 11


def operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    query, key = torch.randn(B, S, H + Hk, D).to(dtype).split((H, Hk), 2)
    return query, key, torch.randn(B, S, Hk, Dv).to(dtype)


def caches(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    memory = torch.full((B + 1, C, Hk, D + Dv + 3), float("nan"), dtype=dtype).transpose(1, 2)
    return memory[..., :D], memory[..., D : D + Dv]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "position": {"position": 5},
    "every": {"every": 2},
    "positions": {"positions": torch.tensor([1, 0, 10, 2, 3, 5])},
    "repeated": {"positions": torch.tensor([1, 0, 1, 0, 3, 1]), "every": 3},
    "counter": {"counter": torch.tensor(5), "every": 2},
    "partial": {"rotary_dim": 22, "position": 1},
    "interleaved": {"rotary_dim": 22, "interleaved": True},
    "ids": {"position_ids": torch.tensor([[3, 1, 0, 2, 4, 5]])},
    "norms": {"query_weight": torch.randn(D), "key_weight": torch.randn(D), "eps": 1e-5, "offset": 1.0},
}
OPTIONS["all"] = OPTIONS["norms"] | OPTIONS["interleaved"] | OPTIONS["ids"] | OPTIONS["repeated"]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_two_steps_apart(name: str, dtype: torch.dtype, threads: int, isa: str) -> None:
    options = dict(OPTIONS[name])
    query, key, value = operands(dtype)
    half = options.get("rotary_dim", D) // 2
    cos, sin = torch.randn(2, *((S,) if "position_ids" in options else (1, S)), half).to(dtype).unbind(0)
    position = options.pop("position", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together, apart = caches(dtype), caches(dtype)
        count = options.pop("counter", None)
        counters = [None if count is None else count.clone() for _ in range(2)]
        rotated = ops.rope_append(query, key, value, cos, sin, *together, position, counter=counters[0], **options)
        place = {n: options.pop(n) for n in ("every", "positions") if n in options}
        expected, expected_key = ops.rope(query, key, cos, sin, **options)
        ops.kv_append(*apart, expected_key, value, position, counter=counters[1], **place)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(rotated, expected) and rotated.is_contiguous()
    assert count is None or counters == [count + S, count + S]
    for x, y in zip(together, apart, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("stored", [torch.int8, torch.float16, torch.float32])
@pytest.mark.parametrize("name", OPTIONS)
def test_converted_keys_equal_the_two_steps_apart(name: str, stored: torch.dtype, isa: str) -> None:
    options = dict(OPTIONS[name])
    query, key, value = operands(torch.bfloat16)
    half = options.get("rotary_dim", D) // 2
    cos, sin = torch.randn(2, *((S,) if "position_ids" in options else (1, S)), half).to(torch.bfloat16).unbind(0)
    position, count = options.pop("position", 0), options.pop("counter", None)
    widths = [ops.stored_width(width, stored) for width in (D, Dv)]
    together, apart = ([torch.full((B + 1, Hk, C, w), 7).to(stored) for w in widths] for _ in range(2))
    counters = [None if count is None else count.clone() for _ in range(2)]
    rotated = ops.rope_append(query, key, value, cos, sin, *together, position, counter=counters[0], **options)
    place = {n: options.pop(n) for n in ("every", "positions") if n in options}
    expected, expected_key = ops.rope(query, key, cos, sin, **options)
    ops.kv_append(*apart, expected_key, value, position, counter=counters[1], **place)
    assert torch.equal(rotated, expected) and not torch.equal(together[0], torch.full_like(together[0], 7))
    for x, y in zip(together, apart, strict=True):
        assert torch.equal(x, y)


def test_many_tokens_on_several_threads(isa: str) -> None:
    tokens = 700
    query, key, value = torch.randn(3, 2, tokens, 3, 64).unbind(0)
    cos, sin = torch.randn(2, 1, tokens, 32).unbind(0)
    for positions in (torch.randperm(tokens), torch.randint(0, 9, (tokens,))):
        together, apart = torch.zeros(2, 2, 2, 3, tokens, 64).unbind(0)
        rotated = ops.rope_append(query, key, value, cos, sin, *together, 0, positions=positions)
        expected, expected_key = ops.rope(query, key, cos, sin)
        ops.kv_append(*apart, expected_key, value, 0, positions=positions)
        assert torch.equal(rotated, expected) and torch.equal(together, apart)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "key heads": ({"key": torch.randn(B, S, 3, D)}, r"key has shape .* expected \[any, any, 2, 48\]"),
    "key tokens": ({"key": torch.randn(B, 1, Hk, D)}, r"key has shape .* expected \[4, 6, any, 48\]"),
    "value width": ({"value": torch.randn(B, S, Hk, D)}, r"value has shape .* expected \[4, 6, 2, 40\]"),
    "value dtype": ({"value": torch.randn(B, S, Hk, Dv).half()}, "value has dtype float16; expected float32"),
    "cache dtype": ({"key_cache": torch.zeros(B, Hk, C, D).half()}, "value_cache has dtype float32; expected float16"),
    "both caches": (
        {"key_cache": torch.zeros(B, Hk, C, D).bfloat16(), "value_cache": torch.zeros(B, Hk, C, Dv).bfloat16()},
        "key_cache has dtype bfloat16; valid with float32 tokens: float32, float16, int8",
    ),
    "capacity": ({"position": 6}, "position 6 and 6 tokens do not fit .* 11"),
    "position": ({"position": 1, "positions": torch.arange(S)}, "position is 1; expected 0"),
    "positions": ({"positions": torch.arange(S) + 6}, "positions has value 11; valid: 0 to 10"),
    "counter": ({"counter": torch.tensor([6])}, "counter 6 and 6 tokens do not fit .* 11"),
    "counter position": ({"counter": torch.tensor(2), "position": 2}, "position is 2; expected 0, as counter"),
    "both": ({"counter": torch.tensor(0), "positions": torch.arange(S)}, "positions and counter are given"),
    "every": ({"every": 0}, "every is 0; expected at least 1"),
    "rows": (
        {"key_cache": torch.zeros(2, Hk, C, D), "value_cache": torch.zeros(2, Hk, C, Dv)},
        "key has 4 rows; key_cache holds 2",
    ),
    "cos": ({"cos": torch.randn(1, S, 20)}, "cos has 20 columns; valid: 24 or 48"),
    "ids": (
        {"position_ids": torch.full((1, S), 6), "cos": torch.randn(6, D), "sin": torch.randn(6, D)},
        "value 6; valid",
    ),
    "weight": ({"query_weight": torch.randn(D)}, "key_weight is missing"),
}


@pytest.mark.parametrize("which", ["kernel", "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named_and_nothing_is_written(case: str, which: str, isa: str) -> None:
    changed, message = BAD[case]
    query, key, value = operands()
    key_cache, value_cache = caches()
    cos, sin = torch.randn(2, 1, S, D).unbind(0)
    args = {"query": query, "key": key, "value": value, "cos": cos, "sin": sin}
    args |= {"key_cache": key_cache, "value_cache": value_cache, "position": 0}
    with pytest.raises(RuntimeError, match=message):
        (ops.rope_append if which == "kernel" else ops.rope_append.reference)(**args | changed)
    assert key_cache.isnan().all() and value_cache.isnan().all()
