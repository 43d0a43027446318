"""Gated activations: bad arguments are named, extreme values stay finite."""

from typing import Any

import pytest
import torch
from torch.nn import functional

from llmrt import ops

X = torch.randn(2, 8)
BAD: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "other shape": ("silu_mul", (X, X[:, :4]), r"up has shape \[2, 4\]; expected \[2, 8\]"),
    "other dimensions": ("gelu_mul", (X, X[0]), r"up has shape \[8\]; expected \[2, 8\]"),
    "other dtype": ("silu_mul", (X, X.half()), "up has dtype float16; expected float32"),
    "integers": ("gelu_mul", (X.int(), X.int()), "gate has dtype int32; valid: float32, bfloat16, float16"),
    "scalars": ("silu_mul", (X[0, 0], X[0, 0]), "gate is a scalar; expected at least one dimension"),
    "approximation": ("gelu_mul", (X, X, "sigmoid"), "approximate is 'sigmoid'; valid: none, tanh"),
}


@pytest.mark.parametrize("which", ["kernel", "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str, which: str, isa: str) -> None:
    name, args, message = BAD[case]
    op = ops.OPERATORS[name]
    with pytest.raises(RuntimeError, match=message):
        (op if which == "kernel" else op.reference)(*args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_gates(dtype: torch.dtype, kernel_isa: str) -> None:
    gate = torch.tensor([-3e38, -1e5, -100, 0, 100, 1e5, 3e38, float("nan")], dtype=dtype)
    up = torch.ones_like(gate)
    for y in (ops.silu_mul(gate, up), ops.gelu_mul(gate, up), ops.gelu_mul(gate, up, "tanh")):
        assert y[:3].abs().max() < 1 and torch.equal(y[3:7], gate[3:7]) and y[7].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_halves_of_a_fused_projection(dtype: torch.dtype, kernel_isa: str) -> None:
    fused = torch.randn(2, 9, 2 * 1003).to(dtype)  # enough elements for several threads, rows with a gap
    gate, up = fused.chunk(2, -1)
    y = ops.silu_mul(gate, up)
    assert y.is_contiguous() and y.dtype == dtype
    assert torch.equal(y, ops.silu_mul(gate.contiguous(), up.contiguous()))
    expected = functional.silu(gate.double()) * up.double()
    rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("name", ["relu", "silu", "gelu", "gelu_tanh"])
def test_nan_passes_through_every_activation(name: str, isa: str) -> None:
    weight = ops.pack_weight(*ops.quantize(torch.eye(32), ops.Layout()), str(ops.Layout()), 32)
    x = torch.full((1, 32), float("nan"))
    assert ops.quant_linear(x, weight, None, None, str(ops.Layout()), 32, "fp32", name).isnan().all()
