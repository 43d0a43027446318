"""Gated activations of feed-forward blocks: an activation of one tensor times another."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from .check import check, check_dtype, check_floating, check_shape
from .norm import wide
from .operator import Sample, operator


def _check(gate: Tensor, up: Tensor) -> None:
    check_floating(gate, "gate")
    check(gate.dim() >= 1, "gate is a scalar; expected at least one dimension")
    check_dtype(up, gate.dtype, "up")
    check_shape(up, gate.shape, "up")


def _check_approximate(approximate: str) -> None:
    check(approximate in ("none", "tanh"), f"approximate is '{approximate}'; valid: none, tanh")


def _gated(gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    _check(gate, up)
    return (activation(wide(gate)) * wide(up)).to(gate.dtype).contiguous()


@operator()
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU's product: ``y = gate * sigmoid(gate) * up``, rounded once at the end.

    Source: Shazeer 2020, "GLU Variants Improve Transformer", equation 5 (Swish with beta 1).

    Args:
        gate: [..., K] float32, bfloat16 or float16; may be a strided half of a tensor [..., 2 * K].
        up: the shape and dtype of gate, with strides of its own.

    Returns:
        [..., K] contiguous, in the dtype of gate.

    Raises:
        RuntimeError: up differs from gate in shape or dtype, or the dtype is not floating.
    """
    return _gated(gate, up, functional.silu)


@silu_mul.fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    _check(gate, up)
    return gate.new_empty(gate.shape)


@operator()
def gelu_mul(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """GEGLU's product: ``y = gelu(gate) * up``, rounded once at the end.

    ``gelu(x) = x / 2 * (1 + erf(x / sqrt(2)))``, or with approximate "tanh"
    ``x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))``. Source: Hendrycks and Gimpel 2016, "Gaussian Error
    Linear Units", section 2; Shazeer 2020, "GLU Variants Improve Transformer", equation 5.

    Args:
        gate: [..., K] float32, bfloat16 or float16; may be a strided half of a tensor [..., 2 * K].
        up: the shape and dtype of gate, with strides of its own.
        approximate: "none" or "tanh".

    Returns:
        [..., K] contiguous, in the dtype of gate.

    Raises:
        RuntimeError: up differs from gate in shape or dtype, the dtype is not floating, or approximate is unknown.
    """
    _check_approximate(approximate)
    return _gated(gate, up, lambda x: functional.gelu(x, approximate=approximate))


@gelu_mul.fake
def _(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    _check_approximate(approximate)
    _check(gate, up)
    return gate.new_empty(gate.shape)


def _pairs(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    for shape in ((1, 1, 64), (2, 3, 67), (5, 1), (33, 300), (0, 8), (3, 0), (1, 20000), (7,)):
        yield f"{shape}", 3 * torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    both = torch.randn(3, 5, 150, dtype=dtype)
    yield "halves of one tensor", both[..., :75], both[..., 75:]
    yield "one half", both[..., :75], torch.randn(3, 5, 75, dtype=dtype)
    yield "every second element", both[..., ::2], both[..., 1::2]
    yield "transposed", both.transpose(0, 1), torch.randn(5, 3, 150, dtype=dtype)
    yield "both ends", torch.linspace(-60, 60, 241, dtype=dtype), torch.full((241,), 0.5, dtype=dtype)


@silu_mul.samples
def _(dtype: torch.dtype) -> Iterator[Sample]:
    for name, gate, up in _pairs(dtype):
        yield Sample(name, (gate, up))


@gelu_mul.samples
def _(dtype: torch.dtype) -> Iterator[Sample]:
    for name, gate, up in _pairs(dtype):
        yield Sample(name, (gate, up))
        yield Sample(f"{name} tanh", (gate, up, "tanh"))
