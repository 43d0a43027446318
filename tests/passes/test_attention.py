"""Rewrites of scaled_dot_product_attention: masks, causality, groups of heads; what must stay as it is."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rewriting import DTYPES, Rewritten, assert_close
from torch.nn.functional import scaled_dot_product_attention as sdpa

NAMES = ["attention"]
ONE = {"llmrt.attention.default": 1}


def operands(dtype: torch.dtype, tokens: int, length: int, kv_heads: int = 4, batch: int = 2) -> list[torch.Tensor]:
    """Return query as a view of [B, S, H, D], and a cache's key and value."""
    query = torch.randn(batch, tokens, 4, 16, dtype=dtype).transpose(1, 2)
    return [query, *(torch.randn(batch, kv_heads, length, 16, dtype=dtype) for _ in range(2))]


def repeated(x: torch.Tensor, times: int) -> torch.Tensor:
    batch, heads, length, width = x.shape
    return x[:, :, None].expand(batch, heads, times, length, width).reshape(batch, heads * times, length, width)


def joined(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous().reshape(x.shape[0], x.shape[2], -1)


def compare(
    function: Callable[..., Any], calls: list[list[torch.Tensor]], dtype: torch.dtype, dynamic: Any = ()
) -> Any:
    """Run a compiled function on several inputs, compare, and return its only graph's record."""
    rewritten = Rewritten(function, NAMES)
    for args in calls:
        for x, dims in zip(args, dynamic, strict=False):
            torch._dynamo.maybe_mark_dynamic(x, dims)
        assert_close(rewritten(*args), function(*args), dtype)
    assert len(rewritten.graphs) == 1
    return rewritten


def views(rewritten: Rewritten) -> list[str]:
    calls = [str(n.target) for n in rewritten.graphs[-1].graph.find_nodes(op="call_function", target=PERMUTE)]
    return calls + [str(n.target) for n in rewritten.graphs[-1].graph.find_nodes(op="call_function", target=EXPAND)]


PERMUTE, EXPAND = torch.ops.aten.permute.default, torch.ops.aten.expand.default


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["bool", "float", "none"])
def test_heads_in_groups_are_read_as_they_are(kind: str, dtype: torch.dtype) -> None:
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen = None if kind == "none" else mask
        return joined(sdpa(q, repeated(k, 2), repeated(v, 2), seen, scale=0.3))

    calls = []
    for length in (7, 11):
        mask: torch.Tensor = torch.ones(2, 1, length, length, dtype=torch.bool).tril()
        mask[1, :, :, :3] = False
        if kind == "float":
            mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)[:, :, 3:]
        q, k, v = operands(dtype, mask.shape[2], length, 2)
        calls.append([q, k, v, mask])
    rewritten = compare(function, calls, dtype, dynamic=(2, 2, 2, [2, 3]))
    assert rewritten.fired == {"attention": 1} and rewritten.calls == ONE and rewritten.misses == []
    assert len(views(rewritten)) == 1  # [B, S, H, D] of the query, which arrives transposed
    operator = rewritten.graphs[-1].graph.find_nodes(op="call_function", target=torch.ops.llmrt.attention.default)[0]
    assert [x.op for x in operator.args[1:3]] == ["placeholder"] * 2
    assert operator.args[5] is False


@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_attention_among_new_tokens(dtype: torch.dtype) -> None:
    def function(qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in qkv.split([4, 2, 2], 2))
        return joined(sdpa(q, repeated(k, 2), repeated(v, 2), is_causal=True))

    calls = [[torch.randn(2, tokens, 8, 16, dtype=dtype)] for tokens in (5, 9)]
    rewritten = compare(function, calls, dtype, [1])
    assert rewritten.fired == {"attention": 1} and rewritten.calls == ONE
    assert len(views(rewritten)) == 2  # keys and values, heads first


def test_decoding_without_a_mask_sees_everything() -> None:
    calls = [operands(torch.float32, 1, length) for length in (5, 9)]
    rewritten = compare(lambda q, k, v: joined(sdpa(q, k, v)), calls, torch.float32, dynamic=((), 2, 2))
    assert rewritten.fired == {"attention": 1} and rewritten.calls == ONE


def test_default_scale_and_native_groups() -> None:
    args = operands(torch.float32, 3, 8, 2)
    rewritten = compare(lambda q, k, v: sdpa(q, k, v, enable_gqa=True), [args], torch.float32)
    operator = rewritten.graphs[-1].graph.find_nodes(op="call_function", target=torch.ops.llmrt.attention.default)[0]
    assert rewritten.calls == ONE and math.isclose(operator.args[4], 16**-0.5)


@pytest.mark.parametrize(
    "shape", [(5, 9), (1, 5, 9), (4, 1, 9), (4, 5, 9), (1, 1, 1, 9), (2, 1, 1, 9), (1, 4, 5, 9), (2, 4, 5, 9)]
)
@pytest.mark.parametrize("boolean", [True, False])
def test_masks_of_all_shapes(shape: tuple[int, ...], boolean: bool) -> None:
    mask = torch.rand(shape) < 0.7 if boolean else torch.randn(shape)
    args = [*operands(torch.float32, 5, 9), mask]
    rewritten = compare(lambda q, k, v, m: joined(sdpa(q, k, v, attn_mask=m)), [args], torch.float32)
    assert rewritten.fired == {"attention": 1} and rewritten.calls == ONE


def test_expanded_masks_are_passed_unexpanded() -> None:
    args = [*operands(torch.float32, 5, 9), torch.rand(2, 1, 1, 9) < 0.7]
    rewritten = compare(lambda q, k, v, m: sdpa(q, k, v, m.expand(2, 4, 5, 9)), [args], torch.float32)
    assert rewritten.fired == {"attention": 1}
    assert not rewritten.graphs[-1].graph.find_nodes(op="call_function", target=EXPAND)


def test_one_head_for_all_queries() -> None:
    args = operands(torch.float32, 5, 9, 1)
    assert compare(lambda q, k, v: joined(sdpa(q, k, v)), [args], torch.float32).calls == ONE


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_see_nothing(dtype: torch.dtype) -> None:
    """A bool mask gives them zeros; the smallest number, added, lets them see everything alike."""
    shown = torch.ones(2, 1, 5, 9, dtype=torch.bool)
    shown[0, :, 2] = False
    for mask in (shown, torch.zeros(shown.shape).masked_fill(~shown, torch.finfo(torch.float32).min).to(dtype)):
        if dtype == torch.float16 and mask.dtype == dtype:
            continue  # minus infinity: NaN
        args = [*operands(dtype, 5, 9), mask]
        compare(lambda q, k, v, m: joined(sdpa(q, k, v, m)), [args], dtype)


def test_two_layers() -> None:
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q = sdpa(q, k, v)
        return joined(sdpa(q, k + 1, v))

    rewritten = compare(function, [operands(torch.float32, 5, 9)], torch.float32)
    assert rewritten.fired == {"attention": 2} and len(views(rewritten)) == 1


def miss(function: Callable[..., Any], *args: torch.Tensor, dynamic: Any = ()) -> str:
    """Return why a call was left alone."""
    rewritten = compare(function, [list(args)], torch.float32, dynamic)
    assert rewritten.fired == {} and sum("scaled_dot_product" in name for name in rewritten.calls) == 1
    return " ".join(rewritten.misses)


def test_causality_from_the_first_key_is_left_alone() -> None:
    args = operands(torch.float32, 3, 8)
    assert "is_causal counts 3 queries" in miss(lambda q, k, v: sdpa(q, k, v, is_causal=True), *args)
    one = operands(torch.float32, 1, 8)
    assert "is_causal" in miss(lambda q, k, v: sdpa(q, k, v, is_causal=True), *one)
    same = operands(torch.float32, 8, 8)
    unknown = miss(lambda q, k, v: sdpa(q, k, v, is_causal=True), *same, dynamic=(2, 2, 2))
    assert "is_causal" in unknown


def test_keys_with_strides_in_their_last_dimension_are_left_alone() -> None:
    q, _, v = operands(torch.float32, 5, 9)
    k = torch.randn(2, 4, 16, 9)
    assert "not contiguous in its last" in miss(lambda q, k, v: sdpa(q, k.transpose(2, 3), v), q, k, v)


def test_one_row_of_keys_for_a_batch_is_left_alone() -> None:
    q, k, v = operands(torch.float32, 5, 9)
    assert "not those of attention" in miss(lambda q, k, v: sdpa(q, k[:1], v[:1]), q, k, v)


def test_keys_written_to_in_between_are_left_alone() -> None:
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k = k.clone()
        wide = repeated(k, 2)
        k.index_copy_(2, torch.tensor([0]), torch.zeros(2, 2, 1, 16))
        return sdpa(q, wide, repeated(v, 2)) + k.sum()

    assert "written to in between" in miss(function, *operands(torch.float32, 5, 9, 2))


def test_dropout_is_left_alone() -> None:
    torch._dynamo.reset()
    rewritten = Rewritten(lambda q, k, v: sdpa(q, k, v, dropout_p=0.5), NAMES)
    rewritten(*operands(torch.float32, 5, 9))
    assert rewritten.fired == {} and rewritten.misses == ["dropout is 0.5"]
