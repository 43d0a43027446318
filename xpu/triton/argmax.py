"""The position of the largest element of each row, in one step or, of long rows, in two."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import ops
from ..route import route
from . import blocks
from .launch import launch, refuses_double

# mypy: disable-error-code="no-untyped-def"


@triton.jit
def _largest(x, best, columns, x_row, x_column, BLOCK: tl.constexpr):
    """Write for each row and block the largest of (element as an ordered integer, last minus position) as one int64."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k = block * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + row * x_row + k * x_column, k < columns, other=0.0).to(tl.float32) + 0.0  # -0 + 0 = 0
    bits = v.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(v != v, 0x7FFFFFFF, order).to(tl.int64)
    pair = (order << 32) | (0x7FFFFFFF - k).to(tl.int64)
    pair = tl.where(k < columns, pair, -0x7FFFFFFFFFFFFFFF)
    tl.store(best + row * tl.num_programs(1) + block, tl.max(pair, 0))


@triton.jit
def _position(best, y, blocks, BLOCK: tl.constexpr):
    """Write the position of the largest pair of a row; it is the first of equal elements."""
    row, k = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    pair = tl.max(tl.load(best + row * blocks + k, k < blocks, other=-0x7FFFFFFFFFFFFFFF), 0)
    tl.store(y + row, 0x7FFFFFFF - (pair & 0x7FFFFFFF))


def _refuses(x: Tensor) -> str | None:
    if x.dim() and x.shape[-1] >= 1 << 31:
        return f"rows have {x.shape[-1]} elements, more than positions of 31 bits"
    return refuses_double(x)


@route("triton", "argmax", _refuses)
def argmax(x: Tensor) -> Tensor:
    """See `llmrt.ops.argmax`."""
    y = ops.argmax.empty(x)
    if y.numel():
        flat = x.reshape(-1, x.shape[-1])
        rows, columns = flat.shape
        choices = blocks.argmax(columns)
        count = triton.cdiv(columns, choices[0].sizes["BLOCK"])
        best = torch.empty((rows, count), dtype=torch.int64, device=x.device)
        launch(_largest, choices, lambda b: (rows, count), (), flat, best, columns, *flat.stride())
        launch(_position, blocks.chunks(count), lambda b: (rows,), (), best, y, count)
    return y
