"""Norms in SYCL: see xpu/sycl/norm.cpp."""

from __future__ import annotations

from torch import Tensor

from ... import ops
from ..route import route
from .bundle import KINDS, launch
from .pointwise import ROW_ITEMS, pointwise, rows_of


def _run(
    kernel: str,
    x: Tensor,
    residual: Tensor | None,
    parameters: tuple[Tensor | None, ...],
    out: Tensor,
    total: Tensor | None,
    *numbers: float,
) -> None:
    (rows, x_stride), other = rows_of(x), rows_of(residual) if residual is not None else (None, 0)
    parameters = tuple(p if p is None else p.contiguous() for p in parameters)
    dtype = next((p.dtype for p in parameters if p is not None), x.dtype)
    items = min(ROW_ITEMS, -(-x.shape[-1] // 32) * 32)
    sizes = (x.shape[-1], x_stride, other[1])
    launch(
        x.device, pointwise(x.dtype), kernel, (1, 1, len(rows)), (1, 1, max(items, 32)),
        rows, other[0], *parameters, KINDS[dtype], out, total, *sizes, *numbers,
    )  # fmt: skip


@route("sycl", "rms_norm")
def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Run `ops.rms_norm`."""
    out = ops.rms_norm.empty(x, weight, eps, offset)
    _run("rms_norm", x, None, (weight,), out, None, float(eps), float(offset))
    return out


@route("sycl", "add_rms_norm")
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Run `ops.add_rms_norm`."""
    out, total = ops.add_rms_norm.empty(x, residual, weight, eps, offset)
    _run("rms_norm", x, residual, (weight,), out, total, float(eps), float(offset))
    return out, total


@route("sycl", "layer_norm")
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Run `ops.layer_norm`."""
    out = ops.layer_norm.empty(x, weight, bias, eps)
    _run("layer_norm", x, None, (weight, bias), out, None, float(eps))
    return out


@route("sycl", "add_layer_norm")
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Run `ops.add_layer_norm`."""
    out, total = ops.add_layer_norm.empty(x, residual, weight, bias, eps)
    _run("layer_norm", x, residual, (weight, bias), out, total, float(eps))
    return out, total
