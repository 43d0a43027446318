"""Gated activations in SYCL: see xpu/sycl/gated.cpp."""

from __future__ import annotations

from torch import Tensor

from ... import ops
from ..route import route
from .bundle import launch
from .pointwise import pointwise, rows_of

#: Elements of one item, and items of a work-group.
ELEMENTS, ITEMS = 4, 256


def _run(gate: Tensor, up: Tensor, out: Tensor, activation: int) -> None:
    (gates, gate_stride), (ups, up_stride) = rows_of(gate), rows_of(up)
    columns = gates.shape[1]
    items = min(ITEMS, -(-columns // (32 * ELEMENTS)) * 32)
    parts = -(-columns // (items * ELEMENTS)) if columns else 0
    sizes = (columns, gate_stride, up_stride, activation)
    groups, local = (1, parts, len(gates)), (1, 1, items)
    launch(gate.device, pointwise(gate.dtype), "gated_row", groups, local, gates, ups, out, *sizes)


@route("sycl", "silu_mul")
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Run `ops.silu_mul`."""
    out = ops.silu_mul.empty(gate, up)
    _run(gate, up, out, 0)
    return out


@route("sycl", "gelu_mul")
def gelu_mul(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """Run `ops.gelu_mul`."""
    out = ops.gelu_mul.empty(gate, up, approximate)
    _run(gate, up, out, 1 if approximate == "none" else 2)
    return out
