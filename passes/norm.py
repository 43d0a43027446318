"""Norms written out in elementwise operators, alone and after a residual addition."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import ops
from .rewrite import Examples, Rewrite

_rms_norm = ops.rms_norm.overload
_add_rms_norm = ops.add_rms_norm.overload
_layer_norm = ops.layer_norm.overload
_add_layer_norm = ops.add_layer_norm.overload

SIZES = {"B": 61, "S": 67, "H": 71, "K": 48}
EPS = 0.0123
#: Shapes that norms meet: tokens of a batch, heads of tokens, and rows.
SHAPES = (("B", "S", "K"), ("B", "S", "H", "K"), ("B", "K"))


def _variants(*names: str) -> list[Callable[[Examples], dict[str, Any]]]:
    """Return example inputs for every shape: x, with `residual` also that, and one [K] for every other name."""

    def inputs(e: Examples, shape: tuple[str, ...]) -> dict[str, Any]:
        made: dict[str, Any] = {n: e.like(*shape) if n in ("x", "residual") else e.like("K") for n in names}
        return {**made, "eps": EPS}

    return [partial(inputs, shape=shape) for shape in SHAPES]


def _unit(x: Tensor, eps: float) -> Tensor:
    v = x.to(torch.float32)
    return v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + eps)


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Rounded to the activations' dtype before the weight."""
    return weight * _unit(x, eps).to(x.dtype)


def _rms_promoted(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The row meets the float32 root uncast; rounded before the weight."""
    return weight * (x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rms_once(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Rounded once, after the weight."""
    return (weight * _unit(x, eps)).to(x.dtype)


def _rms_offset(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The (1 + weight) form, in float32."""
    return (_unit(x, eps) * (1.0 + weight.to(torch.float32))).to(x.dtype)


def _to_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _rms_norm(x, weight, eps, 0.0)


def _layer(x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return functional.layer_norm(x, (48,), weight, bias, eps)


def _to_layer_norm(x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return _layer_norm(x, weight, bias, eps)


def _added(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _rms_norm(total, weight, eps, 0.0), total


def _added_offset(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _rms_norm(total, weight, eps, 1.0), total


def _to_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _add_rms_norm(x, residual, weight, eps, 0.0)


def _to_add_rms_norm_offset(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _add_rms_norm(x, residual, weight, eps, 1.0)


def _added_layer(
    x: Tensor, residual: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _layer_norm(total, weight, bias, eps), total


def _to_add_layer_norm(
    x: Tensor, residual: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return _add_layer_norm(x, residual, weight, bias, eps)


_ROWS = _variants("x", "weight")
_LAYER = [*_variants("x", "weight", "bias"), *_variants("x", "weight"), *_variants("x", "bias"), *_variants("x")]
_SUMS = _variants("x", "residual", "weight")

_aten = torch.ops.aten
_ROOT, _ROW_NORM, _LAYER_NORM = (_aten.rsqrt.default,), (_rms_norm,), (_layer_norm,)

NORMS = (
    Rewrite(
        "rms_norm of 1 + weight",
        _rms_offset,
        lambda x, weight, eps: _rms_norm(x, weight, eps, 1.0),
        _ROWS,
        SIZES,
        needs=_ROOT,
    ),
    Rewrite("rms_norm", _rms, _to_rms_norm, _ROWS, SIZES, needs=_ROOT),
    Rewrite("rms_norm, promoted", _rms_promoted, _to_rms_norm, _ROWS, SIZES, dtypes=(torch.bfloat16,), needs=_ROOT),
    Rewrite("rms_norm, rounded once", _rms_once, _to_rms_norm, _ROWS, SIZES, any_dtype=("weight",), needs=_ROOT),
    Rewrite("layer_norm", _layer, _to_layer_norm, _LAYER, SIZES, needs=(_aten.layer_norm.default,)),
)

ADDED_NORMS = (
    Rewrite("add + rms_norm", _added, _to_add_rms_norm, _SUMS, SIZES, any_dtype=("weight",), needs=_ROW_NORM),
    Rewrite(
        "add + rms_norm of 1 + weight",
        _added_offset,
        _to_add_rms_norm_offset,
        _SUMS,
        SIZES,
        any_dtype=("weight",),
        needs=_ROW_NORM,
    ),
    Rewrite(
        "add + layer_norm",
        _added_layer,
        _to_add_layer_norm,
        [
            *_variants("x", "residual", "weight", "bias"),
            *_variants("x", "residual", "weight"),
            *_variants("x", "residual"),
        ],
        SIZES,
        needs=_LAYER_NORM,
    ),
)
