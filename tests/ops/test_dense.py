"""Linears over floating-point weights beyond the samples: exact agreements, torch's GEMM, threads, modes, bad input."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from llmrt import ops
from llmrt.ops.dense import EPILOGUES, GATES

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
X, W, B = torch.randn(2, 3, 16), torch.randn(24, 16), torch.randn(24)
FEW, MANY = 3, 40  # rows of x: by our kernel, by torch's GEMM where it has one for the dtype


def close(actual: Tensor, expected: Tensor, roundings: int) -> None:
    rtol = {torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[actual.dtype] * roundings
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=rtol)


def problem(m: int, n: int, k: int, dtype: torch.dtype, count: int = 1) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return x, weights and biases with products of about 1."""
    weights = [(torch.randn(n, k) / k**0.5).to(dtype) for _ in range(count)]
    return torch.randn(m, k).to(dtype), weights, [torch.randn(n).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_epilogues_after_a_gemm(epilogue: str, dtype: torch.dtype, isa: str) -> None:
    x, (weight,), (bias,) = problem(150, 70, 130, dtype)
    other = torch.randn(150, 140).to(dtype)[:, ::2] if epilogue in ("add", "mul") else None
    for b in (bias, None):
        double = [None if t is None else t.double() for t in (x, weight, b, other)]
        close(ops.dense_linear(x, weight, b, other, epilogue), ops.dense_linear.reference(*double, epilogue), 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", GATES)
def test_gates_after_a_gemm(activation: str, dtype: torch.dtype, isa: str) -> None:
    x, weights, biases = problem(150, 70, 130, dtype, 2)
    expected = ops.gated_linear.reference(x.double(), *(t.double() for t in (*weights, *biases)), activation)
    close(ops.gated_linear(x, *weights, *biases, activation), expected, 5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_longer_than_what_a_cache_holds(dtype: torch.dtype, isa: str) -> None:
    """Few rows of x fit beside such a weight row, and so the weight is swept several times."""
    x, (weight,), _ = problem(13, 5, 33000, dtype)
    close(ops.dense_linear(x, weight, None, None), x.double() @ weight.double().T, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, FEW, MANY])
def test_parallel_linears_are_the_linears(m: int, dtype: torch.dtype, isa: str) -> None:
    x, weights, biases = problem(m, 37, 75, dtype, 3)
    for some in (biases, []):
        each = [ops.dense_linear(x, w, some[i] if some else None, None) for i, w in enumerate(weights)]
        for y, expected in zip(ops.parallel_linear(x, weights, some), each, strict=True):
            assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_threads_nor_other_rows_change_the_bits(dtype: torch.dtype, kernel_isa: str) -> None:
    x, weights, biases = problem(11, 700, 133, dtype, 2)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(torch.cat(ops.parallel_linear(x, weights, biases), -1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    for rows in (slice(0, 1), slice(3, 5), slice(4, 9)):
        assert torch.equal(torch.cat(ops.parallel_linear(x[rows], weights, biases), -1), results[0][rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, FEW, MANY])
def test_nan_and_inf_reach_the_output(m: int, dtype: torch.dtype, isa: str) -> None:
    x, weights, biases = problem(m, 40, 75, dtype, 2)
    x[0, 74] = float("nan")
    weights[0][7, 3] = float("inf")
    y = ops.dense_linear(x, weights[0], None, None, "relu")
    assert y[0].isnan().all() and y[1:, :7].isfinite().all() and (y[1:, 7] == 0).sum() + y[1:, 7].isinf().sum() == m - 1
    assert ops.gated_linear(x, *weights, *biases, "silu")[0].isnan().all()


def calls(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Iterator[Callable[[], Any]]:
    yield lambda: ops.dense_linear(x, weights[0], biases[0], None, "gelu")
    yield lambda: ops.dense_linear(x, weights[0], None, biases[0].expand(len(x), -1), "add")
    yield lambda: ops.parallel_linear(x, weights, biases)[1]
    yield lambda: ops.gated_linear(x, *weights, *biases, "silu")


@pytest.mark.parametrize("m", [FEW, MANY])
def test_autocast_leaves_the_operators_alone(m: int, kernel_isa: str) -> None:
    for call in calls(*problem(m, 24, 48, torch.float32, 2)):
        expected = call()
        with torch.autocast("cpu", torch.bfloat16):
            actual = call()
        assert actual.dtype == torch.float32 and torch.equal(actual, expected)


@pytest.mark.parametrize("m", [FEW, MANY])
def test_parameters_that_require_gradients(m: int, isa: str) -> None:
    x, weights, biases = problem(m, 24, 48, torch.float32, 2)
    expected = [call() for call in calls(x, weights, biases)]
    for parameter in (*weights, *biases):
        parameter.requires_grad_()
    with torch.inference_mode():
        assert all(torch.equal(call(), e) for call, e in zip(calls(x, weights, biases), expected, strict=True))
    assert all(torch.equal(call(), e) for call, e in zip(calls(x, weights, biases), expected, strict=True))


@pytest.mark.parametrize("name", ["dense_linear", "parallel_linear", "gated_linear"])
def test_opcheck_with_many_rows(name: str, isa: str) -> None:
    op = ops.OPERATORS[name]
    for sample in [s for s in op.sample_inputs(torch.float32) if s.args[0][..., :1].numel() > 16][:4]:
        torch.library.opcheck(op.overload, sample.clone().args, sample.clone().kwargs)


def test_lists_go_through_compile_and_export(isa: str) -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = torch.nn.Linear(16, 24), torch.nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            q, k = ops.parallel_linear(x, [self.q.weight, self.k.weight], [self.q.bias, self.k.bias])
            return torch.cat((q, k), -1)

    block, shapes = Block(), {"x": {0: torch.export.Dim("rows", min=1, max=512)}}
    with torch.no_grad():
        exported = torch.export.export(block, (torch.randn(5, 16),), dynamic_shapes=shapes).module()
        compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
        for rows in (2, MANY):
            x = torch.randn(rows, 16)
            assert torch.equal(exported(x), block(x)) and torch.equal(compiled(x), block(x))


BAD: dict[str, tuple[str, tuple[Any, ...], str]] = {
    "integers": ("dense_linear", (X.int(), W, None, None), "x has dtype int32; valid: float32, bfloat16, float16"),
    "scalar": ("dense_linear", (X[0, 0, 0], W, None, None), "x is a scalar; expected at least one dimension"),
    "inputs": ("dense_linear", (X[..., :7], W, None, None), r"weight has shape \[24, 16\]; expected \[any, 7\]"),
    "vector": ("dense_linear", (X, W[0], None, None), r"weight has shape \[16\]; expected \[any, 16\]"),
    "weight's dtype": ("dense_linear", (X, W.half(), None, None), "weight has dtype float16; expected float32"),
    "weight's strides": (
        "dense_linear",
        (X, torch.randn(16, 24).T, None, None),
        r"weight has strides \[1, 24\]; expected contiguous rows: \[any, 1\]",
    ),
    "bias": ("dense_linear", (X, W, B[:7], None), r"bias has shape \[7\]; expected \[24\]"),
    "bias's dtype": ("dense_linear", (X, W, B.double(), None), "bias has dtype float64; expected float32"),
    "epilogue": ("dense_linear", (X, W, B, None, "swish"), "epilogue is 'swish'; valid: none, relu, silu, gelu, gelu_tanh, add, mul"),
    "gated epilogue": ("dense_linear", (X, W, B, None, "silu_mul"), "epilogue is 'silu_mul'; valid: none, relu"),
    "other missing": ("dense_linear", (X, W, B, None, "add"), "other missing for epilogue 'add'"),
    "other given": ("dense_linear", (X, W, B, B, "relu"), "other given for epilogue 'relu'"),
    "other": ("dense_linear", (X, W, B, X, "mul"), r"other has shape \[2, 3, 16\]; expected \[2, 3, 24\]"),
    "other's dtype": ("dense_linear", (X, W, B, X.half(), "mul"), "other has dtype float16; expected float32"),
    "no weight": ("parallel_linear", (X, [], []), "weights is empty; expected at least one tensor"),
    "biases": ("parallel_linear", (X, [W, W, W], [B, B]), "biases has 2 tensors; expected 0 or 3, as many as weights"),
    "one weight": ("parallel_linear", (X, [W, W.half()], []), r"weights\[1\] has dtype float16; expected float32"),
    "one bias": ("parallel_linear", (X, [W, W], [B, B[:1]]), r"biases\[1\] has shape \[1\]; expected \[24\]"),
    "up": ("gated_linear", (X, W, W[1:], B, None, "silu"), r"up_weight has shape \[23, 16\]; expected \[24, 16\]"),
    "up's bias": ("gated_linear", (X, W, W, B, B[1:], "silu"), r"up_bias has shape \[23\]; expected \[24\]"),
    "activation": ("gated_linear", (X, W, W, None, None, "relu"), "activation is 'relu'; valid: silu, gelu, gelu_tanh"),
}  # fmt: skip


@pytest.mark.parametrize("which", ["kernel", "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str, which: str, isa: str) -> None:
    name, args, message = BAD[case]
    op = ops.OPERATORS[name]
    with pytest.raises(RuntimeError, match=message):
        (op if which == "kernel" else op.reference)(*args)
