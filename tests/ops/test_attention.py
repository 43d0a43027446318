"""Attention beyond its samples: beam search on an indirect cache, splits, leaks, strides, bad arguments."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from llmrt import ops
from llmrt.ops import attention

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def expected(query: Tensor, key: Tensor, value: Tensor, length: int, scale: float, **options: Any) -> Tensor:
    """Return the reference in float64."""
    double = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}
    return attention.reference(query.double(), key.double(), value.double(), length, scale, **double)


def assert_close(actual: Tensor, wanted: Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), wanted, rtol=tolerance, atol=tolerance, equal_nan=True)


def operands(
    batch: int, tokens: int, length: int, heads: int = 4, kv_heads: int = 2, width: int = 16, **more: Any
) -> Any:
    query = torch.randn(batch, tokens, heads, width, **more)
    key, value = torch.randn(2, batch, kv_heads, length, width, **more)
    return query, key, value, length, width**-0.5


@pytest.mark.parametrize("beams", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beam_search_equals_reordered_caches(isa: str, beams: int, dtype: torch.dtype) -> None:
    samples, prompt, steps, heads, kv_heads, width = 2, 75, 9, 6, 2, 24
    batch, capacity = samples * beams, prompt + steps
    cache = [torch.full((batch, kv_heads, capacity, width), math.nan, dtype=dtype) for _ in range(2)]
    new = [torch.randn(samples, prompt, kv_heads, width, dtype=dtype).repeat_interleave(beams, 0) for _ in range(2)]
    rows = (torch.arange(batch) // beams * beams).int()[:, None].repeat(1, capacity)
    ops.kv_append(*cache, *new, 0, beams)
    plain = [x.transpose(1, 2) for x in new]  # what a cache that moves keys and values would hold
    for step in range(steps):
        parent = torch.randint(0, beams, (batch,)) + torch.arange(batch) // beams * beams
        plain = [x[parent] for x in plain]
        rows = rows[parent]
        position = prompt + step
        rows[:, position] = torch.arange(batch)
        new = [torch.randn(batch, 1, kv_heads, width, dtype=dtype) for _ in range(2)]
        ops.kv_append(*cache, *new, position)
        plain = [torch.cat((x, n.transpose(1, 2)), 2) for x, n in zip(plain, new, strict=True)]
        tokens = 1 + step % 3  # every third step verifies several tokens at once
        query = torch.randn(batch, tokens, heads, width, dtype=dtype)
        actual = attention(query, *cache, position + 1, 0.2, rows=rows, beams=beams)
        assert_close(actual, expected(query, *plain, position + 1, 0.2))
        assert_close(attention(query, *cache, position + 1, 0.2, rows=rows), expected(query, *plain, position + 1, 0.2))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("tokens", "heads"), [(1, 2), (1, 3), (3, 1), (50, 1), (130, 3)])
def test_work_split_over_any_number_of_threads(isa: str, threads: int, tokens: int, heads: int) -> None:
    query, *rest = operands(1, tokens, 1400, heads, heads, 20)
    sinks, slopes, mask = torch.randn(heads), torch.rand(heads) / 100, torch.rand(1, 1400) < 0.9
    mask[:, :400] = False  # the first split sees nothing
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        plain = attention(query, *rest)
        options = attention(query, *rest, sinks=sinks, slopes=slopes, mask=mask, window=1300)
    finally:
        torch.set_num_threads(before)
    assert_close(plain, expected(query, *rest))
    assert_close(options, expected(query, *rest, sinks=sinks, slopes=slopes, mask=mask, window=1300))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 60])
def test_hidden_memory_does_not_leak(isa: str, dtype: torch.dtype, tokens: int) -> None:
    batch, length, window = 2, 190, 100
    query, key, value, _, scale = operands(batch, tokens, length + 7, dtype=dtype)
    padding = torch.ones(batch, length, dtype=torch.bool)
    padding[0, : length - 80], padding[1, length - 77] = False, False
    whole = padding[:, None, None] & torch.ones(tokens, length, dtype=torch.bool).tril(length - tokens)
    first = max(0, length - tokens - window + 1)
    for kind, option in {
        "padding": {"mask": padding},
        "bool": {"mask": whole},
        "float": {"mask": torch.zeros(whole.shape, dtype=dtype).masked_fill(~whole, -math.inf)},
        "window": {"window": window},
    }.items():
        hidden = torch.zeros(batch, length + 7, dtype=torch.bool)
        hidden[:, length:] = True
        hidden[:, :length] |= torch.arange(length) < first if kind == "window" else ~padding
        results = []
        for junk in (0.0, math.nan, math.inf):
            k, v = (x.masked_fill(hidden[:, None, :, None], junk) for x in (key, value))
            results.append(attention(query, k, v, length, scale, **option))
        assert results[0].isfinite().all(), kind
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2]), kind


@pytest.mark.parametrize("tokens", [1, 40])
def test_mask_and_window_hide_together(isa: str, tokens: int) -> None:
    query, key, value, length, scale = operands(1, tokens, 150)
    mask = torch.rand(1, 1, tokens, length) < 0.5
    first = length - tokens - 10 + 1
    mask[:, :, tokens // 2 :, first : first + 4] = True  # where no window reaches them
    mask[:, :, : tokens // 2, first : first + 4] = False
    hidden = slice(first, first + 4) if tokens > 1 else slice(0, first)
    key[:, :, hidden], value[:, :, hidden] = math.nan, math.nan
    actual = attention(query, key, value, length, scale, mask=mask, window=10)
    assert actual.isfinite().all()
    assert_close(actual, expected(query, key, value, length, scale, mask=mask, window=10))


@pytest.mark.parametrize("tokens", [1, 40])
def test_visible_nan_stays(isa: str, tokens: int) -> None:
    query, key, value, length, scale = operands(2, tokens, 50)
    key[0, 0, 5, 3] = math.nan
    out = attention(query, key, value, length, scale)
    assert out[0, :, :2].isnan().all() and not out[0, :, 2:].isnan().any() and not out[1].isnan().any()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 11])
def test_strides(isa: str, dtype: torch.dtype, tokens: int) -> None:
    heads_first = torch.randn(2, 4, 30, 24, dtype=dtype)[:, :, :tokens].transpose(1, 2)
    last_strided = torch.randn(2, tokens, 24, 4, dtype=dtype).transpose(2, 3)
    fused = torch.randn(2, 15, 3, 3, 29, dtype=dtype)[..., :24]
    key, value = fused[:, :, 1, :2].transpose(1, 2), fused[:, :, 2, 1:].transpose(1, 2)
    mask = torch.rand(15, tokens, 3, 2).lt(0.7).permute(3, 2, 1, 0)[:, 1:2]
    rows = torch.tensor([[0], [1]], dtype=torch.int32).expand(2, 15)
    for query in (heads_first, last_strided):
        wanted = expected(query, key, value, 15, 0.2, mask=mask)
        assert_close(attention(query, key, value, 15, 0.2, mask=mask), wanted)
        assert_close(attention(query, key, value, 15, 0.2, mask=mask, rows=rows, beams=2), wanted)
        one = mask[:1].expand(2, 4, tokens, 15)
        assert_close(attention(query, key, value, 15, 0.2, mask=one), expected(query, key, value, 15, 0.2, mask=one))


def test_float32_stays_float32(isa: str) -> None:
    for tokens in (1, 200):
        query, key, value, length, _ = operands(1, tokens, 700, 4, 2, 64)
        wanted = expected(query, key, value, length, 1.0)
        ours, torchs = (op(query, key, value, length, 1.0) - wanted for op in (attention, attention.reference))
        assert ours.abs().max() < 2 * torchs.abs().max()


def test_lengths_share_one_graph(isa: str) -> None:
    counter = CompileCounter()
    compiled = torch.compile(lambda *args: attention(*args), backend=counter, fullgraph=True, dynamic=True)
    query, key, value, _, scale = operands(2, 1, 40)
    for length in (20, 21, 30):
        assert_close(compiled(query, key, value, length, scale), expected(query, key, value, length, scale))
    assert counter.frame_count == 1


GOOD = operands(2, 3, 10)
BAD: list[tuple[str, Callable[[], Any], str]] = [
    ("dtype", lambda: attention(GOOD[0].long(), *GOOD[1:]), "query has dtype int64; valid: float32, bfloat16, float16"),
    (
        "key dtype",
        lambda: attention(GOOD[0], GOOD[1].bfloat16(), GOOD[2].bfloat16(), *GOOD[3:]),
        "key has dtype bfloat16; valid with float32 tokens: float32, float16, int8",
    ),
    (
        "int8 key width",
        lambda: attention(GOOD[0], GOOD[1].char(), GOOD[2].char(), *GOOD[3:]),
        r"key has shape .*; expected \[any, any, any, 20\]",
    ),
    (
        "int8 value without scale",
        lambda: attention(GOOD[0], torch.zeros(*GOOD[1].shape[:3], 20).char(), GOOD[2].char()[..., :3], *GOOD[3:]),
        "value has rows of 3 bytes; expected D codes and a scale of 4",
    ),
    (
        "value dtype",
        lambda: attention(*GOOD[:2], GOOD[2].half(), *GOOD[3:]),
        "value has dtype float16; expected float32",
    ),
    ("query rank", lambda: attention(GOOD[0][0], *GOOD[1:]), r"query has shape \[3, 4, 16\]"),
    (
        "key width",
        lambda: attention(GOOD[0], GOOD[1][..., :8], *GOOD[2:]),
        r"key has shape .* expected \[any, any, any, 16",
    ),
    (
        "value tokens",
        lambda: attention(*GOOD[:2], GOOD[2][:, :, :9], *GOOD[3:]),
        r"value has shape .* expected \[2, 2, 10",
    ),
    ("heads", lambda: attention(GOOD[0][:, :, :3], *GOOD[1:]), "query has 3 heads; expected a multiple of the 2 key"),
    ("key stride", lambda: attention(GOOD[0], GOOD[1].mT.contiguous().mT, *GOOD[2:]), "key has stride 10 in its last"),
    ("length", lambda: attention(*GOOD[:3], 11, 1.0), "length is 11; expected 0 to 10"),
    ("negative length", lambda: attention(*GOOD[:3], -1, 1.0), "length is -1; expected 0 to 10"),
    ("short length", lambda: attention(*GOOD[:3], 2, 1.0), "query has 3 tokens and length is 2"),
    ("window", lambda: attention(*GOOD, window=-1), "window is -1"),
    ("softcap", lambda: attention(*GOOD, softcap=-2.0), "softcap is -2"),
    (
        "cache rows",
        lambda: attention(GOOD[0], GOOD[1][:1], GOOD[2][:1], *GOOD[3:]),
        "key has 1 rows; expected at least 2",
    ),
    ("beams", lambda: attention(*GOOD, beams=3), "beams is 3; expected a divisor of the 2 rows"),
    ("mask shape", lambda: attention(*GOOD, mask=torch.ones(2, 9, dtype=torch.bool)), r"mask has shape \[2, 9\]"),
    ("mask dtype", lambda: attention(*GOOD, mask=torch.ones(2, 10)), "and dtype float32; expected bool"),
    ("mask heads", lambda: attention(*GOOD, mask=torch.ones(2, 3, 3, 10)), r"mask has shape \[2, 3, 3, 10\]"),
    ("mask long", lambda: attention(*GOOD, mask=torch.ones(2, 1, 3, 10).long()), "mask has dtype int64"),
    ("slopes shape", lambda: attention(*GOOD, slopes=torch.ones(2)), r"slopes has shape \[2\]; expected \[4\]"),
    (
        "slopes dtype",
        lambda: attention(*GOOD, slopes=torch.ones(4).half()),
        "slopes has dtype float16; expected float32",
    ),
    ("sinks shape", lambda: attention(*GOOD, sinks=torch.ones(1, 4)), r"sinks has shape \[1, 4\]; expected \[4\]"),
    ("rows dtype", lambda: attention(*GOOD, rows=torch.zeros(2, 10).long()), "rows has dtype int64; expected int32"),
    (
        "rows shape",
        lambda: attention(*GOOD, rows=torch.zeros(2, 9).int()),
        r"rows has shape \[2, 9\]; expected \[2, >= 10",
    ),
    ("rows high", lambda: attention(*GOOD, rows=torch.eye(2, 10).int() * 2), "rows has the entry 2; expected 0 to 1"),
    ("rows low", lambda: attention(*GOOD, rows=-torch.eye(2, 10).int()), "rows has the entry -1; expected 0 to 1"),
]


@pytest.mark.parametrize(("call", "message"), [pytest.param(c, m, id=name) for name, c, m in BAD])
def test_bad_arguments_are_named(isa: str, call: Callable[[], Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


def test_rows_beyond_length_are_not_read(isa: str) -> None:
    rows = torch.tensor([[0] * 8 + [99] * 4, [1] * 8 + [-7] * 4], dtype=torch.int32)
    query, key, value, _, scale = GOOD
    assert torch.equal(attention(query, key, value, 8, scale, rows=rows), attention(query, key, value, 8, scale))
