"""Norms: bad arguments are named, by kernel and reference alike; sums are rounded once; accuracy where it is hard."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmrt import ops

X, W = torch.randn(2, 8), torch.randn(8)
NORMS: dict[str, Callable[..., Any]] = {
    "rms_norm": lambda op, x, weight: op(x, weight, 1e-5),
    "add_rms_norm": lambda op, x, weight: op(x, torch.zeros_like(x), weight, 1e-5),
    "layer_norm": lambda op, x, weight: op(x, weight, None, 1e-5),
    "add_layer_norm": lambda op, x, weight: op(x, torch.zeros_like(x), weight, None, 1e-5),
}
BAD = {
    "wrong weight": ("rms_norm", (X, torch.randn(7), 1e-5), r"weight has shape \[7\]; expected \[8\]"),
    "matrix as weight": ("layer_norm", (X, X, None, 1e-5), r"weight has shape \[2, 8\]; expected \[8\]"),
    "wrong bias": ("layer_norm", (X, W, torch.randn(1), 1e-5), r"bias has shape \[1\]; expected \[8\]"),
    "wrong bias alone": ("add_layer_norm", (X, X, None, torch.randn(9), 1e-5), r"bias has shape \[9\]; expected \[8\]"),
    "two dtypes": ("layer_norm", (X, W, W.half(), 1e-5), "bias has dtype float16; expected float32"),
    "integers": ("rms_norm", (X.long(), W, 1e-5), "x has dtype int64; valid: float32, bfloat16, float16"),
    "integer weight": ("add_rms_norm", (X, X, W.int(), 1e-5), "weight has dtype int32; valid: float32"),
    "bool bias": ("layer_norm", (X, None, W.bool(), 1e-5), "bias has dtype bool; valid: float32"),
    "scalar": ("layer_norm", (torch.tensor(1.0), None, None, 1e-5), "x is a scalar; expected at least one dimension"),
    "residual of another shape": (
        "add_rms_norm",
        (X, X[:1], W, 1e-5),
        r"residual has shape \[1, 8\]; expected \[2, 8\]",
    ),
    "flat residual": ("add_layer_norm", (X, X.flatten(), W, W, 1e-5), r"residual has shape \[16\]; expected \[2, 8\]"),
    "residual of another dtype": (
        "add_layer_norm",
        (X, X.bfloat16(), W, W, 1e-5),
        "residual has dtype bfloat16; expected float32",
    ),
}


@pytest.mark.parametrize("which", ["kernel", "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str, which: str, isa: str) -> None:
    name, args, message = BAD[case]
    op = ops.OPERATORS[name]
    with pytest.raises(RuntimeError, match=message):
        (op if which == "kernel" else op.reference)(*args)


@pytest.mark.parametrize("name", NORMS)
def test_nan_and_infinity_stay_in_their_row(name: str, isa: str) -> None:
    x = torch.randn(3, 40)
    x[0, 3], x[2, 39] = float("nan"), float("inf")
    y = NORMS[name](ops.OPERATORS[name], x, torch.ones(40))
    y = y[0] if isinstance(y, tuple) else y
    assert y[0].isnan().all() and not y[1].isnan().any() and y[2, 39].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("K", [5, 67, 256])
def test_sum_is_rounded_once_and_normalized_as_stored(dtype: torch.dtype, K: int, isa: str) -> None:
    x, residual = torch.randn(3, K).to(dtype), 5 * torch.randn(3, K).to(dtype)
    weight, bias = torch.randn(K), torch.randn(K)
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-5, 1.0)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, ops.rms_norm(total, weight, 1e-5, 1.0))
    normed, total = ops.add_layer_norm(x, residual, weight, bias, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, ops.layer_norm(total, weight, bias, 1e-5))


@pytest.mark.parametrize("name", NORMS)
def test_rows_do_not_depend_on_the_batch(name: str, isa: str) -> None:
    x, weight = torch.randn(70, 600), torch.randn(600)  # enough for several threads
    op = ops.OPERATORS[name]
    together = NORMS[name](op, x, weight)
    for m in (0, 34, 69):
        alone = NORMS[name](op, x[m], weight)
        for a, t in zip(*((v if isinstance(v, tuple) else (v,)) for v in (alone, together)), strict=True):
            assert torch.equal(a, t[m])


def test_large_mean_costs_layer_norm_no_accuracy(kernel_isa: str) -> None:
    x = torch.randn(4, 4097) + torch.tensor([[1e4], [-3e3], [0.0], [1e2]])
    expected = ops.layer_norm.reference(x.double(), None, None, 1e-5)
    torch.testing.assert_close(ops.layer_norm(x, None, None, 1e-5).double(), expected, rtol=2e-6, atol=2e-6)


def test_constant_row_gives_the_bias(isa: str) -> None:
    x = torch.full((2, 100), 7.3)
    bias = torch.randn(100)
    torch.testing.assert_close(ops.layer_norm(x, None, bias, 1e-12), bias.expand(2, 100), rtol=0, atol=1e-4)
