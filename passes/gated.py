"""Activations written out in arithmetic, and gated products."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import ops
from .nodes import aten
from .rewrite import Examples, Rewrite

_silu_mul = ops.silu_mul.overload
_gelu_mul = ops.gelu_mul.overload

SIZES = {"B": 61, "S": 67, "K": 48}


def _one(e: Examples) -> dict[str, Any]:
    return {"x": e.like("B", "S", "K")}


def _pair(e: Examples) -> dict[str, Any]:
    return {"gate": e.like("B", "S", "K"), "up": e.like("B", "S", "K")}


def _pair_of_rows(e: Examples) -> dict[str, Any]:
    return {"gate": e.like("B", "K"), "up": e.like("B", "K")}


def _tanh_of_cube(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _tanh_of_product(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


def _to_gelu_tanh(x: Tensor) -> Tensor:
    return aten.gelu.default(x, approximate="tanh")


def _silu_product(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def _gelu_product(gate: Tensor, up: Tensor) -> Tensor:
    return functional.gelu(gate) * up


def _gelu_tanh_product(gate: Tensor, up: Tensor) -> Tensor:
    return functional.gelu(gate, approximate="tanh") * up


_PAIRS = [_pair, _pair_of_rows]
_SILU, _GELU = (aten.silu.default,), (aten.gelu.default,)

ACTIVATIONS = (
    Rewrite("gelu, tanh of a cube", _tanh_of_cube, _to_gelu_tanh, _one, SIZES, needs=(aten.tanh.default,)),
    Rewrite("gelu, tanh of a product", _tanh_of_product, _to_gelu_tanh, _one, SIZES, needs=(aten.tanh.default,)),
    Rewrite(
        "silu of sigmoid",
        lambda x: x * torch.sigmoid(x),
        lambda x: aten.silu.default(x),
        _one,
        SIZES,
        needs=(aten.sigmoid.default,),
    ),
)

GATED = (
    Rewrite("silu_mul", _silu_product, lambda gate, up: _silu_mul(gate, up), _PAIRS, SIZES, needs=_SILU),
    Rewrite("gelu_mul", _gelu_product, lambda gate, up: _gelu_mul(gate, up, "none"), _PAIRS, SIZES, needs=_GELU),
    Rewrite(
        "gelu_mul, tanh",
        _gelu_tanh_product,
        lambda gate, up: _gelu_mul(gate, up, "tanh"),
        _PAIRS,
        SIZES,
        needs=_GELU,
    ),
)
