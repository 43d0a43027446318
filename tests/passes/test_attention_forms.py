"""Rewrites of attention that models write out: scaled, capped, biased, masked and cast in many orders."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rewriting import DTYPES, Rewritten, assert_close
from test_attention import joined, operands, repeated
from torch import Tensor

NAMES = ["attention, written out"]
FLOAT = torch.float32


def float_mask(shown: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(shown, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)


def grouped(q: Tensor, k: Tensor, v: Tensor, shown: Tensor, bias: Tensor) -> Tensor:
    """Keys repeated, softmax in float32."""
    k, v = repeated(k, 2), repeated(v, 2)
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.3 + float_mask(shown, q.dtype)
    weights = torch.nn.functional.softmax(scores, dim=-1, dtype=FLOAT).to(q.dtype)
    return joined(torch.matmul(torch.nn.functional.dropout(weights, 0.1, False), v))


def capped(q: Tensor, k: Tensor, v: Tensor, shown: Tensor, bias: Tensor) -> Tensor:
    """Scores bounded by tanh."""
    scores = torch.matmul(q, repeated(k, 2).transpose(2, 3)) * 0.3
    scores = torch.tanh(scores / 2.5) * 2.5 + float_mask(shown, q.dtype)
    return joined(torch.softmax(scores, -1, dtype=FLOAT).to(q.dtype) @ repeated(v, 2))


def wide(q: Tensor, k: Tensor, v: Tensor, shown: Tensor, bias: Tensor) -> Tensor:
    """Products in float32, divided by a number."""
    k, v = repeated(k, 2), repeated(v, 2)
    scores = torch.matmul(q.to(FLOAT), k.to(FLOAT).transpose(-1, -2)) / 4.0
    weights = torch.softmax(scores + float_mask(shown, q.dtype), -1)
    return joined(torch.matmul(weights.to(v.dtype), v))


def divided_by_a_tensor(q: Tensor, k: Tensor, v: Tensor, shown: Tensor, bias: Tensor) -> Tensor:
    """Divided by a tensor after the mask was added; the query in float32."""
    q, k, v = q.to(FLOAT), repeated(k, 2), repeated(v, 2)
    scores = (torch.matmul(q, k.to(FLOAT).transpose(-1, -2)) + float_mask(shown, k.dtype)) / torch.full((), 4.0)
    return joined(torch.matmul(torch.softmax(scores, -1).to(v.dtype), v))


def flat(q: Tensor, k: Tensor, v: Tensor, shown: Tensor, bias: Tensor) -> Tensor:
    """[B * H, S, T] products that start from a bias per head and token."""
    batch, heads, tokens, width = q.shape
    k, v = (repeated(x, 2).reshape(batch * heads, -1, width) for x in (k, v))
    slope = bias.repeat(batch, 1, 1).reshape(batch * heads, 1, -1).to(q.dtype)
    scores = slope.baddbmm(q.reshape(batch * heads, -1, width), k.transpose(-1, -2), beta=1.0, alpha=0.3)
    scores = scores.view(batch, heads, tokens, -1) + float_mask(shown, q.dtype)
    weights = torch.softmax(scores, -1, dtype=FLOAT).to(q.dtype).view(batch * heads, tokens, -1)
    return joined(torch.bmm(weights, v).view(batch, heads, tokens, width))


def filled(q: Tensor, k: Tensor, v: Tensor, shown: Tensor, bias: Tensor) -> Tensor:
    """A float32 bias per head and token, then a fill."""
    scores = torch.matmul(q, repeated(k, 2).transpose(-1, -2)) * 0.3 + bias
    scores = scores.masked_fill(~shown, torch.finfo(q.dtype).min)
    return joined(torch.softmax(scores.float(), -1).to(v.dtype) @ repeated(v, 2))


def chosen(q: Tensor, k: Tensor, v: Tensor, shown: Tensor, bias: Tensor) -> Tensor:
    """torch.where with the scores or the fill first."""
    scores = torch.matmul(q, repeated(k, 2).transpose(-1, -2)) * 0.3
    scores = torch.where(shown, scores, torch.full((), torch.finfo(q.dtype).min, dtype=q.dtype))
    return joined(torch.softmax(scores, -1) @ repeated(v, 2))


def biased(q: Tensor, k: Tensor, v: Tensor, shown: Tensor, bias: Tensor) -> Tensor:
    """No scale; a bias on either side of the sum, scaled afterwards, and a mask."""
    scores = bias.to(q.dtype) + torch.matmul(q, repeated(k, 2).transpose(-1, -2))
    return joined(
        torch.softmax(scores * 0.5 + float_mask(shown, q.dtype), -1, dtype=FLOAT).to(q.dtype) @ repeated(v, 2)
    )


FORMS = (grouped, capped, wide, divided_by_a_tensor, flat, filled, chosen, biased)


def arguments(dtype: torch.dtype, tokens: int, length: int) -> list[Tensor]:
    """Return query, key, value, a causal mask with padding whose queries see at least one token, and [H, 1, T]."""
    shown = torch.ones(tokens, length, dtype=torch.bool).tril(length - tokens).repeat(2, 1, 1, 1)
    shown[1, ..., : length - tokens] = False
    return [*operands(dtype, tokens, length, 2), shown, torch.randn(4, 1, length)]


def compare(function: Callable[..., Any], dtype: torch.dtype, names: list[str] | None = None) -> Rewritten:
    rewritten = Rewritten(function, names or NAMES)
    for tokens, length in ((5, 9), (7, 12)):
        args = arguments(dtype, tokens, length)
        for x, dims in zip(args, (2, 2, 2, [2, 3], 2), strict=True):
            torch._dynamo.maybe_mark_dynamic(x, dims)
        assert_close(rewritten(*args), function(*args), dtype)
    assert len(rewritten.graphs) == 1
    return rewritten


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form(form: Callable[..., Tensor], dtype: torch.dtype) -> None:
    rewritten = compare(form, dtype)
    assert rewritten.fired == {NAMES[0]: 1} and rewritten.misses == []
    assert rewritten.calls["llmrt.attention.default"] == 1
    left = ("softmax", "matmul", "bmm", "tanh", "dropout", "baddbmm")
    assert not [name for name in rewritten.calls if any(word in name for word in left)]
    operator = rewritten.graphs[-1].graph.find_nodes(op="call_function", target=torch.ops.llmrt.attention.default)[0]
    heads = [x.meta["val"].shape[1] for x in operator.args[1:3]]
    assert heads == [2, 2]


def layers(count: int) -> Callable[..., Tensor]:
    """Return layers that use the same masks, each in its own sum."""

    def function(q: Tensor, k: Tensor, v: Tensor, shown: Tensor, bias: Tensor) -> Tensor:
        hidden, added = ~shown, float_mask(shown, q.dtype)
        k, v = repeated(k, 2), repeated(v, 2)
        for _ in range(count):
            scores = (q @ k.mT + added) / 4 + bias
            q = torch.softmax(scores.masked_fill(hidden, torch.finfo(q.dtype).min), -1) @ v
        return q

    return function


def test_layers_share_a_mask() -> None:
    once, three = (compare(layers(count), FLOAT).calls for count in (1, 3))
    assert three == {**once, "llmrt.attention.default": 3}


def nothing(q: Tensor, k: Tensor, v: Tensor, shown: Tensor, bias: Tensor) -> Tensor:
    """Neither mask nor scale."""
    return torch.softmax(q @ repeated(k, 2).mT, -1) @ repeated(v, 2)


def test_without_a_mask() -> None:
    assert compare(nothing, FLOAT).calls == {"llmrt.attention.default": 1}


def weights_too(q: Tensor, k: Tensor, v: Tensor, shown: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.softmax(q @ repeated(k, 2).mT * 0.3, -1)
    return weights @ repeated(v, 2), weights


def scores_too(q: Tensor, k: Tensor, v: Tensor, shown: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ repeated(k, 2).mT * 0.3
    return torch.softmax(scores, -1) @ repeated(v, 2), scores


def masked_heads(q: Tensor, k: Tensor, v: Tensor, shown: Tensor, bias: Tensor) -> Tensor:
    return (torch.softmax(q @ repeated(k, 2).mT, -1) * bias[:, :, :1]) @ repeated(v, 2)


def small_fill(q: Tensor, k: Tensor, v: Tensor, shown: Tensor, bias: Tensor) -> Tensor:
    return torch.softmax((q @ repeated(k, 2).mT).masked_fill(~shown, -5.0), -1) @ repeated(v, 2)


def masked_then_capped(q: Tensor, k: Tensor, v: Tensor, shown: Tensor, bias: Tensor) -> Tensor:
    return torch.softmax(torch.tanh(q @ repeated(k, 2).mT + bias), -1) @ repeated(v, 2)


def scaled_per_head(q: Tensor, k: Tensor, v: Tensor, shown: Tensor, bias: Tensor) -> Tensor:
    return torch.softmax(q @ repeated(k, 2).mT * bias[:, :, :1], -1) @ repeated(v, 2)


def clamped(q: Tensor, k: Tensor, v: Tensor, shown: Tensor, bias: Tensor) -> Tensor:
    return torch.softmax((q @ repeated(k, 2).mT).clamp(max=3.0), -1) @ repeated(v, 2)


def over_queries(q: Tensor, k: Tensor, v: Tensor, shown: Tensor, bias: Tensor) -> Tensor:
    return torch.softmax(q @ repeated(k, 2).mT, -2) @ repeated(v, 2)


NEAR = {
    weights_too: "2 users", scores_too: "used 2 times", masked_heads: "a product with values", small_fill: "fills with -5",
    masked_then_capped: "tanh stands after a mask", scaled_per_head: "scales by a tensor", clamped: "aten.clamp",
    over_queries: "dimension -2",
}  # fmt: skip


@pytest.mark.parametrize(("form", "reason"), NEAR.items())
def test_what_the_operator_cannot_do_is_left_alone(form: Callable[..., Any], reason: str) -> None:
    rewritten = compare(form, FLOAT)
    assert rewritten.fired == {} and rewritten.calls["aten.softmax.int"] == 1
    assert len(rewritten.misses) == 1 and reason in rewritten.misses[0]


def test_a_softmax_over_experts_is_no_near_miss() -> None:
    rewritten = Rewritten(lambda x, w: torch.softmax(torch.nn.functional.linear(x, w), -1), NAMES)
    rewritten(torch.randn(3, 8), torch.randn(4, 8))
    assert rewritten.fired == {} and rewritten.misses == []
