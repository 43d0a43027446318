"""Linears over floating-point weights as a model holds them: one, several that share an input, and gate and up of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from .check import check, check_dtype, check_floating, check_shape
from .norm import wide
from .operator import Sample, operator


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": _gelu_tanh,
}
EPILOGUES = ("none", *ACTIVATIONS, "add", "mul")
GATES = ("silu", "gelu", "gelu_tanh")


def _check_x(x: Tensor) -> None:
    check_floating(x, "x")
    check(x.dim() >= 1, "x is a scalar; expected at least one dimension")


def _check_weight(x: Tensor, weight: Tensor, bias: Tensor | None, name: str, bias_name: str) -> None:
    check_dtype(weight, x.dtype, name)
    check_shape(weight, (-1, x.shape[-1]), name)
    check(
        x.shape[-1] <= 1 or weight.stride(1) == 1,
        f"{name} has strides {list(weight.stride())}; expected contiguous rows: [any, 1]",
    )
    if bias is not None:
        check_dtype(bias, x.dtype, bias_name)
        check_shape(bias, (weight.shape[0],), bias_name)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = wide(x) @ wide(weight).T
    return y if bias is None else y + wide(bias)


def _check_dense(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, epilogue: str) -> None:
    _check_x(x)
    check(epilogue in EPILOGUES, f"epilogue is {epilogue!r}; valid: {', '.join(EPILOGUES)}")
    _check_weight(x, weight, bias, "weight", "bias")
    check(
        (other is not None) == (epilogue in ("add", "mul")),
        f"other {'missing' if other is None else 'given'} for epilogue {epilogue!r}",
    )
    if other is not None:
        check_dtype(other, x.dtype, "other")
        check_shape(other, (*x.shape[:-1], weight.shape[0]), "other")


@operator()
def dense_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, epilogue: str = "none"
) -> Tensor:
    """Linear layer with what follows it: ``y = epilogue(x @ weight.T + bias)``, in float32, rounded once.

    For up to 16 rows of x a kernel reads the weight in place, once. For more, torch's GEMM makes ``x @ weight.T + bias`` in
    the dtype of x, and an activation, mul, or add with a bias rounds a second time; where torch has no instructions for the
    dtype (float16 on most CPUs), the kernel goes on.

    Args:
        x: [..., K] float32, bfloat16 or float16, any strides.
        weight: [N, K] in the dtype of x; rows are contiguous and may have gaps between them.
        bias: [N] in the dtype of x, or None.
        other: [..., N] in the dtype of x, for the epilogues add and mul; else None.
        epilogue: none; relu, silu, gelu, gelu_tanh; add, mul (with `other`).

    Returns:
        [..., N] contiguous, in the dtype of x.

    Raises:
        RuntimeError: a shape, dtype or stride does not fit, epilogue is unknown, or `other` and epilogue do not go together.
    """
    _check_dense(x, weight, bias, other, epilogue)
    y = _multiply(x, weight, bias)
    if other is not None:
        y = y + wide(other) if epilogue == "add" else y * wide(other)
    elif epilogue != "none":
        y = ACTIVATIONS[epilogue](y)
    return y.to(x.dtype)


@dense_linear.fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, epilogue: str = "none") -> Tensor:
    _check_dense(x, weight, bias, other, epilogue)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _check_parallel(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor | None]:
    _check_x(x)
    count = len(weights)
    check(count > 0, "weights is empty; expected at least one tensor")
    check(len(biases) in (0, count), f"biases has {len(biases)} tensors; expected 0 or {count}, as many as weights")
    each = biases or [None] * count
    for i, (weight, bias) in enumerate(zip(weights, each, strict=True)):
        _check_weight(x, weight, bias, f"weights[{i}]", f"biases[{i}]")
    return each


@operator()
def parallel_linear(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    """Linear layers that share their input: ``y[i] = x @ weights[i].T + biases[i]``, in float32, rounded once.

    For up to 16 rows of x it is one sweep over all weights, in place, with one start of the threads. For more, one GEMM of
    torch per weight, under the conditions of `dense_linear`.

    Args:
        x: [..., K] float32, bfloat16 or float16, any strides.
        weights: each [N_i, K] in the dtype of x; rows are contiguous and may have gaps between them.
        biases: each [N_i] in the dtype of x or None, one per weight; or an empty list, which AOTInductor cannot pass.

    Returns:
        As many tensors as weights, each [..., N_i] contiguous, in the dtype of x.

    Raises:
        RuntimeError: there is no weight, biases are neither none nor one per weight, or a shape, dtype or stride does not fit.
    """
    each = _check_parallel(x, weights, biases)
    return [_multiply(x, weight, bias).to(x.dtype) for weight, bias in zip(weights, each, strict=True)]


@parallel_linear.fake
def _(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    _check_parallel(x, weights, biases)
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]


def _check_gated(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
) -> None:
    _check_x(x)
    check(activation in GATES, f"activation is {activation!r}; valid: {', '.join(GATES)}")
    _check_weight(x, gate_weight, gate_bias, "gate_weight", "gate_bias")
    _check_weight(x, up_weight, up_bias, "up_weight", "up_bias")
    check_shape(up_weight, gate_weight.shape, "up_weight")


@operator()
def gated_linear(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """First half of a gated feed-forward block: ``y = act(x @ gate.T + gate_bias) * (x @ up.T + up_bias)``, rounded once.

    Computed in float32. For more than 16 rows of x, under the conditions of `dense_linear`, torch's GEMM makes both products
    in the dtype of x, and their `silu_mul` or `gelu_mul` rounds a second time. Source: Shazeer 2020, "GLU Variants Improve
    Transformer", equation 5.

    Args:
        x: [..., K] float32, bfloat16 or float16, any strides.
        gate_weight: [N, K] in the dtype of x; rows are contiguous and may have gaps between them.
        up_weight: as gate_weight.
        gate_bias: [N] in the dtype of x, or None.
        up_bias: as gate_bias, given or not on its own.
        activation: silu, gelu or gelu_tanh.

    Returns:
        [..., N] contiguous, in the dtype of x.

    Raises:
        RuntimeError: a shape, dtype or stride does not fit, or activation is unknown.
    """
    _check_gated(x, gate_weight, up_weight, gate_bias, up_bias, activation)
    gate, up = _multiply(x, gate_weight, gate_bias), _multiply(x, up_weight, up_bias)
    return (ACTIVATIONS[activation](gate) * up).to(x.dtype)


@gated_linear.fake
def _(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
) -> Tensor:
    _check_gated(x, gate_weight, up_weight, gate_bias, up_bias, activation)
    return x.new_empty((*x.shape[:-1], gate_weight.shape[0]))


def _exact(*shape: int, dtype: torch.dtype, steps: int = 1) -> Tensor:
    """Return -1, 0 and 1 over `steps`: products of a few hundred such are exact in every dtype, so that no rounding between
    a GEMM and an epilogue tells implementations apart."""
    return (torch.randint(-1, 2, shape) / steps).to(dtype)


def _inputs(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Callable[..., Tensor]]]:
    """Yield (name, x, maker of weights and biases) over small and large M, odd K, empty dimensions and views."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype) / max(shape[-1], 1) ** 0.5

    def exact(*shape: int) -> Tensor:
        return _exact(*shape, dtype=dtype, steps=8)

    for shape in ((1, 1, 64), (5, 67), (2, 1, 131), (3, 256), (7,), (2, 2, 33), (4, 1), (0, 8), (3, 0), (16, 40)):
        yield f"{shape}", torch.randn(shape, dtype=dtype), random
    for shape in ((40, 96), (2, 35, 33), (300, 17), (66, 0)):
        yield f"{shape}", _exact(*shape, dtype=dtype), exact
    yield "row stride", torch.randn(4, 160, dtype=dtype)[:, :80], random
    yield "transposed", torch.randn(3, 2, 80, dtype=dtype).transpose(0, 1), random
    yield "element stride", torch.randn(3, 160, dtype=dtype)[:, ::2], random
    yield "many with row stride", _exact(50, 96, dtype=dtype)[:, :48], exact
    yield "many transposed", _exact(9, 8, 48, dtype=dtype).transpose(0, 1), exact


WIDTHS = (33, 1, 16, 50, 8, 0, 40)  # N


@dense_linear.samples
def _(dtype: torch.dtype) -> Iterator[Sample]:
    for i, (name, x, make) in enumerate(_inputs(dtype)):
        n, k = WIDTHS[i % len(WIDTHS)], x.shape[-1]
        weight = make(n, k) if i % 3 else make(n, k + 8)[:, :k]
        other = torch.randn(*x.shape[:-1], n, dtype=dtype)
        for j in (i, i + 2, i + 4):
            epilogue = EPILOGUES[j % len(EPILOGUES)]
            two = other if epilogue in ("add", "mul") else None
            yield Sample(f"{name} {epilogue}", (x, weight, make(n) if j % 2 else None, two, epilogue))
    x, weight, other = _exact(3, 30, 32, dtype=dtype), _exact(24, 32, dtype=dtype), torch.randn(3, 30, 48, dtype=dtype)
    for epilogue in ("add", "mul"):
        yield Sample(f"strided other {epilogue}", (x, weight, None, other[..., ::2], epilogue))
        yield Sample(f"strided other {epilogue} few", (x[:, 0], weight, None, other[:, 0, 24:], epilogue))


@parallel_linear.samples
def _(dtype: torch.dtype) -> Iterator[Sample]:
    for i, (name, x, make) in enumerate(_inputs(dtype)):
        k = x.shape[-1]
        widths = ((24, 8, 8), (1, 40), (33,), (16, 0, 5, 70))[i % 4]
        weights = [make(n, k) for n in widths]
        weights[0] = make(widths[0], k + 3)[:, :k]
        yield Sample(f"{name} {widths}", (x, weights, [[], [None] * len(widths)][i % 2]))
        yield Sample(f"{name} {widths} biases", (x, weights, [make(n) for n in widths]))
        yield Sample(f"{name} {widths} last bias", (x, weights, [*[None] * (len(widths) - 1), make(widths[-1])]))


@gated_linear.samples
def _(dtype: torch.dtype) -> Iterator[Sample]:
    for i, (name, x, make) in enumerate(_inputs(dtype)):
        n, k = WIDTHS[i % len(WIDTHS)], x.shape[-1]
        gate, up = make(n, k), make(n, k + 8)[:, :k]
        for j in (i, i + 1):
            biases = (make(n) if j % 2 else None, make(n) if j % 3 else None)
            yield Sample(f"{name} {GATES[j % 3]}", (x, gate, up, *biases, GATES[j % 3]))
