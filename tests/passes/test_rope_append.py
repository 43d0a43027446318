"""rope and the kv_append of its key become one call, with every option of both; not where the rotated key is seen."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from llmrt import ops
from llmrt.passes import RewriteReport, rewrite
from llmrt.passes.rope_append import NAME, ROPE_APPENDS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
B, S, H, Hk, D, Dv, C = 2, 4, 4, 2, 8, 6, 12
Call = Callable[..., Any]


pytestmark = pytest.mark.usefixtures("without_gradients")


def inputs(tokens: int = S, dtype: torch.dtype = torch.float32, rows: int = B) -> list[Tensor]:
    """Return query, key, value, cos, sin, the caches and a number of tokens."""
    fused = torch.randn(rows, tokens, H + 2 * Hk, D).to(dtype)
    query, key, value = fused.split((H, Hk, Hk), 2)
    cos, sin = torch.randn(2, rows, tokens, D).to(dtype).unbind(0)
    caches = torch.zeros(rows, Hk, C, D, dtype=dtype), torch.zeros(rows, Hk, C, Dv, dtype=dtype)
    return [query, key, value[..., :Dv], cos, sin, *caches, torch.tensor(3)]


def swap(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def step(rope: dict[str, Any], append: dict[str, Any], use: Call) -> Call:
    """Return a function that rotates, appends and uses the query, with the permutations that models make."""

    def function(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kc: Tensor, vc: Tensor, n: Tensor) -> Any:
        width = rope.get("rotary_dim", D)
        query, key = (swap(x) for x in ops.rope(q, k, cos[..., :width], sin[..., :width], **rope))
        where = {"counter": n} if "counter" in append else {k: v for k, v in append.items() if k != "at"}
        ops.kv_append(kc, vc, swap(key), v, append.get("at", 0), **where)
        return use(query, key, kc)

    return function


def plain_use(query: Tensor, key: Tensor, cache: Tensor) -> Any:
    return query @ cache[:, :1].mT, cache


def assert_equal(gm: Call, function: Call, given: list[Tensor]) -> None:
    copies = [x.clone() for x in given]
    torch.testing.assert_close(gm(*given), function(*copies), rtol=0, atol=0)
    torch.testing.assert_close(given, copies, rtol=0, atol=0)


def calls(gm: GraphModule) -> list[str]:
    return [node.target._opname for node in gm.graph.nodes if str(node.target).startswith("llmrt.")]


def rewritten(function: Call, given: list[Tensor]) -> tuple[GraphModule, RewriteReport]:
    gm = make_fx(function, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)(*given)
    report = rewrite(gm, ROPE_APPENDS, strict=True)
    assert_equal(gm, function, given)
    return gm, report


WEIGHTS = {"query_weight": torch.rand(D), "key_weight": torch.rand(D), "eps": 1e-5, "offset": 1.0}
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "partial": ({"rotary_dim": 4}, {"at": 2}),
    "interleaved": ({"rotary_dim": 8, "interleaved": True}, {"at": 1, "every": 2}),
    "norms": (WEIGHTS, {"positions": torch.tensor([3, 5, 1, 0])}),
    "counter": (WEIGHTS | {"interleaved": True}, {"counter": True}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_passed_on(name: str, dtype: torch.dtype) -> None:
    gm, report = rewritten(step(*OPTIONS[name], plain_use), inputs(dtype=dtype))
    assert report.fired[NAME] == 1 and calls(gm) == ["rope_append"] and not report.near_misses


def test_tables_by_position() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kc: Tensor, vc: Tensor, n: Tensor) -> Any:
        query, key = ops.rope(q, k, cos[0], sin[0], torch.arange(S)[None])
        position = int(kc.shape[2]) - S
        ops.kv_append(kc, vc, key, v, position)
        return query

    gm, report = rewritten(function, inputs())
    assert report.fired[NAME] == 1 and calls(gm) == ["rope_append"]


def test_one_graph_for_all_sizes() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kc: Tensor, vc: Tensor, n: Tensor) -> Any:
        query, key = (swap(x) for x in ops.rope(q, k, cos, sin))
        query = query.reshape(q.shape[0], H, q.shape[1], D)
        ops.kv_append(kc, vc, swap(key), v, kc.shape[2] - k.shape[1])
        return plain_use(query, key, kc)

    gm = make_fx(function, tracing_mode="symbolic", pre_dispatch=True)(*inputs())
    assert rewrite(gm, ROPE_APPENDS, strict=True).fired[NAME] == 1 and calls(gm) == ["rope_append"]
    for sizes in ((1, torch.float32, 3), (7, torch.float32, 1), (5, torch.float32, 5)):
        assert_equal(gm, function, inputs(*sizes))


def test_layers() -> None:
    def function(*given: Tensor) -> Any:
        x = step({}, {}, plain_use)(*given)[0]
        return x, step({"rotary_dim": 4}, {"at": 4}, plain_use)(given[0] * x.mean(), *given[1:])

    gm, report = rewritten(function, inputs())
    assert report.fired[NAME] == 2 and calls(gm) == ["rope_append"] * 2


def unrelated(query: Tensor, key: Tensor, cache: Tensor) -> Any:
    return query, key.sum()


def doubled(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kc: Tensor, vc: Tensor, n: Tensor) -> Any:
    query, key = ops.rope(q, k, cos, sin)
    ops.kv_append(kc, vc, key, key[..., :Dv], 0)
    return query


def same(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kc: Tensor, vc: Tensor, n: Tensor) -> Any:
    query, key = ops.rope(q, k, cos, sin)
    ops.kv_append(kc, torch.zeros_like(kc), key, key, 0)
    return query


def early(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kc: Tensor, vc: Tensor, n: Tensor) -> Any:
    query, key = ops.rope(q, k, cos, sin)
    ops.kv_append(kc, vc, key, v * query.mean(), 0)


def changed(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kc: Tensor, vc: Tensor, n: Tensor) -> Any:
    query, key = ops.rope(q, k, cos, sin)
    cos.mul_(2)
    ops.kv_append(kc, vc, key, v, 0)
    return query


def written(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kc: Tensor, vc: Tensor, n: Tensor) -> Any:
    query, key = ops.rope(q, k, cos, sin)
    key[:, :1].zero_()
    ops.kv_append(kc, vc, key, v, 0)
    return query


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (step({}, {}, unrelated), "the rotated key is used by sum_1 too"),
        (doubled, "the rotated key is stored as the value too"),
        (same, "the rotated key is stored as the value too"),
        (early, "the rotated query is used by mean before the key is stored"),
        (changed, "an input is written to in between"),
        (written, "the rotated key is used by zero_ too"),
    ],
)
def test_near_misses(function: Call, reason: str) -> None:
    gm, report = rewritten(function, inputs())
    assert report.fired[NAME] == 0 and calls(gm) == ["rope", "kv_append"]
    assert f"{NAME} did not fire (1 times): {reason}" in str(report)


def test_a_part_of_the_key_is_not_the_key() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kc: Tensor, vc: Tensor, n: Tensor) -> Any:
        query, key = ops.rope(q, k, cos, sin)
        ops.kv_append(kc, vc, swap(swap(key)[:, :, :2]), v[:, :2], 0)
        ops.kv_append(kc, vc, key.permute(0, 1, 2, 3).flip(2), v, 4)
        return query

    gm, report = rewritten(function, inputs())
    assert report.fired[NAME] == 0 and calls(gm) == ["rope", "kv_append", "kv_append"]
