"""Rewrites to the norm operators."""

import pytest
import torch
from rewriting import DTYPES, Rewritten, assert_close
from torch import nn


class RMS(nn.Module):
    """Root mean square norm as models spell it: rounded before the weight, after it, or with 1 + weight."""

    def __init__(self, width: int, dtype: torch.dtype, form: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, dtype=dtype), requires_grad=False)
        self.form = form

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        v = x.float()
        if self.form == "before":
            v = v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + 1e-6)
            return self.weight * v.to(x.dtype)
        if self.form == "promoted":
            return self.weight * (x * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        if self.form == "after":
            v = v * torch.rsqrt((v * v).mean(dim=-1, keepdim=True) + 1e-6)
            return (v * self.weight).type_as(x)
        v = v * torch.pow(torch.square(v).mean(-1, keepdim=True) + 1e-6, -0.5)
        return (v * (1.0 + self.weight.float())).to(x.dtype)


class Twice(nn.Module):
    """Two norms with a residual addition between them, whose sum goes on."""

    def __init__(self, norm: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.norm, self.other = norm, other

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + self.norm(x)
        return self.other(total), total * 2


NAMES = {
    "before": "rms_norm",
    "promoted": "rms_norm, promoted",
    "after": "rms_norm, rounded once",
    "offset": "rms_norm of 1 + weight",
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("shape", [(2, 3, 40), (5, 40), (2, 3, 4, 40), (1, 1, 40)], ids=str)
def test_rms_norm_and_its_sum(form: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    model = Twice(RMS(40, dtype, form), RMS(40, dtype, form))
    rewritten = Rewritten(model)
    x = torch.randn(shape, dtype=dtype)
    assert_close(rewritten(x), model(x), dtype)
    one = next(name for name in NAMES.values() if rewritten.fired.get(name))  # in float32 the first two are one
    assert dtype == torch.float32 or one == NAMES[form]
    summed = "add + rms_norm of 1 + weight" if form == "offset" else "add + rms_norm"
    assert rewritten.fired == {one: 2, summed: 1}
    assert set(rewritten.calls) == {f"llmrt.{name}.default" for name in ("rms_norm", "add_rms_norm")} | {
        "aten.mul.Tensor"
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_and_its_sum(weight: bool, bias: bool, dtype: torch.dtype) -> None:
    norms = [nn.LayerNorm(40, elementwise_affine=weight, bias=bias, dtype=dtype) for _ in range(2)]
    model = Twice(*norms).requires_grad_(False)
    rewritten = Rewritten(model, dynamic=True)
    for tokens in (3, 6):
        x = torch.randn(2, tokens, 40, dtype=dtype)
        assert_close(rewritten(x), model(x), dtype)
    assert len(rewritten.graphs) == 1
    assert rewritten.fired == {"layer_norm": 2, "add + layer_norm": 1}
    assert "aten.layer_norm.default" not in rewritten.calls and "aten.add.Tensor" not in rewritten.calls


def near(x: torch.Tensor, weight: torch.Tensor, change: str) -> torch.Tensor:
    v = x.float()
    square = v.pow(4 if change == "power" else 2)
    mean = square.mean(1 if change == "dimension" else -1, keepdim=True)
    root = torch.rsqrt(mean + 1e-6)
    normed = v * root
    out = weight * normed.to(x.dtype)
    return out + root.to(x.dtype) if change == "used twice" else out


@pytest.mark.parametrize(
    ("change", "reason"), [("power", "argument 4"), ("dimension", "shape"), ("used twice", "used by"), ("", None)]
)
def test_what_is_nearly_a_norm_stays(change: str, reason: str | None) -> None:
    weight = torch.rand(40).bfloat16()
    rewritten = Rewritten(lambda x: near(x, weight, change))
    x = torch.randn(2, 3, 40).bfloat16()
    assert_close(rewritten(x), near(x, weight, change), torch.bfloat16)
    if reason is None:
        assert rewritten.fired == {"rms_norm": 1}
    else:
        assert not rewritten.fired
        assert any(reason in miss for miss in rewritten.misses), rewritten.misses


def test_a_float32_weight_keeps_the_float32_result() -> None:
    model = RMS(40, torch.float32, "before")
    rewritten = Rewritten(model)
    x = torch.randn(2, 3, 40).bfloat16()
    got = rewritten(x)
    assert got.dtype == torch.float32 and not rewritten.fired
    assert torch.equal(got, model(x))


def test_sums_of_different_shapes_stay() -> None:
    weight = torch.rand(40)
    rewritten = Rewritten(lambda x, y: torch.nn.functional.layer_norm(x + y, (40,), weight))
    x, y = torch.randn(2, 3, 40), torch.randn(1, 40)
    assert_close(rewritten(x, y), torch.nn.functional.layer_norm(x + y, (40,), weight), torch.float32)
    assert rewritten.fired == {"layer_norm": 1}
