"""Rewrites of activations written in arithmetic, and of gated products."""

import math
from collections.abc import Callable

import pytest
import torch
from rewriting import DTYPES, Rewritten, assert_close
from torch.nn import functional


def tanh_of_cube(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def tanh_of_product(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


PRODUCTS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], dict[str, int], str]] = {
    "silu": (functional.silu, {"silu_mul": 1}, "silu_mul"),
    "sigmoid": (lambda x: x * x.sigmoid(), {"silu of sigmoid": 1, "silu_mul": 1}, "silu_mul"),
    "gelu": (functional.gelu, {"gelu_mul": 1}, "gelu_mul"),
    "tanh": (lambda x: functional.gelu(x, approximate="tanh"), {"gelu_mul, tanh": 1}, "gelu_mul"),
    "cube": (tanh_of_cube, {"gelu, tanh of a cube": 1, "gelu_mul, tanh": 1}, "gelu_mul"),
    "product": (tanh_of_product, {"gelu, tanh of a product": 1, "gelu_mul, tanh": 1}, "gelu_mul"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str, dtype: torch.dtype) -> None:
    activation, fired, operator = PRODUCTS[name]

    def function(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return up * activation(gate)

    rewritten = Rewritten(function, dynamic=True)
    for tokens in (3, 5):
        x = torch.randn(2, tokens, 80, dtype=dtype)
        assert_close(rewritten(x), function(x.double()).to(dtype), dtype)
    assert rewritten.fired == fired and len(rewritten.graphs) == 1
    assert dict(rewritten.calls) == {f"llmrt.{operator}.default": 1}


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: functional.silu(x) + y,
        lambda x, y: functional.silu(x) * y[:, :1],
        lambda x, y: functional.silu(x) * y.float(),
        lambda x, y: (lambda g: g * y + g)(functional.silu(x)),
        lambda x, y: functional.mish(x) * y,
    ],
    ids=["sum", "broadcast", "dtypes", "used twice", "other activation"],
)
def test_what_is_no_product_stays(function: Callable[..., torch.Tensor]) -> None:
    rewritten = Rewritten(function)
    x, y = torch.randn(2, 2, 3, 40).bfloat16()
    assert torch.equal(rewritten(x, y), function(x, y)) and not rewritten.fired


def test_other_constants_are_no_gelu() -> None:
    def nearly(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.05 * torch.pow(x, 3.0))))

    rewritten = Rewritten(nearly)
    x = torch.randn(2, 3, 40)
    assert_close(rewritten(x), nearly(x), torch.float32)
    assert not rewritten.fired
    assert any("0.05" in miss for miss in rewritten.misses), rewritten.misses
