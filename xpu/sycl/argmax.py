"""The place of the largest element in SYCL: see xpu/sycl/argmax.cpp."""

from __future__ import annotations

from torch import Tensor

from ... import ops
from ..route import route
from .bundle import launch
from .pointwise import pointwise, rows_of

#: Items of the work-group that reads a row: of a vocabulary, one core's share of the memory's rate must do.
ITEMS = 512


@route("sycl", "argmax")
def argmax(x: Tensor) -> Tensor:
    """Run `ops.argmax`."""
    out = ops.argmax.empty(x)
    rows, stride = rows_of(x)
    items = min(ITEMS, -(-rows.shape[1] // 32) * 32)
    groups, local = (1, 1, len(rows)), (1, 1, items)
    launch(x.device, pointwise(x.dtype), "argmax_row", groups, local, rows, out, rows.shape[1], stride)
    return out
