"""Rewrites to the rotation, in all its spellings, and to norms per head followed by it."""

from collections.abc import Callable

import pytest
import torch
from rewriting import DTYPES, Rewritten, assert_close


def half(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), dim=-1)


def alternating(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


def rotation(
    heads_first: bool, rotary: int, interleaved: bool, doubled: bool
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Return the rotation of [B, H, S, D] or [B, S, H, D] as models write it."""

    def apply(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cos, sin = (t.unsqueeze(1 if heads_first else 2) for t in (cos, sin))
        if interleaved:
            if doubled:
                cos, sin = cos[..., : cos.shape[-1] // 2], sin[..., : sin.shape[-1] // 2]
            cos, sin = cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
        turn = alternating if interleaved else half
        if rotary == q.shape[-1]:
            return q * cos + turn(q) * sin, k * cos + turn(k) * sin
        parts = []
        for x in (q, k):
            rot, rest = x[..., :rotary], x[..., rotary:]
            parts.append(torch.cat([rot * cos + turn(rot) * sin, rest], dim=-1))
        return parts[0], parts[1]

    return apply


def operands(dtype: torch.dtype, tokens: int, heads_first: bool, columns: int, batch: int = 2) -> list[torch.Tensor]:
    q, k = torch.randn(2, tokens, 4, 24, dtype=dtype), torch.randn(2, tokens, 2, 24, dtype=dtype)
    if heads_first:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    angle = torch.randn(batch, tokens, columns)
    return [q, k, angle.cos().to(dtype), angle.sin().to(dtype)]


FORMS = {"half": (False, True), "interleaved": (True, False), "interleaved, doubled table": (True, True)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("rotary", [24, 8])
def test_every_spelling(form: str, heads_first: bool, rotary: int, dtype: torch.dtype) -> None:
    interleaved, doubled = FORMS[form]
    function = rotation(heads_first, rotary, interleaved, doubled)
    columns = rotary if doubled else rotary // 2
    rewritten = Rewritten(function, dynamic=True)
    for tokens in (5, 9):
        args = operands(dtype, tokens, heads_first, columns)
        half_angle = columns // 2 if doubled else columns
        args[2:] = [torch.cat((t[..., :half_angle],) * (2 if doubled else 1), -1) for t in args[2:]]
        assert_close(rewritten(*args), function(*args), dtype)
    assert len(rewritten.graphs) == 1 and sum(rewritten.fired.values()) == 1
    assert dict(rewritten.calls) == {"llmrt.rope.default": 1}


@pytest.mark.parametrize("tokens", [1, 4])
def test_two_layers_pair_their_own_queries_and_keys(tokens: int) -> None:
    rotate = rotation(True, 24, False, True)

    def function(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        q1, k1 = rotate(q, k, cos, sin)
        first = q1.sum() + k1.sum()
        q2, k2 = rotate(q * first, k + first, cos, sin)
        return q2 @ k2.repeat_interleave(2, 1).transpose(-1, -2)

    rewritten = Rewritten(function)
    args = operands(torch.float32, tokens, True, 24, batch=1)
    args[2:] = [torch.cat((t[..., :12],) * 2, -1) for t in args[2:]]
    assert_close(rewritten(*args), function(*args), torch.float32)
    assert rewritten.fired == {"rope": 2}
    assert rewritten.calls["llmrt.rope.default"] == 2 and "aten.neg.default" not in rewritten.calls


@pytest.mark.parametrize("form", ["interleaved", "interleaved, doubled table"])
def test_layers_share_their_tables(form: str) -> None:
    interleaved, doubled = FORMS[form]
    rotate = rotation(True, 8, interleaved, doubled)

    def function(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return rotate(*rotate(q, k, cos, sin), cos, sin)

    rewritten = Rewritten(function)
    args = operands(torch.bfloat16, 5, True, 8 if doubled else 4)
    assert_close(rewritten(*args), function(*args), torch.bfloat16)
    assert dict(rewritten.calls) == {"llmrt.rope.default": 2}


def test_float32_tables_rotate_in_float32() -> None:
    function = rotation(True, 24, False, True)
    q, k, cos, sin = operands(torch.bfloat16, 5, True, 24)
    cos, sin = (torch.cat((t[..., :12],) * 2, -1).float() for t in (cos, sin))
    rewritten = Rewritten(function)
    got = rewritten(q, k, cos, sin)
    assert_close(got, function(q, k, cos, sin), torch.float32)
    assert got[0].dtype == torch.float32 and rewritten.fired == {"rope, float32": 1}


@pytest.mark.parametrize("change", ["sign", "offset", "table"])
def test_what_is_nearly_a_rotation_stays(change: str) -> None:
    def turn(x: torch.Tensor) -> torch.Tensor:
        at = 11 if change == "offset" else 12
        first, second = x[..., :at], x[..., at:]
        return torch.cat((second, -first) if change == "sign" else (-second, first), -1)

    def function(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        other = cos if change == "table" else sin
        cos, sin, other = cos.unsqueeze(1), sin.unsqueeze(1), other.unsqueeze(1)
        return q * cos + turn(q) * sin, k * cos + turn(k) * other

    args = operands(torch.float32, 5, True, 24)
    rewritten = Rewritten(function)
    assert_close(rewritten(*args), function(*args), torch.float32)
    assert not rewritten.fired and rewritten.misses


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_per_head(offset: float, heads_first: bool, dtype: torch.dtype) -> None:
    rotate = rotation(True, 24, False, True)
    weights = torch.randn(2, 24).to(dtype)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        v = x.float()
        v = v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + 1e-6)
        if offset:
            return (v * (1.0 + weight.float())).type_as(x)
        return weight * v.to(x.dtype)

    def function(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if heads_first:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        q, k = norm(q, weights[0]), norm(k, weights[1])
        if not heads_first:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        return rotate(q, k, cos, sin)

    rewritten = Rewritten(function, dynamic=True)
    for tokens in (4, 7):
        args = operands(dtype, tokens, False, 24)
        args[2:] = [torch.cat((t[..., :12],) * 2, -1) for t in args[2:]]
        assert_close(rewritten(*args), function(*args), dtype)
    name = "norms per head + rope" + (" of 1 + weight" if offset else "")
    assert rewritten.fired[name] == 1 and dict(rewritten.calls) == {"llmrt.rope.default": 1}
