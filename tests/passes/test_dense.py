"""Rewrites of linears with floating-point weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rewriting import DTYPES, Rewritten, assert_close
from torch import nn
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


class Projections(nn.Module):
    """Linears [40 -> n] over one input and what a function makes of their results."""

    def __init__(self, widths: list[int], bias: bool, dtype: torch.dtype, combine: Callable[..., Any]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(40, n, bias=bias, dtype=dtype) for n in widths)
        self.combine = combine
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.combine(x, *(linear(x) for linear in self.linears))


def check(model: Projections, dtype: torch.dtype, fired: dict[str, int], calls: dict[str, int]) -> None:
    rewritten = Rewritten(model, dynamic=True)
    for tokens in (3, 20):
        x = torch.randn(2, tokens, 40, dtype=dtype)
        assert_close(rewritten(x), model(x), dtype)
    assert len(rewritten.graphs) == 1
    assert rewritten.fired == fired
    assert dict(rewritten.calls) == {f"llmrt.{name}.default": count for name, count in calls.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated(name: str, bias: bool, dtype: torch.dtype) -> None:
    model = Projections([56, 56], bias, dtype, lambda x, gate, up: ACTIVATIONS[name](gate) * up)
    product = {"silu": "silu_mul", "gelu": "gelu_mul", "gelu_tanh": "gelu_mul, tanh"}[name]
    check(model, dtype, {product: 1, f"gated_linear, {name}": 1}, {"gated_linear": 1})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [[48, 16, 16], [24, 40]], ids=str)
def test_parallel(widths: list[int], bias: bool, dtype: torch.dtype) -> None:
    model = Projections(widths, bias, dtype, lambda x, *parts: parts)
    check(model, dtype, {"parallel linears": 1}, {"parallel_linear": 1})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["none", "relu", *ACTIVATIONS, "add", "mul"])
def test_what_follows(name: str, bias: bool, dtype: torch.dtype) -> None:
    follow: dict[str, Callable[..., torch.Tensor]] = {
        "none": lambda x, y: y,
        "relu": lambda x, y: functional.relu(y),
        "add": lambda x, y: x + y,
        "mul": lambda x, y: x * y,
        **{key: lambda x, y, act=act: act(y) for key, act in ACTIVATIONS.items()},
    }
    model = Projections([40], bias, dtype, follow[name])
    check(model, dtype, {"linear" if name == "none" else f"linear + {name}": 1}, {"dense_linear": 1})


def test_a_product_with_a_transposed_weight_is_a_linear() -> None:
    weight, bias = torch.randn(56, 40), torch.randn(56)
    rewritten = Rewritten(lambda x: torch.addmm(bias, x, weight.t()) + (x @ weight.T))
    x = torch.randn(3, 40)
    assert_close(rewritten(x), torch.addmm(bias, x, weight.t()) + x @ weight.T, torch.float32)
    assert rewritten.fired == {"parallel linears": 1}
    assert set(rewritten.calls) == {"llmrt.parallel_linear.default", "aten.add.Tensor"}


def test_a_gate_that_is_used_elsewhere_is_not_fused_with_its_linear() -> None:
    model = Projections([56, 56], False, torch.float32, lambda x, g, u: (functional.silu(g) * u, g))
    rewritten = Rewritten(model)
    x = torch.randn(2, 3, 40)
    assert_close(rewritten(x), model(x), torch.float32)
    assert rewritten.fired == {"silu_mul": 1, "parallel linears": 1}


@pytest.mark.parametrize("case", ["strided weight", "computed weight", "float32 bias", "broadcast sum"])
def test_what_the_kernels_do_not_take_stays(case: str) -> None:
    weight, bias = torch.randn(56, 40).bfloat16(), torch.randn(56)

    def function(x: torch.Tensor) -> torch.Tensor:
        if case == "strided weight":
            return functional.linear(x, strided)
        if case == "computed weight":
            return functional.linear(x, weight * 2)
        if case == "float32 bias":
            return functional.linear(x, weight).float() + bias
        return functional.linear(x, weight) + x[:, :1, :1]

    strided = torch.randn(40, 56).bfloat16().t()
    rewritten = Rewritten(function)
    x = torch.randn(2, 3, 40).bfloat16()
    assert_close(rewritten(x), function(x), torch.float32 if case == "float32 bias" else torch.bfloat16)
    expected = {} if case in ("strided weight",) else {"linear": 1}
    assert rewritten.fired == expected
