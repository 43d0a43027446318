"""Row normalizations, alone and after a residual addition."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .check import check, check_dtype, check_floating, check_shape
from .operator import Sample, operator


def wide(x: Tensor) -> Tensor:
    """Return `x` in the dtype that references compute in: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def _check_rows(x: Tensor) -> None:
    check_floating(x, "x")
    check(x.dim() >= 1, "x is a scalar; expected at least one dimension")


def _check_parameter(parameter: Tensor | None, x: Tensor, name: str) -> None:
    if parameter is not None:
        check_floating(parameter, name)
        check_shape(parameter, (x.shape[-1],), name)


def _check(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
    _check_rows(x)
    if residual is not None:
        check_dtype(residual, x.dtype, "residual")
        check_shape(residual, x.shape, "residual")
    _check_parameter(weight, x, "weight")
    _check_parameter(bias, x, "bias")
    if weight is not None and bias is not None:
        check_dtype(bias, weight.dtype, "bias")


def _add(x: Tensor, residual: Tensor) -> Tensor:
    return (wide(x) + wide(residual)).to(x.dtype).contiguous()


def _rms(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    v = wide(x)
    y = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps) * (wide(weight) + offset)
    return y.to(x.dtype).contiguous()


def _layer(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    v = wide(x)
    v = v - v.mean(-1, keepdim=True)
    y = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * wide(weight)
    if bias is not None:
        y = y + wide(bias)
    return y.to(x.dtype).contiguous()


@operator()
def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Root mean square norm: ``y = x / sqrt(mean(x^2) + eps) * (weight + offset)``, rounded once at the end.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4; the (1 + w) form is Gemma's.

    Args:
        x: [..., K] float32, bfloat16 or float16.
        weight: [K], a floating dtype of its own.
        eps: added to the mean square.
        offset: added to the weight; 1.0 for the (1 + w) form.

    Returns:
        [..., K] contiguous, in the dtype of x.

    Raises:
        RuntimeError: weight is not [K], or a dtype is not floating.
    """
    _check(x, None, weight, None)
    return _rms(x, weight, eps, offset)


@rms_norm.fake
def _(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    _check(x, None, weight, None)
    return x.new_empty(x.shape)


@operator()
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Residual addition, then `rms_norm` of the sum as stored: ``s = x + residual``, ``y = rms_norm(s, ...)``.

    The sum is rounded once to the dtype of x and the norm is taken of the rounded sum: the result equals that of the two
    steps apart.

    Args:
        x: [..., K] float32, bfloat16 or float16.
        residual: the shape and dtype of x.
        weight: [K], a floating dtype of its own.
        eps: added to the mean square.
        offset: added to the weight; 1.0 for the (1 + w) form.

    Returns:
        (y, s), both [..., K] contiguous, in the dtype of x.

    Raises:
        RuntimeError: residual differs from x in shape or dtype, weight is not [K], or a dtype is not floating.
    """
    _check(x, residual, weight, None)
    total = _add(x, residual)
    return _rms(total, weight, eps, offset), total


@add_rms_norm.fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    _check(x, residual, weight, None)
    return x.new_empty(x.shape), x.new_empty(x.shape)


@operator()
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm: ``y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias``, rounded once at the end.

    The variance is the biased one and is taken of the differences to the mean, so a large mean costs no accuracy.
    Source: Ba, Kiros and Hinton 2016, "Layer Normalization", equation 4.

    Args:
        x: [..., K] float32, bfloat16 or float16.
        weight: [K], a floating dtype of its own, or None for ones.
        bias: [K] in the dtype of weight, or None for zeros.
        eps: added to the variance.

    Returns:
        [..., K] contiguous, in the dtype of x.

    Raises:
        RuntimeError: weight or bias is not [K], their dtypes differ, or a dtype is not floating.
    """
    _check(x, None, weight, bias)
    return _layer(x, weight, bias, eps)


@layer_norm.fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    _check(x, None, weight, bias)
    return x.new_empty(x.shape)


@operator()
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Residual addition, then `layer_norm` of the sum as stored: ``s = x + residual``, ``y = layer_norm(s, ...)``.

    Args:
        x: [..., K] float32, bfloat16 or float16.
        residual: the shape and dtype of x.
        weight: [K], a floating dtype of its own, or None for ones.
        bias: [K] in the dtype of weight, or None for zeros.
        eps: added to the variance.

    Returns:
        (y, s), both [..., K] contiguous, in the dtype of x; s is rounded once and y is the norm of the rounded sum.

    Raises:
        RuntimeError: residual differs from x in shape or dtype, weight or bias is not [K], their dtypes differ, or a
            dtype is not floating.
    """
    _check(x, residual, weight, bias)
    total = _add(x, residual)
    return _layer(total, weight, bias, eps), total


@add_layer_norm.fake
def _(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    _check(x, residual, weight, bias)
    return x.new_empty(x.shape), x.new_empty(x.shape)


SHAPES = ((1, 1, 64), (2, 3, 67), (5, 1), (33, 300), (40, 1000), (0, 8), (3, 0), (7,))


def _strided(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield inputs that are views: rows with a gap, dimensions swapped, elements with a gap."""
    yield "row stride", torch.randn(4, 160, dtype=dtype)[:, :80]
    yield "transposed", torch.randn(3, 5, 80, dtype=dtype).transpose(0, 1)
    yield "element stride", torch.randn(4, 160, dtype=dtype)[:, ::2]


def _addends(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round x in place to steps of 1/16 below 4; return it and another such: their sums are exact in every dtype."""

    def coarse(t: Tensor) -> Tensor:
        return t.mul_(16).round_().div_(16).clamp_(-3.9375, 3.9375)

    return coarse(x), coarse(torch.randn_like(x))


@rms_norm.samples
def _(dtype: torch.dtype) -> Iterator[Sample]:
    for shape in SHAPES:
        x, weight = torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype)
        yield Sample(f"{shape}", (x, weight, 1e-5))
        yield Sample(f"{shape} offset", (x, weight.float(), 1e-6, 1.0))
    for name, x in _strided(dtype):
        yield Sample(name, (x, torch.randn(160, dtype=dtype)[::2], 1e-5))
    yield Sample("expanded", (torch.randn(1, 80, dtype=dtype).expand(6, 80), torch.randn(80, dtype=dtype), 1e-5))


@add_rms_norm.samples
def _(dtype: torch.dtype) -> Iterator[Sample]:
    for shape in SHAPES:
        (x, residual), weight = _addends(torch.randn(shape, dtype=dtype)), torch.randn(shape[-1], dtype=dtype)
        yield Sample(f"{shape}", (x, residual, weight, 1e-5))
        yield Sample(f"{shape} offset", (x, residual, weight.half(), 1e-6, 1.0))
    for name, view in _strided(dtype):
        x, residual = _addends(view)
        yield Sample(name, (x, residual, torch.randn(80, dtype=dtype), 1e-5))
        yield Sample(f"{name} residual", (residual, x, torch.randn(80), 1e-5))


@layer_norm.samples
def _(dtype: torch.dtype) -> Iterator[Sample]:
    for shape in SHAPES:
        x, weight, bias = (torch.randn(s, dtype=dtype) for s in (shape, shape[-1:], shape[-1:]))
        yield Sample(f"{shape}", (x, weight, bias, 1e-5))
        yield Sample(f"{shape} plain", (x, None, None, 1e-6))
        yield Sample(f"{shape} weight", (x, weight.float(), None, 1e-5))
        yield Sample(f"{shape} bias", (x, None, bias.bfloat16(), 1e-5))
    for name, x in _strided(dtype):
        yield Sample(name, (x, torch.randn(160, dtype=dtype)[::2], torch.randn(160, dtype=dtype)[::2], 1e-5))
    large_mean = torch.randn(3, 1000, dtype=dtype) + torch.tensor([[0.0], [1000.0], [-30.0]], dtype=dtype)
    yield Sample("large mean", (large_mean, torch.randn(1000, dtype=dtype), torch.randn(1000, dtype=dtype), 1e-5))


@add_layer_norm.samples
def _(dtype: torch.dtype) -> Iterator[Sample]:
    for shape in SHAPES:
        x, residual = _addends(torch.randn(shape, dtype=dtype))
        weight, bias = torch.randn(shape[-1], dtype=dtype), torch.randn(shape[-1], dtype=dtype)
        yield Sample(f"{shape}", (x, residual, weight, bias, 1e-5))
        yield Sample(f"{shape} plain", (x, residual, None, None, 1e-6))
        yield Sample(f"{shape} weight", (x, residual, weight.float(), None, 1e-5))
        yield Sample(f"{shape} bias", (x, residual, None, bias.float(), 1e-5))
    for name, view in _strided(dtype):
        x, residual = _addends(view)
        yield Sample(name, (x, residual, torch.randn(80, dtype=dtype), torch.randn(80, dtype=dtype), 1e-5))
