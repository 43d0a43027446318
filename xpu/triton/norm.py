"""RMS norm and layer norm of rows, alone and after a residual addition."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ... import ops
from ..route import route
from . import blocks
from .launch import launch, refuses_double, strides

# mypy: disable-error-code="no-untyped-def"


@triton.jit
def _norm(x, residual, weight, bias, y, total, rows, columns, x_row, x_column, r_row, r_column, w_stride, b_stride,
          eps, offset, LAYER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """x, residual: [rows, columns] with strides; y, total: contiguous."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (k < columns)
    v = tl.load(x + row * x_row + k * x_column, inside, other=0.0).to(tl.float32)
    if residual is not None:
        v += tl.load(residual + row * r_row + k * r_column, inside, other=0.0).to(tl.float32)
        rounded = v.to(total.dtype.element_ty)
        tl.store(total + row * columns + k, rounded, inside)
        v = rounded.to(tl.float32)
    if LAYER:
        for _ in tl.static_range(2):  # the second time takes away what rounding left of a large mean
            v = tl.where(inside, v - tl.sum(v, 1, keep_dims=True) / columns, 0.0)
    v = v * tl.rsqrt(tl.sum(v * v, 1, keep_dims=True) / columns + eps)
    if weight is not None:
        v = v * (tl.load(weight + k * w_stride, k < columns, other=0.0).to(tl.float32) + offset)
    if bias is not None:
        v += tl.load(bias + k * b_stride, k < columns, other=0.0).to(tl.float32)
    tl.store(y + row * columns + k, v.to(y.dtype.element_ty), inside)


def _refuses(x: Tensor, *args: Any, **kwargs: Any) -> str | None:
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    if x.dim() and x.shape[-1] > blocks.LONGEST_ROW:
        return f"rows have {x.shape[-1]} elements, more than the {blocks.LONGEST_ROW} that one program holds"
    return refuses_double(x, *tensors)


def _run(
    empty: Any,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float | None = None,
) -> Any:
    """Fill the empty results and return them; a layer norm has no offset."""
    y, total = empty if residual is not None else (empty, None)
    if x.numel():
        rows, columns = x.numel() // x.shape[-1], x.shape[-1]
        flat, other = (None if t is None else t.reshape(rows, columns) for t in (x, residual))
        launch(
            _norm,
            blocks.rows(columns),
            lambda b: (triton.cdiv(rows, b.sizes["ROWS"]),),
            (columns, x.dtype),
            *(flat, other, weight, bias, y, total, rows, columns),
            *(*strides(flat, 2), *strides(other, 2), *strides(weight, 1), *strides(bias, 1), eps, offset or 0.0),
            LAYER=offset is None,
        )
    return empty


@route("triton", "rms_norm", _refuses)
def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """See `llmrt.ops.rms_norm`."""
    return _run(ops.rms_norm.empty(x, weight, eps, offset), x, None, weight, None, eps, offset)


@route("triton", "add_rms_norm", _refuses)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """See `llmrt.ops.add_rms_norm`."""
    return _run(ops.add_rms_norm.empty(x, residual, weight, eps, offset), x, residual, weight, None, eps, offset)


@route("triton", "layer_norm", _refuses)
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """See `llmrt.ops.layer_norm`."""
    return _run(ops.layer_norm.empty(x, weight, bias, eps), x, None, weight, bias, eps)


@route("triton", "add_layer_norm", _refuses)
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """See `llmrt.ops.add_layer_norm`."""
    return _run(ops.add_layer_norm.empty(x, residual, weight, bias, eps), x, residual, weight, bias, eps)
